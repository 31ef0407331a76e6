"""One connection's life: a transport for the accepted socket, its handler, and the end in good order."""

import asyncio
import inspect
import logging
import random
import socket
import ssl as ssl_module
import sys
from collections.abc import Awaitable, Callable
from math import inf
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from aioecho.config import Timeouts
from aioecho.exceptions import ConnectionTimeout
from aioecho.net.kernel import (
    BYTES_ACKED,
    LAST_ACK_RECV,
    LAST_DATA_RECV,
    TICK,
    nothing_more_of,
    tcp_info,
    unacknowledged,
    unread,
)
from aioecho.runtime.driver import Driver
from aioecho.serving.handlers import BaseRequestHandler
from aioecho.streams.protocol import (
    CountingStreamProtocol,
    StreamProtocol,
    StreamWriter,
    reset_when_closed,
)
from aioecho.streams.reader import StreamReader

if TYPE_CHECKING:  # the server is above, and makes connections
    from aioecho.server import BaseServer

__all__ = ["Connection", "log_end"]

logger = logging.getLogger("aioecho.connection")

# Seconds. A client that has been connected for no longer when the server stops is still given the time to speak.
FRESH = 0.1

# The same where other processes serve on (`leaves_queue`), so that nobody waits for it: a stalled client is not lost either.
FRESH_AMONG_OTHERS = 0.5

# The part of a full kernel's buffer that a kernel sends a peer that takes nothing: to probe its window. More is progress.
PROBES = 1 / 16

# The stages of a connection's life: its transport is made, what comes before handle() is waited for, and the methods run.
OPEN, PREPARE, HANDLE, CLOSED = range(4)


class Connection(Driver):
    """A live connection of a server, in `server.connections`.

    `client_address` is as accept() gave it. `handler` is None until it is made. Call :meth:`abort` to cut it off; to do
    anything else with it is its handler's.
    """

    # It ends in exactly one of the server's counters, by `outcome` and `reason`, in its task's done-callback, which it is
    # itself: a bound method for each connection would cost some bytes.

    __slots__ = (
        "_RequestHandlerClass",
        "_is_cut_off",
        "_linger",
        "_loop",
        "_protocol",
        "_server",
        "_sock",
        "_stage",
        "_stalled",
        "client_address",
        "handler",
        "outcome",
        "reason",
        "request",
        "since",
        "was_aborted",
    )

    def __init__(
        self,
        server: "BaseServer",
        sock: socket.socket,
        client_address: Any,
        RequestHandlerClass: Callable[..., Any],
    ) -> None:
        assert server._loop is not None
        self._loop = loop = server._loop
        self._server = server
        self._RequestHandlerClass = RequestHandlerClass
        self._sock = sock
        self.client_address = client_address
        self.since = loop.time()
        self.request: tuple[StreamReader, StreamWriter] | None = None
        self.handler: Any = None
        self.outcome, self.reason = "rejected", "handshake"
        self.was_aborted = self._is_cut_off = False
        self._stage = OPEN
        self._linger: asyncio.TimerHandle | None = None
        self._stalled: tuple[float, int, int] | None = None  # since when, and at which counts of bytes
        limits = server._admission.limits
        kind = CountingStreamProtocol if logger.isEnabledFor(logging.DEBUG) else StreamProtocol
        self._protocol = kind(loop, limit=limits.max_buffer, max_unsent=limits.max_write_buffer, is_server_side=True)
        self._protocol.driver = self
        # Up to where it first waits, before there is a task: by the time that the task runs the transport is there.
        opening = loop.connect_accepted_socket(self._get_protocol, sock)
        opened: Any
        try:
            opened = opening.send(None)
        except Exception as error:  # also StopIteration
            opened = error
        self.start(self._live((opening, opened)), loop, server._context.copy())
        self._task.add_done_callback(self, context=server._context)

    def __call__(self, task: "asyncio.Task[None]") -> None:
        """Count how it has ended."""
        self._protocol.driver = None  # which refers to it: without the cycle both go at once
        self._server._account(self, task)

    def _get_protocol(self) -> StreamProtocol:
        return self._protocol

    def __repr__(self) -> str:
        return f"<Connection from {self.client_address!r}, handler={self.handler!r}>"

    # What the server asks of a connection while it lives.

    @property
    def due(self) -> float:
        """When to visit it next, in the loop's time; 0 for soon."""
        return self._protocol.due

    def stir(self) -> None:
        """Let it be visited in the next round, as its timeouts may be others now."""
        self._protocol.stir()

    def visit(self, now: float) -> float:
        """Do what the timeouts say is due, and rest until something may be due again; return when that is, or 0."""
        protocol = self._protocol
        if self.request is None:
            return 0  # the loop itself keeps the time of a TLS handshake
        if protocol.is_lost:
            if protocol.cut_for is None or self._is_cut_off:
                protocol.due = inf
            elif self._stage == HANDLE:
                self.cut_off()  # it has had a round to find out: one that ignores drain() never does
            return 0
        timeouts = self._timeouts()
        due = min(self._watch_wait(now, timeouts), self._watch_unsent(now, timeouts.write))
        if protocol.is_tls and protocol.transport.is_closing():
            self._start_linger(protocol)  # its handler has closed it, and may wait until its peer has too
        elif due > now and self._stalled is None and protocol.cut_for is None:
            protocol.rest(due)
        return due

    def _watch_wait(self, now: float, timeouts: Timeouts) -> float:
        """End the wait for the peer if that has taken too long; return until when it may last, or 0."""
        reader = self._protocol.reader
        wait = reader.waits(now)
        if wait is None:
            return inf
        kind, since = wait
        seconds: float | None = getattr(timeouts, kind)
        until = inf if seconds is None else since + seconds
        if seconds is not None and now >= until:
            if not self._is_about_to_read():
                reader.interrupt(ConnectionTimeout(kind, seconds))
            return 0
        if timeouts.max_age is not None and (kind == "idle" or timeouts.message is None):
            earliest = timeouts.max_age * (1 - timeouts.max_age_jitter)
            # The same for a connection each time that it is asked, at no memory.
            age = earliest + random.Random(id(self)).random() * (timeouts.max_age - earliest)
            if now >= self.since + age:
                reader.interrupt(ConnectionTimeout("max_age", timeouts.max_age))
                return 0
            until = min(until, self.since + age)
        return until

    def _is_about_to_read(self) -> bool:
        """Tell whether more has come, and only waits for the loop, which something has held up, to read it."""
        return self._protocol.is_socket_read() and unread(self._sock) > 0

    def idle_since(self, now: float) -> float | None:
        """Return since when, about, it has waited for the first byte of something; None if it does not."""
        wait = self._protocol.reader.waits(now) if self.request is not None else None
        if wait is None or wait[0] != "idle":
            return None
        # The visits that the reader goes by are a second apart; the kernel knows when a TCP peer's last data came.
        milliseconds = tcp_info(self._sock, LAST_DATA_RECV)
        return wait[1] if milliseconds is None else now - milliseconds / 1000

    def cut(self, reason: str) -> None:
        """Close at once, for a `reason` that stats count, and throw away what is unsent. The handler ends by itself."""
        if self.request is not None:
            self._protocol.cut(reason)

    def log_end(self) -> None:
        """Make the one record of a connection that has ended, at DEBUG."""
        if logger.isEnabledFor(logging.DEBUG):
            seconds, protocol = self._loop.time() - self.since, self._protocol
            log_end(self.client_address, self.outcome, self.reason, seconds, protocol.bytes_in, protocol.bytes_out)

    def _timeouts(self) -> Timeouts:
        # Before there is a handler, in its setup() too, its class has the word.
        return self._server._timeouts_of(self.handler if self.handler is not None else self._RequestHandlerClass)

    def _watch_unsent(self, now: float, seconds: float | None) -> float:
        """Look whether the peer takes what waits to be sent, and raise or cut off if that is too long ago.

        Return until when it may take nothing, or 0.
        """
        protocol = self._protocol
        if seconds is None or not self._is_unsent(protocol):
            self._stalled = None
            return inf
        below = unacknowledged(self._sock)
        acked = tcp_info(self._sock, BYTES_ACKED)
        if acked is not None:
            # Not by what is left, of which there may be more and more although the peer takes some.
            if self._stalled is None:
                since, acked_then = protocol.paused_since or now, None
            else:
                since, acked_then, _ = self._stalled
            if acked_then is None or acked - acked_then > below * PROBES:
                # It took some, at the latest when the kernel last heard of it; later than that it can only be a probe.
                silent = (tcp_info(self._sock, LAST_ACK_RECV) or 0) / 1000 - TICK
                since, acked_then = min(now, max(since, now - silent)), acked
            self._stalled = (since, acked_then, 0)
        else:
            here = protocol.unsent()
            since, here_then, below_then = self._stalled or (protocol.paused_since or now, here, below)
            if here < here_then or below < below_then:
                since = now
            self._stalled = (since, here, below)
        if now < since + seconds:
            return since + seconds
        self._stalled = None
        if not protocol.interrupt_drains(ConnectionTimeout("write", seconds)):
            protocol.cut("write")
        return 0

    # What the server asks of a connection when it stops.

    def drain(self) -> None:
        """Let the handler meet the end of the stream once it has read what its peer has sent by now.

        One that has only just connected is about to send its request: it has until it is FRESH seconds old.
        """
        if self.request is None:
            return  # it comes here again when it has one
        age = self._loop.time() - self.since
        fresh = FRESH_AMONG_OTHERS if self._server.leaves_queue else FRESH
        if age < fresh:
            self._loop.call_later(fresh - age, self._end_stream)
        else:
            self._end_stream()

    def _end_stream(self) -> None:
        self._protocol.reader.end_when(nothing_more_of(self._sock))

    def stop(self) -> None:
        """Cancel what runs, the handler mostly."""
        self._task.cancel()

    def cut_off(self) -> None:
        """Cancel the handler; what is still unsent when it has ended is thrown away."""
        self._is_cut_off = True
        self.stop()

    def abort(self) -> None:
        """Close at once, throw away what is unsent, and end the handler even if it swallows its cancellation."""
        self.was_aborted = self._is_cut_off = True
        self.abandon()
        if self.request is not None and not self._protocol.is_lost:
            if self._is_unsent(self._protocol):
                reset_when_closed(self._protocol.transport)
            self._protocol.transport.abort()
        self.stop()

    # Its life.

    async def _live(self, awaitable: Any) -> None:
        """Open the transport, run the handler, and close. `awaitable` is what :meth:`_open` takes."""
        # While a connection is idle this frame stays: with as few variables as it goes, and where nothing is raised.
        end: BaseException | None = None
        try:
            awaitable = self._open(*awaitable)
            if awaitable is not None:
                await awaitable
            if self._stage == PREPARE:
                awaitable = self._prepare()
                if awaitable is not None:
                    await awaitable
            if self.handler is not None:
                self._stage = HANDLE
                awaitable = None
                await self._handle()
        except BaseException:
            end = self._end_with(sys.exception())
        self._close_if_done(end)
        if self._waiter is not None:
            await self.hand_back()
        try:
            if self._stage != CLOSED:
                await self._finish(end)
        finally:
            del end  # its traceback refers to this frame
            if self._waiter is not None:
                await self.hand_back()

    def _open(self, opening: Any, opened: Any) -> Awaitable[None] | None:
        """Open the transport; return what has to be awaited for that.

        `opening` is a coroutine that was stepped once, and `opened` the future that it awaits, or what it has raised.
        """
        if not isinstance(opened, Exception) and not opened.done():
            return self._open_later(opening, opened)
        try:
            try:
                if isinstance(opened, Exception):
                    raise opened
                opened = opening.send(None)
            except StopIteration:
                pass
            else:
                return self._open_later(opening, opened)
            self._protocol.begin_reading()
            self._stage = PREPARE
        except (OSError, MemoryError) as error:
            self._server._report_not_begun(self.client_address, "transport", error)
        return None

    async def _open_later(self, opening: Any, opened: Any) -> None:
        try:
            await opened
        except BaseException:
            opening.close()
            raise
        awaitable = self._open(opening, opened)
        if awaitable is not None:
            await awaitable

    def _end_with(self, error: BaseException | None) -> BaseException | None:
        """Return what handle(), or what comes before, has ended with."""
        if isinstance(error, GeneratorExit) and not self._is_current():
            raise error  # the program has ended
        # What awaits a coroutine that was closed meets an error of Python's.
        return asyncio.CancelledError() if self._is_abandoned else error

    def _close_if_done(self, end: BaseException | None) -> None:
        """Close, if handle() has returned, the peer has closed, and nothing is unsent or to be cleaned up: most often."""
        protocol = self._protocol
        if (
            end is None
            and self._stage == HANDLE
            and protocol.peer_has_closed
            and not (protocol.is_lost or protocol.is_tls or self._is_cut_off or protocol.cut_for is not None)
            and getattr(type(self.handler), "finish", None) is BaseRequestHandler.finish
            and protocol.transport.get_write_buffer_size() == 0
        ):
            self.outcome, self.reason = "completed", "finished"
            self._stage = CLOSED
            protocol.transport.close()  # the loop has closed the socket by the time that the end is accounted for

    def give_up(self) -> None:
        """Count it as ended, though its handler goes on."""
        self.outcome = self.reason = "cancelled"
        self._task.remove_done_callback(self)
        self._protocol.driver = None
        self._server._forget(self)

    def _prepare(self) -> Awaitable[None] | None:
        """Make the handler, if all goes well; return what has to be awaited for that."""
        server, protocol = self._server, self._protocol
        writer = protocol.make_writer()
        return self._verify((protocol.reader, writer)) if server.ssl is None else self._secure(server.ssl, writer)

    async def _secure(self, ssl: ssl_module.SSLContext, writer: StreamWriter) -> None:
        server = self._server
        try:
            await writer.start_tls(ssl, **server._tls_timeouts(self._RequestHandlerClass))
        except OSError as error:
            # The peer's fault or bad luck: garbage, silence, gone. It may be a flood of them.
            server._report_not_begun(self.client_address, "TLS handshake", error)
            return
        verifying = self._verify((self._protocol.reader, writer))
        if verifying is not None:
            await verifying

    def _verify(self, request: tuple[StreamReader, StreamWriter]) -> Awaitable[None] | None:
        server = self._server
        self.request = request
        self.outcome, self.reason = "failed", "error"
        if server._drain is not None:
            self.drain()
        verified = server.verify_request(request, self.client_address)
        return self._make_handler() if verified is True else self._judge(verified)

    async def _judge(self, verified: Any) -> None:
        if inspect.isawaitable(verified):
            self._server._rounds.keep(self._timeouts())
            verified = await verified
        if not verified:
            self.outcome, self.reason = "rejected", "refused"
            return
        making = self._make_handler()
        if making is not None:
            await making

    def _make_handler(self) -> Awaitable[None] | None:
        make = self._RequestHandlerClass
        handler = make(self.request, self.client_address, self._server)
        if type(handler).setup is not BaseRequestHandler.setup:
            return self._set_up(handler)
        self.handler = handler
        self._server._rounds.keep(self._timeouts())
        return None

    async def _set_up(self, handler: Any) -> None:
        self._server._rounds.keep(self._timeouts())
        await handler.setup()
        self.handler = handler
        self._server._rounds.keep(self._timeouts())

    def _handle(self) -> Awaitable[None]:
        handling: Awaitable[None] = self.handler.handle()
        if type(handling) is CoroutineType:
            # What names the task, where a task is shown: Upper.handle.
            self._coroutine.__qualname__ = handling.__qualname__
            return handling
        if inspect.isawaitable(handling):
            return handling
        raise TypeError(  # so it is no coroutine function
            f"{type(self.handler).__qualname__}.handle() returned {handling!r}, which can't be awaited: define it"
            " as `async def handle(self)`"
        )

    async def _finish(self, end: BaseException | None) -> None:
        """Let the handler clean up, report what went wrong, and close."""
        protocol, request = self._protocol, self.request
        try:
            try:
                if self.handler is not None:
                    self.outcome, self.reason = "completed", "finished"
                if end is not None:
                    raise end
            finally:
                handler = self.handler
                if (
                    handler is not None
                    and not self._is_abandoned
                    and type(handler).finish is not BaseRequestHandler.finish
                ):
                    await handler.finish()
        except asyncio.CancelledError:
            self.outcome = self.reason = "cancelled"
            raise
        except Exception as error:
            if self._is_abandoned:  # finish() was closed
                self.outcome = self.reason = "cancelled"
                raise asyncio.CancelledError from None
            self.outcome, self.reason = "failed", "error"
            if isinstance(error, ConnectionTimeout):
                self.reason = error.which
            elif isinstance(error, OSError) and (
                error is protocol.reader.exception()
                or (isinstance(error, ConnectionError) and protocol.lost_with is not None)
            ):
                self.reason = "connection lost"
            self._server._call_handle_error(request, self.client_address)
        except BaseException:  # the program ends
            self.outcome, self.reason = "failed", "error"
            if request is not None:
                protocol.transport.abort()
            raise
        finally:
            try:
                if request is None:
                    self._sock.close()
                    protocol.connection_lost(None)  # nobody else tells it
                elif not protocol.is_lost:
                    await self._close(protocol)
            finally:
                if self._linger is not None:
                    self._linger.cancel()
            if protocol.cut_for is not None:
                self.outcome, self.reason = "failed", protocol.cut_for

    async def _close(self, protocol: StreamProtocol) -> None:
        """Send what was written, and close so that the peer can read it."""
        transport = protocol.transport
        unsent = protocol.unsent()
        if self._is_cut_off or self.outcome == "cancelled" or self.reason == "write":
            self._cut_short(protocol)
        elif protocol.is_tls:
            protocol.discard()
            if not transport.is_closing():
                transport.close()
            # It waits until its peer closes too; so it does if its handler has closed it.
            self._start_linger(protocol)
        elif protocol.peer_has_closed or transport.is_closing():
            transport.close()
        else:
            assert self.request is not None
            self.request[1].write_eof()
            protocol.discard()
            self._start_linger(protocol)
        try:
            await protocol.wait_lost()
        except asyncio.CancelledError:
            self._cut_short(protocol)
            await protocol.wait_lost()
            raise
        if unsent and protocol.lost_with is not None and self.outcome == "completed":
            self.outcome, self.reason = "failed", "connection lost"

    def _cut_short(self, protocol: StreamProtocol) -> None:
        if self._is_unsent(protocol):
            self.was_aborted = True
            if self.outcome == "completed":
                self.outcome, self.reason = "cancelled", "unsent"
            reset_when_closed(protocol.transport)
        protocol.transport.abort()

    def _is_unsent(self, protocol: StreamProtocol) -> bool:
        """Tell whether data waits that the kernel has not taken, or, with TLS, that the peer's has not."""
        return protocol.unsent() > 0 or (protocol.is_tls and unacknowledged(self._sock) > 0)

    def _start_linger(self, protocol: StreamProtocol) -> None:
        seconds = self._timeouts().linger
        if seconds is not None and self._linger is None:
            self._linger = self._loop.call_later(seconds, self._end_linger, protocol)

    def _end_linger(self, protocol: StreamProtocol) -> None:
        self._linger = None
        if protocol.is_lost:
            return
        if self._is_unsent(protocol):
            self._start_linger(protocol)  # counts from the time that everything is sent
        else:
            protocol.transport.abort()


def log_end(
    client_address: Any, outcome: str, reason: str, seconds: float = 0.0, bytes_in: int = 0, bytes_out: int = 0
) -> None:
    """Make the record of a connection that has ended, at DEBUG, with its facts as fields too."""
    facts = {
        "client_address": client_address,
        "outcome": outcome,
        "reason": reason,
        "seconds": seconds,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
    }
    logger.debug(
        "connection from %(client_address)s: %(outcome)s (%(reason)s) after %(seconds).3f s,"
        " %(bytes_in)d bytes in, %(bytes_out)d out",
        facts,
        extra=facts,
    )
