"""What the run of a datagram's handler and that of a session have in common: how they end when they are told to."""

from typing import Any

from aioecho.serving.running import HandlerRun

__all__ = ["DatagramRun"]


class DatagramRun(HandlerRun):
    """A handler of one datagram, or of a peer's, that runs in a task of its own."""

    __slots__ = ("client_address", "handler", "reason", "request", "was_aborted")

    was_aborted: bool

    def forget(self) -> None:
        """Do what is to be done before a handler is counted as ended that goes on. To be overridden."""

    def give_up(self) -> None:
        """Count it as ended, though its handler goes on."""
        self.reason = "cancelled"
        self.task.remove_done_callback(self)
        self.forget()
        self._server.unregister_connection(self)

    def __call__(self, task: Any) -> None:
        """Count how it has ended. To be overridden."""
        self._server.task_ended(self, task)

    # What the server asks of it when it stops.

    def is_in_message(self) -> bool:
        """Return False: a datagram is a whole message."""
        return False

    def cut_off(self) -> None:
        """Cancel the handler."""
        self.task.cancel()

    def abort(self) -> None:
        """End the handler even if it swallows its cancellation."""
        self.was_aborted = True
        self.abandon()
        self.cut_off()
