"""Loading a server whose protocol has frames: what comes is split, and a reply is one whole frame, equal to what was sent.

The bytes of a reply may differ from the bytes that were sent, as where a server encodes a frame in another way.
"""

from __future__ import annotations

from typing import Any

from aioecho.framing import Framing
from aioecho.load.messages import make_frames
from aioecho.load.replies import ReplyConnection, ReplyEngine
from aioecho.load.settings import LoadSettings

__all__ = ["FrameEngine"]

# Bytes without a whole frame, over the longest frame's, before a framing is taken to have overlooked that.
_SLACK = 2**16


class FrameEngine(ReplyEngine):
    """The engine for `tcp://` and `unix:` with a framing."""

    def __init__(self, settings: LoadSettings, share: int, shares: int, control: Any = None) -> None:
        assert settings.framing is not None
        self.messages = make_frames(settings.framing, settings.size_bytes)
        self.joined = self.messages.joined
        super().__init__(settings, share, shares, control)
        # No frame is longer than the ones that were sent: one that says so is refused before it has come.
        self.framing: Framing = settings.framing.limited(max(map(len, self.messages.frames)))

    def _make_pool(self) -> tuple[bytes, int]:
        return self.messages.pool()

    def _split(self, c: ReplyConnection, chunk: bytes) -> int:
        """Return how many replies have become whole. Raises ValueError, with what is wrong, if they are not the expected."""
        expected, buffer = self.messages.frames, c.buffer
        if not buffer and chunk == self.messages.joined[c.to_read] and c.due:  # the commonest case by far
            c.to_read = (c.to_read + 1) % len(expected)
            return 1
        buffer += chunk
        done = 0
        while frames := c.split(self.framing, self.longest + _SLACK):
            if len(frames) + done > len(c.due):
                raise ValueError("the server sent more than it was sent")
            for frame in frames:
                if frame != expected[c.to_read]:
                    raise ValueError(f"expected the frame {expected[c.to_read][:24]!r}, got {frame[:24]!r}")
                c.to_read = (c.to_read + 1) % len(expected)
            done += len(frames)
        if buffer and done == len(c.due):
            raise ValueError("the server sent more than it was sent")
        return done
