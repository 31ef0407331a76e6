"""Several servers as one: one start, one drain, one report."""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from aioecho.serving.base import BaseServer
from aioecho.serving.drain import Drain
from aioecho.serving.live import Connections
from aioecho.stats import DatagramStats, DrainReport, ServiceStats

__all__ = ["Composite", "inherit"]

# The attributes that workers and users set on a composite server for all of its parts.
SET_ON_PARTS = ("keep_backlog", "on_accept", "handover", "access_log", "ids", "relay")


class _Drains:
    """The drains of several servers, as one."""

    def __init__(self, drains: Sequence[Drain], release: Callable[[], Awaitable[None]]) -> None:
        self._drains = drains
        self.task = asyncio.ensure_future(self._end(release))

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
        await asyncio.shield(self.task)
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


def inherit(servers: Sequence[BaseServer], groups: Sequence[Sequence[str]]) -> None:
    """Give every server, in order, as many of the groups of endpoints as it has endpoints: see BaseServer.inherit()."""
    rest = iter(groups)
    for server in servers:
        server.inherit(list(itertools.islice(rest, len(server.endpoints))))


class Composite(BaseServer):
    """A server that is made of others, `_parts`. It has no sockets of its own."""

    _what = "handler"
    _parts: Sequence[BaseServer] = ()

    # What it is.

    @property
    def parts(self) -> Sequence[BaseServer]:
        """The servers that it is made of in the end, which are made of no others."""
        return [inner for part in self._parts for inner in (part.parts if isinstance(part, Composite) else [part])]

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
        for part in self.parts:
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
        """Count messages that clients of streams have missed, for the first server of streams: there is one count for all."""
        of_streams = (part for part in self.parts if not isinstance(part.live_stats, DatagramStats))
        next(of_streams, self.parts[0]).note_unpublished(count)

    def owns_this_thread(self) -> bool:
        """Tell whether the caller runs in a thread of a part's blocking handlers. May be called in any thread."""
        return any(part.owns_this_thread() for part in self._parts)

    def waits_for(self, task: object) -> bool:
        """Tell whether its drain waits for this task, or that of a part does."""
        return super().waits_for(task) or any(part.waits_for(task) for part in self._parts)

    # What is set on all parts.

    def _begin_shutdown_of(self, part: BaseServer, grace: float, why: str | None) -> Drain:
        """Begin the shutdown of a part alone."""
        raise NotImplementedError

    def _prepare(self, part: BaseServer) -> None:
        """Do what is to be done before a part starts."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in SET_ON_PARTS:
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
            raise RuntimeError("a server can be started once, and not after its end: make another one")
        self._was_started = True
        self.event_loop = asyncio.get_running_loop()
        self.measure_loop(self.event_loop)
        try:
            if self._lifespan is not None:
                self.state = await self._lifespan.begin()
            for part in self._parts:
                self._prepare(part)
                part.is_part = True
                part.hold()  # nothing is served unless all can be; pause() and resume() hold as ever meanwhile
                await part.start()
            if self.when_bound is not None:
                self.when_bound()
        except BaseException:
            self.keep_backlog = True
            await self._undo_start()
            raise
        self.socket, self._address = self._parts[0].socket, self._parts[0].server_address
        if not self._is_held:
            self.release_hold()

    async def _undo_start(self) -> None:
        self.close()
        for part in (self, *self._parts):
            part.measure_loop(None)
        await self._end_program()

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

    def _resume_listeners(self) -> None:
        """Do nothing: the parts have the sockets, and the clients that wait."""

    def release_hold(self) -> None:
        """Accept and read from now on, where a part is not paused. Not for users."""
        super().release_hold()
        for part in self._parts:
            part.release_hold()

    def resume(self) -> None:
        """Accept and read again, after :meth:`pause`."""
        super().resume()
        for part in self._parts:
            part.resume()

    def _begin_shutdown(self, grace: float | None, why: str | None = None) -> Drain:
        seconds = self.grace if grace is None else grace
        drains = [self._begin_shutdown_of(part, seconds, why) for part in self._parts]
        if self._drain is None:
            self._drain = _Drains(drains, self._release)  # type: ignore[assignment]
            self._tell_stopping(grace, why)
        assert self._drain is not None
        return self._drain
