"""What every framing is, and what several of them share."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self, TypeAlias

from aioecho.exceptions import FrameTooLong, FramingError

__all__ = ["Buffer", "Framing", "check_max_size", "check_separator", "check_split", "drop_from_too_long", "shown"]

Buffer: TypeAlias = bytes | bytearray
"""What is split."""


class Framing(ABC):
    """The base of all framings. Override `split` and `join`, and set `limit`.

    aioecho.framing describes what these do. Override `resync` as well if `split` raises errors whose `skip` is None.
    """

    limit: ClassVar[Literal["max_buffer", "max_frame"]] = "max_frame"
    """The field of Limits that holds where `max_size` is None."""

    max_size: int | None = None
    """The most bytes of one frame, as `split` returns it. None: as the server's limits have it."""

    @abstractmethod
    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[Any], int, int]:
        """Cut the whole frames off the front of a buffer: return (frames, used, wanted).

        The frames are bytes, but for a framing that parses them too. Raises FrameTooLong and FramingError, the peer's fault,
        where the first frame is refused.
        """

    @abstractmethod
    def join(self, frame: Any, /) -> bytes:
        """Return the bytes to write for one frame.

        Raises ValueError if the framing has no way to write this frame: the caller's fault.
        """

    def resync(self, buffer: Buffer, /) -> tuple[int, bool]:
        """Look for the end of a record that is skipped: return (used, found).

        This one never finds it: what follows is skipped up to the end of the stream.
        """
        return len(buffer), False

    def split_datagram(self, datagram: bytes, /) -> Iterator[bytes]:
        """Return an iterator of the frames of a datagram.

        Raises FrameTooLong and FramingError as `split` does, also where the datagram ends in the middle of a frame: its
        sender's fault. The frames before that were yielded, and what follows in the datagram is lost. If nothing came before,
        the call may raise it, or the first step of the iterator.
        """
        frames, used, wanted = self.split(datagram) if datagram else ([], 0, 1)
        if used == len(datagram):  # as nearly always: a generator would cost as much as to split the frames off
            return iter(frames)
        return self._split_on(datagram, frames, used, wanted)

    def _split_on(self, datagram: bytes, frames: list[bytes], used: int, wanted: int) -> Iterator[bytes]:
        while True:
            if not 0 < used <= len(datagram):
                check_split(self, len(datagram), frames, used, wanted)
            yield from frames
            datagram = datagram[used:]
            if not datagram:
                return
            if wanted > len(datagram):
                raise FramingError(f"the peer sent a datagram that ends in the middle of a frame: {shown(datagram)}")
            frames, used, wanted = self.split(datagram)

    def limited(self, max_size: int, /) -> Self:
        """Return this framing with a `max_size`, or itself if it has one of its own."""
        if self.max_size is not None:
            return self
        check_max_size(max_size)
        bound = copy.copy(self)
        object.__setattr__(bound, "max_size", max_size)  # most framings are frozen dataclasses
        return bound


def check_max_size(max_size: object) -> None:
    """Raise ValueError unless this is a `max_size`."""
    if max_size is not None and (type(max_size) is not int or max_size < 1):
        raise ValueError(f"max_size must be a number of bytes above 0, or None, not {max_size!r}")


def check_split(framing: Framing, size: int, frames: list[bytes], used: int, wanted: int) -> None:
    """Raise RuntimeError if what split() has returned for `size` bytes would never come to an end: its author's mistake."""
    if not 0 <= used <= size:
        problem = f"used={used} of {size} bytes"
    elif used or not (frames or wanted <= size):
        return
    elif frames:
        problem = f"{len(frames)} frames with used=0, so it would return them for ever"
    else:
        problem = f"no frames, used=0 and wanted={wanted} for {size} bytes, so it has to want more"
    kind = type(framing)
    raise RuntimeError(f"the framing {kind.__module__}.{kind.__qualname__} is wrong: its split() returned {problem}")


def check_separator(name: str, value: object, *, may_be_empty: bool = False) -> None:
    """Raise TypeError or ValueError unless this is bytes that can mark a frame's start or end."""
    if not isinstance(value, bytes):
        raise TypeError(f"{name} must be bytes, not {value!r}")
    if not value and not may_be_empty:
        raise ValueError(f"{name} must not be empty")


def drop_from_too_long(frames: list[bytes], max_size: int, overhead: int, uncounted: int = 0) -> int:
    """Remove the first frame that is too long and all after it. Return the number of bytes that the others take.

    A frame takes `overhead` bytes in the stream beside its own, of which `uncounted` do not count for `max_size`. There has
    to be one that is too long. Raises FrameTooLong if that is the first.
    """
    used = 0
    for index, frame in enumerate(frames):
        size = len(frame) - uncounted
        if size > max_size:
            if index == 0:
                raise FrameTooLong(size, max_size, len(frame) + overhead)
            del frames[index:]
            break
        used += len(frame) + overhead
    return used


def shown(frame: Buffer) -> str:
    """Return the beginning of a frame as errors show it."""
    return repr(bytes(frame[:40])) + ("…" if len(frame) > 40 else "")
