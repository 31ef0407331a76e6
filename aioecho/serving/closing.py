"""A connection's end in good order: all that was written is sent, and the peer can read it before the socket is closed."""

import asyncio
from typing import cast

from aioecho.serving.ends import Reason
from aioecho.serving.handlers import BaseRequestHandler
from aioecho.serving.timeouts import CLOSED, FINISH, HANDLE
from aioecho.serving.verifying import VerifiedConnection
from aioecho.streams.outgoing import reset_when_closed
from aioecho.streams.protocol import StreamProtocol
from aioecho.streams.reader import StreamReader

__all__ = ["ClosingConnection"]


class ClosingConnection(VerifiedConnection):
    """The part of a :class:`~aioecho.serving.connection.Connection` that closes it when its handler has ended."""

    __slots__ = ()

    def _close_if_done(self, end: BaseException | None) -> bool:
        """Close, if handle() has returned, all is sent, and there is nothing to be cleaned up: most often.

        Return whether that was done. The connection then lasts until its peer closes it too. An error is told to the loop:
        raised from here it would end the task, or leave it waiting for ever, with the connection open.
        """
        try:
            return self._close_at_once(end)
        except Exception as error:
            self._loop.call_exception_handler({"message": f"could not close {self!r}", "exception": error})
            return False

    def _close_at_once(self, end: BaseException | None) -> bool:
        protocol = self._protocol
        if protocol.collected is not None:
            protocol.flush()
        if (
            end is not None
            or self._stage != HANDLE
            or protocol.is_lost
            or protocol.is_tls
            or self._is_cancelled
            or protocol.aborted_for is not None
            or self._server.beside
            or getattr(type(self.handler), "finish", None) is not BaseRequestHandler.finish
            or protocol.transport.get_write_buffer_size() > 0
        ):
            return False
        if self._linger is not None:
            self._linger.cancel()  # it watches a peer that has ended its stream, and would keep all of this
            self._linger = None
        if protocol.peer_has_closed:
            protocol.transport.close()  # the loop has closed the socket by the time that the end is accounted for
        else:
            assert self.request is not None
            if self._has_sent_eof or protocol.transport.is_closing() or not self.request[1].shut(self._sock):
                return False
            self._start_linger(protocol)
        self.reason = "finished"
        self._stage = CLOSED
        return True

    def note_inner_end(self, end: BaseException | None) -> None:
        """Close, if handle() has returned and nothing is left to do. The task goes on when the connection is lost.

        While the peer may still read, what the handler has handed on to other tasks is written before.
        """
        if end is None and self._stepped.value is not None:  # of its StopIteration
            self._server.report_result(self.handler, self._stepped.value)
        if not (self._protocol.peer_has_closed and self._close_if_done(end)):
            self._loop.call_soon(self._close_or_go_on, end, context=self._server.task_context)

    def _close_or_go_on(self, end: BaseException | None) -> None:
        if self.task.cancelling() or not self._close_if_done(end):
            self.go_on()

    def note_lost(self) -> None:
        """Let the task of a connection that was closed go on."""
        if self._stage == CLOSED and self._wake_up is not None:
            self.go_on()

    def note_cancel(self) -> None:
        """Abort a connection that was closed, and lasts only until its peer closes it too."""
        if self._stage == CLOSED:
            self._abort_transport(self._protocol)

    async def _wait_lost(self, protocol: StreamProtocol) -> None:
        """Wait until the connection is lost, as its peer closes it too or the linger ends. A cancellation aborts it."""
        try:
            await protocol.wait_lost()
        except asyncio.CancelledError:
            self._abort_transport(protocol)
            await protocol.wait_lost()
            raise

    def get_stream(self) -> StreamReader:
        """Return the reader."""
        return self._protocol.reader

    def is_peer_lost(self) -> bool:
        """Tell whether the connection broke."""
        return self._protocol.lost_with is not None

    def is_answered(self) -> bool:
        """Tell whether nothing was read since the last write; what a handler that never answers reads does not count."""
        return not self._protocol.unanswered or bool(getattr(self.handler, "one_way", False))

    def is_in_message(self) -> bool:
        """Tell whether a message, or a TLS handshake, is in progress: cancelling the handler, which has not ended, cuts it."""
        return self.is_before_end() and super().is_in_message()

    def is_cut(self) -> bool:
        """Tell whether a message that was in progress when the handler was cancelled was not answered, and the peer stayed.

        Of a handler that only reads: whether a part of a record is left.
        """
        if self.reason not in ("finished", "error"):
            return False
        is_one_way = getattr(self.handler, "one_way", False)
        return self._protocol.reader.is_in_record() if is_one_way else not self.is_answered()

    def cancel(self) -> None:
        """Cancel the handler. What has come of a message counts as not answered until the handler writes something."""
        if self.is_in_message():
            self._protocol.unanswered = self._protocol.unanswered or True
        super().cancel()

    async def _finish(self, end: BaseException | None) -> None:
        """Let the handler clean up, report what went wrong, and close."""
        protocol, request = self._protocol, self.request
        self._stage = FINISH
        if self._linger is not None:  # of the time when the handler ran
            self._linger.cancel()
            self._linger = None
        try:
            if self._server.beside:
                end = await self.end_beside(end)
            finishing = self.finish_handler(end)
            del end  # as in _live(): its traceback comes to refer to this frame
            if finishing is not None:
                await finishing
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException:  # the program ends
            if request is not None:
                protocol.transport.abort()
            raise
        finally:
            try:
                if request is None:
                    self._sock.close()
                    protocol.connection_lost(None)  # the loop does not tell it
                elif not protocol.is_lost:
                    await self._close(protocol)
            finally:
                if self._linger is not None:
                    self._linger.cancel()
            if protocol.aborted_for is not None:
                self.reason = cast(Reason, protocol.aborted_for)

    async def _close(self, protocol: StreamProtocol) -> None:
        """Send what was written, and close so that the peer can read it."""
        transport = protocol.transport
        protocol.flush()  # of finish(), or handle_error()
        unsent = protocol.unsent()
        if self._is_cancelled or self.reason == "cancelled" or self.reason == "write":
            self._abort_transport(protocol)
        elif protocol.is_tls:
            protocol.discard()
            if not transport.is_closing():
                transport.close()
            # It waits until its peer closes too; so it does if its handler has closed it.
            self._start_linger(protocol)
        elif protocol.peer_has_closed or transport.is_closing() or self._has_sent_eof:
            transport.close()
        else:
            assert self.request is not None
            self.request[1].write_eof()
            protocol.discard()
            self._start_linger(protocol)
        await self._wait_lost(protocol)
        if unsent and protocol.lost_with is not None and self.outcome == "completed":
            self.reason = "connection lost"

    def _abort_transport(self, protocol: StreamProtocol) -> None:
        if self._is_unsent(protocol):
            self.was_aborted = True
            if self.outcome == "completed":
                self.reason = "unsent"
            reset_when_closed(protocol.transport)
        protocol.transport.abort()
