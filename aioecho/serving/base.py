"""The base of all servers: what they are made with, and their life from the start to the end of a shutdown."""

import asyncio
import contextvars
import logging
import socket
import ssl as ssl_module
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from aioecho.certificates import TLS
from aioecho.config import Limits, Timeouts, check_ssl, check_type
from aioecho.net.binding import bind_endpoint
from aioecho.net.bound import BoundSocket
from aioecho.net.bound_options import note_options
from aioecho.net.endpoints import Endpoint, HostEndpoint, InheritedEndpoint, parse_endpoint
from aioecho.net.forks import close_in_forked_children, is_forked_by_multiprocessing
from aioecho.net.proxy_protocol import ProxyProtocol, check_trust
from aioecho.serving.drain import DEFAULT_GRACE, Drain, check_grace
from aioecho.serving.handler_types import check_handler_class, check_socket_type
from aioecho.serving.lifespan import Lifespan, MakeLifespan
from aioecho.serving.listening import ListeningSocket
from aioecho.serving.networks import read_networks
from aioecho.serving.renewal import Renewal
from aioecho.serving.sharing import Sharing
from aioecho.stats import DrainReport

__all__ = ["BaseServer"]

logger = logging.getLogger("aioecho.server")


class BaseServer(Sharing):
    """Serves connections, each with a handler object of its own and in a task of its own.

    Args:
        server_address: an endpoint string, or several of them, which then share one set of limits, one drain and one
            `stats`. Subclasses take the address forms of socketserver.
        RequestHandlerClass: anything that, called with `(request, client_address, server)`, gives a handler: a subclass
            of StreamRequestHandler, or a functools.partial of one that binds more arguments. A handler class of
            socketserver's, or a partial of one, is called in a thread, with a blocking socket: see Limits.max_threads.
            Or, if `server_address` is None, a mapping: of every handler class to its endpoints.
        ssl: serve TLS 1.2 or later with this context, on all endpoints but the ones with ``?tls=off``, where handlers may
            begin TLS with `server.ssl`. A context whose `minimum_version` is MINIMUM_SUPPORTED, which is the default of many
            distributions' Pythons, leaves the choice to OpenSSL: it is set to TLSv1_2 on that very context. A context that
            names an older version is rejected. Or with the files that an aioecho.TLS names, loaded anew when they change.
        limits: see Limits.
        timeouts: see Timeouts.
        grace: seconds, for shutdown() and at the end of ``async with``.
        access_log: log a line for each connection that has ended, at INFO by the logger `aioecho.access`.
        allow, deny: networks, as "10.0.0.0/8" or "2001:db8::/32". A client in a network of `deny`, or, if `allow` names any, in
            none of that, is disconnected at once, and counted as "not allowed"; a datagram is dropped. Clients of Unix sockets
            have no address, and are not concerned.
        lifespan: called with the server as it starts; returns an async context manager, as a function does that
            contextlib.asynccontextmanager decorates. It is entered before the server listens, and left when the server has
            drained; what it yields is `state`, which handlers have too. If it raises, so does start().
        sock: a bound stream socket to serve on besides, or instead of an address, which then is None. It becomes the
            server's, which closes it; a path that it is bound to is left alone.
        proxy: expect a PROXY header on every connection, or in every datagram, from these balancers. An endpoint string may
            have its own, as in tcp://*:9999?proxy=v2&proxy_from=10.0.0.0/8.

    ``async with`` starts it, and at the end shuts it down. The constructor only stores. To be overridden:
    :meth:`verify_request`, :meth:`handle_error`. No signal is handled here: :func:`aioecho.run` does that.

    Raises:
        ValueError, TypeError: an argument makes no sense; the message names it.
    """

    # What a subclass for datagrams has otherwise.
    _socket_type: ClassVar[int] = socket.SOCK_STREAM
    _log_level: ClassVar[int] = logging.INFO  # of its start and its end

    _address: Any = None
    _listeners: Sequence[ListeningSocket] = ()
    _names: Sequence[str] = ()
    _proxy: ProxyProtocol | None = None
    _renewal: Renewal | None = None
    _stopping: asyncio.Future[None] | None = None  # what serve_forever() waits for
    _was_started = False
    when_bound: Callable[[], object] | None = None

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any],
        *,
        ssl: ssl_module.SSLContext | TLS | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        grace: float = DEFAULT_GRACE,
        access_log: bool = False,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        lifespan: MakeLifespan | None = None,
        sock: socket.socket | None = None,
        proxy: ProxyProtocol | None = None,
    ) -> None:
        if isinstance(RequestHandlerClass, Mapping):
            if server_address is not None:
                raise TypeError("give the endpoints of several handler classes with them, and None as the address")
            if sock is not None:
                raise TypeError("no handler class is named for sock: give its descriptor with one, as fd://N")
            served = list(RequestHandlerClass.items())
        else:
            served = [(RequestHandlerClass, server_address)]
        if isinstance(ssl, TLS):
            self._renewal = Renewal(ssl, self._set_context)
        context = None if isinstance(ssl, TLS) else ssl
        check_ssl(context)
        check_grace(grace)
        self.endpoints: list[Endpoint] = []
        self._handler_classes: list[Any] = []  # of each endpoint, where there are several
        for handler_class, address in served:
            check_handler_class(handler_class)
            self.endpoints += [] if address is None else self._parse_address(address)
            if isinstance(RequestHandlerClass, Mapping):
                self._handler_classes += [handler_class] * (len(self.endpoints) - len(self._handler_classes))
        if sock is not None:
            self.endpoints.append(InheritedEndpoint(sock, self._socket_type))
        if not self.endpoints:
            raise ValueError("a server needs an endpoint or a socket to listen on: give it tcp://HOST:PORT, or sock=")
        for handler_class, _ in served:
            self._check_endpoints(handler_class)
        self._proxy = None if proxy is None else check_type("proxy", proxy, ProxyProtocol)
        for endpoint in self.endpoints:
            if isinstance(endpoint, HostEndpoint):
                check_trust(endpoint.proxy or proxy, str(endpoint))
            if endpoint.tls and ssl is None:
                raise ValueError(f"{endpoint} needs a certificate: give ssl= (--ssl-certfile)")
        self.grace = grace
        self._lifespan = None if lifespan is None else Lifespan(lifespan, self, lambda: self._begin_shutdown(None))
        self._address = server_address
        super().__init__(RequestHandlerClass, ssl=context, limits=limits, timeouts=timeouts)
        self.access_log = access_log
        self.admission.networks = read_networks(allow, deny)

    def _parse_address(self, address: Any) -> list[Endpoint]:
        texts = [address] if isinstance(address, str) else address
        return [parse_endpoint(text, self._socket_type) for text in texts]

    def inherit(self, groups: Sequence[Sequence[str]]) -> None:
        """Serve on other endpoints in place of its own: one or more for every one of them. Before the start. Not for users."""
        sizes = [len(group) for group in groups]
        self._handler_classes = [
            kind for kind, size in zip(self._handler_classes, sizes, strict=False) for _ in range(size)
        ]
        self.endpoints = [parse_endpoint(text, self._socket_type) for group in groups for text in group]

    def _check_endpoints(self, RequestHandlerClass: Any) -> None:
        """Raise if the endpoints are not for this kind of server, or the handler is not for them."""
        for endpoint in self.endpoints:
            if endpoint.type != self._socket_type:
                raise ValueError(
                    f"{endpoint} is not for {type(self).__name__}: aioecho.serve() finds the server for it"
                )
        check_socket_type(RequestHandlerClass, self._socket_type, self.endpoints[0])

    # What it is.

    @property
    def server_address(self) -> Any:
        """Where the first socket listens, as getsockname() tells it; before the start, the address as it was given."""
        return self._address

    @property
    def names(self) -> Sequence[str]:
        """The endpoint strings of where it listens, in order, with real ports, none twice. Empty before the start."""
        return tuple(dict.fromkeys(self._names))

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty when it does not serve."""
        return tuple(listener.sock for listener in self._listeners)

    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return bool(self._listeners) and not self._is_held

    # Life.

    async def start(self) -> None:
        """Listen on every endpoint, or on none, and accept.

        Raises:
            EndpointError: an endpoint can't be listened on.
            CertificateError: what `ssl` names cannot be loaded.
            RuntimeError: it was started before, or has been closed. To serve again, make another server.
        """
        if self._was_started or self._is_ending():
            raise RuntimeError("a server can be started once, and not after its end: make another one")
        self._was_started = True
        self.event_loop = asyncio.get_running_loop()
        self.measure_loop(self.event_loop)
        # Not the context of an accept: a handler, or another thread, may be what makes the server accept again.
        self.task_context = contextvars.copy_context()
        bound: list[BoundSocket] = []
        handler_classes: list[Any] = []  # of each socket
        try:
            if self._renewal is not None:
                self._renewal.start(self.event_loop)
            if self._lifespan is not None:
                self.state = await self._lifespan.begin()
            for index, endpoint in enumerate(self.endpoints):
                found = await bind_endpoint(endpoint, backlog=self.limits.backlog)
                bound += note_options(found, endpoint, self._proxy)
                handler_class = self._handler_classes[index] if index < len(self._handler_classes) else None
                handler_classes += [handler_class] * (len(bound) - len(handler_classes))
            if self._is_ending():
                raise RuntimeError("the server was closed while it was starting")
            close_in_forked_children(self)
            self._listeners = self._make_listeners(bound, handler_classes)
            self._names = [bound_socket.name for bound_socket in bound]
            # socketserver's name, for its handlers; after the end it is closed, as there
            self.socket = self._listeners[0].sock
            self._address = self.socket.getsockname()
            if self.when_bound is not None:
                self.when_bound()
            self._resume_listeners()
        except BaseException:
            self.keep_backlog = True  # clients that have connected by now are not served
            self.close()
            for bound_socket in bound:
                bound_socket.close()
            self.measure_loop(None)
            await self._end_program()
            raise
        logger.log(self._log_level, "listening on %s", ", ".join(self.names))

    def reload_tls(self) -> None:
        """Load the files that `ssl` names anew, now. Connections that there are keep what they began with.

        May be called from the loop's thread only.

        Raises:
            CertificateError: they cannot be loaded, or a certificate is not valid today. What was loaded before is served on.
            RuntimeError: `ssl` is no aioecho.TLS, which names files.
        """
        if self._renewal is None:
            raise RuntimeError("there is nothing to reload: give as ssl an aioecho.TLS, which names the files")
        self._renewal.reload()

    def _set_context(self, context: ssl_module.SSLContext) -> None:
        self.ssl = context

    def _is_ending(self) -> bool:
        return self._drain is not None or self.admission.is_closing

    def _make_listeners(self, bound: list[BoundSocket], handler_classes: list[Any]) -> Sequence[ListeningSocket]:
        """Return what accepts on, or reads, the sockets `bound` for this server.

        `handler_classes` has the handler class of every socket, or None where all have the same: `RequestHandlerClass`.
        """
        raise NotImplementedError

    def _apply_limits(self, limits: Limits) -> None:
        for listener in self._listeners:
            listener.set_limits(limits)

    def _timeouts_changed(self) -> None:
        super()._timeouts_changed()
        for listener in self._listeners:
            listener.set_timeouts()

    def _resume_listeners(self) -> None:
        if self.admission.is_closing:
            self.admission.admit_queued()
            if self._drain is not None:
                self._drain.end_if_idle()
        elif not (self.admission.is_paused or self._is_held):
            for listener in self._listeners:
                listener.resume()

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
        """Stop accepting, for good. Connections that are live, or in the kernel's backlog, are served to their end.

        Clients in the backlog for which there is no room, by `limits`, are accepted and wait for it. Without a descriptor left
        they are reset. If the attribute `keep_backlog` was set to True, the backlog is not accepted: other processes
        accept from the same sockets.
        """
        self.admission.close()
        if self._renewal is not None:
            self._renewal.stop()
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.stop(keep_backlog=self.keep_backlog)

    def pause(self) -> None:
        """Leave new clients in the kernel's queue, until :meth:`resume`. Live connections are served on."""
        self.admission.pause()
        for listener in self._listeners:
            listener.pause()

    def resume(self) -> None:
        """Accept again, after :meth:`pause`: first the clients that have queued meanwhile."""
        self.admission.resume()

    async def shutdown(self, grace: float | None = None) -> DrainReport:
        """Stop: accept no more, let handlers finish for at most `grace` seconds, and cancel the rest.

        A handler that waits for data from its peer, and has read all that the peer has sent, meets the end of its stream; a
        handler at work finishes, and meets that end at its next read. When the grace is over handlers are cancelled, and
        a handler that swallows that is named in the log, and its connection aborted. Called again, the shorter grace wins,
        and both calls return the same report. If the call is cancelled, the grace is over at once.

        May be awaited in any event loop; in a thread without one call :meth:`begin_shutdown`. In a handler's own task, and in
        the `tasks` of handlers and of the server, it returns at once, with the report as it stands then: to wait for all of
        them would be to wait for itself.

        Raises:
            ValueError: `grace` is no number of seconds.
        """
        check_grace(self.grace if grace is None else grace)
        loop = self.event_loop
        if loop is not None and loop is not asyncio.get_running_loop() and not loop.is_closed():
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.shutdown(grace), loop))
        drain = self._begin_shutdown(grace)
        if (self.composite or self).waits_for(asyncio.current_task()):
            return drain.report()
        return await drain.wait()

    def begin_shutdown(self, grace: float | None = None) -> None:
        """Begin what :meth:`shutdown` does, and return at once. May be called in any thread, once the server is started.

        Raises:
            ValueError: `grace` is no number of seconds.
            RuntimeError: the server has not been started, or its loop is closed.
        """
        check_grace(self.grace if grace is None else grace)
        if self.event_loop is None:
            raise RuntimeError("the server has not been started: await start(), or use `async with`")
        self.event_loop.call_soon_threadsafe(self._begin_shutdown, grace)

    def end_at_once(self, why: str) -> None:
        """Begin a shutdown without any grace, or end the grace of one that has begun. In the server's event loop only.

        `why` is for the log, where it follows "cut off": "by SIGTERM", for instance.
        """
        self._begin_shutdown(0, why)

    def sockets_to_close_in_child(self) -> Iterable[int]:
        """Return the descriptors of its sockets that are open now, for a process that was forked.

        A child keeps the connection whose blocking handler has forked it, unless multiprocessing has.
        """
        thread = None if is_forked_by_multiprocessing() else threading.current_thread()
        for sock in (*self.sockets, *self.admission.queued):
            yield sock.fileno()
        for connection in self._connections:
            if getattr(connection, "thread", None) is None or connection.thread is not thread:
                sock = connection.request if hasattr(connection, "thread") else connection._sock
                yield sock.fileno()

    def _begin_shutdown(self, grace: float | None, why: str | None = None) -> Drain:
        if self._drain is None:
            self._drain = Drain(
                self._connections,
                close=self.close,
                is_idle=self._is_idle,
                drop_waiting=self._drop_waiting,
                release=self._release,
                level=self._log_level if self._names else logging.DEBUG,  # the end of one that never served is no news
            )
            self._tell_stopping(grace, why)
        self._drain.shorten(self.grace if grace is None else grace, why)
        return self._drain

    def _tell_stopping(self, grace: float | None, why: str | None) -> None:
        if self._stopping is not None:
            self._stopping.set_result(None)
        if self.composite is not None:
            self.composite.one_stops(grace, why)

    # What a drain asks of it.

    async def _release(self) -> None:
        if self.handler_threads is not None:
            await self.handler_threads.close()
        self.timeout_sweeper.stop()
        self.measure_loop(None)
        await self._end_program()

    async def __aenter__(self) -> Self:
        if not self._was_started:
            await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()
