"""Frames that end with a separator."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from aioecho.exceptions import FrameTooLong, FramingError
from aioecho.framing.base import Buffer, Framing, check_max_size, check_separator, drop_from_too_long, shown

__all__ = ["Delimited", "Lines", "skip_to"]


@dataclass(frozen=True)
class Lines(Framing):
    r"""Lines, which end with a newline, b"\n".

    A frame is a line without its newline, or with it, as from `readline()`, if `keep_end` is true. Either way `max_size` does
    not count it. A carriage return before the newline is part of the frame, so that joining gives back what came.
    ``Delimited(b"\r\n")`` is for protocols that demand both.
    """

    limit: ClassVar[Literal["max_buffer", "max_frame"]] = "max_buffer"

    keep_end: bool = False
    max_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_size(self.max_size)

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole lines off."""
        size, most = len(buffer), self.max_size
        if buffer.find(b"\n", scanned) < 0:
            if most is not None and size > most:
                raise FrameTooLong(None, most)
            return [], 0, size + 1
        if self.keep_end:
            frames = io.BytesIO(buffer).readlines()
            rest = 0 if frames[-1].endswith(b"\n") else len(frames.pop())
        else:
            frames = bytes(buffer).split(b"\n")
            rest = len(frames.pop())
        if most is None or size <= most:
            return frames, size - rest, rest + 1
        end = 1 if self.keep_end else 0
        if max(map(len, frames)) - end > most:
            return frames, drop_from_too_long(frames, most, 1 - end, end), 0
        return frames, size - rest, 0 if rest > most else rest + 1

    def join(self, frame: bytes, /) -> bytes:
        """Return the line with its newline.

        Raises ValueError if there is a newline in it, or, where `keep_end` is true, none at its end.
        """
        if self.keep_end:
            if frame.find(b"\n") != len(frame) - 1 or not frame:
                raise ValueError(f"a line must have one newline, at its end (keep_end): {shown(frame)}")
            return bytes(frame)
        if b"\n" in frame:
            raise ValueError(f"a line must not contain a newline: {shown(frame)}")
        return b"%b\n" % frame

    def split_datagram(self, datagram: bytes, /) -> Iterator[bytes]:
        """Yield the lines of a datagram. The last one may lack its newline: senders leave it out."""
        return super().split_datagram(_end_with(b"\n", datagram))

    def resync(self, buffer: Buffer, /) -> tuple[int, bool]:
        """Look for the newline that ends a line which is skipped."""
        return skip_to(b"\n", buffer)


@dataclass(frozen=True)
class Delimited(Framing):
    r"""Frames that end with a separator, and may have to begin with a start mark.

    A frame is what stands between the two. MLLP, of HL7, is ``Delimited(b"\x1c\r", start=b"\x0b")``. The first
    separator after a frame's first byte ends it: there is no escape.

    A frame that lacks the start mark raises FramingError, and what was sent up to the next separator is skipped.
    """

    limit: ClassVar[Literal["max_buffer", "max_frame"]] = "max_buffer"

    separator: bytes
    start: bytes = b""
    max_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_size(self.max_size)
        check_separator("separator", self.separator)
        check_separator("start", self.start, may_be_empty=True)
        if self.separator in self.start:
            raise ValueError(f"start {self.start!r} contains the separator {self.separator!r}")

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole frames off."""
        separator, start, most = self.separator, self.start, self.max_size
        size, ending, begun = len(buffer), len(separator), len(start)
        if buffer.find(separator, max(0, scanned - ending + 1)) < 0:
            self._check_begun(buffer)
            return [], 0, size + 1
        frames = bytes(buffer).split(separator)
        rest = frames.pop()
        used = size - len(rest)
        wanted = len(rest) + 1
        if begun:
            bad = -1
            for index, frame in enumerate(frames):
                if not frame.startswith(start):
                    bad = index
                    break
                frames[index] = frame[begun:]
            if bad == 0:
                raise self._misses_start(frames[0], len(frames[0]) + ending)
            if bad > 0:
                del frames[bad:]
                used, wanted = sum(map(len, frames)) + bad * (begun + ending), 0
        if most is not None and size > most and max(map(len, frames)) > most:
            return frames, drop_from_too_long(frames, most, begun + ending), 0
        if wanted and rest:
            try:
                self._check_begun(rest)
            except ValueError:
                wanted = 0  # this is raised when its turn comes
        return frames, used, wanted

    def _check_begun(self, buffer: Buffer) -> None:
        """Raise what is wrong with a frame whose separator has not come."""
        start, most = self.start, self.max_size
        if not (buffer.startswith(start) or start.startswith(buffer)):
            raise self._misses_start(buffer, None)
        # The last bytes may be the beginning of the separator.
        if most is not None and len(buffer) - len(start) - len(self.separator) + 1 > most:
            raise FrameTooLong(None, most)

    def _misses_start(self, frame: Buffer, skip: int | None) -> FramingError:
        return FramingError(f"the peer sent a frame that does not start with {self.start!r}: {shown(frame)}", skip)

    def join(self, frame: bytes, /) -> bytes:
        """Return the frame between its start mark and its separator.

        Raises ValueError if it contains the separator, or would make one with the bytes beside it.
        """
        joined = b"%b%b%b" % (self.start, frame, self.separator)
        if joined.find(self.separator) != len(joined) - len(self.separator):
            raise ValueError(f"a frame must not contain its separator {self.separator!r}: {shown(frame)}")
        return joined

    def split_datagram(self, datagram: bytes, /) -> Iterator[bytes]:
        """Yield the frames of a datagram. The last one may lack its separator."""
        return super().split_datagram(_end_with(self.separator, datagram))

    def resync(self, buffer: Buffer, /) -> tuple[int, bool]:
        """Look for the separator that ends a frame which is skipped."""
        return skip_to(self.separator, buffer)


def _end_with(separator: bytes, datagram: bytes) -> bytes:
    return datagram if not datagram or datagram.endswith(separator) else datagram + separator


def skip_to(separator: bytes, buffer: Buffer) -> tuple[int, bool]:
    """Tell how much of a buffer a skipped record takes, and whether the separator at its end is in it.

    The last bytes stay in the buffer where they may be the beginning of a longer separator.
    """
    at = buffer.find(separator)
    if at >= 0:
        return at + len(separator), True
    kept = len(separator) - 1
    while kept and not buffer.endswith(separator[:kept]):
        kept -= 1
    return len(buffer) - kept, False
