"""Stream servers: start, the registry of connections, the hooks, and the drain."""

import asyncio
import contextlib
import contextvars
import inspect
import logging
import os
import socket
import ssl as ssl_module
import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, ClassVar, Protocol, Self

from aioecho.config import Limits, Timeouts
from aioecho.connection import Connection
from aioecho.endpoints import (
    BoundSocket,
    Endpoint,
    InheritedEndpoint,
    TCPEndpoint,
    UnixEndpoint,
    bind_endpoint,
    parse_endpoint,
)
from aioecho.handlers import DatagramRequestHandler, DatagramSessionHandler
from aioecho.listener import Listener
from aioecho.logs import BoundedLog
from aioecho.stats import DrainReport, Stats
from aioecho.streams import FOR_EVER

__all__ = ["BaseServer", "TCPServer", "UnixStreamServer"]

logger = logging.getLogger("aioecho.server")

DEFAULT_GRACE = 30.0
"""Seconds that handlers have to finish when a server stops."""

# Seconds that a cancelled handler has to clean up before it is cut off.
PATIENCE = 0.25


class Served(Protocol):
    """What a server keeps of each connection, or of each datagram's handler, while it lasts."""

    client_address: Any
    outcome: str
    reason: str
    was_aborted: bool

    def drain(self) -> None:
        """Let it end when there is nothing left to do."""

    def cut_off(self) -> None:
        """Cancel the handler."""

    def abort(self) -> None:
        """End it, whatever it does."""


class Ear(Protocol):
    """What a server has for each socket that it listens on."""

    @property
    def sock(self) -> socket.socket:
        """The socket."""

    def resume(self) -> None:
        """Take what comes from now on, as long as there is room."""


class BaseServer:
    """Serves connections, each with a handler object of its own and in a task of its own.

    Args:
        server_address: an endpoint string, or several of them, which then share one set of limits, one drain and one
            `stats`. Subclasses take the address forms of socketserver.
        RequestHandlerClass: anything that, called with `(request, client_address, server)`, gives a handler: a subclass
            of StreamRequestHandler, or a functools.partial of one that binds more arguments.
        ssl: serve TLS with this context, on all endpoints. TLS 1.2 is the least that a context of the standard library's
            defaults offers; one that offers less is refused.
        limits: see Limits.
        timeouts: see Timeouts.
        grace: seconds, for shutdown() and at the end of ``async with``.
        sock: a bound stream socket to serve on besides, or instead of an address, which then is None. It becomes the
            server's, which closes it; a path that it is bound to is left alone.

    ``async with`` starts it, and at the end shuts it down. The constructor only stores. To be overridden:
    :meth:`verify_request`, :meth:`handle_error`. No signal is handled here: :func:`aioecho.run` does that.

    Raises:
        ValueError, TypeError: an argument makes no sense; the message names it.
    """

    # What subclasses for datagrams have otherwise.
    _socket_type: ClassVar[int] = socket.SOCK_STREAM
    _wrong_handlers: ClassVar[tuple[type, ...]] = (DatagramRequestHandler, DatagramSessionHandler)
    _what: ClassVar[str] = "connection"

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[..., Any],
        *,
        ssl: ssl_module.SSLContext | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        grace: float = DEFAULT_GRACE,
        sock: socket.socket | None = None,
    ) -> None:
        _check_handler_class(RequestHandlerClass)
        _check_ssl(ssl)
        check_grace(grace)
        self.endpoints = [] if server_address is None else self._parse_address(server_address)
        if sock is not None:
            self.endpoints.append(InheritedEndpoint(sock, self._socket_type))
        if not self.endpoints:
            raise ValueError("a server needs an address or a socket to listen on")
        self._check_kind(RequestHandlerClass)
        self.RequestHandlerClass = RequestHandlerClass
        self.ssl = ssl
        self.limits = limits if limits is not None else Limits()
        self.timeouts = timeouts if timeouts is not None else Timeouts()
        self.grace = grace
        self._stats = self._make_stats()
        self._address = server_address
        self._connections: set[Any] = set()
        self._listeners: Sequence[Ear] = []
        self._names: list[str] = []
        self._was_started = False
        self._drain: asyncio.Task[DrainReport] | None = None
        self._grace_timer: asyncio.TimerHandle | None = None
        self._deadline = float("inf")
        self._drained = {"completed": 0, "cancelled": 0, "aborted": 0}
        self._stopping: asyncio.Future[None] | None = None  # what serve_forever() waits for
        self._all_ended: asyncio.Future[None] | None = None  # what the drain waits for
        # For all connections the same two objects.
        self._when_ended = self._account
        self._context = contextvars.copy_context()
        self._handshake_log = BoundedLog(logger, logging.WARNING)

    def _parse_address(self, address: Any) -> list[Endpoint]:
        texts = [address] if isinstance(address, str) else address
        return [parse_endpoint(text, self._socket_type) for text in texts]

    def _check_kind(self, RequestHandlerClass: Any) -> None:
        """Raise if the endpoints are not for this kind of server, or the handler is not for them."""
        for endpoint in self.endpoints:
            if endpoint.type != self._socket_type:
                raise ValueError(
                    f"{endpoint} is not for {type(self).__name__}: aioecho.serve() finds the server for it"
                )
        if inspect.isclass(RequestHandlerClass) and issubclass(RequestHandlerClass, self._wrong_handlers):
            takes, does_not = ("datagrams", "streams") if self._what == "connection" else ("streams", "datagrams")
            raise TypeError(
                f"{RequestHandlerClass.__qualname__} is a handler of {takes}: it can't serve {does_not}, as on"
                f" {self.endpoints[0]}"
            )

    def _make_stats(self) -> Stats:
        return Stats()

    # What it is.

    @property
    def server_address(self) -> Any:
        """Where the first socket listens, as getsockname() tells it; before the start, the address as it was given."""
        return self._listeners[0].sock.getsockname() if self.is_serving() else self._address

    @property
    def names(self) -> Sequence[str]:
        """The endpoint strings of where it listens, in order, with real ports; each once. Empty before the start."""
        return tuple(dict.fromkeys(self._names))

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty when it does not serve."""
        return tuple(listener.sock for listener in self._listeners)

    @property
    def connections(self) -> Collection[Any]:
        """The live connections: a copy, as they come and go."""
        return frozenset(self._connections)

    @property
    def stats(self) -> Stats:
        """What it has counted since it started."""
        return self._stats

    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return bool(self._listeners)

    @property
    def is_draining(self) -> bool:
        """Whether a shutdown has begun."""
        return self._drain is not None

    # Hooks.

    def verify_request(self, request: Any, client_address: Any) -> bool | Awaitable[bool]:
        """Return whether to serve a connection; may be a coroutine function. With TLS, called after the handshake."""
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the exception that is being handled, which a handler raised. The server goes on whatever it was.

        As it is here: an ERROR record with the traceback; at DEBUG, without one, what is the peer's doing alone, a lost
        connection or a stream that ends in the middle of a message.
        """
        error = sys.exception()
        if isinstance(error, ConnectionError | asyncio.IncompleteReadError):
            logger.debug("the connection from %s ended in mid-request: %r", client_address, error)
        else:
            logger.exception("the handler of the connection from %s raised", client_address)

    # Life.

    async def start(self) -> None:
        """Listen on every endpoint, or on none, and accept.

        Raises:
            EndpointError: an endpoint can't be listened on.
            RuntimeError: it was started before. To serve again, make another server.
        """
        if self._was_started or self._drain is not None:
            raise RuntimeError("a server can be started once")
        self._was_started = True
        bound: list[BoundSocket] = []
        try:
            for endpoint in self.endpoints:
                bound += await bind_endpoint(endpoint, backlog=self.limits.backlog)
            if self._drain is not None:
                raise RuntimeError("the server was shut down while it was starting")
        except BaseException:
            for each in bound:
                each.close()
            raise
        self._listeners = self._make_listeners(bound)
        self._names = [each.name for each in bound]
        for listener in self._listeners:
            listener.resume()
        logger.info("listening on %s", ", ".join(self.names))

    def _make_listeners(self, bound: list[BoundSocket]) -> Sequence[Ear]:
        return [
            Listener(each, take=self._take, has_room=self._has_room, failed=self._count_accept_error) for each in bound
        ]

    async def serve_forever(self) -> None:
        """Start, if that was not done, and return when the server has been shut down. If cancelled, shut it down."""
        if not self._was_started:
            await self.start()
        try:
            if self._drain is None:
                self._stopping = self._stopping or asyncio.get_running_loop().create_future()
                await asyncio.shield(self._stopping)
        finally:
            await self.shutdown()

    def close(self) -> None:
        """Stop accepting, once and for all. Live connections, and those that the kernel had queued, are served on.

        Not those for which there is no room, by `limits` or for want of descriptors: they are reset.
        """
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            assert isinstance(listener, Listener)
            listener.close(backlog=self.limits.backlog)

    async def shutdown(self, grace: float | None = None) -> DrainReport:
        """Stop: accept no more, let handlers finish for at most `grace` seconds, cut off the rest.

        A handler that waits for data from its peer, and all that the peer has sent is read, meets the end of its stream;
        one at work finishes, and meets it at its next read. When the grace is over handlers are cancelled, and one that
        swallows that is named in the log and closed. Called again, the shorter grace wins; both calls return the same
        report. If the call is cancelled, the grace is over at once.
        """
        grace = self.grace if grace is None else grace
        check_grace(grace)
        loop = asyncio.get_running_loop()
        if self._drain is None:
            self._drain = loop.create_task(self._run_drain())
            if self._stopping is not None:
                self._stopping.set_result(None)
        self._shorten(loop.time() + grace)
        try:
            return await asyncio.shield(self._drain)
        except asyncio.CancelledError:
            self._shorten(loop.time())
            with contextlib.suppress(asyncio.CancelledError):  # a further one: it can't be any faster
                await asyncio.wait([self._drain])
            raise

    async def __aenter__(self) -> Self:
        if not self._was_started:
            await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()

    # Connections.

    def _has_room(self) -> bool:
        limit = self.limits.max_connections
        return limit is None or len(self._connections) < limit

    def _count_accept_error(self) -> None:
        self._stats.accept_errors += 1

    def _take(self, sock: socket.socket, address: Any) -> None:
        sock.setblocking(False)
        self._add(Connection(self, sock, address))

    def _add(self, connection: Served) -> None:
        self._stats.accepted += 1
        self._stats.active += 1
        self._connections.add(connection)

    def _account(self, task: "asyncio.Task[None]") -> None:
        """Count an ended connection; it makes room for another."""
        connection: Any = task.get_coro()
        self._count_end(connection)
        if not task.cancelled() and (error := task.exception()) is not None and isinstance(error, Exception):
            logger.error(
                "aioecho itself failed with the %s from %s", self._what, connection.client_address, exc_info=error
            )
        for listener in self._listeners:
            listener.resume()

    def _count_end(self, connection: Served) -> None:
        self._connections.discard(connection)
        stats, outcome = self._stats, connection.outcome
        stats.active -= 1
        setattr(stats, outcome, getattr(stats, outcome) + 1)
        stats.reasons[connection.reason] += 1
        if self._drain is not None:
            how = "aborted" if connection.was_aborted else "cancelled" if outcome == "cancelled" else "completed"
            self._drained[how] += 1
            if not self._connections and self._all_ended is not None and not self._all_ended.done():
                self._all_ended.set_result(None)

    def _call_handle_error(self, request: Any, client_address: Any) -> None:
        """Call the hook for the exception that is being handled, and report what the hook itself raises."""
        try:
            self.handle_error(request, client_address)
        except Exception:
            logger.exception("handle_error raised, for the %s from %s", self._what, client_address)

    def _tls_timeouts(self) -> dict[str, float]:
        """Return the timeouts that the loop's TLS is to keep, in seconds."""
        return {
            "ssl_handshake_timeout": self.timeouts.handshake or FOR_EVER,
            # It would also count while a large reply is still being sent: a connection sees to its end itself.
            "ssl_shutdown_timeout": FOR_EVER,
        }

    def _report_handshake(self, client_address: Any, error: BaseException) -> None:
        """Log a TLS handshake that failed, at a bounded rate: the peer decides how often."""
        self._handshake_log.report("no TLS handshake with %s: %s", client_address, error)

    # The drain.

    def _shorten(self, deadline: float) -> None:
        """Let the grace end at `deadline`, unless it ends earlier, or all is over."""
        is_over = self._drain is not None and self._drain.done()
        if deadline < self._deadline and not is_over:
            self._deadline = deadline
            if self._grace_timer is not None:
                self._grace_timer.cancel()
            self._grace_timer = asyncio.get_running_loop().call_at(deadline, self._cut_off)

    # When the grace is over, each of these three is given PATIENCE before the next.

    def _cut_off(self) -> None:
        for connection in self._connections:
            connection.cut_off()
        self._grace_timer = asyncio.get_running_loop().call_later(PATIENCE, self._abort_all)

    def _abort_all(self) -> None:
        for connection in self._connections:
            if not connection.was_aborted:
                logger.warning("would not end when cancelled, and was cut off: %r", connection)
            connection.abort()
        self._grace_timer = asyncio.get_running_loop().call_later(PATIENCE, self._leave_behind)

    def _leave_behind(self) -> None:
        if self._all_ended is None:  # the loop was held up so long that the drain has not come to wait for its end
            self._grace_timer = asyncio.get_running_loop().call_later(PATIENCE, self._leave_behind)
        elif not self._all_ended.done():
            logger.error("left behind, as they would not end: %r", list(self._connections))
            self._drained["aborted"] += len(self._connections)
            self._all_ended.set_result(None)

    async def _run_drain(self) -> DrainReport:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.close()
        # By the second turn the loop has polled, and delivered all that had come before.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for connection in self._connections:
            connection.drain()
        if self._connections:
            self._all_ended = loop.create_future()
            await self._all_ended
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        report = DrainReport(**self._drained, seconds=loop.time() - began)
        if report.cancelled or report.aborted:
            logger.warning(
                "cut off when the grace was over: %d cancelled, %d aborted", report.cancelled, report.aborted
            )
        logger.info("shut down in %.3f s", report.seconds)
        return report


class TCPServer(BaseServer):
    """A server on one TCP address, `(host, port)`; host "" is every address, port 0 is any free one.

    See :class:`BaseServer` for the rest.
    """

    def _parse_address(self, address: Any) -> list[Endpoint]:
        if isinstance(address, str):
            return super()._parse_address(address)
        match address:
            case (str() | None as host, int(port)) if not isinstance(port, bool) and 0 <= port <= 65535:
                return [TCPEndpoint(host or "", port)]
        raise ValueError(f"expected a (host, port) with a port from 0 to 65535, not {address!r}")


class UnixStreamServer(BaseServer):
    """A server on one Unix stream socket: a path, or a name behind a NUL; `mode` sets the file's permissions, as 0o660.

    A path on which nobody listens any more is taken over. See :class:`BaseServer` for the rest.
    """

    def __init__(
        self, server_address: Any, RequestHandlerClass: Callable[..., Any], *, mode: int | None = None, **options: Any
    ) -> None:
        self._mode = mode
        super().__init__(server_address, RequestHandlerClass, **options)

    def _parse_address(self, address: Any) -> list[Endpoint]:
        if not isinstance(address, str | bytes | os.PathLike):
            raise ValueError(f"expected the path of a Unix socket, not {address!r}")
        path = os.fsdecode(address)
        if path.startswith("unix:"):
            if self._mode is not None:
                raise ValueError(f"give the permissions once: in {path!r} as ?mode=, or as the argument mode")
            return super()._parse_address(path)
        return [UnixEndpoint(path, self._mode)]


def _check_handler_class(RequestHandlerClass: Any) -> None:
    if not callable(RequestHandlerClass):
        raise TypeError(f"RequestHandlerClass must be callable, not {RequestHandlerClass!r}")
    if inspect.isclass(RequestHandlerClass):
        if inspect.isabstract(RequestHandlerClass):
            raise TypeError(
                f"{RequestHandlerClass.__qualname__} has no handle(): a handler class defines `async def handle(self)`"
            )
        handle = getattr(RequestHandlerClass, "handle", None)
        if inspect.isfunction(handle) and not inspect.iscoroutinefunction(handle) and _is_blocking(RequestHandlerClass):
            raise TypeError(
                f"{RequestHandlerClass.__qualname__} is a blocking handler of socketserver's; derive it from"
                " aioecho.StreamRequestHandler or DatagramRequestHandler and make handle() a coroutine"
            )


def _is_blocking(RequestHandlerClass: type) -> bool:
    socketserver = sys.modules.get("socketserver")
    return socketserver is not None and issubclass(RequestHandlerClass, socketserver.BaseRequestHandler)


def _check_ssl(ssl: Any) -> None:
    if ssl is None:
        return
    if not isinstance(ssl, ssl_module.SSLContext):
        raise TypeError(f"ssl must be an ssl.SSLContext, not {ssl!r}")
    # MINIMUM_SUPPORTED compares below every version.
    if ssl.minimum_version < ssl_module.TLSVersion.TLSv1_2:
        raise ValueError(f"ssl allows {ssl.minimum_version.name}: set its minimum_version to TLSv1_2 or TLSv1_3")


def check_grace(grace: Any) -> None:
    """Raise ValueError unless `grace` is a number of seconds, from 0."""
    if not isinstance(grace, int | float) or isinstance(grace, bool) or not grace >= 0:
        raise ValueError(f"grace must be a number of seconds from 0, not {grace!r}")
