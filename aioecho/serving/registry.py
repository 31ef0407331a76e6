"""The live connections of a server, and what they need of it: counters, hooks, timeouts, threads, their reports."""

import asyncio
import contextlib
import contextvars
import functools
import logging
import socket
import ssl as ssl_module
import sys
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from aioecho.config import Limits, Timeouts, check_type
from aioecho.metrics import Metrics
from aioecho.net.turns import AcceptTurns
from aioecho.runtime.logs import BoundedLog, format_address
from aioecho.runtime.threads import ThreadPool
from aioecho.serving.admission import Admission
from aioecho.serving.audience import Audience
from aioecho.serving.drain import Drain, Served
from aioecho.serving.end_record import MistakeLog, is_recorded, log_end
from aioecho.serving.ends import OUTCOMES, Ended, Reason, ending, find_other_stream, find_peers_reason
from aioecho.serving.handler_types import undo_partial
from aioecho.serving.held_up import HeldUpWatch, watch_in_debug_mode
from aioecho.serving.live import Connections, Identities
from aioecho.serving.measures import Measures
from aioecho.serving.measuring import measure
from aioecho.serving.sweeper import TimeoutSweeper
from aioecho.stats import Stats
from aioecho.streams.handshake_limit import HandshakeLimit

__all__ = ["Registry"]

logger = logging.getLogger("aioecho.server")

# The reasons of connections that the server has ended by itself, which the log tells of.
ENDED_BY_SERVER = {"write buffer", "memory", "key updates", "broadcast", "shed", "handler"}


class Registry:
    """The part of :class:`~aioecho.serving.base.BaseServer` that handlers, connections and datagrams' tasks deal with.

    The attributes that follow are for them. They are not for users, although they have no underscore.

    `event_loop`: the server's event loop; None before the start.
    `task_context`: a copy of the context of start(). The task of every connection runs in a copy of it.
    `admission`, `handshake_limit`, `timeout_sweeper`: what applies the limits, and the timeouts.
    `handler_threads`: the threads of blocking handlers; None until the first one needs a thread.
    `keep_backlog`: whether the end of accepting leaves what the kernel has queued to other processes, which have the same
    sockets. `on_accept`: called with the number of connections, or of datagrams, that were registered. `accept_turns`: tells
    when to leave clients to other processes that accept from the same sockets; None if there are none. Workers set the three.
    `ids`: the ids of connections. `access_log`: whether the ends of connections are recorded for the access log.
    `live_stats`: what `stats` tells. `measures`: what is measured besides, None before the first call of `metrics()`.
    `audience`: what broadcasts. `beside`: what runs beside handlers, by their connections. `is_part`: whether it is one of
    several servers that another one is made of.
    """

    # The other attributes of a server for datagrams are no more than 30, also in a worker with a lifespan: see there.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_drain",
        "_held_up",
        "_is_held",
        "event_loop",
        "handler_threads",
        "ids",
        "is_part",
        "measures",
        "on_accept",
    )

    # What a subclass for datagrams has otherwise.
    _what: ClassVar[str] = "connection"

    live_stats: Stats
    measures: Measures | None
    accept_turns: AcceptTurns | None = None

    def __init__(
        self,
        RequestHandlerClass: Any,
        *,
        ssl: ssl_module.SSLContext | None,
        limits: Limits | None,
        timeouts: Timeouts | None,
    ) -> None:
        self.RequestHandlerClass = RequestHandlerClass
        self.ssl = ssl
        self.live_stats = self._make_stats()
        self.keep_backlog = self.access_log = False
        self.measures = None
        self._held_up: HeldUpWatch | None = None
        self.is_part = self._is_held = False
        self.on_accept: Callable[[int], object] | None = None
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self.handler_threads: ThreadPool | None = None
        self._connections: set[Any] = set()
        self.ids = Identities()
        self.beside: dict[Any, Any] = {}
        self.admission = Admission(
            check_type("limits", limits if limits is not None else Limits(), Limits),
            self._connections,
            self._resume_listeners,
        )
        self.audience = Audience(self._connections, self.live_stats)
        self.handshake_limit = HandshakeLimit(lambda: self.limits.max_handshakes)
        self.timeout_sweeper = TimeoutSweeper()
        self._timeouts = check_type("timeouts", timeouts if timeouts is not None else Timeouts(), Timeouts)
        self._drain: Drain | None = None  # made when a shutdown begins
        self.task_context = contextvars.copy_context()
        self._not_begun_log = BoundedLog(logger, logging.WARNING)
        self._abort_log = BoundedLog(logger, logging.WARNING)
        self._mistake_log = MistakeLog(logger)
        self._no_thread_log = BoundedLog(logging.getLogger("aioecho.threads"), logging.ERROR)

    def _make_stats(self) -> Stats:
        return Stats()

    def _resume_listeners(self) -> None:
        raise NotImplementedError

    # What users see of it.

    @property
    def connections(self) -> Connections:
        """The live connections, every one a :class:`~aioecho.LiveConnection`: a copy, as they come and go."""
        return Connections(self._connections)

    @property
    def stats(self) -> Stats:
        """What it has counted since it started."""
        return self.live_stats

    def metrics(self) -> Metrics:
        """Return what can be measured of it now, for Prometheus by ``metrics().text()``. In the loop's thread only.

        Durations, handshakes, bytes and the loop's lag are measured from the first call on: make it before the start. A call
        costs about 2 us for each live connection; run() with `metrics` spreads that over several turns of the loop.
        """
        return measure(self)

    def measure_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Measure the lag of `loop`, if the server is measured, and watch it in debug mode; None ends that. Not for users."""
        if self.measures is not None:
            self.measures.stop()
            if loop is not None:
                self.measures.start(loop)
        if self._held_up is not None:
            self._held_up.stop()
        self._held_up = None if loop is None or self.is_part else watch_in_debug_mode(loop)

    @property
    def limits(self) -> Limits:
        """The limits that hold now. They may be replaced at any time: the new ones hold for new connections, and close none."""
        return self.admission.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._apply_limits(check_type("limits", limits, Limits))
        self.admission.apply(limits)
        self.handshake_limit.admit()
        if self.handler_threads is not None:
            self.handler_threads.resize(limits.max_threads)

    def _apply_limits(self, limits: Limits) -> None:
        """Tell the sockets of other limits than they were made with."""
        raise NotImplementedError

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts of handlers whose class has none of its own. They may be replaced at any time."""
        return self._timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._timeouts = check_type("timeouts", timeouts, Timeouts)
        self._timeouts_changed()

    def _timeouts_changed(self) -> None:
        self.timeout_sweeper.mark_all((each for each in self._connections if hasattr(each, "place")), self._timeouts)

    @property
    def what_it_serves(self) -> str:
        """What `connections` are, for people: "connection", or "datagram"."""
        return self._what

    @property
    def is_draining(self) -> bool:
        """Whether a shutdown has begun."""
        return self._drain is not None

    @property
    def is_paused(self) -> bool:
        """Whether it accepts no clients, by pause(), until resume()."""
        return self.admission.is_paused

    def hold(self) -> None:
        """Accept nothing after start() before :meth:`release_hold`, whether it is paused or not. Not for users."""
        self._is_held = True

    def release_hold(self) -> None:
        """Accept from now on, unless it is paused. Not for users."""
        self._is_held = False
        self._resume_listeners()

    # Hooks.

    def verify_request(self, request: Any, client_address: Any) -> bool | Awaitable[bool]:
        """Return whether to serve a connection; may be a coroutine function. With TLS, called after the handshake.

        For a blocking handler called in the loop too, with its socket, and before the handshake.
        """
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the exception that is being handled, which a handler raised. The server goes on whatever it was.

        For a blocking handler called in its thread, as by socketserver, and so perhaps in several threads at once.

        As it is here: an ERROR record with the handler's part of the traceback, or, where :meth:`is_peers_fault`, a record at
        DEBUG without one. Of errors of one type that one line of code raises, one record a second: the next tells how many were
        left out. The hook itself is called for every error.
        """
        error = sys.exception()
        address = format_address(client_address)
        if error is None or self.is_peers_fault(error):
            logger.debug("the connection from %s ended in mid-request: %r", address, error)
            return
        ended = ending.get()
        other = find_other_stream(error, ended.get_stream() if ended is not None else None)
        if other is None:
            self._mistake_log.report(error, "the handler of the connection from %s raised", address)
        else:
            self._mistake_log.report(
                error,
                "the handler of the connection from %s raised what the connection with %s met",
                address,
                format_address(other),
            )

    def is_peers_fault(self, error: BaseException) -> bool:
        """Tell whether an error that a handler raised is its peer's doing, or the network's, and no mistake of the handler's.

        For :meth:`handle_error`, with the exception that is being handled. It is so for a connection that broke, a timeout, a
        line or a frame that is too long, a stream that ended in mid-message, what a framing does not allow; and for an
        exception group all of whose errors are such. It is not so for an error of another connection that the handler uses.
        Elsewhere than in `handle_error` the request is not known: then the type alone decides, and a lost connection is no
        peer's doing.
        """
        return find_peers_reason(error, ending.get() or Ended()) is not None

    def call_handle_error(self, request: Any, client_address: Any, ended: Ended) -> None:
        """Call the hook for the exception that is being handled, and report what the hook itself raises."""
        token = ending.set(ended)
        try:
            self.handle_error(request, client_address)
        except Exception as error:
            address = format_address(client_address)
            self._mistake_log.report(
                error, "handle_error raised, for the %s from %s", self._what, address, is_whole=True
            )
        finally:
            ending.reset(token)

    def report_not_begun(self, client_address: Any, what: str, error: BaseException) -> None:
        """Log that a connection could not get its `what`, at a bounded rate: the peer decides how often that happens.

        At DEBUG if the peer has just closed the connection, as a health check does that only opens it.
        """
        address, reason = format_address(client_address), str(error) or type(error).__name__
        if isinstance(error, ConnectionError | ssl_module.SSLEOFError | ssl_module.SSLZeroReturnError):
            logger.debug("no %s with %s: %s", what, address, reason)
        else:
            self._not_begun_log.report("no %s with %s: %s", what, address, reason)

    def report_slow_verification(self, client_address: Any, seconds: float | None) -> None:
        """Log that a coroutine of verify_request() took longer than it may, `seconds`."""
        error = TimeoutError(f"verify_request() took longer than {seconds:.4g} seconds")
        self.report_not_begun(client_address, "verification", error)

    def report_no_thread(self, client_address: Any, error: RuntimeError) -> None:
        """Log that there is no thread for a blocking handler, at a bounded rate."""
        self._no_thread_log.report("no thread for %s: %s", format_address(client_address), error)

    # What holds for a connection.

    def timeouts_of(self, handler: Any) -> Timeouts:
        """Return the timeouts of a handler object or, before it is made, of its class."""
        timeouts = getattr(handler, "timeouts", None)
        if timeouts is None:
            if not isinstance(handler, functools.partial):
                return self._timeouts
            timeouts = getattr(undo_partial(handler), "timeouts", None)
        return timeouts if isinstance(timeouts, Timeouts) else self._timeouts

    def get_handler_threads(self) -> ThreadPool:
        """Return the threads for blocking handlers, and make them for the first one."""
        if self.handler_threads is None:
            self.handler_threads = ThreadPool(self.limits.max_threads)
        return self.handler_threads

    def owns_this_thread(self) -> bool:
        """Tell whether the caller runs in a thread of this server's blocking handlers. May be called in any thread."""
        return self.handler_threads is not None and self.handler_threads.owns_this_thread()

    # Registering, and counting.

    def register_connection(self, connection: Served) -> None:
        """Count a connection as active until its end is counted."""
        stats = self.live_stats
        stats.accepted += 1
        stats.active += 1
        self._connections.add(connection)
        if self.on_accept is not None:
            self.on_accept(1)

    def identify(self, connection: Any) -> str:
        """Return the id of a connection, which it gets now if it has none yet. One that has ended gets none: ""."""
        return self.ids.find(connection) if connection in self._connections else ""

    def note_kick(self, connection: Any, reason: str) -> None:
        """Count the end of a connection, which is about to come, as kicked."""
        if connection in self._connections and self.ids.add_kicked(connection):
            why = f": {reason}" if reason else ""
            logger.info("kicked the %s from %s%s", self._what, format_address(connection.client_address), why)

    def drain_late(self, connection: Served) -> None:
        """Let a connection drain that was registered when all others had been told to."""
        if self._drain is not None:
            self._drain.drain_late(connection)

    def reject(self, sock: socket.socket, client_address: Any, reason: Reason, endpoint: str = "") -> None:
        """Close a client's socket at once, and count it."""
        sock.close()
        self.live_stats.accepted += 1
        self.live_stats.rejected += 1
        self.live_stats.reasons[reason] += 1
        log_end(self.access_log, client_address, reason, endpoint=endpoint)

    def unregister_connection(self, connection: Any) -> None:
        """Count an ended connection, by its `reason`; it makes room for another."""
        self._count_end(connection)
        self.audience.forget(connection)
        self.admission.release(connection.counted_address)
        if self.measures is not None and connection.outcome != "rejected":
            self.measures.durations.note(asyncio.get_running_loop().time() - connection.since)
        if is_recorded(self.access_log):
            connection.log_end()
        if connection.reason in ENDED_BY_SERVER:
            address = format_address(connection.client_address)
            self._abort_log.report("cut off the connection from %s: %s", address, connection.reason)
        self._resume_listeners()

    def task_ended(self, connection: Any, task: "asyncio.Task[None]") -> None:
        """Count a connection whose task has ended; report an error that the task ends with."""
        if task.cancelled():
            with contextlib.suppress(asyncio.CancelledError):
                task.result()  # so that it lets go of the error, whose traceback refers to the connection and so to the task
        elif (error := task.exception()) is not None:
            what, address = self._what, format_address(connection.client_address)
            if isinstance(error, Exception):
                self._mistake_log.report(
                    error, "aioecho itself failed with the %s from %s", what, address, is_whole=True
                )
            elif not isinstance(error, KeyboardInterrupt | SystemExit):  # these the loop raises
                self._mistake_log.report(error, "the handler of the %s from %s raised", what, address)
        self.unregister_connection(connection)

    def _count_end(self, connection: Any) -> None:
        self._connections.discard(connection)
        if self.ids.forget(connection):
            connection.reason = "kicked"
        stats, reason = self.live_stats, connection.reason
        outcome = OUTCOMES[reason]
        stats.active -= 1
        if outcome == "completed":
            stats.completed += 1
        else:
            setattr(stats, outcome, getattr(stats, outcome) + 1)
        stats.reasons[reason] += 1
        if self._drain is not None:
            self._drain.count(connection)

    # What a drain asks of it.

    def _is_idle(self) -> bool:
        return not self._connections and not self.admission.queued

    def _drop_waiting(self) -> int:
        """Reset the clients that still wait for room; return how many."""
        queued = self.admission.take_queued()
        for sock, client_address in queued:
            self.reject(sock, client_address, "overflow")
        return len(queued)
