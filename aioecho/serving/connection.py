"""One connection's life: a transport for the accepted socket, its handler, and the end in good order."""

import asyncio
import socket
import ssl as ssl_module
import sys
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any, ClassVar

from aioecho.runtime.logs import format_address
from aioecho.serving.base import BaseServer
from aioecho.serving.closing import ClosingConnection
from aioecho.serving.end_record import is_recorded, log_end
from aioecho.serving.ends import Reason
from aioecho.serving.running import HandlerRun
from aioecho.serving.timeouts import CLOSED, HANDLE, OPEN, PREPARE
from aioecho.streams.protocol import CountingStreamProtocol, StreamProtocol
from aioecho.streams.reader import StreamReader
from aioecho.streams.tls import FOR_EVER
from aioecho.streams.writer import StreamWriter

__all__ = ["Connection"]


class Connection(ClosingConnection):
    """A live connection of a server, in `server.connections`.

    `client_address` is as accept() gave it. `handler` is None until it is made. Call :meth:`abort` to cut it off; to do
    anything else with it is its handler's.
    """

    # It ends in exactly one of the server's counters, by its `reason`, in its task's done-callback, which it is
    # itself: a bound method for each connection would cost some bytes.

    __slots__ = ("client_address",)

    protocol_class: ClassVar[type[StreamProtocol]] = StreamProtocol

    def __init__(
        self,
        server: BaseServer,
        sock: socket.socket,
        client_address: Any,
        RequestHandlerClass: Callable[..., Any],
    ) -> None:
        loop: Any = server.event_loop
        self._loop = loop
        self._server = server
        self._RequestHandlerClass = RequestHandlerClass
        self._sock = sock
        self.client_address = client_address
        self.since = loop.time()
        self.request: tuple[StreamReader, StreamWriter] | None = None
        self.handler: Any = None
        self.reason: Reason = "handshake"
        self.was_aborted = self._is_cancelled = self._has_sent_eof = False
        self._stage = OPEN
        self.place = self._handling = None
        self._linger: asyncio.TimerHandle | None = None
        self._stalled: tuple[float, int, int] | None = None  # since when, and at which counts of bytes
        limits = server.admission.limits
        measures = server.measures
        counts = is_recorded(server.access_log)
        kind = CountingStreamProtocol if counts else self.protocol_class
        if measures is not None:
            kind = measures.choose_protocol(sock, counts or self.protocol_class is not StreamProtocol)
        self._protocol = protocol = kind(loop, True, limits.max_buffer, limits, server.admission.memory)
        protocol.driver = self
        if measures is not None:
            measures.attach(sock, protocol)
        # Up to where it first waits, before there is a task: by the time that the task runs the transport is there.
        opening = loop.connect_accepted_socket(self._get_protocol, sock)
        opened: Any
        try:
            opened = opening.send(None)
        except Exception as error:  # also StopIteration
            opened = error
        name = getattr(RequestHandlerClass, "__qualname__", "connection")
        self.start(self._live((opening, opened)), loop, server.task_context.copy(), name)
        self.task.add_done_callback(self, context=server.task_context)

    def __call__(self, task: "asyncio.Task[None]") -> None:
        """Count how it has ended."""
        protocol = self._protocol
        if self.place is not None:
            self._server.timeout_sweeper.remove(self)
        protocol.driver = None  # which refers to it: without the cycle both go at once
        protocol.undo_cycles()
        if self._linger is not None:
            self._linger.cancel()
        if self._stage == OPEN and not protocol.is_lost:
            # The task was cancelled before its first step: _live() never ran. By now the transport is there, if it was made.
            self.reason = "cancelled"
            transport = getattr(protocol, "transport", None)
            if transport is not None:
                transport.abort()
            else:
                self._sock.close()
            protocol.connection_lost(None)  # uvloop does not tell it, as what opened the transport was never awaited
        self._server.task_ended(self, task)

    def _get_protocol(self) -> StreamProtocol:
        return self._protocol

    def __repr__(self) -> str:
        return f"<Connection from {format_address(self.client_address)}, handler={self.handler!r}>"

    def note_endpoint(self, endpoint: str) -> None:
        """Note where the client came in, if its end will be recorded."""
        if self._protocol.counts:
            self._protocol.endpoint = endpoint  # type: ignore[misc] # of which the class has the slot

    def log_end(self) -> None:
        """Make the one record of a connection that has ended, if it is to be made."""
        server, now = self._server, self._loop.time()
        log_end(server.access_log, self.client_address, self.reason, began=self.since, ended=now, counts=self._protocol)

    def look_at_wire(self) -> int:
        """Count its bytes up to now, where the server is measured. Return how many wait for the kernel to take them."""
        protocol = self._protocol
        if protocol.wire is not None:
            protocol.wire.look()
        return 0 if protocol.is_lost or protocol.get_socket_protocol() is None else protocol.unsent()

    # Its life.

    async def _live(self, awaitable: Any) -> None:
        """Open the transport, run the handler, and close. `awaitable` is what :meth:`_open` takes."""
        # While a connection is idle this frame stays: with as few variables as it goes, and where nothing is raised.
        end: BaseException | None = None
        try:
            awaitable = self._open(awaitable)
            if awaitable is not None:
                await awaitable
            if self._stage == PREPARE:
                awaitable = self._prepare()
                if awaitable is not None:
                    await awaitable
            if self.handler is not None:
                self._stage = HANDLE
                awaitable = None
                awaitable = await self.handle()
                if awaitable is not None:
                    self._server.report_result(self.handler, awaitable)
                self.take_inner_end(None)
        except BaseException:
            end = self.end_with(sys.exception())
        if self._waiter is not None:  # what setup() has waited for steps this, up to here
            await self.hand_back()
        if self._stage != CLOSED:
            self._close_if_done(end)
        try:
            if self._stage != CLOSED:
                await self._finish(end)
            elif not self._protocol.transport.is_closing():
                await self._wait_lost(self._protocol)
        except RuntimeError:
            self.raise_if_abandoned()
            raise
        finally:
            del end  # its traceback refers to this frame
            if self._waiter is not None:
                await self.hand_back()

    def _open(self, begun: tuple[Any, Any]) -> Awaitable[None] | None:
        """Open the transport; return what has to be awaited for that.

        `begun` is a coroutine that was stepped once, and the future that it awaits, or what it has raised.
        """
        opening, opened = begun
        try:
            try:
                if isinstance(opened, Exception):
                    raise opened
                if opened.done():
                    opened = opening.send(None)
                return self._open_later(opening, opened)
            except StopIteration:
                pass
            self._protocol.begin_reading()
            self._stage = PREPARE
        except (OSError, MemoryError) as error:
            self._server.report_not_begun(self.client_address, "transport", error)
        return None

    async def _open_later(self, opening: Any, opened: Any) -> None:
        try:
            await opened
        except BaseException:
            opening.close()
            raise
        awaitable = self._open((opening, opened))
        if awaitable is not None:
            await awaitable

    def handle(self) -> Awaitable[Any]:
        """Call handle(); return what is to be awaited, which an event may step."""
        handling = HandlerRun.handle(self)  # not through super(): this is for every connection
        protocol = self._protocol
        if protocol.peer_has_closed or protocol.is_lost:  # while setup() waited
            self.note_stream_end(False)
        if isinstance(handling, CoroutineType):
            self.step_inner(handling)
        return handling

    def end_with(self, error: BaseException | None) -> BaseException | None:
        """Return what handle(), or what comes before it, has ended with, given the exception that it raised."""
        end = self.take_inner_end(error)
        return None if end is None and not self._is_abandoned else super().end_with(end)

    def give_up(self) -> None:
        """Count it as ended, though its handler goes on."""
        self.reason = "cancelled"
        self.task.remove_done_callback(self)
        self._protocol.driver = None
        self._protocol.release_memory()
        self.cancel_beside()
        self._server.timeout_sweeper.remove(self)
        self._server.unregister_connection(self)

    def _prepare(self) -> Awaitable[None] | None:
        """Make the handler, if all goes well; return what has to be awaited for that."""
        protocol = self._protocol
        writer = StreamWriter(protocol.transport, protocol, protocol.reader, self._loop)
        ssl = self.get_tls()
        return self._verify((protocol.reader, writer)) if ssl is None else self._secure(ssl, writer)

    def get_tls(self) -> ssl_module.SSLContext | None:
        """Return what TLS is served with, None for none."""
        context: ssl_module.SSLContext | None = self._server.ssl
        return context

    async def _secure(self, ssl: ssl_module.SSLContext, writer: StreamWriter) -> None:
        if self._server.is_draining:
            self._loop.call_soon(self._drain_handshake)  # which has begun by then
        measures, began = self._server.measures, self._loop.time()
        try:
            # A connection times its end itself: this time would also count while a large reply is still being sent.
            await writer.start_tls(ssl, ssl_shutdown_timeout=FOR_EVER)
        except OSError as error:
            self._note_failed_handshake(error)
            return
        if measures is not None:
            measures.note_handshake(self._loop.time() - began)
        verifying = self._verify((self._protocol.reader, writer))
        if verifying is not None:
            await verifying

    def _note_failed_handshake(self, error: OSError) -> None:
        # The peer's fault or bad luck: garbage, silence, gone. It may be a flood of them.
        self._server.report_not_begun(self.client_address, "TLS handshake", error)
        if self._server.measures is not None:
            self.look_at_wire()  # which ends without a word to the stream's protocol
            self._server.measures.note_handshake(None)

    def _verify(self, request: tuple[StreamReader, StreamWriter]) -> Awaitable[None] | None:
        self.request = request
        self.reason = "error"
        if self._server.is_draining:
            self.drain()
        return self.prepare()

    # Broadcasts.

    def is_listening(self) -> bool:
        """Tell whether broadcasts are for it: its handler's setup() is done, and handle() runs."""
        return self._stage == HANDLE

    def push(self, data: bytes, most: int) -> bool:
        """Write a broadcast, unless too much waits to be sent already: return False. If the handler has ended, do nothing."""
        return self._stage != HANDLE or self._protocol.push(data, most)
