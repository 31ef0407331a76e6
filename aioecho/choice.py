"""The choice of a server by endpoints and handler classes; and servers for streams and datagrams together."""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from aioecho.config import Limits
from aioecho.datagrams.server import DatagramServer
from aioecho.net import systemd
from aioecho.net.endpoints import InheritedEndpoint, SystemdEndpoint, parse_endpoint
from aioecho.server import StdioServer, StreamServer
from aioecho.serving.base import BaseServer
from aioecho.serving.drain import Drain
from aioecho.serving.handler_types import serves_datagrams
from aioecho.serving.lifespan import MakeLifespan
from aioecho.serving.live import Connections
from aioecho.stats import DrainReport, ServiceStats

__all__ = ["Service", "are_for_datagrams", "serve"]


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
        return self.service.broadcast(data, **options)

    def publish(self, topic: str, data: bytes, **options: Any) -> int:
        """Write a message to clients of the service's streams in all workers."""
        return self.service.publish(topic, data, **options)

    def _check_limits(self, limits: Limits) -> None:
        """Do nothing: the service checks whether any part can have them."""

    def check_own_limits(self, limits: Limits) -> None:
        """Raise ValueError if a limit is set that no handler of this part can have."""
        super()._check_limits(limits)


class _Drains:
    """The drains of a service's parts, as one."""

    def __init__(self, drains: Sequence[Drain], release: Callable[[], Awaitable[None]]) -> None:
        self._drains = drains
        self._ending = asyncio.ensure_future(self._end(release))

    async def _end(self, release: Callable[[], Awaitable[None]]) -> None:
        await asyncio.wait([drain.task for drain in self._drains])
        await release()

    def seconds_left(self) -> float:
        """Return the seconds until the grace is over; 0 from then on."""
        return min(drain.seconds_left() for drain in self._drains)

    def report(self) -> DrainReport:
        """Return the sums of what the parts have counted so far, and the longest of their times."""
        return self._sum([drain.report() for drain in self._drains])

    async def wait(self) -> DrainReport:
        """Wait until every part has drained, and return the report of all."""
        reports = await asyncio.gather(*(drain.wait() for drain in self._drains))
        await asyncio.shield(self._ending)
        return self._sum(reports)

    @staticmethod
    def _sum(reports: Sequence[DrainReport]) -> DrainReport:
        return DrainReport(
            completed=sum(report.completed for report in reports),
            cancelled=sum(report.cancelled for report in reports),
            aborted=sum(report.aborted for report in reports),
            seconds=max(report.seconds for report in reports),
            unfinished=sum(report.unfinished for report in reports),
        )


class Service(BaseServer):
    """A server for streams and datagrams, with a handler class per kind: one start, one drain, one report.

    `stats` is a :class:`ServiceStats`. A handler's `server` is the part that serves its kind: its `stats` are of that kind, and
    its `shutdown()` shuts all down. ``Limits`` hold for streams as in a server of their own, and for every handler class of
    datagrams. `ssl` is for the streams. In `names` and `sockets` streams come first.

    Args:
        handlers: the handler classes, with the endpoint of every class or a list of them.
        sessions: as for :class:`DatagramServer`, for all handler classes of datagrams.
    """

    _what = "handler"
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
            raise ValueError("ssl is for streams: TLS does not go over datagrams")
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

    # What it is.

    @property
    def parts(self) -> Sequence[BaseServer]:
        """The servers that it is made of: one for streams, and one per handler class of datagrams."""
        return self._parts

    @property
    def names(self) -> Sequence[str]:
        """The endpoint strings of where it listens, with real ports, none twice. Empty before the start."""
        return tuple(dict.fromkeys(name for part in self._parts for name in part.names))

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty when it does not serve."""
        return tuple(sock for part in self._parts for sock in part.sockets)

    def is_serving(self) -> bool:
        """Whether it accepts connections, or reads datagrams."""
        return any(part.is_serving() for part in self._parts)

    @property
    def connections(self) -> Connections:
        """The live connections, and the handlers of datagrams that run: a copy, as they come and go."""
        return Connections(itertools.chain(*(part.connections for part in self._parts)))

    @property
    def stats(self) -> ServiceStats:
        """What it has counted since it started: a copy, as it stands now."""
        stats = ServiceStats()
        for part in self._parts:
            stats.add(part.stats)
        return stats

    def broadcast(self, data: bytes, **options: Any) -> int:
        """Write a message to many of the clients of streams: see :meth:`BaseServer.broadcast`."""
        return self._parts[0].broadcast(data, **options)

    def publish(self, topic: str, data: bytes, **options: Any) -> int:
        """Write a message to clients of streams in all workers: see :meth:`BaseServer.publish`."""
        return self._parts[0].publish(topic, data, **options)

    def deliver(self, topic: str, data: bytes, full: Literal["close", "skip"]) -> None:
        """Write what another worker has published to the clients of streams."""
        self._parts[0].deliver(topic, data, full)

    def note_unpublished(self, count: int) -> None:
        """Count messages that the clients of streams have missed."""
        self._parts[0].note_unpublished(count)

    def owns_this_thread(self) -> bool:
        """Tell whether the caller runs in a thread of a part's blocking handlers. May be called in any thread."""
        return any(part.owns_this_thread() for part in self._parts)

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

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("keep_backlog", "on_accept", "handover", "access_log", "ids", "relay"):
            for part in self._parts:
                setattr(part, name, value)

    # Life.

    async def start(self) -> None:
        """Listen on every endpoint, or on none, and accept and read.

        Raises:
            EndpointError: an endpoint can't be listened on.
            RuntimeError: it was started before, or has been closed.
        """
        if self._was_started or self._is_ending():
            raise RuntimeError("a server can be started once, and not after its end")
        self._was_started = True
        self.event_loop = asyncio.get_running_loop()
        try:
            if self._lifespan is not None:
                self.state = await self._lifespan.begin()
            for part in self._parts:
                part.state = self.state
                part.pause()  # nothing is served unless all can be
                await part.start()
            if self.when_bound is not None:
                self.when_bound()
        except BaseException:
            self.keep_backlog = True
            self.close()
            await self._end_program()
            raise
        self.socket, self._address = self._parts[0].socket, self._parts[0].server_address
        if not self.admission.is_paused:
            self.resume()

    def close(self) -> None:
        """Stop accepting and reading, for good. Handlers that run, and what has come by now, are served to their end."""
        self.admission.close()
        for part in self._parts:
            part.close()

    def pause(self) -> None:
        """Leave new clients and datagrams in the kernel's queues, until :meth:`resume`."""
        super().pause()
        for part in self._parts:
            part.pause()

    def resume(self) -> None:
        """Accept and read again, after :meth:`pause`."""
        super().resume()
        for part in self._parts:
            part.resume()

    def reload_tls(self) -> None:
        """Load the files that `ssl` names anew, now: see :meth:`BaseServer.reload_tls`."""
        if self._renewal is None:
            super().reload_tls()  # which raises
        self._parts[0].reload_tls()

    def _begin_shutdown(self, grace: float | None, why: str | None = None) -> Drain:
        seconds = self.grace if grace is None else grace
        drains = [part.begin_own_shutdown(seconds, why) for part in self._parts]
        if self._drain is None:
            self._drain = _Drains(drains, self._end_program)  # type: ignore[assignment]
            if self._stopping is not None:
                self._stopping.set_result(None)
        assert self._drain is not None
        return self._drain


def serve(
    RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any], *endpoints: str, **options: Any
) -> BaseServer:
    """Return a server on all of `endpoints`, to be used with ``async with``.

    It is a :class:`BaseServer` for streams or, where the endpoints are for datagrams, a :class:`DatagramServer`. It
    takes the options of that class.

    Or with several handler classes, async and blocking ones, with an endpoint or a list of them for every class:
    ``serve({Chat: "tcp://127.0.0.1:7000", Legacy: ["tcp://127.0.0.1:7001", "unix:legacy.sock"]})``. Where some are for
    datagrams it is a :class:`Service`: ``serve({Query: "tcp://127.0.0.1:53", Packet: "udp://127.0.0.1:53"})``.

    Raises:
        ValueError: the endpoints of one handler class are for both. Or an argument makes no sense.
    """
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
