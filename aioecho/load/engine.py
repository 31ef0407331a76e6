"""One process's part of a load, whatever it speaks: when messages fall due, how long every message took, and how a run goes.

A plain epoll loop and no asyncio, because a generator has to be cheaper than what it measures. Times inside the loop are
integers in nanoseconds. Latencies are counted per whole microsecond in a dict, which costs 0.1 us a message.

The modules `streams` and `datagrams` have the engines that connect, send and compare.
"""

from __future__ import annotations

import gc
import select
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from aioecho.load.messages import make_pool
from aioecho.load.settings import ERROR_CLASSES, LoadProgress, LoadSettings, Tally

__all__ = ["CLOSED_EARLY", "CONNECT", "RESET", "TIMED_OUT", "WRONG_BYTES", "Engine", "Stop"]

CONNECT, RESET, CLOSED_EARLY, TIMED_OUT, WRONG_BYTES = range(len(ERROR_CLASSES))

NEVER = 1 << 62  # ns
OPENING_AT_ONCE = 128  # the usual default of a server's backlog; past it the kernel drops SYNs for a second
TICK_NS = 250_000_000
INTERVAL_NS = 1_000_000_000  # of the series over time
COARSE_FROM_US = 1 << 17  # above this latencies are counted in steps of 128 us, within three digits


class Stop(Exception):
    """Ends the run before its time; carries the problem, or None if the user or the parent ended it."""


class Engine(ABC):
    """One process's share of a run: `share` of `shares`, counted from 0.

    A slot is what can carry one message at a time: a connection, once for each message in flight that it may have, or
    None for one that has yet to be made.
    """

    def __init__(self, settings: LoadSettings, share: int, shares: int, control: Any = None) -> None:
        self.settings = settings
        self.control = control  # pipe to the parent: "ready" up, "go" and "stop" down
        self.size = settings.size_bytes
        self.slots = settings.connections // shares + (share < settings.connections % shares)
        self.interval = 0.0 if settings.rate is None else 1e9 * shares / settings.rate  # ns
        self.offset = self.interval * share / shares  # processes take turns instead of sending together
        self.timeout = int(settings.effective_timeout_s * 1e9)
        self.pool, self.period = self._make_pool()
        self.queue: deque[int] = deque()  # open loop: due, and no slot was free
        self.free: deque[Any] = deque()  # open loop: slots, longest free first
        self.counts: defaultdict[int, int] = defaultdict(int)
        self.series: list[tuple[float, float, dict[int, int]]] = []
        self.interval_began = self.interval_end = NEVER
        self.replies = self.sent = self.received = 0
        self.late = self.duplicates = 0
        self.errors = [0] * len(ERROR_CLASSES)
        self.first_error = ""
        self.failures_in_a_row = 0
        self.paused: list[Any] = []  # slots that failed, used again from the next tick on
        self.ready = 0
        self.sending = False
        self.start = NEVER  # messages due from here on are measured
        self.begun = 0
        self.next_due = 0.0
        self.epoll = select.epoll()
        self.next_tick = self.last_tick = 0
        self.last_replies = 0
        self.on_progress: Callable[[LoadProgress], None] | None = None
        self.phase = "connecting"

    def _make_pool(self) -> tuple[bytes, int]:
        """Make what all connections send, and return it with its length without the part that is repeated."""
        return make_pool(self.size, self.settings.lines)

    # What a kind of connection adds.

    wanted_ready: int  # how many must have answered before the load begins

    @abstractmethod
    def _open(self, due: int) -> None:
        """Make a connection and send a message on it that was due at `due` (ns)."""

    @abstractmethod
    def _submit(self, slot: Any, due: int) -> None:
        """Send a message due at `due` (ns) on this slot."""

    @abstractmethod
    def _handle(self, events: list[tuple[int, int]]) -> None:
        """Read replies, compare and count them, and in closed loop send what follows."""

    @abstractmethod
    def _list_slots(self) -> Sequence[Any]:
        """List the slots there are when the load begins."""

    @abstractmethod
    def _has_any(self) -> bool:
        """Tell whether any connection is left."""

    @abstractmethod
    def _is_owed(self) -> bool:
        """Tell whether a reply is still owed."""

    @abstractmethod
    def _count_owed(self) -> int:
        """Count the replies still owed."""

    @abstractmethod
    def _fail_silent(self, now: int) -> None:
        """Count as lost what has waited too long for its reply."""

    @abstractmethod
    def _close_all(self) -> None:
        """Close every connection."""

    # The run, from outside in.

    def run(
        self,
        on_progress: Callable[[LoadProgress], None] | None = None,
        on_window: Callable[[bool], None] | None = None,
    ) -> Tally:
        """Connect, warm up, measure, drain; always gives a tally."""
        self.on_progress = on_progress
        tally = Tally()
        opened = closed = 0
        before = after = self._counters()
        _allow_many_descriptors()
        _allow_exact_timers()
        collecting = gc.isenabled()
        gc.disable()  # nothing here makes cycles, and a collection would show as latency
        try:
            self._connect_all()
            self._wait_for_go()
            self._begin()
            self._turn_until(self.begun + int(self.settings.warmup_s * 1e9))
            self.phase = "measuring"
            if on_window is not None:
                on_window(True)
                self._turn_until(time.perf_counter_ns() + 10_000_000)  # catch up with what fell due meanwhile
            before = self._counters()
            opened = self.start = self.interval_began = time.perf_counter_ns()
            self.interval_end = opened + INTERVAL_NS
            end = opened + int(self.settings.duration_s * 1e9)
            self._turn_until(end)
            self._turn(end - 1, end)  # for what fell due last, if this process stood still then
            closed, after = time.perf_counter_ns(), self._counters()
            if on_window is not None:
                on_window(False)
            self._drain()
        except (Stop, KeyboardInterrupt) as stop:
            tally.interrupted = isinstance(stop, KeyboardInterrupt) or stop.args == (None,)
            tally.problem = stop.args[0] if isinstance(stop, Stop) else None
            if opened and not closed:
                closed, after = time.perf_counter_ns(), self._counters()
        finally:
            if collecting:
                gc.enable()
            self._close_all()
            self.epoll.close()
        if opened:
            self._end_series(closed)
        tally.measured_s = (closed - opened) / 1e9
        tally.replies = after[0] - before[0]
        tally.bytes_sent = after[1] - before[1]
        tally.bytes_received = after[2] - before[2]
        tally.cpu_s = after[3] - before[3]
        self._fill(tally)
        return tally

    def _fill(self, tally: Tally) -> None:
        """Tell what was counted since the engine was made."""
        if any(self.errors) and not tally.problem:
            tally.problem = f"messages were lost: {self.first_error}"
        tally.series = self.series
        for _, _, counts in self.series:
            for latency, count in counts.items():
                tally.counts[latency] = tally.counts.get(latency, 0) + count
        tally.errors = self.errors
        tally.late, tally.duplicates = self.late, self.duplicates

    def _counters(self) -> tuple[int, int, int, float]:
        return self.replies, self.sent, self.received, time.thread_time()

    def _connect_all(self) -> None:
        """Open every connection and exchange one message on it, so that the server has accepted all of them."""
        attempts = 0
        while self.ready + sum(self.errors) < self.wanted_ready:
            while attempts < self.wanted_ready and attempts - self.ready - sum(self.errors) < OPENING_AT_ONCE:
                attempts += 1
                self._open(time.perf_counter_ns())
            self._turn(time.perf_counter_ns(), NEVER)
            if sum(self.errors) and not self.ready and not self._has_any():
                raise Stop(self.first_error)
        if not self.ready:
            raise Stop(self.first_error)

    def _wait_for_go(self) -> None:
        if self.control is not None:
            self.control.send("ready")
            if self.control.recv() == "stop":
                raise Stop(None)

    def _begin(self) -> None:
        self.sending = True
        self.phase = "warming up"
        self.begun = time.perf_counter_ns()
        self.next_due = self.begun + self.offset
        slots = self._list_slots()
        if self.interval:
            self.free.extend(slots)
        else:
            # Spread over the warm-up: all at once they would stay in step with a server that waits, and come in bursts, of
            # which a window of whole seconds has one more or one less.
            warmup = int(self.settings.warmup_s * 1e9)
            for i, slot in enumerate(slots):
                self._turn_until(self.begun + warmup * i // len(slots))
                self._submit(slot, time.perf_counter_ns())

    def _turn_until(self, end: int) -> None:
        while (now := time.perf_counter_ns()) < end:
            self._turn(now, end)

    def _drain(self) -> None:
        """Wait for the replies still owed; what does not come is lost."""
        self.phase = "draining"
        self.sending = False
        end = time.perf_counter_ns() + self.timeout
        while (self.queue or self._is_owed()) and (now := time.perf_counter_ns()) < end:
            self._turn(now, min(end, now + 10_000_000))
        if lost := self._count_owed() + len(self.queue):
            self._count_error(TIMED_OUT, lost, f"no reply within {self.settings.effective_timeout_s:g} s of the end")

    # One turn of the loop.

    def _turn(self, now: int, until: int) -> None:
        """Send what is due, wait for events (not past `until`, in ns), and handle them."""
        if now >= self.next_tick:
            self._tick(now)
        if self.interval:
            queue, free = self.queue, self.free
            if self.sending:
                due, interval = self.next_due, self.interval
                while due <= now:
                    queue.append(int(due))
                    due += interval
                self.next_due = due
                until = min(until, int(due))
            while queue and free:
                self._submit(free.popleft(), queue.popleft())
            now = time.perf_counter_ns()
        wait = min(until, self.next_tick) - now
        if self.interval and 0 < wait < 20_000_000:
            # epoll counts its timeout in milliseconds, which would make every message late; select counts microseconds.
            with suppress(ValueError):  # the descriptor is past select's 1024
                if not select.select([self.epoll], [], [], wait / 1e9)[0]:
                    return
                wait = 0
        self._handle(self.epoll.poll(max(wait, 0) / 1e9))

    def _count(self, due: int, now: int) -> None:
        """Count a reply that came now to a message that was due then (ns), if it belongs to what is measured."""
        if due >= self.start:
            t = (now - due) // 1000
            self.counts[t if t < COARSE_FROM_US else t & -128] += 1

    def _move_on(self, slot: Any, now: int) -> None:
        """Decide what follows on a slot that is free again."""
        if not self.begun:
            self.ready += 1
        elif self.interval:
            if self.queue:
                self._submit(slot, self.queue.popleft())
            else:
                self.free.append(slot)
        elif self.sending:
            self._submit(slot, now)

    def _end_interval(self, now: int) -> None:
        """Put the latencies since the last interval into the series. A message costs nothing for that."""
        self.series.append(((self.interval_began - self.start) / 1e9, (now - self.interval_began) / 1e9, self.counts))
        self.counts = defaultdict(int)
        self.interval_began = now
        while self.interval_end <= now:
            self.interval_end += INTERVAL_NS

    def _end_series(self, closed: int) -> None:
        """Put what is left into the series: into its last interval if that makes a short one."""
        self._end_interval(closed)
        if len(self.series) > 1 and self.series[-1][1] < INTERVAL_NS / 4e9:
            _, seconds, rest = self.series.pop()
            start, so_far, counts = self.series.pop()
            for latency, count in rest.items():
                counts[latency] = counts.get(latency, 0) + count
            self.series.append((start, so_far + seconds, counts))

    # What goes wrong.

    def _count_error(self, error_class: int, lost: int, detail: object) -> None:
        self.errors[error_class] += lost
        self.first_error = self.first_error or f"{ERROR_CLASSES[error_class].replace('_', ' ')}: {detail}"

    def _pause(self, slot: Any, what: str, error_class: int) -> None:
        """Use a slot that failed again from the next tick on. At once would spin where no server listens."""
        self.failures_in_a_row += 1
        if self.failures_in_a_row > 2 * self.slots * self.settings.depth + 20:
            self.errors[error_class] += len(self.queue)  # due, and no slot is left to send them
            raise Stop(f"{self.failures_in_a_row} {what} in a row failed: {self.first_error}")
        self.paused.append(slot)

    def _tick(self, now: int) -> None:
        """Do what need not happen at every turn: timeouts, paused slots, intervals, progress, word from the parent."""
        if now >= self.interval_end and self.sending:
            self._end_interval(now)
        self._fail_silent(now)
        paused, self.paused = self.paused, []
        if self.sending or self.queue:
            for slot in paused:
                if self.interval:
                    self.free.append(slot)
                else:
                    self._submit(slot, now)
        if self.control is not None and self.control.poll() and self.control.recv() == "stop":
            raise Stop(None)
        if self.on_progress is not None and self.last_tick:
            self.on_progress(
                LoadProgress(
                    self.phase,
                    (now - self.begun) / 1e9 if self.begun else 0.0,
                    self.settings.warmup_s + self.settings.duration_s,
                    self.replies,
                    (self.replies - self.last_replies) * 1e9 / max(1, now - self.last_tick),
                    sum(self.errors),
                )
            )
        self.last_tick, self.last_replies = now, self.replies
        self.next_tick = now + TICK_NS


def _allow_many_descriptors() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _allow_exact_timers() -> None:
    # By default the kernel delays a timer by up to 50 us to save wake-ups, which would show as latency.
    with suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
        slack.write("1")
