"""A connection about which a coroutine of verify_request() decides: if its peer is lost meanwhile, that is cancelled."""

from collections.abc import Callable
from typing import Any

from aioecho.blocking.lingering import LingeringRequest
from aioecho.net.resets import reset_watch

__all__ = ["VerifiedRequest"]


class VerifiedRequest(LingeringRequest):
    """The part of a :class:`~aioecho.blocking.streams.ThreadedConnection` that watches its peer before it has a thread."""

    __slots__ = ("_end_watch", "_was_lost")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._was_lost = False
        self._end_watch: Callable[[], None] | None = None

    def _watch_peer(self) -> None:
        self._end_watch = reset_watch().add(self.request, self._lose_peer)

    def _lose_peer(self) -> None:
        if self._verifying is not None:
            self._was_lost = True
            self._verifying.cancel()

    def _forget_peer(self) -> None:
        if self._end_watch is not None:
            self._end_watch()
            self._end_watch = None
