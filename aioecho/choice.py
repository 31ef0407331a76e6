"""The choice of a server by endpoints and handler classes; and servers for streams and datagrams together."""

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aioecho.config import Limits
from aioecho.datagrams.server import DatagramServer
from aioecho.net import systemd
from aioecho.net.endpoints import InheritedEndpoint, SystemdEndpoint, parse_endpoint
from aioecho.parts import Composite, inherit
from aioecho.server import StdioServer, StreamServer
from aioecho.serving.base import BaseServer
from aioecho.serving.drain import Drain
from aioecho.serving.handler_types import serves_datagrams
from aioecho.serving.lifespan import MakeLifespan
from aioecho.stats import DrainReport

__all__ = ["Service", "are_for_datagrams", "serve"]

KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)


class _Part(BaseServer):
    """One of the servers that make a service. To shut it down is to shut the service down."""

    service: "Service"

    def begin_own_shutdown(self, grace: float, why: str | None) -> Drain:
        """Begin the shutdown of this part alone."""
        return super()._begin_shutdown(grace, why)

    def _begin_shutdown(self, grace: float | None, why: str | None = None) -> Drain:
        self.service._begin_shutdown(grace, why)
        assert self._drain is not None
        return self._drain

    async def shutdown(self, grace: float | None = None) -> DrainReport:
        """Shut the whole service down."""
        return await self.service.shutdown(grace)


class _StreamPart(_Part, StreamServer):
    pass


class _DatagramPart(_Part, DatagramServer):
    def broadcast(self, data: bytes, **options: Any) -> int:
        """Write a message to many clients of the service's streams."""
        if self._is_first():
            return super().broadcast(data, **options)
        return self.service.broadcast(data, **options)

    def publish(self, topic: str, data: bytes, **options: Any) -> int:
        """Write a message to clients of the service's streams in all workers."""
        if self._is_first():
            return super().publish(topic, data, **options)
        return self.service.publish(topic, data, **options)

    def _is_first(self) -> bool:
        """Tell whether the service has no streams, and would pass a message on to this part, which raises TypeError."""
        return self.service.parts[0] is self

    def _check_limits(self, limits: Limits) -> None:
        """Do nothing: the service checks whether any part can have them."""

    def check_own_limits(self, limits: Limits) -> None:
        """Raise ValueError if a limit is set that no handler of this part can have."""
        super()._check_limits(limits)


class Service(Composite):
    """A server for streams and datagrams, with a handler class per kind: one start, one drain, one report.

    `stats` is a :class:`ServiceStats`. A handler's `server` is the part that serves its kind: its `stats` are of that kind, and
    its `shutdown()` shuts all down. ``Limits`` hold for streams as in a server of their own, and for every handler class of
    datagrams. `ssl` is for the streams. In `names` and `sockets` streams come first.

    Args:
        handlers: the handler classes, with the endpoint of every class or a list of them.
        sessions: as for :class:`DatagramServer`, for all handler classes of datagrams.
    """

    _parts: Sequence[_StreamPart | _DatagramPart] = ()

    def __init__(
        self,
        handlers: Mapping[Callable[..., Any], Any],
        *,
        sessions: bool | None = None,
        ssl: Any = None,
        lifespan: MakeLifespan | None = None,
        **options: Any,
    ) -> None:
        super().__init__(None, handlers, ssl=ssl, lifespan=lifespan, **options)
        self.endpoints = []
        streams: dict[Callable[..., Any], Sequence[str]] = {}
        datagrams: dict[Callable[..., Any], Sequence[str]] = {}
        for handler_class, address in handlers.items():
            texts = [address] if isinstance(address, str) else list(address)
            is_for_datagrams = are_for_datagrams(*texts, RequestHandlerClass=handler_class)
            (datagrams if is_for_datagrams else streams)[handler_class] = texts
            kind = socket.SOCK_DGRAM if is_for_datagrams else socket.SOCK_STREAM
            self.endpoints += [parse_endpoint(text, kind) for text in texts]
        if ssl is not None and not streams:
            raise ValueError("ssl is for streams: TLS does not go over datagrams, so leave it out")
        parts: list[_StreamPart | _DatagramPart] = [_StreamPart(None, streams, ssl=ssl, **options)] if streams else []
        parts += [
            _DatagramPart(texts, handler_class, sessions=sessions, **options)
            for handler_class, texts in datagrams.items()
        ]
        for part in parts:
            part.service = self
        self._parts = parts
        self.ids = self.ids  # the parts' too, so that no two of their connections have the same id
        self._check_limits(self.limits)

    def _check_endpoints(self, RequestHandlerClass: Any) -> None:
        """Do nothing: the parts check theirs."""

    # What is set on all parts.

    def _check_limits(self, limits: Limits) -> None:
        """Raise ValueError if a limit is set that no part can have."""
        if all(isinstance(part, _DatagramPart) and not part.has_sessions for part in self._parts):
            for part in self._parts:
                assert isinstance(part, _DatagramPart)
                part.check_own_limits(limits)

    def _apply_limits(self, limits: Limits) -> None:
        self._check_limits(limits)
        for part in self._parts:
            part.limits = limits

    def _timeouts_changed(self) -> None:
        for part in self._parts:
            part.timeouts = self.timeouts

    def _begin_shutdown_of(self, part: BaseServer, grace: float, why: str | None) -> Drain:
        assert isinstance(part, _Part)
        return part.begin_own_shutdown(grace, why)

    def _prepare(self, part: BaseServer) -> None:
        part.state = self.state

    def inherit(self, groups: Sequence[Sequence[str]]) -> None:
        """Serve on other endpoints in place of its own, of the same kinds: see :meth:`BaseServer.inherit`."""
        served = list(zip(self.endpoints, groups, strict=True))
        by_kind = [group for kind in KINDS for endpoint, group in served if endpoint.type == kind]
        inherit(self._parts, by_kind)  # streams first, as in the parts

    def reload_tls(self) -> None:
        """Load the files that `ssl` names anew, now: see :meth:`BaseServer.reload_tls`."""
        if self._renewal is None:
            super().reload_tls()  # which raises
        self._parts[0].reload_tls()


def serve(
    RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any],
    *endpoints: str,
    server_class: type[BaseServer] | None = None,
    **options: Any,
) -> BaseServer:
    """Return a server on all of `endpoints`, to be used with ``async with``.

    It is a :class:`BaseServer` for streams or, where the endpoints are for datagrams, a :class:`DatagramServer`. It
    takes the options of that class. Or it is of the class `server_class`, a subclass of one of aioecho's servers with hooks of
    its own, or other options.

    Or with several handler classes, async and blocking ones, with an endpoint or a list of them for every class:
    ``serve({Chat: "tcp://127.0.0.1:7000", Legacy: ["tcp://127.0.0.1:7001", "unix:legacy.sock"]})``. Where some are for
    datagrams it is a :class:`Service`: ``serve({Query: "tcp://127.0.0.1:53", Packet: "udp://127.0.0.1:53"})``.

    Raises:
        ValueError: the endpoints of one handler class are for both. Or an argument makes no sense.
        TypeError: `server_class` is no class of servers. Or an argument is of the wrong type.
    """
    if server_class is not None:
        if not (isinstance(server_class, type) and issubclass(server_class, BaseServer)):
            raise TypeError(f"server_class is a subclass of aioecho.TCPServer or another server, not {server_class!r}")
        return server_class(list(endpoints) or None, RequestHandlerClass, **options)
    if isinstance(RequestHandlerClass, Mapping):
        if endpoints or not any(map(_is_of_datagrams, RequestHandlerClass.items())):
            return StreamServer(endpoints or None, RequestHandlerClass, **options)
        return Service(RequestHandlerClass, **options)
    if are_for_datagrams(*endpoints, sock=options.get("sock"), RequestHandlerClass=RequestHandlerClass):
        return DatagramServer(endpoints or None, RequestHandlerClass, **options)
    kind = StdioServer if endpoints == ("stdio:",) else StreamServer
    return kind(endpoints or None, RequestHandlerClass, **options)


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
        raise ValueError(f"{stream} is for streams and {datagram} is for datagrams: give a handler class for each")
    return any(found.values())


def _is_of_datagrams(served: tuple[Callable[..., Any], Any]) -> bool:
    handler_class, address = served
    texts = [address] if isinstance(address, str) else address
    return are_for_datagrams(*texts, RequestHandlerClass=handler_class)


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
