"""Loading a datagram server: UDP and Unix datagram sockets, with a number in every message, which its reply repeats.

A datagram may be lost, doubled or late, and no error reports it. So every message begins with a number: a reply is the
expected one, or late (its message had been counted as timed out), or a duplicate, or else it has wrong bytes.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from aioecho.load.engine import CONNECT, TIMED_OUT, WRONG_BYTES, Engine
from aioecho.load.settings import NUMBER_BYTES, LoadSettings, parse_target
from aioecho.load.targets import find_addresses
from aioecho.net.endpoints import UDPEndpoint, UnixDatagramEndpoint

__all__ = ["DatagramEngine"]

_READ_BYTES = 65_536  # of a reply, or one more than were sent: a longer one is cut there, and so differs
_READS_A_TURN = 64  # of one socket; the others have replies waiting, too
_EVENTS = select.EPOLLIN | select.EPOLLET  # edge-triggered for fairness, see StreamEngine
_BODIES = 1021  # so many consecutive messages differ in more than their numbers
_MOST_GIVEN_UP = 100_000  # timed-out messages whose replies are recognised when they come after all


class _Socket:
    """One client of the server, with a source address of its own."""

    __slots__ = ("blocked", "fd", "recv", "send", "sock", "target")

    def __init__(self, sock: socket.socket, target: Any) -> None:
        self.sock = sock
        self.target = target  # the server's address
        self.fd = sock.fileno()
        self.send = sock.send
        self.recv = sock.recv
        self.blocked: deque[int] = deque()  # when the messages were due for which the socket had no room


class DatagramEngine(Engine):
    """The engine for `udp://` and `unixgram:`."""

    def __init__(self, settings: LoadSettings, share: int, shares: int, control: Any = None) -> None:
        super().__init__(settings, share, shares, control)
        self.wanted_ready = self.slots
        self.sockets: dict[int, _Socket] = {}
        # What is in flight, oldest first: number -> socket, message, when it was due and when it was sent.
        self.pending: dict[bytes, tuple[_Socket, bytes, int, int]] = {}
        self.given_up: dict[bytes, None] = {}
        self.number = share << 48  # so no two processes share one
        self.first_number = self.number
        self.body_bytes = self.size - NUMBER_BYTES
        self.read_bytes = max(_READ_BYTES, self.size + 1)
        where = parse_target(settings.endpoint)
        self.family: int = socket.AF_UNIX
        self.address: Any
        self.further: list[Any] = []  # addresses of the host for when no server is at this one
        if isinstance(where, UDPEndpoint):
            self.further = find_addresses(where)
            self.family, self.address = self.further.pop(0)
        else:
            assert isinstance(where, UnixDatagramEndpoint)
            self.address = where.path

    def _list_slots(self) -> Sequence[_Socket]:
        return list(self.sockets.values()) * self.settings.depth

    def _has_any(self) -> bool:
        return bool(self.pending)

    def _is_owed(self) -> bool:
        return bool(self.pending) or any(s.blocked for s in self.sockets.values())

    def _count_owed(self) -> int:
        return len(self.pending) + sum(len(s.blocked) for s in self.sockets.values())

    def _close_all(self) -> None:
        for s in self.sockets.values():
            s.sock.close()

    def _handle(self, events: list[tuple[int, int]]) -> None:
        """Read replies, compare and count them, and in closed loop send what follows. The hot path."""
        clock, pending, would_block, read_bytes = time.perf_counter_ns, self.pending, BlockingIOError, self.read_bytes
        may_be_more = self.settings.depth > 1
        for fd, event in events:
            s = self.sockets[fd]
            if event & select.EPOLLOUT:
                self._send_blocked(s)
            for _ in range(_READS_A_TURN):
                try:
                    data = s.recv(read_bytes)
                except would_block:
                    break
                except OSError as error:  # what the server's host says to a datagram that it can't deliver
                    if self._try_next_address(s):
                        break
                    self._fail_oldest(s, error)
                    continue
                now = clock()
                self.received += len(data)
                number = data[:NUMBER_BYTES]
                found = pending.get(number)
                if found is None or found[0] is not s or found[1] != data:
                    self._judge(s, number, data, found)
                    continue
                del pending[number]
                self.replies += 1
                self.failures_in_a_row = 0
                self._count(found[2], now)
                self._move_on(s, now)
                if not may_be_more:  # if there is after all, it is read together with the next
                    break
            else:
                self._watch(s)

    def _judge(self, s: _Socket, number: bytes, data: bytes, found: tuple[_Socket, bytes, int, int] | None) -> None:
        """Count a reply that is not the one to a message in flight on its socket."""
        if found is None and number in self.given_up:
            del self.given_up[number]
            self.late += 1
        elif found is None and self.first_number < int.from_bytes(number) <= self.number and len(data) == self.size:
            self.duplicates += 1
        else:
            # Which message it was meant for can't be known if its number is wrong: the oldest of its socket has failed.
            mine = number if found and found[0] is s else self._find_oldest(s)
            sent = self.pending[mine][1] if mine is not None else b"nothing"
            self._fail(s, mine, WRONG_BYTES, f"expected {sent[:24]!r}, got {data[:24]!r} ({len(data)} bytes)")

    # One socket.

    def _submit(self, slot: _Socket, due: int) -> None:
        self.number = number = self.number + 1
        key = number.to_bytes(NUMBER_BYTES)
        at = number % _BODIES
        message = key + self.pool[at : at + self.body_bytes]
        now = time.perf_counter_ns()
        # Before it is sent: on loopback the reply may be there when send() returns.
        self.pending[key] = (slot, message, due, now)
        try:
            self.sent += slot.send(message)
        except BlockingIOError:
            del self.pending[key]
            slot.blocked.append(due)
            self._watch(slot)
        except OSError as error:  # also what the server's host said to an earlier one
            self._fail(slot, key, CONNECT, error.strerror or error)

    def _send_blocked(self, s: _Socket) -> None:
        waiting, s.blocked = s.blocked, deque()
        for due in waiting:
            if s.blocked:
                s.blocked.append(due)
            else:
                self._submit(s, due)
        self._watch(s)

    def _watch(self, s: _Socket) -> None:
        """Register for replies, also for replies that have come already, and for room if messages are blocked."""
        self.epoll.modify(s.fd, _EVENTS | (select.EPOLLOUT if s.blocked else 0))

    def _open(self, due: int) -> None:
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        s = _Socket(sock, self.address)
        try:
            sock.setblocking(False)
            if self.family == socket.AF_UNIX:
                sock.bind("")  # Linux chooses a name, to which the server can reply
            sock.connect(self.address)
        except OSError as error:
            sock.close()
            if self.further:
                self.family, self.address = self.further.pop(0)
                self._open(due)
            else:
                self._count_error(CONNECT, 1, error.strerror or error)
            return
        self.sockets[s.fd] = s
        self.epoll.register(s.fd, _EVENTS)
        self._submit(s, due)

    # What goes wrong.

    def _try_next_address(self, s: _Socket) -> bool:
        """Send what a socket has sent to the next address of the host, as long as none has replied; else return False."""
        oldest = self._find_oldest(s)
        if self.begun or self.ready or oldest is None or not (self.further or s.target is not self.address):
            return False
        if s.target is self.address:
            self.family, self.address = self.further.pop(0)
        _, _, due, _ = self.pending.pop(oldest)
        del self.sockets[s.fd]
        s.sock.close()
        self._open(due)
        return True

    def _fail_oldest(self, s: _Socket, error: OSError) -> None:
        """Count a message as lost for which there was an error instead of a reply: the socket's oldest."""
        oldest = self._find_oldest(s)
        if oldest is not None:
            self._fail(s, oldest, CONNECT, error.strerror or error)

    def _find_oldest(self, s: _Socket) -> bytes | None:
        return next((number for number, entry in self.pending.items() if entry[0] is s), None)

    def _fail(self, s: _Socket, number: bytes | None, error_class: int, detail: object) -> None:
        """Count an error, and the message in flight that it has cost, if any. Pause its slot."""
        self._count_error(error_class, 1, detail)
        if number is not None:
            del self.pending[number]
            if self.begun:
                self._pause(s, "datagrams", error_class)

    def _fail_silent(self, now: int) -> None:
        while self.pending:
            number, (s, _, _, sent) = next(iter(self.pending.items()))
            if now - sent <= self.timeout:
                break
            self.given_up[number] = None
            if len(self.given_up) > _MOST_GIVEN_UP:
                del self.given_up[next(iter(self.given_up))]
            self._fail(s, number, TIMED_OUT, f"no reply within {self.settings.effective_timeout_s:g} s")
