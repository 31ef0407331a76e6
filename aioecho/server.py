"""Stream servers: their life from start to shutdown, their hooks, and the registry of connections."""

import asyncio
import contextlib
import contextvars
import functools
import logging
import socket
import ssl as ssl_module
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar

from aioecho.blocking.streams import ThreadedConnection
from aioecho.config import Limits, Timeouts
from aioecho.exceptions import ConnectionTimeout
from aioecho.net.acceptor import Listener
from aioecho.net.binding import BoundSocket, bind_endpoint
from aioecho.net.endpoints import Endpoint, InheritedEndpoint, TCPEndpoint, UnixEndpoint, parse_endpoint
from aioecho.net.watch import OUT_OF_RESOURCES
from aioecho.runtime.logs import BoundedLog
from aioecho.runtime.threads import Begun, ThreadPool
from aioecho.serving.admission import Admission
from aioecho.serving.connection import Connection, log_end
from aioecho.serving.drain import DEFAULT_GRACE, Drain, Served, check_grace
from aioecho.serving.handler_types import check_handler_class, check_kind, is_blocking, undo_partial
from aioecho.serving.sweeper import Rounds
from aioecho.stats import DrainReport, Stats
from aioecho.streams.reader import StreamReader
from aioecho.streams.tls import FOR_EVER

__all__ = ["BaseServer", "TCPServer", "UnixStreamServer"]

logger = logging.getLogger("aioecho.server")

T = TypeVar("T")

# Seconds between shutdown() in another thread and its beginning, if nobody awaits it.
HANDOVER = 0.05


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
    _what: ClassVar[str] = "connection"
    _log_level: ClassVar[int] = logging.INFO  # of its start and its end

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
            check_handler_class(handler_class)
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
        self.grace = grace
        limits = _check_type("limits", limits if limits is not None else Limits(), Limits)
        self._stats = self._make_stats()
        self.leaves_queue = False  # see close()
        self.when_taken: Callable[[], object] | None = None  # called for each connection that is let in
        self._address = server_address
        self._connections: set[Any] = set()
        self._threads: ThreadPool | None = None  # made for the first blocking handler
        self._admission = Admission(limits, self._connections, self._resume_listeners)
        self._rounds = Rounds(self._connections)
        self.timeouts = timeouts if timeouts is not None else Timeouts()
        self._listeners: Sequence[Ear] = []
        self._names: list[str] = []
        self._was_started = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: Drain | None = None  # made when a shutdown begins
        self._stopping: asyncio.Future[None] | None = None  # what serve_forever() waits for
        self._context = contextvars.copy_context()
        self._not_begun_log = BoundedLog(logger, logging.WARNING)
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
        check_kind(RequestHandlerClass, self._socket_type, self.endpoints[0])

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
        self._apply_limits(_check_type("limits", limits, Limits))
        self._admission.apply(limits)
        if self._threads is not None:
            self._threads.resize(limits.max_threads)

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts of handlers whose class has none of its own. Others may be set at any time."""
        return self._timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._timeouts = _check_type("timeouts", timeouts, Timeouts)
        for each in self._connections:
            if isinstance(each, Connection):
                each.stir()

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
            RuntimeError: it was started before, or has been closed. To serve again, make another server.
        """
        if self._was_started or self._is_ending():
            raise RuntimeError("a server can be started once, and not after its end")
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
            if self._is_ending():
                raise RuntimeError("the server was closed while it was starting")
            self._listeners = self._make_listeners(bound)
            self._names = [each.name for each in bound]
            # socketserver's name, for its handlers; after the end it is closed, as there
            self.socket = self._listeners[0].sock
            self._address = self.socket.getsockname()
            self._resume_listeners()
        except BaseException:
            self.leaves_queue = True  # nobody is served who may have come by now
            self.close()
            for each in bound:
                each.close()
            raise
        logger.log(self._log_level, "listening on %s", ", ".join(self.names))

    def _is_ending(self) -> bool:
        return self._drain is not None or self._admission.is_closing

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
        handler, or a thread that it starts for this, calls it without `await`. In another event loop it can be awaited.

        In a handler's own task it begins that and returns at once, with the report as it stands then: to wait for all
        handlers would be to wait for itself.
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

    def _begin_shutdown(self, grace: float | None) -> Drain:
        if self._drain is None:
            self._drain = Drain(
                self._connections,
                close=self.close,
                is_idle=self._is_idle,
                drop_waiting=self._drop_waiting,
                release=self._release,
                level=self._log_level if self._names else logging.DEBUG,  # the end of one that never served is no news
            )
            if self._stopping is not None:
                self._stopping.set_result(None)
        self._drain.shorten(self.grace if grace is None else grace)
        return self._drain

    async def _shut_down(self, grace: float | None) -> DrainReport:
        loop = self._loop
        if loop is not None and loop is not asyncio.get_running_loop() and not loop.is_closed():
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._shut_down(grace), loop))
        drain = self._begin_shutdown(grace)
        this = asyncio.current_task()
        if any(getattr(each, "_task", None) is this for each in self._connections):
            return drain.report()
        return await drain.wait()

    # What a drain asks of it.

    def _is_idle(self) -> bool:
        return not self._connections

    def _drop_waiting(self) -> None:
        """Nobody waits for a handler here."""

    async def _release(self) -> None:
        if self._threads is not None:
            await self._threads.close()
        self._rounds.stop()

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
            self._reject(sock, address, refused_for)
            return
        if handler_class is None:
            handler_class = self.RequestHandlerClass
        connection: Connection | ThreadedConnection
        try:
            if is_blocking(handler_class):
                connection = ThreadedConnection(self, self._thread_pool(), sock, address, handler_class)
            else:
                connection = Connection(self, sock, address, handler_class)
        except (OSError, MemoryError) as error:
            self._admission.leave(address)
            self._report_not_begun(address, "connection", error)
            self._reject(sock, address, "handshake")
            return
        self._add(connection)
        if isinstance(connection, ThreadedConnection):
            connection.begin()

    def _reject(self, sock: socket.socket, address: Any, reason: str) -> None:
        sock.close()
        stats = self._stats
        stats.accepted += 1
        stats.rejected += 1
        stats.reasons[reason] += 1
        log_end(address, "rejected", reason)

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

    def _account(self, connection: Any, task: "asyncio.Task[None]") -> None:
        """Count the connection whose task has ended."""
        if not task.cancelled() and (error := task.exception()) is not None:
            what, address = self._what, connection.client_address
            if isinstance(error, Exception):
                logger.error("aioecho itself failed with the %s from %s", what, address, exc_info=error)
            elif not isinstance(error, KeyboardInterrupt | SystemExit):  # these the loop raises
                logger.error("the handler of the %s from %s raised", what, address, exc_info=error)
        self._forget(connection)

    def _forget(self, connection: Any) -> None:
        """Count an ended connection; it makes room for another."""
        self._count_end(connection)
        self._admission.leave(connection.client_address)
        connection.log_end()
        if connection.reason in ("write buffer", "shed"):
            self._cut_log.report("cut off the connection from %s: %s", connection.client_address, connection.reason)
        self._resume_listeners()

    def _count_end(self, connection: Served) -> None:
        self._connections.discard(connection)
        stats, outcome = self._stats, connection.outcome
        stats.active -= 1
        if outcome == "completed":
            stats.completed += 1
        else:
            setattr(stats, outcome, getattr(stats, outcome) + 1)
        stats.reasons[connection.reason] += 1
        if self._drain is not None:
            self._drain.count(connection)

    def _call_handle_error(self, request: Any, client_address: Any) -> None:
        """Call the hook for the exception that is being handled, and report what the hook itself raises."""
        try:
            self.handle_error(request, client_address)
        except Exception:
            logger.exception("handle_error raised, for the %s from %s", self._what, client_address)

    def _timeouts_of(self, handler: Any) -> Timeouts:
        """Return what holds for a handler object, or before there is one, for its class."""
        if isinstance(handler, functools.partial):
            handler = undo_partial(handler)
        timeouts = getattr(handler, "timeouts", None)
        return timeouts if isinstance(timeouts, Timeouts) else self._timeouts

    def _tls_timeouts(self, RequestHandlerClass: Any) -> dict[str, Any]:
        """Return the timeouts that the loop's TLS is to keep for a connection with this handler class, in seconds."""
        timeouts = self._timeouts_of(RequestHandlerClass)
        return {
            "ssl_handshake_timeout": min(timeouts.handshake or FOR_EVER, FOR_EVER),
            # It would also count while a large reply is still being sent: a connection sees to its end itself.
            "ssl_shutdown_timeout": FOR_EVER,
        }

    def _report_not_begun(self, client_address: Any, what: str, error: BaseException) -> None:
        """Log that `what` could not be had for a connection, at a bounded rate: the peer decides how often."""
        self._not_begun_log.report("no %s with %s: %s", what, client_address, str(error) or type(error).__name__)


class TCPServer(BaseServer):
    """A server on one TCP address, `(host, port)`; host "" is every address, port 0 is any free one.

    See :class:`BaseServer` for the rest.
    """

    def _parse_address(self, address: Any) -> list[Endpoint]:
        return super()._parse_address(address) if isinstance(address, str) else [TCPEndpoint.at(address)]


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
        return [UnixEndpoint.at(address, self._mode)]


def _check_type(name: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an aioecho.{kind.__name__}, not {value!r}")
    return value


def _check_ssl(ssl: Any) -> None:
    if ssl is None:
        return
    if not isinstance(ssl, ssl_module.SSLContext):
        raise TypeError(f"ssl must be an ssl.SSLContext, not {ssl!r}")
    # MINIMUM_SUPPORTED compares below every version.
    if ssl.minimum_version < ssl_module.TLSVersion.TLSv1_2:
        raise ValueError(f"ssl allows {ssl.minimum_version.name}: set its minimum_version to TLSv1_2 or TLSv1_3")
