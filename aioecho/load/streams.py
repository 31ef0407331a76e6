"""Loading a stream server: connections over TCP, Unix sockets and TLS. Replies are compared byte by byte.

A message costs 4.9 us of processor time, of which 3.4 are the kernel's.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from aioecho.load.engine import (
    CLOSED_EARLY,
    COARSE_FROM_US,
    CONNECT,
    RESET,
    TIMED_OUT,
    WRONG_BYTES,
    Engine,
    Stop,
)
from aioecho.load.messages import CHUNK_BYTES
from aioecho.load.settings import LoadSettings, parse_target
from aioecho.load.targets import find_addresses
from aioecho.net.endpoints import TCPEndpoint, UnixEndpoint

__all__ = ["OPEN_PHASE", "READABLE", "WOULD_BLOCK", "WRITABLE", "Connection", "StreamEngine"]

_IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h; leaves the choice of a port to connect(2), which knows the other end
CONNECT_PHASE, HANDSHAKE_PHASE, OPEN_PHASE = range(3)
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
READABLE, WRITABLE = select.EPOLLIN, select.EPOLLOUT


class Connection:
    """One socket, and how far the streams to and from the server have come."""

    __slots__ = ("due", "fd", "have", "phase", "read_at", "recv",
                 "send", "since", "sock", "target", "unsent", "watched", "write_at")  # fmt: skip

    def __init__(self, sock: socket.socket, at: int, now: int) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.send = sock.send
        self.recv = sock.recv
        self.phase = CONNECT_PHASE
        self.read_at = at  # where in the pool the next byte to come is
        self.write_at = at
        self.have = 0  # bytes of the current reply
        self.unsent = 0
        self.due: deque[int] = deque()  # when each message in flight was due, oldest first
        self.since = now  # the last sign of life, or when it began to owe one
        self.watched = 0  # epoll events; 0 while it is not registered
        self.target: Any = None  # the address that it connects to


class StreamEngine(Engine):
    """The engine for `tcp://` and `unix:`."""

    def __init__(self, settings: LoadSettings, share: int, shares: int, control: Any = None) -> None:
        super().__init__(settings, share, shares, control)
        self.view = memoryview(self.pool)
        # To copy a short message is cheaper than to make a view of it.
        self.source: bytes | memoryview = self.pool if self.size <= 1024 else self.view
        self.share = share
        self.opened = share * 7_919
        self.recv_bytes = min(CHUNK_BYTES, max(4096, self.size * settings.depth + 1))
        self.wanted_ready = 1 if settings.churn else self.slots
        self.connections: dict[int, Connection] = {}
        self.owing: list[Connection] = []
        where = parse_target(settings.endpoint)
        self.family: int = socket.AF_UNIX
        self.address: Any
        self.further: list[Any] = []  # addresses of the host for when no connection comes about to this one
        self.source_addresses: list[str] = []
        self.server_hostname = "localhost"
        if isinstance(where, TCPEndpoint):
            self.server_hostname = where.host or "localhost"
            self.further = find_addresses(where)
            self._take_next_address()
        else:
            assert isinstance(where, UnixEndpoint)
            self.address = where.path
        self.context = ssl.create_default_context(cafile=settings.ca_file) if settings.tls else None
        # Edge-triggered, as each reply is read whole: the kernel need not look again, and it tells of sockets in the
        # order in which their replies came. Level-triggered it puts sockets that it has just reported before new ones, and
        # that unfairness was measured as latency: half as much skew again, p99 over p50. TLS reads record by record, and may
        # leave records unread.
        self.trigger = 0 if settings.tls else select.EPOLLET | select.EPOLLRDHUP

    def _take_next_address(self) -> None:
        self.family, self.address = self.further.pop(0)
        # A closed connection keeps its port for a minute. With one address they run short after 28,000, and long
        # before that connect() spends its time looking for a free one, which would be measured as the server's.
        is_loopback = self.family == socket.AF_INET and str(self.address[0]).startswith("127.")
        wants_several = self.settings.churn and is_loopback
        self.source_addresses = [f"127.0.{self.share}.{i}" for i in range(2, 250)] if wants_several else []

    def _list_slots(self) -> Sequence[Connection | None]:
        if self.settings.churn:
            return [None] * self.slots
        return list(self.connections.values()) * self.settings.depth

    def _has_any(self) -> bool:
        return bool(self.connections)

    def _is_owed(self) -> bool:
        while True:
            while self.owing:
                if self.owing[-1].due and self.connections.get(self.owing[-1].fd) is self.owing[-1]:
                    return True
                self.owing.pop()
            self.owing = [connection for connection in self.connections.values() if connection.due]
            if not self.owing:
                return False

    def _count_owed(self) -> int:
        return sum(len(connection.due) for connection in self.connections.values())

    def _close_all(self) -> None:
        for connection in list(self.connections.values()):
            connection.sock.close()

    def _handle(self, events: list[tuple[int, int]]) -> None:
        """Read replies, compare and count them, and in closed loop send what follows. The hot path."""
        clock, counts, connections, readable = time.perf_counter_ns, self.counts, self.connections, READABLE
        is_at, recv_bytes, size, period = self.pool.startswith, self.recv_bytes, self.size, self.period
        source, start = self.source, self.start
        follows = self.sending and not self.settings.churn and not self.interval
        received = replies = 0
        try:
            for fd, event in events:
                c = connections.get(fd)
                if c is None:  # it failed in this very turn, when another one's reply let a message go out on it
                    continue
                if c.phase != OPEN_PHASE:
                    self._advance(c)
                    continue
                if event != readable and not self._prepare(c, event):
                    continue
                try:
                    chunk = c.recv(recv_bytes)
                except WOULD_BLOCK:
                    continue
                except OSError as error:
                    self._fail(c, RESET, error)
                    continue
                now = clock()
                at, length, due = c.read_at, len(chunk), c.due
                if not chunk:
                    self._fail(c, CLOSED_EARLY, f"the server closed a connection that was owed {len(due)} replies")
                    continue
                if not is_at(chunk, at):
                    self._fail(c, WRONG_BYTES, f"expected {self.pool[at : at + 24]!r}, got {chunk[:24]!r}")
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
                    except WOULD_BLOCK:
                        length = 0
                    except OSError as error:
                        self._fail(c, RESET, error)
                        continue
                    self.sent += length
                    c.write_at = (at + length) % period
                    if length != size:
                        c.unsent = size - length
                        self._flush(c)
                    if t >= start:
                        t = (now - t) // 1000
                        counts[t if t < COARSE_FROM_US else t & -128] += 1
                    continue
                if length == recv_bytes:  # there may be more
                    self._watch(c, c.watched)
                done, c.have = divmod(have, size)
                if done > len(due) or (c.have and done == len(due)):
                    self._fail(c, WRONG_BYTES, "the server sent more than it was sent")
                    continue
                replies += done
                if follows:
                    for _ in range(done):
                        self._count(due.popleft(), now)
                        due.append(now)
                    c.unsent += done * size
                    self._flush(c)
                elif done:
                    self._count_replies(c, done, now)
        finally:
            self.received += received
            self.replies += replies

    def _receive(self, c: Connection, event: int) -> bytes | None:
        """Return what has come, b"" at the end of the stream, None if nothing is to be done with it.

        :meth:`_handle` has this written out.
        """
        if c.phase != OPEN_PHASE:
            self._advance(c)
            return None
        if event != READABLE and not self._prepare(c, event):
            return None
        try:
            return c.recv(self.recv_bytes)
        except WOULD_BLOCK:
            return None
        except OSError as error:
            self._fail(c, RESET, error)
            return None

    def _prepare(self, c: Connection, event: int) -> bool:
        """Handle the other flags of an event. Return whether there is something to read."""
        if event & ~(READABLE | WRITABLE):
            self._watch(c, c.watched)  # it has come to its end, which nothing more will tell of
        if event & WRITABLE and not self._flush(c):
            return False
        return event != WRITABLE

    def _count_replies(self, c: Connection, done: int, now: int) -> None:
        """Count replies after which something else follows than simply the next message on the same connection."""
        self.failures_in_a_row = 0
        for _ in range(done):
            self._count(c.due.popleft(), now)
        slot: Connection | None = c
        if self.settings.churn:
            self._close(c)
            slot = None
        for _ in range(done):
            self._move_on(slot, now)

    # One connection.

    def _submit(self, slot: Connection | None, due: int) -> None:
        if slot is None:
            self._open(due)
        elif self.connections.get(slot.fd) is not slot:  # it failed while it was in line
            if self.interval:
                self.queue.appendleft(due)
        else:
            if not slot.due:
                slot.since = time.perf_counter_ns()
            slot.due.append(due)
            slot.unsent += self._next_size(slot)
            self._flush(slot)

    def _make_connection(self, sock: socket.socket, index: int) -> Connection:
        return Connection(sock, index * 31 % (self.period // self.size) * self.size, time.perf_counter_ns())

    def _next_size(self, c: Connection) -> int:
        """Return how many bytes the next message takes that is sent on this connection."""
        return self.size

    def _open(self, due: int) -> None:
        index, self.opened = self.opened, self.opened + 1
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        c = self._make_connection(sock, index)
        c.target = self.address
        c.due.append(due)
        c.unsent = self._next_size(c)
        try:
            if self.family == socket.AF_UNIX:
                # Without blocking, connect(2) refuses at once where the backlog is full; nothing tells when to retry.
                sock.settimeout(self.settings.effective_timeout_s)
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
            self._lose(c, CONNECT, error)
            return
        self.connections[c.fd] = c
        # On loopback the handshake is over by now, though connect() said it was in progress: saves a turn.
        self._advance(c)
        if not c.watched and self.connections.get(c.fd) is c:
            self._watch(c, READABLE | WRITABLE)

    def _advance(self, c: Connection) -> None:
        """Take a connection as far towards open as it goes without waiting, and send its first message."""
        try:
            if self.context is None:
                # To send tells in one call whether the connection stands, still waits or was refused.
                length = c.send(self.view[c.write_at : c.write_at + min(c.unsent, CHUNK_BYTES)])
                c.write_at = (c.write_at + length) % self.period
                c.unsent -= length
                self.sent += length
            elif c.phase == CONNECT_PHASE:
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
                self._watch(c, READABLE)
                c.phase = HANDSHAKE_PHASE
            if c.phase == HANDSHAKE_PHASE:
                assert isinstance(c.sock, ssl.SSLSocket)
                c.sock.do_handshake()
            c.phase = OPEN_PHASE
        except WOULD_BLOCK:
            return
        except OSError as error:
            self._fail(c, CONNECT, error)
            return
        if self._flush(c) and c.unsent and c.watched:
            self._watch(c, c.watched)  # the event that led here may have told of a reply, too

    def _flush(self, c: Connection) -> bool:
        """Send as much as the socket takes; False where the connection failed."""
        try:
            while c.unsent:
                at = c.write_at
                length = c.send(self.view[at : at + min(c.unsent, CHUNK_BYTES)])
                c.write_at = (at + length) % self.period
                c.unsent -= length
                self.sent += length
        except WOULD_BLOCK:
            pass
        except OSError as error:
            self._fail(c, RESET, error)
            return False
        wanted = READABLE | WRITABLE if c.unsent else READABLE
        if wanted != c.watched:
            self._watch(c, wanted)
        return True

    def _watch(self, c: Connection, events: int) -> None:
        """Register for these events, also for events that have happened already."""
        if c.watched:
            self.epoll.modify(c.fd, events | self.trigger)
        else:
            self.epoll.register(c.fd, events | self.trigger)
        c.watched = events

    def _close(self, c: Connection) -> None:
        del self.connections[c.fd]
        c.sock.close()  # which removes it from the epoll, too

    # What goes wrong.

    def _fail(self, c: Connection, error_class: int, error: object) -> None:
        self._close(c)
        self._lose(c, error_class, error)

    def _lose(self, c: Connection, error_class: int, error: object) -> None:
        """Count what was in flight as lost; a lost connection is not opened again, but in churn its slot goes on.

        As long as no connection has come about, the next address of the host is tried instead.
        """
        if (
            c.phase == CONNECT_PHASE
            and not self.begun
            and not self.ready
            and (self.further or c.target is not self.address)
        ):
            if c.target is self.address:
                self._take_next_address()
            self._open(c.due[0])
            return
        detail = f"{type(error).__name__}: {error}" if isinstance(error, ssl.SSLError) else error
        self._count_error(error_class, max(1, len(c.due)), getattr(detail, "strerror", None) or detail)
        if not self.begun:
            return
        if self.settings.churn:
            self._pause(None, "connections", error_class)
        elif not self.connections:
            self.errors[error_class] += len(self.queue)  # due, and no connection is left to send them
            raise Stop(f"the last connection was lost: {self.first_error}")

    def _fail_silent(self, now: int) -> None:
        for c in list(self.connections.values()):
            if c.due and now - c.since > self.timeout:
                self._fail(c, TIMED_OUT, f"no byte came for {self.settings.effective_timeout_s:g} s")
