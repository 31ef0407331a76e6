"""Servers for streams, which make a connection of each client that they accept."""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from aioecho.blocking.proxied import ProxiedThreadedConnection
from aioecho.blocking.streams import ThreadedConnection
from aioecho.config import Limits
from aioecho.net.acceptor import Acceptor
from aioecho.net.bound import BoundSocket
from aioecho.net.endpoints import (
    Endpoint,
    StdioEndpoint,
    TCPEndpoint,
    UnixEndpoint,
)
from aioecho.net.kernel import set_keepalive
from aioecho.net.proxy_protocol import ProxyProtocol
from aioecho.net.watch import OUT_OF_RESOURCES
from aioecho.serving.base import BaseServer
from aioecho.serving.connection import Connection
from aioecho.serving.handler_types import is_blocking, is_handle_function, undo_partial
from aioecho.serving.handlers import StreamRequestHandler
from aioecho.serving.listening import ListeningSocket
from aioecho.serving.porting import check_hooks, check_options
from aioecho.serving.proxied import ProxiedConnection

__all__ = ["StdioServer", "StreamListener", "StreamServer", "TCPServer", "UnixStreamServer"]


class _InClear:
    """The part of a connection with an endpoint that has ``tls=off``."""

    __slots__ = ()

    def get_tls(self) -> None:
        """Return None: no TLS is spoken."""


class _ConnectionInClear(_InClear, Connection):
    __slots__ = ()


class _ThreadedInClear(_InClear, ThreadedConnection):
    __slots__ = ()


class _ProxiedInClear(_InClear, ProxiedConnection):
    __slots__ = ()


class _ProxiedThreadedInClear(_InClear, ProxiedThreadedConnection):
    __slots__ = ()


class _Kinds(NamedTuple):
    """The classes of a listening socket's connections: by the kind of their handler, and whether a PROXY header comes first."""

    plain: type[Connection]
    threaded: type[ThreadedConnection]
    proxied: type[ProxiedConnection]
    proxied_threaded: type[ProxiedThreadedConnection]


_KINDS = _Kinds(Connection, ThreadedConnection, ProxiedConnection, ProxiedThreadedConnection)
_IN_CLEAR = _Kinds(_ConnectionInClear, _ThreadedInClear, _ProxiedInClear, _ProxiedThreadedInClear)


class StreamListener:
    """One of a server's listening sockets: makes a connection of each client that it accepts, or rejects it.

    `handler_class` is None where the server has one for all of its sockets, which may be replaced at any time.
    """

    def __init__(self, server: BaseServer, bound: BoundSocket, handler_class: Any) -> None:
        self._server = server
        self._handler_class = handler_class
        self._known: Any = None  # the handler class of the last connection,
        self._is_blocking = False  # and whether its handlers are
        self._proxy = bound.proxy
        self._kinds = _IN_CLEAR if bound.is_in_clear else _KINDS
        on_accept = self._accepted if bound.proxy is None else self._accepted_from_balancer
        self._acceptor = Acceptor(
            bound,
            on_accept=on_accept,
            has_room=server.admission.has_room,
            on_error=self._cannot_accept,
            turns=server.accept_turns,
        )
        self.sock, self._name = bound.sock, bound.name
        self.resume, self.pause = self._acceptor.resume, self._acceptor.pause
        self.set_timeouts()

    def stop(self, *, keep_backlog: bool) -> None:
        """Accept the clients in the backlog, unless `keep_backlog`, and close the socket."""
        self._acceptor.close(backlog=self._server.limits.backlog, keep_backlog=keep_backlog)

    def set_limits(self, limits: Limits) -> None:
        """Apply the limit that is the socket's own."""
        self.sock.listen(limits.backlog)

    def set_timeouts(self) -> None:
        """Apply the timeouts that accepted sockets inherit."""
        server = self._server
        timeouts = server.timeouts_of(self._handler_class or server.RequestHandlerClass)
        if timeouts.keepalive is not None:
            write = timeouts.write
            set_keepalive(self.sock, timeouts.keepalive, None if write is None else max(write, timeouts.keepalive))

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        admission = self._server.admission
        if not (admission.is_closing and admission.enqueue(sock, address, self._serve)):
            self._serve(sock, address)

    def _accepted_from_balancer(self, sock: socket.socket, address: Any) -> None:
        assert self._proxy is not None
        if not self._proxy.trusts(address):
            self._server.reject(sock, address, "proxy untrusted", self._name)
        # Limits per host are for clients. The client's address is not known yet.
        elif not self._server.admission.enqueue(sock, None, lambda sock, _: self._serve(sock, address)):
            self._serve(sock, address)

    def _serve(self, sock: socket.socket, address: Any) -> None:
        server, proxy = self._server, self._proxy
        counted = address if proxy is None else None
        reason = server.admission.admit(counted)
        if reason is not None:
            server.reject(sock, address, reason, self._name)
            return
        handler_class = self._handler_class
        if handler_class is None:
            handler_class = server.RequestHandlerClass
        if handler_class is not self._known:
            self._known, self._is_blocking = handler_class, is_blocking(handler_class)
        connection: Connection | ThreadedConnection
        try:
            if proxy is not None:
                connection = self._make_proxied(sock, address, handler_class, proxy)
            elif self._is_blocking:
                connection = self._kinds.threaded(server, server.get_handler_threads(), sock, address, handler_class)
            else:
                connection = self._kinds.plain(server, sock, address, handler_class)
        except (OSError, MemoryError) as error:
            server.admission.release(counted)
            server.report_not_begun(address, "connection", error)
            server.reject(sock, address, "handshake", self._name)
            return
        connection.note_endpoint(self._name)
        server.register_connection(connection)
        if self._is_blocking and isinstance(connection, ThreadedConnection):
            connection.begin()
            server.drain_late(connection)  # an async one asks itself, when it has a handler

    def _make_proxied(
        self, sock: socket.socket, address: Any, handler_class: Any, proxy: ProxyProtocol
    ) -> Connection | ThreadedConnection:
        server = self._server
        if not self._is_blocking:
            return self._kinds.proxied(server, sock, address, handler_class, proxy)
        return self._kinds.proxied_threaded(server, server.get_handler_threads(), sock, address, handler_class, proxy)

    def _cannot_accept(self, error: OSError) -> None:
        server = self._server
        server.live_stats.accept_errors += 1
        if error.errno in OUT_OF_RESOURCES and server.limits.shed == "idle":
            now = asyncio.get_running_loop().time()
            idle = [
                (since, connection.since, connection)
                for connection in server.connections
                if (since := connection.idle_since(now)) is not None
            ]
            if idle:
                min(idle, key=lambda found: found[:2])[2].abort_for("shed")


def _as_handler_class(handle: Any) -> Any:
    """Return a handler class that calls a coroutine function with a reader and a writer; anything else as it is."""
    if not is_handle_function(handle):
        return handle
    function: Any = undo_partial(handle)
    attributes = {
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "handle": lambda self: handle(*self.request),
    }
    return type(function.__name__, (StreamRequestHandler,), attributes)


class StreamServer(BaseServer):
    """A server on any number of endpoints for streams. See :class:`BaseServer`.

    In place of a handler class it takes a coroutine function that is called with a reader and a writer, as
    asyncio.start_server() does.
    """

    def __init__(self, server_address: Any, RequestHandlerClass: Any, **options: Any) -> None:
        check_hooks(type(self))
        check_options(options)
        if isinstance(RequestHandlerClass, Mapping):
            served = {_as_handler_class(handler): endpoints for handler, endpoints in RequestHandlerClass.items()}
            super().__init__(server_address, served, **options)
        else:
            super().__init__(server_address, _as_handler_class(RequestHandlerClass), **options)

    def _check_endpoints(self, RequestHandlerClass: Any) -> None:
        if any(isinstance(endpoint, StdioEndpoint) for endpoint in self.endpoints) and (
            len(self.endpoints) > 1 or not isinstance(self, StdioServer)
        ):
            raise ValueError("stdio: is one connection: give it to aioecho.serve() or run(), and no other endpoint")
        super()._check_endpoints(RequestHandlerClass)

    def _make_listeners(self, bound: list[BoundSocket], handler_classes: list[Any]) -> Sequence[ListeningSocket]:
        return [
            StreamListener(self, bound_socket, handler_class)
            for bound_socket, handler_class in zip(bound, handler_classes, strict=True)
        ]


class _Stdio(StreamListener):
    """In place of a listening socket: one connection, which is there already."""

    def __init__(self, server: "StdioServer", bound: BoundSocket, handler_class: Any) -> None:
        super().__init__(server, bound, handler_class)
        self._bound = bound
        self._stdio_server = server
        self._has_begun = False
        self.resume, self.pause = self._begin, self._do_nothing

    def _begin(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        try:
            address = self.sock.getpeername()
        except OSError:  # it is gone already
            address = ""
        self._accepted(self.sock, address)
        self._stdio_server.end_if_over()

    def _do_nothing(self) -> None:
        pass

    def stop(self, *, keep_backlog: bool) -> None:
        """Close the connection if it has no handler."""
        if not self._has_begun:
            self._has_begun = True
            self._bound.close()

    def set_limits(self, limits: Limits) -> None:
        """Do nothing: there is one connection."""


class StdioServer(StreamServer):
    """Serves the one connection on the program's standard streams, and is shut down when that has ended."""

    _log_level = logging.DEBUG  # it starts and ends with a connection

    def _make_listeners(self, bound: list[BoundSocket], handler_classes: list[Any]) -> Sequence[ListeningSocket]:
        return [
            _Stdio(self, bound_socket, handler_class)
            for bound_socket, handler_class in zip(bound, handler_classes, strict=True)
        ]

    def unregister_connection(self, connection: Any) -> None:
        """Count the connection, and begin the shutdown."""
        super().unregister_connection(connection)
        self.end_if_over()

    def end_if_over(self) -> None:
        """Begin the shutdown if the connection was ended, or rejected."""
        if not self._connections:
            self._begin_shutdown(None)


# BaseServer(address, Handler) serves streams too, and so do classes that users derive from it. What makes connections is
# above BaseServer, for connections know it.
BaseServer._make_listeners = StreamServer._make_listeners  # type: ignore[method-assign, assignment]


class TCPServer(StreamServer):
    """A server on one TCP address, `(host, port)`; host "" is every address, port 0 is any free one. Or on a list of endpoints.

    See :class:`BaseServer` for the rest.
    """

    def _parse_address(self, address: Any) -> list[Endpoint]:
        return super()._parse_address(address) if isinstance(address, str | list) else [TCPEndpoint.at(address)]


class UnixStreamServer(StreamServer):
    """A server on one Unix stream socket: a path, or a name behind a NUL; `mode` sets the file's permissions, as 0o660.

    A stale path, on which no socket listens any more, is replaced. See :class:`BaseServer` for the rest.
    """

    def __init__(
        self, server_address: Any, RequestHandlerClass: Callable[..., Any], *, mode: int | None = None, **options: Any
    ) -> None:
        self._mode = mode
        super().__init__(server_address, RequestHandlerClass, **options)

    def _parse_address(self, address: Any) -> list[Endpoint]:
        return super()._parse_address(address) if isinstance(address, list) else [UnixEndpoint.at(address, self._mode)]
