"""Loading a server whose protocol has frames: what comes is split, and a reply is one whole frame, equal to what was sent.

The bytes of a reply may differ from those that were sent, as where a server encodes a frame in another way.
"""

from __future__ import annotations

import socket
import time
from typing import Any

from aioecho.exceptions import FrameTooLong
from aioecho.framing import Framing
from aioecho.load.engine import CLOSED_EARLY, WRONG_BYTES
from aioecho.load.messages import CHUNK_BYTES, make_frames
from aioecho.load.settings import LoadSettings
from aioecho.load.streams import Connection, StreamEngine

__all__ = ["FrameEngine"]

_SLACK = (
    2**16
)  # bytes without a whole frame, over those of the longest, before a framing is taken to have overlooked that


class _FrameConnection(Connection):
    """A connection, and its next frames."""

    __slots__ = ("buffer", "scanned", "to_read", "to_send", "wanted")

    def __init__(self, sock: socket.socket, at: int, now: int, frame: int) -> None:
        super().__init__(sock, at, now)
        self.to_send = self.to_read = frame  # the index of the next one
        self.buffer = bytearray()  # what has come and was no whole frame
        self.scanned = self.wanted = 0  # of the buffer: see Framing.split()


class FrameEngine(StreamEngine):
    """The engine for `tcp://` and `unix:` with a framing."""

    connections: dict[int, _FrameConnection]  # type: ignore[assignment]

    def __init__(self, settings: LoadSettings, share: int, shares: int, control: Any = None) -> None:
        assert settings.framing is not None
        self.messages = make_frames(settings.framing, settings.size_bytes)
        super().__init__(settings, share, shares, control)
        self.starts = [0]
        for joined in self.messages.joined:
            self.starts.append(self.starts[-1] + len(joined))
        self.longest = max(map(len, self.messages.joined))
        self.recv_bytes = min(CHUNK_BYTES, max(4096, self.longest * settings.depth + 1))
        # No frame is longer than the ones that were sent: one that says so is refused before it has come.
        self.framing: Framing = settings.framing.limited(max(map(len, self.messages.frames)))

    def _make_pool(self) -> tuple[bytes, int]:
        return self.messages.pool()

    def _make_connection(self, sock: socket.socket, index: int) -> _FrameConnection:
        frame = index * 31 % len(self.messages.frames)
        return _FrameConnection(sock, self.starts[frame], time.perf_counter_ns(), frame)

    def _next_size(self, c: Connection) -> int:
        assert isinstance(c, _FrameConnection)
        frame = c.to_send
        c.to_send = (frame + 1) % len(self.messages.frames)
        return len(self.messages.joined[frame])

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

    def _split(self, c: _FrameConnection, chunk: bytes) -> int:
        """Return how many replies have become whole. Raises ValueError, with what is wrong, if they are not the expected."""
        expected, buffer = self.messages.frames, c.buffer
        if not buffer and chunk == self.messages.joined[c.to_read] and c.due:  # the commonest case by far
            c.to_read = (c.to_read + 1) % len(expected)
            return 1
        buffer += chunk
        done = 0
        while len(buffer) >= c.wanted:
            frames, used, wanted = self.framing.split(buffer, c.scanned)
            if len(frames) + done > len(c.due):
                raise ValueError("the server sent more than it was sent")
            for frame in frames:
                if frame != expected[c.to_read]:
                    raise ValueError(f"expected the frame {expected[c.to_read][:24]!r}, got {frame[:24]!r}")
                c.to_read = (c.to_read + 1) % len(expected)
            done += len(frames)
            del buffer[:used]
            c.scanned, c.wanted = (len(buffer), wanted) if wanted > len(buffer) else (0, 0)
            if not frames and len(buffer) > self.longest + _SLACK:
                raise FrameTooLong(None, self.longest)
            if not buffer:
                c.scanned = c.wanted = 0
                break
        if buffer and done == len(c.due):
            raise ValueError("the server sent more than it was sent")
        return done
