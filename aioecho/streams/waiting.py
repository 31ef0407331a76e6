"""How a reader waits: for its peer, until a timeout, or until the server stops."""

import asyncio
from collections.abc import Generator, Iterable
from time import monotonic
from typing import Any, SupportsIndex

from aioecho.exceptions import FrameTooLong
from aioecho.runtime.steps import steps
from aioecho.streams.ending import StreamDrain
from aioecho.streams.news import SLOW, News, Slow
from aioecho.streams.receive import ReceiveBuffer
from aioecho.streams.records import ALL, SLICE, skip_record

__all__ = ["WaitingReader"]

# Seconds of a drain for which a read goes on to wait although another task has answered meanwhile: others may be at work still,
# on requests that came before, and end when the handler does.
AHEAD_FOR = 1.0


class WaitingReader(ReceiveBuffer):
    """The part of StreamReader that waits for what is received, and for what ends the wait."""

    _drain: StreamDrain | None = None  # while the server stops
    _drains_since: float  # set while there is that
    _waiting_for_end: "tuple[asyncio.Future[None], ...]" = ()  # in wait_end()
    _holds: int = 0  # the unbroken() blocks that the handler is in
    _is_ended_by_drain: bool = False
    _interruption: Exception | None = None
    _overdue: Exception | None = None
    overdue_since: float | None = None  # when interrupt_next() was called, until a read or drain() has raised
    _seen: float | None = None  # when a visitor first found the wait that goes on, or that there is none

    @property
    def _waiter(self) -> News | Slow | None:  # what asyncio's own methods look for
        return self._awaited or None

    @_waiter.setter
    def _waiter(self, waiter: News | None) -> None:
        self._awaited = waiter

    def _slow_down(self) -> None:
        """Let every read look at everything before it waits, until :meth:`_speed_up` finds nothing to look at any more."""
        self._unawaited = SLOW
        if self._awaited is None:
            self._awaited = SLOW

    def _speed_up(self) -> None:
        if self._unawaited is not None and not (
            self._received
            or self._eof
            or self._exception is not None
            or self._news.collected is not None
            or self._paused
            or self._interruption is not None
            or self._overdue is not None
            or self._drain is not None
            or self._seen is not None
            or self._skip is not None
        ):
            self._unawaited = None
            if self._awaited is SLOW:
                self._awaited = None
            self._news.note_all_read()

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        """Buffer `data`, and wake the coroutine that waits for it."""
        assert not self._eof, "feed_data after feed_eof"
        if data:
            self._keep(data)  # type: ignore[arg-type]
            self._wakeup_waiter()

    def feed_eof(self) -> None:
        """End the stream after what is buffered."""
        self._end()
        self._wakeup_waiter()

    def _end(self) -> None:
        self._eof = True
        self._slow_down()
        if self._waiting_for_end:
            self._tell_of_end()

    def set_exception(self, exc: BaseException) -> None:
        """Make this and every later read raise `exc`."""
        self._settle()
        self._exception = exc
        self._slow_down()
        self._tell_of_end()
        if self._news is not None:  # the connection is not lost
            self._news.flush()
            self._news.update_slow_path()  # for drain(), which raises it too
        self._wakeup_waiter()

    def discard(self, exc: Exception) -> None:
        """Forget what was received, and have reads that begin from now on raise `exc`: the connection is aborted.

        A read that waits goes on to, until the connection is lost.
        """
        self._discard()
        self._exception, self._is_broken_off = exc, False
        self._slow_down()

    def break_off(self, exc: BaseException) -> None:
        """Make reads raise `exc` once all that had come before is read: the connection broke."""
        self._is_broken_off = self._exception is None
        self.set_exception(exc)

    def begin_drain(self, drain: StreamDrain) -> None:
        """Let `drain` decide, from now on, whether a read that waits gets the end of the stream."""
        if self._drain is not None:
            self._drain.stop()
        else:
            self._drains_since = self._loop.time()
        self._drain = drain
        drain.begin(self)
        self._slow_down()
        if self._news is not None:
            self._news.update_slow_path()  # for note_answer()
        self._tell_of_end()
        self._wakeup_waiter()  # a read that waits already asks too

    def note_answer(self) -> None:
        """Ask the drain again for a read that waits, once that has lasted for AHEAD_FOR: another task has answered.

        Else a peer that asks again and again, of a handler that reads ahead, would never be between two messages.
        """
        if self._loop.time() > self._drains_since + AHEAD_FOR:
            self._wakeup_waiter()

    def suspend_drain(self) -> None:
        """Let no read get the end of the stream for a drain, until the next begin_drain()."""
        if self._drain is not None:
            self._drain.stop()
            self._drain = None

    def has_stopped_peer(self) -> bool:
        """Tell whether a drain has stopped a peer that only sends: the end of the stream, or a reset, is the server's doing."""
        return self._drain is not None and self._drain.has_stopped_peer

    def _raise_unless_stopped(self, exception: BaseException) -> None:
        """Raise what broke the stream; or end it, if the server had stopped the peer and no record is half there."""
        if not (self.has_stopped_peer() and self._is_broken_off) or self._gathered or self._skip is not None:
            raise exception
        self._exception = None
        self._eof = self._is_ended_by_drain = True

    def hold(self, count: int) -> None:
        """Count the blocks in which a drain does not end the stream: add `count` to them."""
        self._holds += count
        if self._drain is not None and not self._holds:
            self._wakeup_waiter()

    def is_held(self) -> bool:
        """Tell whether the handler is in a block that hold() counts."""
        return self._holds > 0

    def is_awaited(self) -> bool:
        """Tell whether a read waits, or wait_end() does."""
        return bool(self._awaited) or bool(self._waiting_for_end)

    async def wait_end(self) -> None:
        """Wait until the peer has ended its stream, the connection broke, or a drain has begun. Reads nothing."""
        if self._eof or self._exception is not None or self._drain is not None:
            return
        waiting = self._loop.create_future()
        self._waiting_for_end += (waiting,)
        try:
            await waiting
        finally:
            self._waiting_for_end = tuple(each for each in self._waiting_for_end if each is not waiting)

    def _tell_of_end(self) -> None:
        for waiting in self._waiting_for_end:
            if not waiting.done():
                waiting.set_result(None)

    @property
    def end(self) -> str | None:
        """What has ended the stream: "peer", or "drain", as the server stops. None if it has not ended.

        What the peer had sent may still be buffered.
        """
        return None if not self._eof else "drain" if self._is_ended_by_drain else "peer"

    def is_in_record(self) -> bool:
        """Tell whether a part of a record has come, or something that is still to be read."""
        return self._has_input() or self._skip is not None

    def is_in_message(self) -> bool:
        """Tell whether a message is in progress: a part of a record has come, or a request was not answered yet."""
        news = self._news
        return self.is_in_record() or bool(news is not None and news.unanswered)

    def interrupt(self, exc: Exception) -> None:
        """Raise `exc` in the read that waits now; later ones go on as if nothing had been."""
        self._interruption = exc
        self._slow_down()
        self._wakeup_waiter()

    def interrupt_next(self, exc: Exception, now: float) -> None:
        """Raise `exc` in the read, or drain(), that begins next; one that waits now goes on. `now` is for `overdue_since`."""
        self._overdue, self.overdue_since = exc, now
        self._slow_down()
        self._left, self._slice_end = 0, 0.0  # for what reads out of the buffer to look up
        if self._news is not None:
            self._news.update_slow_path()  # for drain()

    def raise_overdue(self) -> None:
        """Raise what interrupt_next() was given, once."""
        overdue, self._overdue, self.overdue_since = self._overdue, None, None
        if overdue is not None:
            raise overdue

    def _take_interruption(self) -> Exception | None:
        interruption, self._interruption = self._interruption, None
        return interruption

    def _raise_interruption(self) -> None:
        interruption = self._take_interruption()
        self._message_began = None  # a handler that catches it gives the peer as much time again
        if interruption is not None:
            raise interruption

    def waits(self, now: float) -> tuple[str, float] | None:
        """Tell for what a read waits, "idle" or "message", and since when; None if none does. `now` is the loop's time.

        "idle" is for the first byte, counted from the first call that meets the wait, so that reading need not look at the
        clock; "message" for the rest, counted from the first byte. Another wait calls the protocol's mark_due().
        """
        if self._seen is None:
            self._seen = now
            self._slow_down()  # for the next read to forget it; so a read that no visitor has seen need not
        if not self._awaited:
            return None
        return ("idle", self._seen) if self._message_began is None else ("message", self._message_began)

    def _wakeup_waiter(self) -> None:
        if self._awaited:
            self._awaited.wake()

    def _wait(self, func_name: str, began: bool = False) -> Generator[Any, None, None]:
        """Wait for news, and then look: at the buffer, at the end of the stream. Wakes without news are possible."""
        if self._awaited:
            raise RuntimeError(f"{func_name}() called while another coroutine is already waiting for incoming data")
        if self._exception is not None:
            raise self._exception
        if self._interruption is not None:  # of a read that was cancelled before it met it
            self._take_interruption()
        news = self._news
        if news.collected is not None:
            news.flush()
        if self._paused:
            # To wait while the transport is paused would be for ever: readexactly() of more than the limit.
            self._paused = False
            assert self._transport is not None
            if news.note_memory() and not news.is_breathing:  # else the loop has its turn before
                self._transport.resume_reading()
            if self._drain is not None:
                # A TLS transport may hold data of its own, which it delivers in the next turn.
                self._loop.call_soon(self._loop.call_soon, self._wakeup_waiter)
        elif self._drain is not None and self._drain.may_end(self, func_name, began):
            self._eof = self._is_ended_by_drain = True
            return
        if self._message_began is None:  # else the wait that a visitor has seen goes on, though some more has come
            if self._seen is not None:
                self._seen = None
                news.mark_due()
            if self._received or self._skip is not None:
                self._message_began = self._loop.time()
        self._speed_up()
        self._awaited = news
        if news.unanswered or self._received:
            news.wait_in_message()
        try:
            yield news
        finally:
            self._awaited = self._unawaited
            self._keep_item()
        self._settle()  # another coroutine may have read meanwhile
        self._slice_end = monotonic() + SLICE
        if self._interruption is not None:
            self._raise_interruption()
        if self._exception is not None and not self._received:
            self._raise_unless_stopped(self._exception)

    @steps
    def _wait_for_data(self, func_name: str) -> Generator[Any, None, None]:
        """Wait for news, for code that calls what asyncio's own methods do: its future would be no waiter."""
        yield from self._wait(func_name)

    def _breathe(self) -> Generator[Any, None, None]:
        """Let the loop run: other connections have their turn."""
        if self._overdue is not None:
            self.raise_overdue()
        yield
        self._slice_end = monotonic() + SLICE

    def _look(self) -> Generator[Any, None, None]:
        """Do what comes before a read that does not find its way short."""
        self._settle()
        if self._overdue is not None:
            self.raise_overdue()
        if (
            self._received
            and (self._exception is None or self._is_broken_off)
            and self._skip is None
            and self._is_due()
        ):
            yield from self._breathe()
            self._settle()  # another coroutine may have read meanwhile
        if self._exception is not None and not (self._is_broken_off and self._received):
            self._raise_unless_stopped(self._exception)
        if self._skip is not None:
            yield from skip_record(self)

    def _skip_from_now(self, what: Any) -> None:
        """Have the next read skip what skip_record() calls `what`; None is all that comes."""
        self._skip = ALL if what is None else what
        self._slow_down()

    def _check_size(self, n: int) -> None:
        most = self._news.max_frame if self._news is not None else None
        if most is not None and n > most:
            self._skip_from_now(n)
            raise FrameTooLong(n, most, n)
