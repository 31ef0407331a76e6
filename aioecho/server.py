"""Stream servers: start, the registry of connections, the hooks, and the drain."""

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import os
import socket
import ssl as ssl_module
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from aioecho.admission import Admission
from aioecho.blocking import ThreadedConnection, is_blocking, same_of_socketservers
from aioecho.config import Limits, Timeouts
from aioecho.connection import Connection, log_end
from aioecho.deadlines import Rounds
from aioecho.endpoints import (
    BoundSocket,
    Endpoint,
    InheritedEndpoint,
    TCPEndpoint,
    UnixEndpoint,
    bind_endpoint,
    parse_endpoint,
)
from aioecho.exceptions import ConnectionTimeout
from aioecho.handlers import DatagramRequestHandler, DatagramSessionHandler
from aioecho.listener import OUT_OF_RESOURCES, Listener
from aioecho.logs import BoundedLog
from aioecho.stats import DrainReport, Stats
from aioecho.streams import StreamReader
from aioecho.threads import Begun, ThreadPool
from aioecho.tls import FOR_EVER

__all__ = ["BaseServer", "TCPServer", "UnixStreamServer"]

logger = logging.getLogger("aioecho.server")

DEFAULT_GRACE = 30.0
"""Seconds that handlers have to finish when a server stops."""

# Seconds between shutdown() in another thread and its beginning, if nobody awaits it.
HANDOVER = 0.05

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

    def pause(self) -> None:
        """Leave what comes to the kernel, until resume()."""


class BaseServer:
    """Serves connections, each with a handler object of its own and in a task of its own.

    Args:
        server_address: an endpoint string, or several of them, which then share one set of limits, one drain and one
            `stats`. Subclasses take the address forms of socketserver.
        RequestHandlerClass: anything that, called with `(request, client_address, server)`, gives a handler: a subclass
            of StreamRequestHandler, or a functools.partial of one that binds more arguments. A handler class of
            socketserver's, or a partial of one, is called in a thread, with a blocking socket: see Limits.max_threads.
            Or, if `server_address` is None, a mapping of such to the endpoints that each serves.
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
        RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any],
        *,
        ssl: ssl_module.SSLContext | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        grace: float = DEFAULT_GRACE,
        sock: socket.socket | None = None,
    ) -> None:
        if isinstance(RequestHandlerClass, Mapping):
            if server_address is not None:
                raise TypeError("the endpoints of several handler classes are given with them, and nowhere else")
            if sock is not None:
                raise TypeError("no handler class is named for sock: give its descriptor with one, as fd://N")
            served = list(RequestHandlerClass.items())
        else:
            served = [(RequestHandlerClass, server_address)]
        _check_ssl(ssl)
        check_grace(grace)
        self.endpoints: list[Endpoint] = []
        self._handler_classes: list[Any] = []  # of each endpoint, where there are several
        self._handler_of: list[Any] = []  # of each socket: one of these, or None
        for handler_class, address in served:
            _check_handler_class(handler_class)
            self.endpoints += [] if address is None else self._parse_address(address)
            if isinstance(RequestHandlerClass, Mapping):
                self._handler_classes += [handler_class] * (len(self.endpoints) - len(self._handler_classes))
        if sock is not None:
            self.endpoints.append(InheritedEndpoint(sock, self._socket_type))
        if not self.endpoints:
            raise ValueError("a server needs an address or a socket to listen on")
        for handler_class, _ in served:
            self._check_kind(handler_class)
        self.RequestHandlerClass: Any = RequestHandlerClass
        self.ssl = ssl
        self.timeouts = timeouts if timeouts is not None else Timeouts()
        self.grace = grace
        self._stats = self._make_stats()
        self.leaves_queue = False  # see close()
        self.when_taken: Callable[[], object] | None = None  # called for each connection that is let in
        self._address = server_address
        self._connections: set[Any] = set()
        self._threads: ThreadPool | None = None  # made for the first blocking handler
        self._admission = Admission(
            limits if limits is not None else Limits(), self._connections, self._resume_listeners
        )
        self._rounds = Rounds(self._connections)
        self._listeners: Sequence[Ear] = []
        self._names: list[str] = []
        self._was_started = False
        self._loop: asyncio.AbstractEventLoop | None = None
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
        self._cut_log = BoundedLog(logger, logging.WARNING)

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
        wrong = self._wrong_handlers + same_of_socketservers(self._wrong_handlers)
        while isinstance(RequestHandlerClass, functools.partial):
            RequestHandlerClass = RequestHandlerClass.func
        if inspect.isclass(RequestHandlerClass) and issubclass(RequestHandlerClass, wrong):
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
        return self._address

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

    @property
    def limits(self) -> Limits:
        """The limits that hold now. Others may be set at any time, and hold for what comes; nobody is cut off for them."""
        return self._admission.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._apply_limits(limits)
        self._admission.limits = limits
        if self._threads is not None:
            self._threads.resize(limits.max_threads)

    def _apply_limits(self, limits: Limits) -> None:
        """Tell the sockets of other limits than they were made with."""
        for listener in self._listeners:
            listener.sock.listen(limits.backlog)

    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return bool(self._listeners)

    @property
    def is_draining(self) -> bool:
        """Whether a shutdown has begun."""
        return self._drain is not None

    # Hooks.

    def verify_request(self, request: Any, client_address: Any) -> bool | Awaitable[bool]:
        """Return whether to serve a connection; may be a coroutine function. With TLS, called after the handshake.

        For a blocking handler called in the loop too, with its socket, and before the handshake.
        """
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the exception that is being handled, which a handler raised. The server goes on whatever it was.

        For a blocking handler called in its thread, as by socketserver, and so perhaps in several threads at once.

        As it is here: an ERROR record with the traceback; at DEBUG, without one, what is the peer's doing alone: a lost
        connection, a stream that ends in the middle of a message, a timeout.
        """
        error = sys.exception()
        # What a stream breaks with may be any OSError: that the peer's host has vanished is a TimeoutError. But who is refused
        # has connected to somebody else.
        reader = request[0] if isinstance(request, tuple) else None
        is_broken = isinstance(reader, StreamReader) and isinstance(error, OSError) and reader.exception() is error
        is_the_peers = isinstance(error, ConnectionError | asyncio.IncompleteReadError | ConnectionTimeout)
        if is_broken or (is_the_peers and not isinstance(error, ConnectionRefusedError)):
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
        self._loop = asyncio.get_running_loop()
        # Not as it is when one connects: a handler may have let the next ones in, or another's thread.
        self._context = contextvars.copy_context()
        bound: list[BoundSocket] = []
        self._handler_of = []
        try:
            for index, endpoint in enumerate(self.endpoints):
                bound += await bind_endpoint(endpoint, backlog=self.limits.backlog)
                handler_class = self._handler_classes[index] if index < len(self._handler_classes) else None
                self._handler_of += [handler_class] * (len(bound) - len(self._handler_of))
            if self._drain is not None:
                raise RuntimeError("the server was shut down while it was starting")
        except BaseException:
            for each in bound:
                each.close()
            raise
        self._listeners = self._make_listeners(bound)
        self._names = [each.name for each in bound]
        # socketserver's name, for its handlers; after the end it is closed, as there
        self.socket = self._listeners[0].sock
        self._address = self.socket.getsockname()
        self._resume_listeners()
        logger.info("listening on %s", ", ".join(self.names))

    def _make_listeners(self, bound: list[BoundSocket]) -> Sequence[Ear]:
        return [
            Listener(
                each,
                # For all connections but those of a server with several handler classes the same object.
                take=self._take if kind is None else functools.partial(self._take, handler_class=kind),
                has_room=self._admission.has_room,
                failed=self._cannot_accept,
            )
            for each, kind in zip(bound, self._handler_of, strict=True)
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

        Not those for which there is no room, by `limits` or for want of descriptors: they are reset. If `leaves_queue` was
        set to True, those that are queued are left to other processes, which accept from the same sockets.
        """
        self._admission.close()
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            assert isinstance(listener, Listener)
            listener.close(backlog=self.limits.backlog, leave_queue=self.leaves_queue)

    def pause(self) -> None:
        """Leave new clients in the kernel's queue, until :meth:`resume`. Live connections are served on."""
        self._admission.pause()
        for listener in self._listeners:
            listener.pause()

    def resume(self) -> None:
        """Accept again, after :meth:`pause`; those first who have queued meanwhile."""
        self._admission.resume()

    def shutdown(self, grace: float | None = None) -> Coroutine[Any, Any, DrainReport]:
        """Stop: accept no more, let handlers finish for at most `grace` seconds, cut off the rest.

        A handler that waits for data from its peer, and all that the peer has sent is read, meets the end of its stream;
        one at work finishes, and meets it at its next read. When the grace is over handlers are cancelled, and one that
        swallows that is named in the log and closed. Called again, the shorter grace wins; both calls return the same
        report. If the call is cancelled, the grace is over at once.

        Outside the server's event loop the call itself begins it, whether what it returns is awaited or not. So a blocking
        handler, or a thread that it starts for this, calls it without `await`.
        """
        check_grace(self.grace if grace is None else grace)
        if self._loop is None or asyncio._get_running_loop() is self._loop:
            return self._shut_down(grace)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and all is over
            # A moment later: who is about to hand the coroutine to the loop must find it open.
            self._loop.call_soon_threadsafe(self._loop.call_later, HANDOVER, self._begin_shutdown, grace)
        return Begun(functools.partial(self._shut_down, grace))

    def begin_shutdown(self, grace: float | None = None) -> None:
        """Begin what :meth:`shutdown` does, and return at once. May be called in any thread, once the server is started.

        Raises:
            RuntimeError: its loop is closed.
        """
        check_grace(self.grace if grace is None else grace)
        if self._loop is None:
            raise RuntimeError("the server has not been started")
        self._loop.call_soon_threadsafe(self._begin_shutdown, grace)

    def _begin_shutdown(self, grace: float | None) -> None:
        grace = self.grace if grace is None else grace
        loop = asyncio.get_running_loop()
        if self._drain is None:
            self._drain = loop.create_task(self._run_drain())
            if self._stopping is not None:
                self._stopping.set_result(None)
        self._shorten(loop.time() + grace)

    async def _shut_down(self, grace: float | None) -> DrainReport:
        self._begin_shutdown(grace)
        assert self._drain is not None
        try:
            return await asyncio.shield(self._drain)
        except asyncio.CancelledError:
            self._shorten(asyncio.get_running_loop().time())
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

    def _resume_listeners(self) -> None:
        if not self._admission.is_paused:
            for listener in self._listeners:
                listener.resume()

    def _cannot_accept(self, error: OSError) -> None:
        self._stats.accept_errors += 1
        if error.errno in OUT_OF_RESOURCES and self.limits.shed == "idle":
            now = asyncio.get_running_loop().time()
            idle = [
                (since, each.since, each) for each in self._connections if (since := each.idle_since(now)) is not None
            ]
            if idle:
                min(idle, key=lambda found: found[:2])[2].cut("shed")

    def _take(self, sock: socket.socket, address: Any, handler_class: Any = None) -> None:
        refused_for = self._admission.admit(address)
        if refused_for is not None:
            sock.close()
            stats = self._stats
            stats.accepted += 1
            stats.rejected += 1
            stats.reasons[refused_for] += 1
            log_end(address, "rejected", refused_for)
            return
        if handler_class is None:
            handler_class = self.RequestHandlerClass
        if is_blocking(handler_class):
            threaded = ThreadedConnection(self, self._thread_pool(), sock, address, handler_class)
            self._add(threaded)
            threaded.begin()
        else:
            sock.setblocking(False)
            self._add(Connection(self, sock, address, handler_class))

    def _thread_pool(self) -> ThreadPool:
        if self._threads is None:
            self._threads = ThreadPool(self.limits.max_threads)
        return self._threads

    def _add(self, connection: Served) -> None:
        self._stats.accepted += 1
        self._stats.active += 1
        self._connections.add(connection)
        if self.when_taken is not None:
            self.when_taken()

    def _account(self, task: "asyncio.Task[None]") -> None:
        """Count the connection whose task has ended."""
        connection: Any = task.get_coro()
        if not task.cancelled() and (error := task.exception()) is not None and isinstance(error, Exception):
            logger.error(
                "aioecho itself failed with the %s from %s", self._what, connection.client_address, exc_info=error
            )
        self._forget(connection)

    def _forget(self, connection: Served) -> None:
        """Count an ended connection; it makes room for another."""
        self._count_end(connection)
        if isinstance(connection, Connection | ThreadedConnection):
            self._admission.leave(connection.client_address)
            connection.log_end()
            if connection.reason in ("write buffer", "shed"):
                self._cut_log.report("cut off the connection from %s: %s", connection.client_address, connection.reason)
        self._resume_listeners()

    def _count_end(self, connection: Served) -> None:
        self._connections.discard(connection)
        stats, outcome = self._stats, connection.outcome
        stats.active -= 1
        setattr(stats, outcome, getattr(stats, outcome) + 1)
        stats.reasons[connection.reason] += 1
        if self._drain is not None:
            how = "aborted" if connection.was_aborted else "cancelled" if outcome == "cancelled" else "completed"
            self._drained[how] += 1
            self._end_drain_if_idle()

    def _is_idle(self) -> bool:
        return not self._connections

    def _end_drain_if_idle(self) -> None:
        if self._is_idle() and self._all_ended is not None and not self._all_ended.done():
            self._all_ended.set_result(None)

    def _call_handle_error(self, request: Any, client_address: Any) -> None:
        """Call the hook for the exception that is being handled, and report what the hook itself raises."""
        try:
            self.handle_error(request, client_address)
        except Exception:
            logger.exception("handle_error raised, for the %s from %s", self._what, client_address)

    def _timeouts_of(self, handler: Any) -> Timeouts:
        """Return what holds for a handler object, or before there is one, for its class."""
        while isinstance(handler, functools.partial):
            handler = handler.func
        timeouts = getattr(handler, "timeouts", None)
        return timeouts if isinstance(timeouts, Timeouts) else self.timeouts

    def _tls_timeouts(self, RequestHandlerClass: Any) -> dict[str, Any]:
        """Return the timeouts that the loop's TLS is to keep for a connection with this handler class, in seconds."""
        timeouts = self._timeouts_of(RequestHandlerClass)
        return {
            "ssl_handshake_timeout": min(timeouts.handshake or FOR_EVER, FOR_EVER),
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
        for connection in self.connections:
            connection.cut_off()
        self._grace_timer = asyncio.get_running_loop().call_later(PATIENCE, self._abort_all)

    def _abort_all(self) -> None:
        for connection in self.connections:
            if not connection.was_aborted:
                logger.warning("would not end when cancelled, and was cut off: %r", connection)
            connection.abort()
        self._grace_timer = asyncio.get_running_loop().call_later(PATIENCE, self._leave_behind)

    def _leave_behind(self) -> None:
        if self._all_ended is None:  # the loop was held up so long that the drain has not come to wait for its end
            self._grace_timer = asyncio.get_running_loop().call_later(PATIENCE, self._leave_behind)
        elif not self._all_ended.done():
            logger.error("left behind, as they would not end: %r", list(self._connections))
            if self._threads is not None:
                self._threads.report_stuck()
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
        if not self._is_idle():
            self._all_ended = loop.create_future()
            await self._all_ended
        if self._threads is not None:
            await self._threads.close()
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        self._rounds.stop()
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
    if is_blocking(RequestHandlerClass):
        plain = RequestHandlerClass
        while isinstance(plain, functools.partial):
            plain = plain.func
        if inspect.iscoroutinefunction(plain.handle):
            raise TypeError(
                f"{plain.__qualname__} is a handler of socketserver's, whose handle() can't be a coroutine; derive it"
                " from aioecho.StreamRequestHandler"
            )
    elif inspect.isabstract(RequestHandlerClass):
        raise TypeError(
            f"{RequestHandlerClass.__qualname__} has no handle(): a handler class defines `async def handle(self)`"
        )


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
