"""One connection's life: a transport for the accepted socket, its handler, and the end in good order."""

import asyncio
import fcntl
import inspect
import socket
import struct
import termios
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aioecho.driver import Driver
from aioecho.handlers import BaseRequestHandler
from aioecho.streams import StreamProtocol, StreamReader, StreamWriter

if TYPE_CHECKING:  # the server is above, and makes connections
    from aioecho.server import BaseServer

__all__ = ["Connection"]

# Seconds. A client that has been connected for no longer when the server stops is still given the time to speak.
FRESH = 0.1

# The least that either loop takes from a full socket in one read, in bytes.
LEAST_READ = 2**16


# The stages of a connection's life.
BEGIN, HANDLE, FINISH = range(3)


class Connection(Driver[None]):
    """A live connection of a server, in `server.connections`.

    `client_address` is as accept() gave it. `handler` is None until it is made. Call :meth:`abort` to cut it off; to do
    anything else with it is its handler's.
    """

    # It is what its task runs: _begin(), the handler's handle(), and _finish(), one after the other. While a connection is
    # idle there is so nothing on the heap but the handler's own coroutine; each that awaits another costs some hundred
    # bytes. It ends in exactly one of the server's counters, by `outcome` and `reason`, in the task's done-callback.

    __slots__ = (
        "_is_cut_off",
        "_protocol",
        "_server",
        "_sock",
        "_stage",
        "client_address",
        "handler",
        "outcome",
        "reason",
        "request",
        "since",
        "was_aborted",
    )

    _protocol: StreamProtocol

    def __init__(self, server: "BaseServer", sock: socket.socket, client_address: Any) -> None:
        loop = asyncio.get_running_loop()
        self._server = server
        self._sock = sock
        self._protocol = StreamProtocol(loop, limit=server.limits.max_buffer, is_server_side=True)
        self.client_address = client_address
        self.since = loop.time()
        self.request: tuple[StreamReader, StreamWriter] | None = None
        self.handler: Any = None
        self.outcome = "rejected"
        self.reason = "handshake"
        self.was_aborted = self._is_cut_off = False
        self._stage = BEGIN
        super().__init__(self._begin())
        self.start_early()  # by the time that the task runs the transport is there: a turn and a step less
        self._loop, self._task = loop, loop.create_task(self)
        # One callback and one context for all: each would cost a connection some bytes of its own.
        self._task.add_done_callback(server._when_ended, context=server._context)

    def __repr__(self) -> str:
        return f"<Connection from {self.client_address!r}, handler={self.handler!r}>"

    # What the server asks of a connection when it stops.

    def drain(self) -> None:
        """Let the handler meet the end of the stream once it has read what its peer has sent by now.

        One that has only just connected is about to send its request: it has until it is FRESH seconds old.
        """
        if self.request is None:
            return  # it comes here again when it has one
        age = self._loop.time() - self.since
        if age < FRESH:
            self._loop.call_later(FRESH - age, self._protocol.reader.end_when, _nothing_more_of(self._sock))
        else:
            self._protocol.reader.end_when(_nothing_more_of(self._sock))

    def stop(self) -> None:
        """Cancel what runs, the handler mostly."""
        if self._task is not None:
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
            self._protocol.transport.abort()
        self.stop()

    # Its life.

    def after(self, end: BaseException) -> Awaitable[None] | None:
        """Return the next of the three."""
        self._stage += 1
        if self._stage == HANDLE and self.handler is not None:
            try:
                handling: Awaitable[None] = self.handler.handle()
                return handling
            except BaseException as error:  # it is no coroutine function, and raised at once
                end = error
        if self._stage <= FINISH and not (type(end) is StopIteration and self._has_ended_plainly()):
            self._stage = FINISH
            return self._finish(end)
        return None

    def _has_ended_plainly(self) -> bool:
        """Close, and return True, if the handler is all done, the peer has closed and nothing is unsent: most often."""
        protocol = self._protocol
        if (
            self._stage == FINISH
            and type(self.handler).finish is BaseRequestHandler.finish
            and protocol.peer_has_closed
            and not (protocol.is_lost or self._is_cut_off)
            and protocol.transport.get_extra_info("sslcontext") is None
            and protocol.transport.get_write_buffer_size() == 0
        ):
            self.outcome, self.reason = "completed", "finished"
            protocol.transport.close()  # the loop has closed the socket by the time that the end is accounted for
            return True
        return False

    async def _begin(self) -> None:
        """Make the transport and, if all goes well, the handler."""
        server = self._server
        tls: dict[str, Any] = {} if server.ssl is None else {"ssl": server.ssl, **server._tls_timeouts()}
        try:
            # With TLS uvloop returns a protocol of its own, so ours is not taken from there.
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self._protocol, self._sock, **tls)
        except OSError as error:
            # The peer's fault or bad luck: garbage, silence, gone. It may be a flood of them.
            server._report_handshake(self.client_address, error)
            return
        self.request = request = (self._protocol.reader, self._protocol.make_writer())
        self.outcome, self.reason = "failed", "error"
        if server.is_draining:
            self.drain()
        verified = server.verify_request(request, self.client_address)
        if verified is not True and inspect.isawaitable(verified):
            verified = await verified
        if not verified:
            self.outcome, self.reason = "rejected", "refused"
            return
        handler = server.RequestHandlerClass(request, self.client_address, server)
        if type(handler).setup is not BaseRequestHandler.setup:
            await handler.setup()
        self.handler = handler

    async def _finish(self, end: BaseException) -> None:
        """Let the handler clean up, report what went wrong, and close."""
        protocol, request = self._protocol, self.request
        try:
            try:
                if self.handler is not None:
                    self.outcome, self.reason = "completed", "finished"
                if not isinstance(end, StopIteration):
                    raise end
            finally:
                handler = self.handler
                if (
                    handler is not None
                    and not self._abandoned
                    and type(handler).finish is not BaseRequestHandler.finish
                ):
                    await handler.finish()
        except asyncio.CancelledError:
            self.outcome = self.reason = "cancelled"
            raise
        except Exception as error:
            self.outcome, self.reason = "failed", "error"
            if protocol.lost_with is not None and isinstance(error, ConnectionError):
                self.reason = "connection lost"
            self._server._call_handle_error(request, self.client_address)
        except BaseException:  # the program ends
            self.outcome, self.reason = "failed", "error"
            if request is not None:
                protocol.transport.abort()
            raise
        finally:
            if request is None:
                self._sock.close()
            elif not protocol.is_lost:
                await self._close(protocol)

    async def _close(self, protocol: StreamProtocol) -> None:
        """Send what was written, and close so that the peer can read it."""
        transport = protocol.transport
        linger: asyncio.TimerHandle | None = None
        if self._is_cut_off or self.outcome == "cancelled":
            self._cut_short(protocol)
        elif protocol.peer_has_closed or transport.is_closing():
            transport.close()
        else:
            if transport.can_write_eof():
                try:
                    transport.write_eof()
                except OSError:  # asyncio's: the peer has reset the connection, and the loop does not know yet
                    transport.abort()
                protocol.discard()
            else:
                transport.close()  # a TLS transport itself discards what comes until its peer closes too
            linger = self._start_linger(protocol)
        try:
            await protocol.wait_lost()
        except asyncio.CancelledError:
            self._cut_short(protocol)
            await protocol.wait_lost()
            raise
        finally:
            if linger is not None:
                linger.cancel()

    def _cut_short(self, protocol: StreamProtocol) -> None:
        if self._is_unsent(protocol):
            self.was_aborted = True
            if self.outcome == "completed":
                self.outcome, self.reason = "cancelled", "unsent"
        protocol.transport.abort()

    def _is_unsent(self, protocol: StreamProtocol) -> bool:
        """Tell whether data waits that the kernel has not taken, or, with TLS, that the peer's has not."""
        if protocol.transport.get_extra_info("sslcontext") is not None:
            # The TLS transport does not tell what waits in the transport under it; if that is much, the kernel's is full.
            return _kernel_count(self._sock, termios.TIOCOUTQ) > 0
        return protocol.transport.get_write_buffer_size() > 0

    def _start_linger(self, protocol: StreamProtocol) -> asyncio.TimerHandle | None:
        seconds = self._server.timeouts.linger
        return None if seconds is None else self._loop.call_later(seconds, self._end_linger, protocol)

    def _end_linger(self, protocol: StreamProtocol) -> None:
        if protocol.is_lost:
            return
        if self._is_unsent(protocol):
            self._start_linger(protocol)  # counts from the time that everything is sent
        else:
            protocol.transport.abort()


def _nothing_more_of(sock: socket.socket) -> Callable[[], bool]:
    """Return what tells, whenever a stream waits with an empty buffer, that all that was sent by now has been read.

    Asked rather than counted: what is in the socket now has been read after so many reads as it takes at the most, or
    when the socket is empty. One who never stops sending does not put the end off.
    """
    unread = _kernel_count(sock, termios.FIONREAD)
    reads_left = -(-unread // LEAST_READ)

    def no_more_comes() -> bool:
        nonlocal reads_left
        if reads_left == 0 or _kernel_count(sock, termios.FIONREAD) == 0:
            return True
        reads_left -= 1
        return False

    return no_more_comes


def _kernel_count(sock: socket.socket, request: int) -> int:
    """Return the bytes that wait in a socket, to be read (FIONREAD) or acknowledged (TIOCOUTQ); 0 if it is closed."""
    try:
        count: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), request, b"\0\0\0\0"))[0]
    except (OSError, ValueError):
        return 0
    return count
