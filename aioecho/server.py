"""Servers for streams, which make a connection of each client that they accept; and the choice of a server by endpoints."""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aioecho.blocking.streams import ThreadedConnection
from aioecho.config import Limits
from aioecho.datagrams.server import ONE_HANDLER_CLASS, DatagramServer
from aioecho.net import systemd
from aioecho.net.acceptor import Acceptor
from aioecho.net.binding import BoundSocket
from aioecho.net.endpoints import (
    Endpoint,
    InheritedEndpoint,
    SystemdEndpoint,
    TCPEndpoint,
    UnixEndpoint,
    parse_endpoint,
)
from aioecho.net.watch import OUT_OF_RESOURCES
from aioecho.serving.base import BaseServer, ListeningSocket
from aioecho.serving.connection import Connection
from aioecho.serving.end_record import log_end
from aioecho.serving.handler_types import is_blocking, serves_datagrams

__all__ = ["StreamServer", "TCPServer", "UnixStreamServer", "are_for_datagrams", "serve"]


class _ListeningSocket:
    """One of a server's listening sockets: makes a connection of each client that it accepts, or rejects it.

    `handler_class` is None where the server has one for all of its sockets, which may be replaced at any time.
    """

    def __init__(self, server: BaseServer, bound: BoundSocket, handler_class: Any) -> None:
        self._server = server
        self._handler_class = handler_class
        self._acceptor = Acceptor(
            bound, on_accept=self._accepted, has_room=server.admission.has_room, on_error=self._cannot_accept
        )
        self.sock = bound.sock
        self.resume, self.pause = self._acceptor.resume, self._acceptor.pause

    def stop(self, *, keep_backlog: bool) -> None:
        """Accept the clients in the backlog, unless `keep_backlog`, and close the socket."""
        self._acceptor.close(backlog=self._server.limits.backlog, keep_backlog=keep_backlog)

    def set_limits(self, limits: Limits) -> None:
        """Apply the limit that is the socket's own."""
        self.sock.listen(limits.backlog)

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        server = self._server
        reason = server.admission.admit(address)
        if reason is not None:
            self._reject(sock, address, reason)
            return
        handler_class = self._handler_class
        if handler_class is None:
            handler_class = server.RequestHandlerClass
        connection: Connection | ThreadedConnection
        try:
            if is_blocking(handler_class):
                connection = ThreadedConnection(server, server.get_handler_threads(), sock, address, handler_class)
            else:
                connection = Connection(server, sock, address, handler_class)
        except (OSError, MemoryError) as error:
            server.admission.leave(address)
            server.report_not_begun(address, "connection", error)
            self._reject(sock, address, "handshake")
            return
        server.register_connection(connection)
        if isinstance(connection, ThreadedConnection):
            connection.begin()

    def _reject(self, sock: socket.socket, address: Any, reason: str) -> None:
        sock.close()
        stats = self._server.live_stats
        stats.accepted += 1
        stats.rejected += 1
        stats.reasons[reason] += 1
        log_end(address, reason)

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
                min(idle, key=lambda found: found[:2])[2].cut("shed")


class StreamServer(BaseServer):
    """A server on any number of endpoints for streams. See :class:`BaseServer`."""

    def _make_listeners(self, bound: list[BoundSocket], handler_classes: list[Any]) -> Sequence[ListeningSocket]:
        return [
            _ListeningSocket(self, bound_socket, handler_class)
            for bound_socket, handler_class in zip(bound, handler_classes, strict=True)
        ]


# BaseServer(address, Handler) serves streams too, and so do classes that users derive from it. What makes connections is
# above BaseServer, for connections know it.
BaseServer._make_listeners = StreamServer._make_listeners  # type: ignore[method-assign, assignment]


class TCPServer(StreamServer):
    """A server on one TCP address, `(host, port)`; host "" is every address, port 0 is any free one.

    See :class:`BaseServer` for the rest.
    """

    def _parse_address(self, address: Any) -> list[Endpoint]:
        return super()._parse_address(address) if isinstance(address, str) else [TCPEndpoint.at(address)]


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
        return [UnixEndpoint.at(address, self._mode)]


def serve(
    RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any], *endpoints: str, **options: Any
) -> BaseServer:
    """Return a server on all of `endpoints`, to be used with ``async with``.

    It is a :class:`BaseServer` for streams or, where the endpoints are for datagrams, a :class:`DatagramServer`, whose
    options it takes.

    Or with several handler classes for streams, async and blocking ones, with an endpoint or a list of them for every class:
    ``serve({Chat: "tcp://127.0.0.1:7000", Legacy: ["tcp://127.0.0.1:7001", "unix:legacy.sock"]})``.

    Raises:
        ValueError: they are for both; that takes two servers. Or an argument makes no sense.
    """
    if isinstance(RequestHandlerClass, Mapping):
        if any(serves_datagrams(handler_class) for handler_class in RequestHandlerClass):
            raise TypeError(ONE_HANDLER_CLASS)
        return StreamServer(endpoints or None, RequestHandlerClass, **options)
    if are_for_datagrams(*endpoints, sock=options.get("sock"), RequestHandlerClass=RequestHandlerClass):
        return DatagramServer(endpoints or None, RequestHandlerClass, **options)
    return StreamServer(endpoints or None, RequestHandlerClass, **options)


def are_for_datagrams(
    *endpoints: str, sock: socket.socket | None = None, RequestHandlerClass: Callable[..., Any] | None = None
) -> bool:
    """Return whether endpoints, and a socket object, are for datagrams.

    A socket that exists is for what the handler class serves, if that is known, and else for what it can do: with the wrong
    one the server itself says so when it starts.

    Raises:
        ValueError: some are and some are not, or one is no endpoint.
    """
    wanted = serves_datagrams(RequestHandlerClass)
    found = {text: _is_for_datagrams(text, wanted) for text in endpoints}
    if sock is not None:
        found["sock"] = sock.type == socket.SOCK_DGRAM if wanted is None else wanted
    if len(set(found.values())) > 1:
        stream, datagram = (next(text for text, is_one in found.items() if is_one is which) for which in (False, True))
        raise ValueError(f"{stream} is for streams and {datagram} is for datagrams: that takes two servers")
    return any(found.values())


def _is_for_datagrams(text: str, wanted: bool | None) -> bool:
    endpoint = parse_endpoint(text)
    if not isinstance(endpoint, InheritedEndpoint | SystemdEndpoint):
        return endpoint.type == socket.SOCK_DGRAM
    if wanted is not None:
        return wanted
    if isinstance(endpoint, SystemdEndpoint):
        descriptor = next((number for name, number in systemd.listen_fds() if name == endpoint.name), -1)
    else:
        assert isinstance(endpoint.source, int)
        descriptor = endpoint.source
    try:
        sock = socket.socket(fileno=descriptor)
    except (OSError, ValueError):  # no socket: the server says so when it tries to listen on it
        return False
    try:
        return sock.type == socket.SOCK_DGRAM
    finally:
        sock.detach()
