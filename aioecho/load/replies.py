"""Loading a stream server whose replies are not the bytes that were sent: what the engines for that have in common."""

from __future__ import annotations

import socket
import time
from abc import abstractmethod
from collections import deque
from typing import Any

from aioecho.exceptions import FrameTooLong
from aioecho.framing import Framing
from aioecho.framing.base import check_split
from aioecho.load.engine import CLOSED_EARLY, WRONG_BYTES, Stop
from aioecho.load.messages import CHUNK_BYTES
from aioecho.load.settings import LoadSettings
from aioecho.load.streams import Connection, StreamEngine

__all__ = ["ReplyConnection", "ReplyEngine"]

_TLS_RECORD = 2**14  # bytes at most, by RFC 8446


class ReplyConnection(Connection):
    """A connection, its next messages, and what has come."""

    __slots__ = ("_scanned", "_wanted", "buffer", "frames", "to_read", "to_send")

    def __init__(self, sock: socket.socket, at: int, now: int, index: int) -> None:
        super().__init__(sock, at, now)
        self.to_send = self.to_read = index  # of the next message
        self.buffer = bytearray()  # what has come and was no whole reply
        self.frames: deque[bytes] = deque()  # of a script: what was split off the buffer, and is later replies
        self._scanned = self._wanted = 0  # of the buffer: see aioecho.framing

    def split(self, framing: Framing, most: int) -> list[bytes]:
        """Remove whole frames from the front of the buffer, and return them; none while the next one is not whole.

        Raises ValueError if what came is none of the framing's, or more than `most` bytes that hold no whole frame; and Stop if
        the framing is wrong.
        """
        buffer = self.buffer
        while buffer and len(buffer) >= self._wanted:
            frames, used, wanted = framing.split(buffer, self._scanned)
            if not 0 < used <= len(buffer) and not (self._scanned and not frames and not used):
                try:
                    check_split(framing, len(buffer), frames, used, wanted)
                except RuntimeError as error:
                    raise Stop(str(error)) from error
            del buffer[:used]
            left = len(buffer)
            self._scanned, self._wanted = (left, wanted) if wanted > left else (0, 0)
            if frames:
                return frames
            if left > most:  # the framing has overlooked that
                raise FrameTooLong(None, most)
        return []


class ReplyEngine(StreamEngine):
    """The part of an engine that sends messages one after another, and counts replies that `_split` finds."""

    connections: dict[int, ReplyConnection]  # type: ignore[assignment]
    joined: list[bytes]
    """The messages as they are sent. The pool holds them one after another."""

    def __init__(self, settings: LoadSettings, share: int, shares: int, control: Any = None) -> None:
        super().__init__(settings, share, shares, control)
        self.starts = [0]
        for message in self.joined:
            self.starts.append(self.starts[-1] + len(message))
        self.longest = max(map(len, self.joined))
        # A record of TLS is read whole: no event tells of the rest, which the kernel does not have any more.
        least = _TLS_RECORD if settings.tls else 4096
        self.recv_bytes = min(CHUNK_BYTES, max(least, self.longest * settings.depth + 1))

    def _make_connection(self, sock: socket.socket, index: int) -> ReplyConnection:
        message = index * 31 % len(self.joined)
        return ReplyConnection(sock, self.starts[message], time.perf_counter_ns(), message)

    def _next_size(self, c: Connection) -> int:
        assert isinstance(c, ReplyConnection)
        message = c.to_send
        c.to_send = (message + 1) % len(self.joined)
        return len(self.joined[message])

    def _handle(self, events: list[tuple[int, int]]) -> None:
        """Read replies, split, compare and count them, and in closed loop send what follows."""
        follows = self.sending and not self.settings.churn and not self.interval
        for fd, event in events:
            c = self.connections.get(fd)
            chunk = None if c is None else self._receive(c, event)
            if c is None or chunk is None:
                continue
            now = time.perf_counter_ns()
            if not chunk:
                self._fail(c, CLOSED_EARLY, f"the server closed a connection that was owed {len(c.due)} replies")
                continue
            c.since = now
            self.received += len(chunk)
            try:
                done = self._split(c, chunk)
            except ValueError as error:
                self._fail(c, WRONG_BYTES, error)
                continue
            if len(chunk) == self.recv_bytes:  # there may be more
                self._watch(c, c.watched)
            self.replies += done
            if follows:
                for _ in range(done):
                    self._count(c.due.popleft(), now)
                    c.due.append(now)
                    c.unsent += self._next_size(c)
                self._flush(c)
            elif done:
                self._count_replies(c, done, now)

    @abstractmethod
    def _split(self, c: ReplyConnection, chunk: bytes) -> int:
        """Return how many replies have become whole. Raises ValueError, with what is wrong, if they are not the expected."""
