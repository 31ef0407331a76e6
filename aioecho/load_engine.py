"""One process's part of a load: an epoll loop over raw sockets that sends, compares every reply, and counts.

A plain loop and no asyncio, because a generator has to be cheaper than what it measures (4.9 us of processor time a
message, of which 3.4 are the kernel's). Times inside the loop are integers in nanoseconds. Latencies are counted per
whole microsecond in a dict and become an HdrHistogram at the end: recording into the HdrHistogram package directly
costs 0.84 us a message, the dict 0.1 us.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import ssl
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

__all__ = ["ERROR_CLASSES", "Engine", "LoadProgress", "LoadSettings", "Tally"]

ERROR_CLASSES = ("connect", "reset", "closed_early", "timed_out", "wrong_bytes")
_CONNECT, _RESET, _CLOSED_EARLY, _TIMED_OUT, _WRONG_BYTES = range(5)

_NEVER = 1 << 62  # ns
_CHUNK_BYTES = 262_144  # most that one recv or send moves
_POOL_BYTES = 262_144  # small enough to stay in a processor's cache
_CONNECTING_AT_ONCE = 128  # the backlog a server has if nobody chose one; past it the kernel drops SYNs for a second
_TICK_NS = 250_000_000
_COARSE_FROM_US = 1 << 17  # above this latencies are counted in steps of 128 us, within HDR's three digits

_IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h; leaves the choice of a port to connect(2), which knows the other end
_CONNECT_PHASE, _HANDSHAKE_PHASE, _OPEN_PHASE = range(3)
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Say what to send where, and for how long.

    `endpoint`: `tcp://HOST:PORT`, `tcp://[::1]:PORT` or `unix:PATH`. `rate`: messages a second over all connections;
    None is closed loop. `lines`: each message is printable and ends in a newline, counted in `size_bytes`. `churn`:
    a connection per message, its set-up counted in the latency. `timeout_s`: a connection that owes a reply and sends
    nothing for so long has failed; a run also waits so long at its end for the replies still owed. `ca_file`: verify
    the server by this file instead of the system's certificates.

    Raises:
        ValueError: a value out of range or an endpoint that cannot be read (caller).
    """

    endpoint: str
    connections: int = 10
    depth: int = 1
    rate: float | None = None
    churn: bool = False
    size_bytes: int = 64
    lines: bool = False
    duration_s: float = 10.0
    warmup_s: float = 1.0
    timeout_s: float = 10.0
    processes: int = 1
    tls: bool = False
    ca_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("connections", "depth", "size_bytes", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("duration_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, not {getattr(self, name)}")
        if self.warmup_s < 0:
            raise ValueError(f"warmup_s must not be below 0 seconds, not {self.warmup_s}")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be above 0 messages a second, not {self.rate}")
        if self.processes > self.connections:
            raise ValueError(f"processes ({self.processes}) must not exceed connections ({self.connections})")
        if self.churn and self.depth > 1:
            raise ValueError("churn sends one message per connection, so depth must be 1")
        _parse_endpoint(self.endpoint)


@dataclass(frozen=True)
class LoadProgress:
    """How far a run is, given to `load`'s `on_progress` about four times a second."""

    phase: str  # "connecting", "warming up", "measuring" or "draining"
    elapsed_s: float  # since the warm-up began, 0 while connecting
    total_s: float  # warm-up and duration
    replies: int  # since the connections were opened
    rate: float  # replies a second since the last report
    errors: int


def _parse_endpoint(endpoint: str) -> tuple[str, str, int]:
    """Split an endpoint into `("tcp", host, port)` or `("unix", path, 0)`."""
    if endpoint.startswith("unix:"):
        path = endpoint.removeprefix("unix:").partition("?")[0]
        if path:
            return "unix", path, 0
    elif endpoint.startswith("tcp://"):
        host, colon, port = endpoint.removeprefix("tcp://").rpartition(":")
        if colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536:
            bracketed = host.startswith("[") and host.endswith("]")
            if bracketed or ":" not in host:
                return "tcp", host.strip("[]"), int(port)
    raise ValueError(f"expected tcp://HOST:PORT (1 to 65535), tcp://[IPV6]:PORT or unix:PATH, not {endpoint!r}")


def _make_pool(size_bytes: int, lines: bool) -> tuple[bytes, int]:
    """Make what all connections send: pairwise different messages one after another, and their total length.

    Connection i starts at its own message and goes round, so that a reply that is stale or belongs to another
    connection differs. The start is repeated at the end, so that no chunk need be split at the seam.
    """
    count = max(16, _POOL_BYTES // size_bytes)
    pool = bytearray(Random(size_bytes).randbytes(count * size_bytes))
    if lines:
        pool = pool.translate(bytes(33 + value % 94 for value in range(256)))
        pool[size_bytes - 1 :: size_bytes] = b"\n" * count
    period = len(pool)
    while len(pool) < period + _CHUNK_BYTES:
        pool += pool[: period + _CHUNK_BYTES - len(pool)]
    return bytes(pool), period


class _Connection:
    """One socket, and how far the streams to and from the server have come."""

    __slots__ = ("due", "fd", "have", "phase", "read_at", "recv",
                 "send", "since", "sock", "unsent", "watched", "write_at")  # fmt: skip

    def __init__(self, sock: socket.socket, at: int, now: int) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.send = sock.send
        self.recv = sock.recv
        self.phase = _CONNECT_PHASE
        self.read_at = at  # where in the pool the next byte to come is
        self.write_at = at
        self.have = 0  # bytes of the current reply
        self.unsent = 0
        self.due: deque[int] = deque()  # when each message in flight was due, oldest first
        self.since = now  # the last sign of life, or when it began to owe one
        self.watched = 0  # epoll events; 0 while it is not registered


@dataclass
class Tally:
    """What one process counted, as plain data that can cross to its parent."""

    counts: dict[int, int] = field(default_factory=dict)  # latency in us -> messages
    replies: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    measured_s: float = 0.0
    cpu_s: float = 0.0
    errors: list[int] = field(default_factory=lambda: [0] * len(ERROR_CLASSES))
    interrupted: bool = False
    problem: str | None = None


class _Stop(Exception):
    """Ends the run before its time; carries the problem, or None where somebody asked for it."""


class Engine:
    """One process's share of a run: `share` of `shares`, counted from 0."""

    def __init__(self, settings: LoadSettings, share: int, shares: int, control: Any = None) -> None:
        self.settings = settings
        self.control = control  # pipe to the parent: "ready" up, "go" and "stop" down
        self.size = settings.size_bytes
        self.slots = settings.connections // shares + (share < settings.connections % shares)
        self.interval = 0.0 if settings.rate is None else 1e9 * shares / settings.rate  # ns
        self.offset = self.interval * share / shares  # processes take turns instead of sending together
        self.timeout = int(settings.timeout_s * 1e9)
        self.pool, self.period = _make_pool(self.size, settings.lines)
        self.view = memoryview(self.pool)
        self.opened = share * 7_919
        self.recv_bytes = min(_CHUNK_BYTES, max(4096, self.size * settings.depth + 1))
        kind, host, port = _parse_endpoint(settings.endpoint)
        self.address: Any = host
        self.family = socket.AF_UNIX
        if kind == "tcp":
            self.family, _, _, _, self.address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # A closed connection keeps its port for a minute. With one address they run short after 28,000, and long before
        # that connect() spends its time looking for a free one, which would be measured as the server's.
        local = kind == "tcp" and self.family == socket.AF_INET and self.address[0].startswith("127.")
        self.source_addresses = [f"127.0.{share}.{i}" for i in range(2, 250)] if local and settings.churn else []
        self.server_hostname = host if kind == "tcp" else "localhost"
        self.context = ssl.create_default_context(cafile=settings.ca_file) if settings.tls else None

        self.connections: dict[int, _Connection] = {}
        self.queue: deque[int] = deque()  # open loop: due, and no connection was free
        self.free: deque[_Connection | None] = deque()  # open loop: longest free first; None opens a connection
        self.counts: defaultdict[int, int] = defaultdict(int)
        self.replies = self.sent = self.received = 0
        self.errors = [0] * len(ERROR_CLASSES)
        self.first_error = ""
        self.failures_in_a_row = 0
        self.resting = 0  # churn: slots whose connection failed, free again at the next tick
        self.ready = 0
        self.sending = False
        self.start = _NEVER  # messages due from here on are measured
        self.begun = 0
        self.next_due = 0.0
        self.epoll = select.epoll()
        self.next_tick = self.last_tick = 0
        self.last_replies = 0
        self.on_progress: Callable[[LoadProgress], None] | None = None
        self.phase = "connecting"

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
            self._begin(int(self.settings.warmup_s * 1e9))
            self._turn_until(self.begun + int(self.settings.warmup_s * 1e9))
            self.phase = "measuring"
            if on_window is not None:
                on_window(True)
                self._turn_until(time.perf_counter_ns() + 10_000_000)  # catch up with what fell due meanwhile
            before = self._counters()
            opened = self.start = time.perf_counter_ns()
            self._turn_until(opened + int(self.settings.duration_s * 1e9))
            closed, after = time.perf_counter_ns(), self._counters()
            if on_window is not None:
                on_window(False)
            self._drain()
        except (_Stop, KeyboardInterrupt) as stop:
            tally.interrupted = isinstance(stop, KeyboardInterrupt) or stop.args == (None,)
            tally.problem = stop.args[0] if isinstance(stop, _Stop) else None
            if opened and not closed:
                closed, after = time.perf_counter_ns(), self._counters()
        finally:
            if collecting:
                gc.enable()
            for connection in list(self.connections.values()):
                connection.sock.close()
            self.epoll.close()
        if any(self.errors) and not tally.problem:
            tally.problem = f"messages were lost: {self.first_error}"
        tally.counts = dict(self.counts)
        tally.replies = after[0] - before[0]
        tally.bytes_sent = after[1] - before[1]
        tally.bytes_received = after[2] - before[2]
        tally.cpu_s = after[3] - before[3]
        tally.measured_s = (closed - opened) / 1e9
        tally.errors = self.errors
        return tally

    def _counters(self) -> tuple[int, int, int, float]:
        return self.replies, self.sent, self.received, time.thread_time()

    def _connect_all(self) -> None:
        """Open every connection and exchange one message on each, so that the server has taken all of them in."""
        wanted = 1 if self.settings.churn else self.slots
        attempts = 0
        while self.ready + sum(self.errors) < wanted:
            while attempts < wanted and attempts - self.ready - sum(self.errors) < _CONNECTING_AT_ONCE:
                attempts += 1
                self._open(time.perf_counter_ns())
            self._turn(time.perf_counter_ns(), _NEVER)
            if sum(self.errors) and not self.ready and not self.connections:
                raise _Stop(self.first_error)
        if not self.ready:
            raise _Stop(self.first_error)

    def _wait_for_go(self) -> None:
        if self.control is not None:
            self.control.send("ready")
            if self.control.recv() == "stop":
                raise _Stop(None)

    def _begin(self, warmup: int) -> None:
        self.sending = True
        self.phase = "warming up"
        self.begun = time.perf_counter_ns()
        self.next_due = self.begun + self.offset
        live = list(self.connections.values())
        if self.settings.churn:
            slots: Sequence[_Connection | None] = [None] * self.slots
        else:
            slots = live * self.settings.depth
        if self.interval:
            self.free.extend(slots)
        else:
            for slot in slots:
                self._submit(slot, time.perf_counter_ns())

    def _turn_until(self, end: int) -> None:
        while (now := time.perf_counter_ns()) < end:
            self._turn(now, end)

    def _drain(self) -> None:
        """Wait for the replies still owed; what does not come is lost."""
        self.phase = "draining"
        self.sending = False
        end = time.perf_counter_ns() + self.timeout
        if self.interval:
            while self.queue or any(connection.due for connection in self.connections.values()):
                now = time.perf_counter_ns()
                if now >= end:
                    break
                self._turn(now, min(end, now + 10_000_000))
        else:
            owing = [c for c in self.connections.values() if c.due]
            while owing and (now := time.perf_counter_ns()) < end:
                self._turn(now, min(end, now + 10_000_000))
                owing = [c for c in owing if c.due and self.connections.get(c.fd) is c]
        lost = sum(len(connection.due) for connection in self.connections.values()) + len(self.queue)
        if lost:
            self._count_error(_TIMED_OUT, lost, f"no reply within {self.settings.timeout_s:g} s of the end")

    # One turn of the loop.

    def _turn(self, now: int, until: int) -> None:
        """Send what is due, wait for events (not past `until`, in ns), and handle them."""
        if now >= self.next_tick:
            self._tick(now)
        if self.interval and self.sending:
            queue, due, interval = self.queue, self.next_due, self.interval
            while due <= now:
                queue.append(int(due))
                due += interval
            self.next_due = due
            free = self.free
            while queue and free:
                self._submit(free.popleft(), queue.popleft())
            until, now = min(until, int(due)), time.perf_counter_ns()
        wait = min(until, self.next_tick) - now
        if self.interval and 0 < wait < 20_000_000:
            # epoll counts its timeout in milliseconds, which would make every message late; select counts microseconds.
            with suppress(ValueError):  # the descriptor is past select's 1024
                if not select.select([self.epoll], [], [], wait / 1e9)[0]:
                    return
                wait = 0
        self._handle(self.epoll.poll(max(wait, 0) / 1e9))

    def _handle(self, events: list[tuple[int, int]]) -> None:
        """Take in replies, compare and count them, and in closed loop send what follows. The hot path."""
        clock, counts, connections, readable = time.perf_counter_ns, self.counts, self.connections, select.EPOLLIN
        is_at, recv_bytes, size, period = self.pool.startswith, self.recv_bytes, self.size, self.period
        source = (
            self.pool if size <= 1024 else self.view
        )  # to copy a short message is cheaper than to make a view of it
        start = self.start
        follows = self.sending and not self.settings.churn and not self.interval
        received = replies = 0
        try:
            for fd, event in events:
                c = connections.get(fd)
                if c is None:  # it failed in this very turn, when another one's reply let a message go out on it
                    continue
                if c.phase != _OPEN_PHASE:
                    self._advance(c)
                    continue
                if event != readable and not self._prepare(c, event):
                    continue
                try:
                    chunk = c.recv(recv_bytes)
                except _WOULD_BLOCK:
                    continue
                except OSError as error:
                    self._fail(c, _RESET, error)
                    continue
                now = clock()
                at, length, due = c.read_at, len(chunk), c.due
                if not chunk:
                    self._fail(c, _CLOSED_EARLY, f"the server closed a connection that was owed {len(due)} replies")
                    continue
                if not is_at(chunk, at):
                    self._fail(c, _WRONG_BYTES, f"expected {self.pool[at : at + 24]!r}, got {chunk[:24]!r}")
                    continue
                c.read_at = (at + length) % period
                c.since = now
                received += length
                have = c.have + length
                if follows and have == size and len(due) == 1:
                    # The commonest case by far, written out: one message in flight and its whole reply here.
                    c.have = 0
                    replies += 1
                    t, due[0] = due[0], now
                    at = c.write_at
                    try:
                        length = c.send(source[at : at + size])
                    except _WOULD_BLOCK:
                        length = 0
                    except OSError as error:
                        self._fail(c, _RESET, error)
                        continue
                    self.sent += length
                    c.write_at = (at + length) % period
                    if length != size:
                        c.unsent = size - length
                        self._flush(c)
                    if t >= start:
                        t = (now - t) // 1000
                        counts[t if t < _COARSE_FROM_US else t & -128] += 1
                    continue
                done, c.have = divmod(have, size)
                if done > len(due) or (c.have and done == len(due)):
                    self._fail(c, _WRONG_BYTES, "the server sent more than it was sent")
                    continue
                replies += done
                if follows:
                    due.extend([now] * done)
                    c.unsent += done * size
                    self._flush(c)
                if done:
                    self._count(c, done, now)
                    if not follows:
                        self._move_on(c, done, now)
        finally:
            self.received += received
            self.replies += replies

    def _prepare(self, c: _Connection, event: int) -> bool:
        """Handle what an event tells besides readable; whether there is something to read."""
        if event & select.EPOLLOUT and not self._flush(c):
            return False
        return event != select.EPOLLOUT

    def _count(self, c: _Connection, done: int, now: int) -> None:
        counts = self.counts
        for _ in range(done):
            t = c.due.popleft()
            if t >= self.start:
                t = (now - t) // 1000
                counts[t if t < _COARSE_FROM_US else t & -128] += 1

    def _move_on(self, c: _Connection, done: int, now: int) -> None:
        """Decide what follows replies where it is not simply the next message on the same connection."""
        self.failures_in_a_row = 0
        churn = self.settings.churn
        if churn:
            self._close(c)
        if not self.begun:
            self.ready += 1
        elif self.interval:
            for _ in range(done):
                slot = None if churn else c
                if self.queue:
                    self._submit(slot, self.queue.popleft())
                else:
                    self.free.append(slot)
        elif self.sending:
            self._submit(None, now)

    # One connection.

    def _submit(self, slot: _Connection | None, due: int) -> None:
        """Send a message due at `due` (ns) on this connection, or on one of its own."""
        if slot is None:
            self._open(due)
        elif self.connections.get(slot.fd) is not slot:  # it failed while it was in line
            self.queue.appendleft(due)
        else:
            if not slot.due:
                slot.since = time.perf_counter_ns()
            slot.due.append(due)
            slot.unsent += self.size
            self._flush(slot)

    def _open(self, due: int) -> None:
        index, self.opened = self.opened, self.opened + 1
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        c = _Connection(sock, index * 31 % (self.period // self.size) * self.size, time.perf_counter_ns())
        c.due.append(due)
        c.unsent = self.size
        try:
            if self.family == socket.AF_UNIX:
                # Without blocking, connect(2) refuses at once where the backlog is full; nothing tells when to retry.
                sock.settimeout(self.settings.timeout_s)
                sock.connect(self.address)
                sock.setblocking(False)
            else:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.source_addresses:
                    sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
                    sock.bind((self.source_addresses[index % len(self.source_addresses)], 0))
                with suppress(BlockingIOError):
                    sock.connect(self.address)
        except OSError as error:
            sock.close()
            self._lose(c, _CONNECT, error)
            return
        self.connections[c.fd] = c
        # On loopback the handshake is over by now, though connect() said it was in progress: saves a turn.
        self._advance(c)
        if not c.watched and self.connections.get(c.fd) is c:
            self._watch(c, select.EPOLLIN | select.EPOLLOUT)

    def _advance(self, c: _Connection) -> None:
        """Take a connection as far towards open as it goes without waiting, and send its first message."""
        try:
            if self.context is None:
                # To send tells in one call whether the connection stands, still waits or was refused.
                length = c.send(self.view[c.write_at : c.write_at + min(c.unsent, _CHUNK_BYTES)])
                c.write_at = (c.write_at + length) % self.period
                c.unsent -= length
                self.sent += length
            elif c.phase == _CONNECT_PHASE:
                code = c.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
                try:
                    c.sock.getpeername()
                except OSError:
                    return
                c.sock = self.context.wrap_socket(
                    c.sock, server_hostname=self.server_hostname, do_handshake_on_connect=False
                )
                c.send, c.recv = c.sock.send, c.sock.recv
                self._watch(c, select.EPOLLIN)
                c.phase = _HANDSHAKE_PHASE
            if c.phase == _HANDSHAKE_PHASE:
                assert isinstance(c.sock, ssl.SSLSocket)
                c.sock.do_handshake()
            c.phase = _OPEN_PHASE
        except _WOULD_BLOCK:
            return
        except OSError as error:
            self._fail(c, _CONNECT, error)
            return
        self._flush(c)

    def _flush(self, c: _Connection) -> bool:
        """Send as much as the socket takes; False where the connection failed."""
        try:
            while c.unsent:
                at = c.write_at
                length = c.send(self.view[at : at + min(c.unsent, _CHUNK_BYTES)])
                c.write_at = (at + length) % self.period
                c.unsent -= length
                self.sent += length
        except _WOULD_BLOCK:
            pass
        except OSError as error:
            self._fail(c, _RESET, error)
            return False
        wanted = select.EPOLLIN | select.EPOLLOUT if c.unsent else select.EPOLLIN
        if wanted != c.watched:
            self._watch(c, wanted)
        return True

    def _watch(self, c: _Connection, events: int) -> None:
        if c.watched:
            self.epoll.modify(c.fd, events)
        else:
            self.epoll.register(c.fd, events)
        c.watched = events

    def _close(self, c: _Connection) -> None:
        del self.connections[c.fd]
        c.sock.close()  # which takes it out of the epoll, too

    # What goes wrong.

    def _fail(self, c: _Connection, error_class: int, error: object) -> None:
        self._close(c)
        self._lose(c, error_class, error)

    def _lose(self, c: _Connection, error_class: int, error: object) -> None:
        """Count what was in flight as lost; a lost connection is not opened again, but in churn its slot goes on."""
        detail = f"{type(error).__name__}: {error}" if isinstance(error, ssl.SSLError) else error
        self._count_error(error_class, max(1, len(c.due)), getattr(detail, "strerror", None) or detail)
        if not self.begun:
            return
        if not self.settings.churn:
            if not self.connections:
                self.errors[error_class] += len(self.queue)  # due, and there is nobody left to send them
                raise _Stop(f"the last connection was lost: {self.first_error}")
            return
        self.failures_in_a_row += 1
        if self.failures_in_a_row > 2 * self.slots + 20:
            raise _Stop(f"{self.failures_in_a_row} connections in a row failed: {self.first_error}")
        self.resting += 1  # trying again at once would spin where nobody listens

    def _count_error(self, error_class: int, lost: int, detail: object) -> None:
        self.errors[error_class] += lost
        self.first_error = self.first_error or f"{ERROR_CLASSES[error_class].replace('_', ' ')}: {detail}"

    def _tick(self, now: int) -> None:
        """Do what need not happen at every turn: time-outs, resting slots, progress, word from the parent."""
        for c in list(self.connections.values()):
            if c.due and now - c.since > self.timeout:
                self._fail(c, _TIMED_OUT, f"no byte came for {self.settings.timeout_s:g} s")
        resting, self.resting = self.resting, 0
        for _ in range(resting if self.sending or self.queue else 0):
            if self.interval:
                self.free.append(None)
            else:
                self._submit(None, now)
        if self.control is not None and self.control.poll() and self.control.recv() == "stop":
            raise _Stop(None)
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
        self.next_tick = now + _TICK_NS


def _allow_many_descriptors() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _allow_exact_timers() -> None:
    # By default the kernel lets a sleeper oversleep by 50 us to save wake-ups, and each would show as latency.
    with suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
        slack.write("1")
