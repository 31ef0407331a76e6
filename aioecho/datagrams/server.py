"""Datagram servers: which handler gets a datagram, and which datagram is dropped."""

import asyncio
import logging
import socket
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from aioecho.blocking.datagrams import ThreadedDatagram
from aioecho.config import Limits, Timeouts
from aioecho.datagrams.session_table import SessionTable
from aioecho.datagrams.sessions import Session
from aioecho.datagrams.task import DatagramTask
from aioecho.net.binding import BoundSocket
from aioecho.net.datagram_socket import DatagramSocket, DatagramTransport
from aioecho.net.endpoints import Endpoint, UDPEndpoint, UnixDatagramEndpoint
from aioecho.runtime.logs import BoundedLog, format_address
from aioecho.serving.base import BaseServer
from aioecho.serving.end_record import handlers_part
from aioecho.serving.handler_types import is_blocking, makes_sessions
from aioecho.stats import DatagramStats

__all__ = ["DatagramServer", "UDPServer", "UnixDatagramServer"]

logger = logging.getLogger("aioecho.datagram")

ONE_HANDLER_CLASS = "several handler classes go to aioecho.serve(), which makes a server for each"

# Datagrams that waited for room, whose handlers begin in one turn of the loop.
BEGUN_PER_TURN = 64


class DatagramServer(BaseServer):
    """Serves datagrams, with a handler object for each of them, or for each peer.

    Args:
        server_address: an endpoint string, or several, for datagrams.
        RequestHandlerClass: a subclass of DatagramRequestHandler, or of DatagramSessionHandler; or anything that, called
            with `(request, client_address, server)`, gives one. A handler class of socketserver's for datagrams, or a
            partial of one, is called in a thread: ``Limits.max_threads`` at a time, and ``Limits.max_queue`` wait for one.
        sessions: whether there is a handler for each peer. None: if RequestHandlerClass is, or is a functools.partial of, a
            DatagramSessionHandler.

    The rest is as for :class:`BaseServer`, without `ssl`. `connections` are the handlers that run. A datagram for which
    there is no room is dropped and counted in `stats`, a :class:`DatagramStats`: see :class:`Limits` for the limits. A
    stopping server serves what has come by then, and reads no more.
    """

    # So an object's other attributes are no more than 30: beyond that Python 3.11 looks up any of them, and any method, at
    # several times the cost.
    __slots__ = (
        "_at_once",
        "_begins_queued",
        "_error_log",
        "_is_stopping",
        "_longest",
        "_most",
        "_queue",
        "_sessions",
        "_sockets",
        "_spare",
        "has_sessions",
    )
    _socket_type = socket.SOCK_DGRAM
    _what = "datagram"
    live_stats: DatagramStats

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[..., Any],
        *,
        sessions: bool | None = None,
        **options: Any,
    ) -> None:
        if options.get("ssl") is not None:
            raise ValueError("ssl is for streams: TLS does not go over datagrams")
        if isinstance(RequestHandlerClass, Mapping):
            raise TypeError(ONE_HANDLER_CLASS)
        super().__init__(server_address, RequestHandlerClass, **options)
        self.has_sessions = makes_sessions(RequestHandlerClass) if sessions is None else sessions
        self._sockets: list[DatagramSocket] = []
        self._is_stopping = False
        # Handlers for single datagrams.
        self._spare: DatagramTask | None = None
        self._at_once = 0  # handlers that ended without waiting, which live_stats does not count
        self._queue: deque[tuple[tuple[bytes, DatagramTransport], Any]] = deque()
        self._begins_queued = False
        self._sessions = SessionTable(self)
        self._error_log = BoundedLog(logger, logging.ERROR)

    def _make_stats(self) -> DatagramStats:
        return DatagramStats()

    # What it is.

    @property
    def stats(self) -> DatagramStats:
        """What it has counted since it started, and what the kernel counts: a copy, as it stands now."""
        stats = self.live_stats.copy()
        at_once, running = self._at_once, self._first_step() is not None
        stats.accepted += at_once + running
        stats.received += at_once + running
        stats.handled += at_once + running
        stats.active += running
        stats.completed += at_once
        if at_once:
            stats.reasons["finished"] += at_once
        stats.kernel_drops += sum(sock.new_kernel_drops() for sock in self._sockets)
        return stats

    @property
    def connections(self) -> Collection[Any]:
        """The handlers that run: a copy, as they come and go."""
        running = self._first_step()
        return frozenset(self._connections if running is None else {*self._connections, running})

    def _first_step(self) -> DatagramTask | None:
        """Return the handler that takes its first step right now, if it is not registered; nearly all never are."""
        spare = self._spare
        if spare is None or spare.is_counted or not spare.is_stepping():
            return None
        # None for another thread, which only looks on: the step may end meanwhile.
        return spare if asyncio._get_running_loop() is self.event_loop else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the exception that is being handled, which a handler raised. The server goes on whatever it was.

        As it is here: an ERROR record with the handler's part of the traceback, at most one in a second, as any peer can send
        anything. Where :meth:`is_peers_fault`, a record at DEBUG without a traceback.
        """
        error = sys.exception()
        address = format_address(client_address)
        if error is None or self.is_peers_fault(error):
            logger.debug("a datagram from %s was not handled to its end: %r", address, error)
        else:
            self._error_log.report("the handler of a datagram from %s raised", address, exc_info=handlers_part(error))

    @property
    def handler_timeouts(self) -> Timeouts:
        """The timeouts of the handler class, or else the server's."""
        return self.timeouts_of(self.RequestHandlerClass)

    def _timeouts_changed(self) -> None:
        """Do nothing: `send` and `session` alone apply to datagrams, and they are looked up when they are needed."""

    # Life.

    def _make_listeners(self, bound: list[BoundSocket], handler_classes: list[Any]) -> Sequence[DatagramSocket]:
        self._longest, self._most = self.limits.max_datagram, self.limits.max_handlers
        on_datagram = self._sessions.receive if self.has_sessions else self._take_datagram
        if is_blocking(self.RequestHandlerClass):
            on_datagram = self._take_for_thread
        self._sockets = [
            DatagramSocket(
                each,
                on_datagram=on_datagram,
                stats=self.live_stats,
                on_turn_end=self._leave,
                limits=self.limits,
                send_timeout=self.handler_timeouts.send,
            )
            for each in bound
        ]
        return list(self._sockets)

    def _apply_limits(self, limits: Limits) -> None:
        self._longest, self._most = limits.max_datagram, limits.max_handlers
        for sock in self._sockets:
            sock.set_limits(limits)
        self._begin_queued_later()  # there may be room for them now

    def close(self) -> None:
        """Serve what has come by now, and then read no more, once and for all. Handlers that run can still reply.

        Sessions that live get their peers' datagrams as long as they live; a peer without one gets none.

        If the attribute `keep_backlog` was set to True, what has come is left to other processes, which read the same sockets.
        """
        self.admission.close()
        if self._listeners:
            self._listeners = []
            if self._spare is not None:
                self._spare.is_special = True
            self._is_stopping = True
            for sock in self._sockets:
                sock.stop(keep_backlog=self.keep_backlog)
            self._is_stopping = False
            self._sessions.is_closed = True
            if len(self._sessions) and not self.keep_backlog:
                for sock in self._sockets:
                    sock.resume()
        self._close_if_done()

    def _is_idle(self) -> bool:
        return not (self._connections or self._queue)

    def sockets_to_close_in_child(self) -> Iterable[int]:
        """Return the descriptors of its sockets that are open now, for a process that was forked."""
        return [sock.sock.fileno() for sock in self._sockets]

    def _close_if_done(self) -> None:
        """Close the sockets when no handler can have anything to send any more."""
        if not (self._listeners or self._is_stopping) and self._is_idle():
            spare = self._spare
            if spare is None or not spare.is_stepping():
                self._close_sockets()

    def _close_sockets(self) -> None:
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            sock.close()
        self._sessions.stop()
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.retire()

    def _drop_waiting(self) -> int:
        if self._queue:
            self.live_stats.drops["stopped"] += len(self._queue)
            self.live_stats.queued -= len(self._queue)
            self._queue.clear()
        return 0  # they are no connections

    async def _release(self) -> None:
        try:
            await super()._release()
        finally:
            self._close_sockets()
            await asyncio.sleep(0)  # the spare task ends

    def task_ended(self, ended: Any, task: "asyncio.Task[None]") -> None:
        """Count a handler whose task has ended, and begin what has waited for it to."""
        # Waiting datagrams are begun before the end is counted: a drain is over when no handler is left.
        if isinstance(ended, Session):
            self.replace_session(ended)
        elif self._queue:
            self._connections.discard(ended)
            self._begin_queued()
        super().task_ended(ended, task)

    def unregister_connection(self, connection: Any) -> None:
        """Count a handler that has ended, and close the sockets if it was the last one of a server that stops."""
        self._count_end(connection)
        self._resume_listeners()
        self._close_if_done()

    # A handler for each datagram.

    @property
    def is_special(self) -> bool:
        """Whether each datagram is to be counted as its handler begins, and not only when it has ended."""
        return not self._listeners or self.on_accept is not None

    def _take_datagram(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        spare = self._spare
        if (
            spare is None
            or spare.is_special
            or spare.request is not None  # it is in its handler that this one was read
            or len(data) > self._longest
            or len(self._connections) >= self._most
            or self._queue
            or not (spare.is_entered or spare.enter())
        ):
            self._take_special(data, client_address, transport)
            return
        spare.request = (data, transport)
        spare.client_address = client_address
        yielded = spare.resume()
        if yielded is spare.parking and not spare.is_special:
            self._at_once += 1  # as nearly all do, so this is all that is done for them
        else:
            self._settle(spare, yielded)

    def _take_special(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        """Take a datagram that may have to wait or to be dropped, or whose handler is to be counted as it begins."""
        self._leave()
        stats, limits = self.live_stats, self.limits
        if len(data) > self._longest:
            stats.received += 1
            stats.drops["truncated"] += 1
        elif len(self._connections) < limits.max_handlers and not self._queue:
            self._begin((data, transport), client_address)
        elif len(self._queue) < limits.max_queue:
            stats.received += 1
            stats.queued += 1
            self._queue.append(((data, transport), client_address))
        else:
            stats.received += 1
            stats.drops["queue full"] += 1

    def _leave(self) -> None:
        """Let the spare task be the current one no longer, as it stays between the datagrams that are read in one turn."""
        spare = self._spare
        if spare is not None and spare.request is None:
            spare.leave()

    def _begin(self, request: tuple[bytes, DatagramTransport], client_address: Any) -> None:
        spare = self._spare
        if spare is None or spare.is_retired or spare.request is not None or not spare.enter():
            if asyncio.current_task() is not None:
                later = DatagramTask(self, request, client_address)
                self._register(later)
                later.count_end()
                return
            self._spare = spare = DatagramTask(self)
            spare.enter()
        spare.request = request
        spare.client_address = client_address
        self._settle(spare, spare.resume())

    def _settle(self, task: DatagramTask, yielded: Any) -> None:
        """Do what remains to be done about a datagram after its task was resumed and has yielded something."""
        if task is self._spare:
            self._spare = None
        task.leave()
        is_free = task.settle(yielded)
        if not task.is_counted:
            self._register(task)
        if is_free:
            self._count_end(task)
            task.reset()
            self._spare = task
            self._close_if_done()
        else:
            task.count_end()

    def _take_for_thread(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        stats, limits = self.live_stats, self.limits
        stats.received += 1
        if len(data) > self._longest:
            stats.drops["truncated"] += 1
        elif len(self._connections) < limits.max_threads + limits.max_queue:
            stats.handled += 1
            threaded = ThreadedDatagram(self, self.get_handler_threads(), data, client_address, transport)
            self.register_connection(threaded)
            threaded.begin()
        else:
            stats.drops["queue full"] += 1

    def _count_end(self, connection: Any) -> None:
        if connection.outcome == "rejected" and isinstance(connection, DatagramTask | ThreadedDatagram):
            self.live_stats.handled -= 1
            self.live_stats.drops[connection.reason] += 1
        elif (
            isinstance(connection, ThreadedDatagram) and connection.thread is None and connection.outcome == "cancelled"
        ):
            self.live_stats.handled -= 1
            self.live_stats.drops["stopped"] += 1
        super()._count_end(connection)

    def _register(self, task: DatagramTask) -> None:
        task.is_counted = task.is_special = True
        self.live_stats.received += 1
        self.live_stats.handled += 1
        self.register_connection(task)

    def _begin_queued(self) -> None:
        """Begin datagrams that wait in the queue, as far as there is room; the rest in the loop's next turn."""
        self._begins_queued = False
        for _ in range(BEGUN_PER_TURN):
            if not self._queue or len(self._connections) >= self.limits.max_handlers:
                return
            request, client_address = self._queue.popleft()
            self.live_stats.queued -= 1
            self.live_stats.received -= 1  # it is counted again where it is begun
            self._begin(request, client_address)
        self._begin_queued_later()

    def _begin_queued_later(self) -> None:
        if self._queue and not self._begins_queued:
            self._begins_queued = True
            asyncio.get_running_loop().call_soon(self._begin_queued)

    # A handler for each peer.

    def replace_session(self, ended: Session) -> None:
        """Forget a session that has ended; what its peer has sent since goes to a new one."""
        self._connections.discard(ended)
        self._sessions.replace(ended)


class UDPServer(DatagramServer):
    """A server on one UDP address, `(host, port)`; host "" is every address, port 0 is any free one.

    On every address it replies from the one that was asked. See :class:`DatagramServer` for the rest.
    """

    def _parse_address(self, address: Any) -> list[Endpoint]:
        return super()._parse_address(address) if isinstance(address, str) else [UDPEndpoint.at(address)]


class UnixDatagramServer(DatagramServer):
    """A server on one Unix datagram socket: a path, or a name behind a NUL; `mode` sets the file's permissions, as 0o660.

    A stale path, to which no socket is bound any more, is replaced. See :class:`DatagramServer` for the rest.
    """

    def __init__(
        self, server_address: Any, RequestHandlerClass: Callable[..., Any], *, mode: int | None = None, **options: Any
    ) -> None:
        self._mode = mode
        super().__init__(server_address, RequestHandlerClass, **options)

    def _parse_address(self, address: Any) -> list[Endpoint]:
        return [UnixDatagramEndpoint.at(address, self._mode)]
