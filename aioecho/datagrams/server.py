"""Datagram servers: their limits and hooks, their sockets, and their life up to the end of a stop."""

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aioecho.blocking.datagrams import ThreadedDatagram
from aioecho.config import Limits, Timeouts
from aioecho.datagrams.batches import Batch, BatchDispatcher, check_batch_limits
from aioecho.datagrams.dispatcher import Dispatcher
from aioecho.datagrams.handover import Handover
from aioecho.datagrams.proxied import Receive, behind_header
from aioecho.datagrams.run import DatagramRun
from aioecho.datagrams.session_table import SessionTable
from aioecho.datagrams.sessions import Session
from aioecho.datagrams.task import DatagramTask
from aioecho.net.bound import BoundSocket
from aioecho.net.datagram_socket import DatagramSocket
from aioecho.net.datagram_transport import DatagramTransport
from aioecho.net.endpoints import Endpoint, UDPEndpoint, UnixDatagramEndpoint
from aioecho.runtime.logs import BoundedLog, format_address
from aioecho.serving.base import BaseServer
from aioecho.serving.drain import Drain
from aioecho.serving.end_record import MistakeLog
from aioecho.serving.handler_types import is_blocking, makes_batches, makes_sessions
from aioecho.serving.live import Connections
from aioecho.serving.porting import check_hooks
from aioecho.stats import DatagramStats

__all__ = ["DatagramServer", "UDPServer", "UnixDatagramServer"]

logger = logging.getLogger("aioecho.datagram")

ONE_HANDLER_CLASS = "several handler classes go to aioecho.serve(), which makes a server for each"
NO_ACCEPT_RATE = (
    "accept_rate is for connections and for sessions, and this server has a handler for each datagram: leave it out, and set"
    " max_handlers, max_queue or max_per_host"
)


class DatagramServer(BaseServer):
    """Serves datagrams, with a handler object for each datagram, for each peer, or for all that have come.

    Args:
        server_address: an endpoint string, or several, for datagrams.
        RequestHandlerClass: a subclass of DatagramRequestHandler, DatagramSessionHandler or DatagramBatchHandler; or what,
            called with `(request, client_address, server)`, makes one of the first two. A handler class of socketserver's
            for datagrams, or a partial of one, is called in a thread: ``Limits.max_threads`` at a time, and
            ``Limits.max_queue`` wait for one.
        sessions: whether there is a handler for each peer. None: if RequestHandlerClass is, or is a functools.partial of, a
            DatagramSessionHandler.

    The rest is as for :class:`BaseServer`, without `ssl`. `connections` are the handlers that run. A datagram for which
    there is no room is dropped and counted in `stats`, a :class:`DatagramStats`: see :class:`Limits` for the limits. A
    stopping server serves what has come by then, and reads no more.
    """

    # So an object's other attributes are at most 30: of more Python 3.11 looks up every one at several times the cost.
    __slots__ = (
        "_dispatcher",
        "_error_log",
        "_is_stopping",
        "_makes_batches",
        "_sessions",
        "_sockets",
        "_warnings",
        "has_sessions",
    )
    _socket_type = socket.SOCK_DGRAM
    _what = "datagram"
    live_stats: DatagramStats
    handover: Handover | None = None
    """What a worker hands its sessions over with."""

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[..., Any],
        *,
        sessions: bool | None = None,
        **options: Any,
    ) -> None:
        check_hooks(type(self))
        if options.get("ssl") is not None:
            raise ValueError("ssl is for streams: TLS does not go over datagrams, so leave it out")
        if isinstance(RequestHandlerClass, Mapping):
            raise TypeError(ONE_HANDLER_CLASS)
        super().__init__(server_address, RequestHandlerClass, **options)
        self.has_sessions = makes_sessions(RequestHandlerClass) if sessions is None else sessions
        self._makes_batches = makes_batches(RequestHandlerClass)
        self._check_limits(self.limits)
        self._sockets: list[DatagramSocket] = []
        self._is_stopping = False
        self._dispatcher = (BatchDispatcher if self._makes_batches else Dispatcher)(self, self._connections)
        self._sessions = SessionTable(self)
        self._error_log = MistakeLog(logger)
        # Besides mistakes no more than two records a second, whatever peers send: the sockets have a log as the second one.
        self._warnings = BoundedLog(logger, logging.WARNING, every=2.0)

    def _make_stats(self) -> DatagramStats:
        return DatagramStats()

    # What it is.

    @property
    def stats(self) -> DatagramStats:
        """What it has counted since it started, and what the kernel counts: a copy, as it stands now."""
        stats = self.live_stats.copy()
        self._dispatcher.add_uncounted(stats, self._first_step() is not None)
        stats.kernel_drops += sum(sock.new_kernel_drops() for sock in self._sockets)
        return stats

    @property
    def connections(self) -> Connections:
        """The handlers that run: a copy, as they come and go."""
        running = self._first_step()
        return Connections(self._connections if running is None else {*self._connections, running})

    def _first_step(self) -> DatagramTask | None:
        # Another thread only looks on: the step may end meanwhile.
        return self._dispatcher.first_step() if asyncio._get_running_loop() is self.event_loop else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the exception that is being handled, which a handler raised. The server goes on whatever it was.

        As it is here: an ERROR record with the handler's part of the traceback, one a second for errors of one type that one
        line of code raises, as any peer can send anything. Where :meth:`is_peers_fault`, a record at DEBUG without a traceback.
        """
        error = sys.exception()
        address = format_address(client_address)
        if error is None or self.is_peers_fault(error):
            logger.debug("a datagram from %s was not handled to its end: %r", address, error)
        else:
            self._error_log.report(error, "the handler of a datagram from %s raised", address)

    @property
    def handler_timeouts(self) -> Timeouts:
        """The timeouts of the handler class, or else the server's."""
        return self.timeouts_of(self.RequestHandlerClass)

    def _check_message(self, *_: Any) -> None:
        raise TypeError("broadcast() is for streams: datagrams are sent by a handler's transport, to an address")

    def _timeouts_changed(self) -> None:
        runs = (each for each in self._connections if isinstance(each, DatagramRun))
        self.timeout_sweeper.mark_all(runs, self.handler_timeouts)

    # Life.

    def _make_listeners(self, bound: list[BoundSocket], handler_classes: list[Any]) -> Sequence[DatagramSocket]:
        on_datagram: Receive = self._sessions.receive if self.has_sessions else self._dispatcher.receive
        if is_blocking(self.RequestHandlerClass):
            on_datagram = self._receive_for_thread
        networks = self.admission.networks
        guarded = on_datagram if networks is None else networks.guard(on_datagram, self.drop)
        dispatcher = next((each for each in (self._dispatcher, self._sessions) if guarded == each.receive), None)
        log = BoundedLog(logging.getLogger("aioecho.datagram_socket"), logging.WARNING, every=2.0)
        self._sockets = [
            DatagramSocket(
                each,
                on_datagram=guarded if each.proxy is None else behind_header(self, each.proxy, on_datagram, networks),
                stats=self.live_stats,
                on_turn_end=self._dispatcher.end_turn,
                on_gone=self._sessions.end_gone,
                log=log,
                limits=self.limits,
                send_timeout=self.handler_timeouts.send,
                reads_all=self._makes_batches,
                dispatcher=dispatcher if each.proxy is None else None,
            )
            for each in bound
        ]
        self._tell_of_receive_buffer(self.limits.receive_buffer)
        self._sessions.sockets = {sock.bound.name: sock for sock in self._sockets}
        if on_datagram != self._sessions.receive:
            self.handover = None  # each datagram is for any worker
        elif self.handover is not None:
            self.handover.add(self._sessions)
        return list(self._sockets)

    def _resume_listeners(self) -> None:
        if self.handover is None or not self.handover.is_others_turn or self.admission.is_closing:
            super()._resume_listeners()

    @property
    def gets_datagrams(self) -> bool:
        """Whether datagrams reach its sessions: it reads, or a successor passes them on."""
        return not self.keep_backlog or (self.handover is not None and self.handover.has_left)

    def stop_reading(self) -> None:
        """Leave what comes in the kernel's queues."""
        for sock in self._sockets:
            sock.pause()

    def read_on(self) -> None:
        """Read, unless the server is paused or another worker's turn has come; the peers of sessions as long as these live."""
        if self._listeners:
            self._resume_listeners()
        else:
            for sock in self._sockets:
                sock.resume()

    def _tell_of_receive_buffer(self, wanted: int | None) -> None:
        found = min((sock.receive_buffer for sock in self._sockets), default=wanted)
        if wanted is not None and found is not None and found < wanted:
            logger.warning(
                "receive_buffer is %d bytes, as the system allows no more (net.core.rmem_max), not %d", found, wanted
            )

    def _check_limits(self, limits: Limits) -> None:
        """Raise ValueError if a limit is set that no handler of this server can have."""
        if limits.accept_rate is not None and not self.has_sessions:
            raise ValueError(NO_ACCEPT_RATE)
        if self._makes_batches:
            check_batch_limits(limits)

    def _apply_limits(self, limits: Limits) -> None:
        self._check_limits(limits)
        for sock in self._sockets:
            sock.set_limits(limits)
        if limits.receive_buffer != self.limits.receive_buffer:
            self._tell_of_receive_buffer(limits.receive_buffer)
        self._dispatcher.apply(limits)

    def close(self) -> None:
        """Serve what has come by now, and then read no more, once and for all. Handlers that run can still reply.

        Sessions that live get their peers' datagrams as long as they live; a peer without one gets none.

        If the attribute `keep_backlog` was set to True, what has come is left to other processes, which read the same sockets.
        """
        self.admission.close()
        if self._listeners:
            self._listeners = []
            self._dispatcher.count_all()
            self._is_stopping = True
            for sock in self._sockets:
                sock.stop(keep_backlog=self.keep_backlog)
            self._is_stopping = False
            self._sessions.is_closed = self.handover is None or not self.handover.serves_newcomers
            if len(self._sessions) and not self.keep_backlog:
                for sock in self._sockets:
                    sock.resume()
        self.close_if_done()

    def _begin_shutdown(self, grace: float | None, why: str | None = None) -> Drain:
        self._dispatcher.count_all()  # the drain counts each handler that ends from now on
        return super()._begin_shutdown(grace, why)

    def _is_idle(self) -> bool:
        return not (self._connections or self._dispatcher.has_queued())

    def sockets_to_close_in_child(self) -> Iterable[int]:
        """Return the descriptors of its sockets that are open now, for a process that was forked."""
        return [sock.sock.fileno() for sock in self._sockets]

    def close_if_done(self) -> None:
        """Close the sockets when no handler can have anything to send any more."""
        if not (self._listeners or self._is_stopping or self._dispatcher.is_stepping()) and self._is_idle():
            self._close_sockets()

    def _close_sockets(self) -> None:
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            sock.close()
        self._sessions.stop()
        self._dispatcher.stop()

    def _drop_waiting(self) -> int:
        self._dispatcher.drop_queued()
        return 0  # they are no connections

    async def _release(self) -> None:
        try:
            await super()._release()
        finally:
            self._close_sockets()
            await asyncio.sleep(0)  # the spare task ends

    def task_ended(self, ended: Any, task: "asyncio.Task[None]") -> None:
        """Count a handler at the end of its task, and begin what has waited for it to."""
        self.replace(ended)  # before the end is counted: a drain is over when no session is left
        super().task_ended(ended, task)

    def unregister_connection(self, connection: Any) -> None:
        """Count a handler that has ended, and begin what has waited in the queue. Close the sockets after a stop's last one."""
        self._count_end(connection)
        if isinstance(connection, DatagramRun):
            self.timeout_sweeper.remove(connection)
        if not self.has_sessions:
            self.admission.release(connection.client_address)
        if self._dispatcher.has_queued():
            self._dispatcher.begin_queued()
        self._resume_listeners()
        self.close_if_done()

    @property
    def needs_slow_path(self) -> bool:
        """Whether each datagram is to be counted as its handler begins, and not only when it has ended."""
        per_host = self.admission.limits.max_per_host
        return not self._listeners or self.is_draining or self.on_accept is not None or per_host is not None

    def note_end(self, task: DatagramTask) -> None:
        """Count the end of a handler that has not waited, and that was registered."""
        self._count_end(task)
        self.admission.release(task.client_address)

    def _receive_for_thread(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        limits = self.limits
        if len(data) > limits.max_datagram:
            self.drop("truncated", client_address)
            return
        most = limits.max_threads + limits.max_queue
        if len(self._connections) >= min(most, limits.max_connections or most):
            self.drop("queue full", client_address)
        elif (reason := self.admit(client_address)) is not None:
            self.drop(reason, client_address)
        else:
            self.live_stats.received += 1
            self.live_stats.handled += 1
            threaded = ThreadedDatagram(self, self.get_handler_threads(), data, client_address, transport)
            self.register_connection(threaded)
            threaded.begin()

    def admit(self, client_address: Any) -> str | None:
        """Count a datagram for which there is room, by its host. Return the reason to drop it, or None."""
        return self.admission.admit_host(client_address)

    def release(self, client_address: Any) -> None:
        """Count the end of what was admitted, where no registered handler has ended."""
        self.admission.release(client_address)

    def report_timeout(self, cancelled: DatagramRun) -> None:
        """Log that a handler took too long, at a bounded rate: its peer may decide how long it takes."""
        self._warnings.report(
            "cancelled %s: it took longer than Timeouts.datagram_handler, %g s",
            cancelled,
            self.handler_timeouts.datagram_handler,
        )

    def drop(self, reason: str, client_address: Any) -> None:
        """Count a datagram that no handler gets. The first that was too long is told of: the limit may be a mistake."""
        self.live_stats.received += 1
        self.live_stats.drops[reason] += 1
        if reason == "truncated" and self.live_stats.drops[reason] == 1:
            logger.warning(
                "dropped a datagram from %s that is longer than Limits.max_datagram, %d bytes; others are only counted",
                format_address(client_address),
                self.limits.max_datagram,
            )

    def _count_end(self, connection: Any) -> None:
        if connection.outcome == "rejected" and not isinstance(connection, Session):
            count = connection.size if isinstance(connection, Batch) else 1
            self.live_stats.handled -= count
            self.live_stats.drops[connection.reason] += count
        elif (
            isinstance(connection, ThreadedDatagram) and connection.thread is None and connection.reason == "cancelled"
        ):
            self.live_stats.handled -= 1
            self.live_stats.drops["stopped"] += 1
        super()._count_end(connection)

    def replace(self, ended: Any) -> None:
        """Forget a session that has ended, and begin its peer's next one, or a newcomer's."""
        if isinstance(ended, Session):
            self._connections.discard(ended)
            self._sessions.replace(ended)


class UDPServer(DatagramServer):
    """A server on one UDP address, `(host, port)`; host "" is every address, port 0 is any free one.

    On every address it replies from the one that was asked. See :class:`DatagramServer` for the rest.
    """

    def _parse_address(self, address: Any) -> list[Endpoint]:
        return super()._parse_address(address) if isinstance(address, str | list) else [UDPEndpoint.at(address)]


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
        is_list = isinstance(address, list)
        return super()._parse_address(address) if is_list else [UnixDatagramEndpoint.at(address, self._mode)]
