"""Frames whose length is announced in decimal digits."""

import re
from dataclasses import dataclass, field
from typing import Any

from aioecho.exceptions import FrameTooLong, FramingError
from aioecho.framing.base import Buffer, Framing, check_max_size, shown
from aioecho.framing.separated import skip_to

__all__ = ["ContentLength", "Netstrings", "OctetCounted"]

_MAX_DIGITS = 10
"""Of a length: no process holds a frame for which they do not suffice."""

_MAX_HEADER = 4096
"""Bytes of a header of ContentLength. Those that are in use take fewer than 100."""

_NEWLINE, _COMMA, _ZERO, _NINE = b"\n,09"


@dataclass(frozen=True)
class Netstrings(Framing):
    """Netstrings: ``5:hello,``, as in https://cr.yp.to/proto/netstrings.txt.

    Anything else raises FramingError: leading zeros, more than 10 digits, a missing comma.
    """

    max_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_size(self.max_size)

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole frames off."""
        data: Any = buffer
        size = len(data)
        most = 10**_MAX_DIGITS if self.max_size is None else self.max_size
        frames: list[bytes] = []
        append = frames.append
        start, wanted = 0, 3
        while start < size:
            colon = data.find(b":", start, start + _MAX_DIGITS + 1)
            digits = data[start:colon] if colon >= 0 else data[start : start + _MAX_DIGITS + 1]
            if not digits.isdigit() or (digits[0] == _ZERO and len(digits) > 1) or len(digits) > _MAX_DIGITS:
                if not frames:
                    raise FramingError(f"the peer sent no netstring: {shown(data)}")
                wanted = 0
                break
            if colon < 0:
                wanted = max(3, size - start + 1)
                break
            length = int(digits)
            end = colon + 1 + length
            if length > most:
                if not frames:
                    raise FrameTooLong(length, most, end + 1)
                wanted = 0
                break
            if end >= size:
                wanted = end + 1 - start
                break
            if data[end] != _COMMA:
                if not frames:
                    raise FramingError(f"the peer sent a netstring of {length} bytes with no comma after them")
                wanted = 0
                break
            if not start:
                data = bytes(data)  # once a frame is whole: a long one that comes in pieces is not copied for each
            append(data[colon + 1 : end])
            start = end + 1
        return frames, start, wanted

    def join(self, frame: bytes, /) -> bytes:
        """Return the frame as a netstring."""
        return b"%d:%b," % (len(frame), frame)


@dataclass(frozen=True)
class OctetCounted(Framing):
    r"""Syslog messages over TCP (RFC 6587): octet-counted, ``5 hello``, or lines, as senders mix the two.

    A message that begins with a digit from 1 to 9 is octet-counted: its length, a space, and so many bytes. Any other ends with
    a newline, which is no part of the frame. Empty lines are ignored, as rsyslog does: some senders write a newline
    after a message that they have counted.

    `join` writes octet-counted messages alone, so what came as lines is not given back as it was. A length with no space after
    it, or of more than 10 digits, raises FramingError, and what was sent up to the next newline is skipped.
    """

    max_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_size(self.max_size)

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole messages off."""
        data: Any = buffer
        size = len(data)
        most = size + 10**_MAX_DIGITS if self.max_size is None else self.max_size
        frames: list[bytes] = []
        start, wanted = 0, 1
        try:
            while start < size:
                if _ZERO < data[start] <= _NINE:
                    body, end = _read_count(data, start)
                    if not end:
                        wanted = size - start + 1
                        break
                    length, after = end - body, end
                else:
                    body = start
                    end = data.find(b"\n", max(start, scanned))
                    length, after = (end if end >= 0 else size) - start, end + 1
                if length > most:
                    raise FrameTooLong(length if after else None, most, after or None)
                if not 0 < after <= size:
                    wanted = after - start if after else size - start + 1
                    break
                if length:
                    if not frames:
                        data = bytes(data)  # as in Netstrings
                    frames.append(data[body:end])
                start = after
        except (FrameTooLong, FramingError):
            if not start:
                raise
            wanted = 0
        return frames, start, wanted

    def join(self, frame: bytes, /) -> bytes:
        """Return the message after its length. Raises ValueError if it is empty: syslog has no such messages."""
        if not frame:
            raise ValueError("a syslog message must not be empty")
        return b"%d %b" % (len(frame), frame)

    def resync(self, buffer: Buffer, /) -> tuple[int, bool]:
        """Look for the newline after which a message may begin."""
        return skip_to(b"\n", buffer)


def _read_count(buffer: Buffer, start: int) -> tuple[int, int]:
    """Return where an octet-counted message begins and where it ends, (0, 0) if its length is not all there."""
    space = buffer.find(b" ", start, start + _MAX_DIGITS + 1)
    digits = buffer[start:space] if space >= 0 else buffer[start : start + _MAX_DIGITS + 1]
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        newline = buffer.find(b"\n", start)
        raise FramingError(
            f"the peer sent a syslog message that begins with a digit, but not with a length and a space: {shown(digits)}",
            None if newline < 0 else newline + 1 - start,
        )
    if space < 0:
        return 0, 0
    return space + 1, space + 1 + int(digits)


@dataclass(frozen=True)
class ContentLength(Framing):
    r"""Frames after a header ``Content-Length: 5\r\n\r\n``: the base protocol of LSP, and of the Debug Adapter Protocol.

    A frame is the content. Other fields of the header are read and dropped, so that the content alone is given back. A header
    without the field, with two of it, or of more than 4096 bytes raises FramingError.
    """

    max_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_size(self.max_size)

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole frames off."""
        data: Any = buffer
        size, most = len(data), self.max_size
        frames: list[bytes] = []
        start, wanted = 0, len(b"Content-Length:0\r\n\r\n")
        while start < size:
            # Always from the start: `scanned` may mean that the header was found, and headers are short.
            body = data.find(b"\r\n\r\n", start, start + _MAX_HEADER) + 4
            if body == 3:
                if size - start >= _MAX_HEADER:
                    if not frames:
                        raise FramingError(f"the peer sent a header of more than {_MAX_HEADER} bytes: {shown(data)}")
                    wanted = 0
                else:
                    wanted = max(wanted, size - start + 1)
                break
            try:
                length = _read_content_length(bytes(data[start : body - 4]))
            except FramingError:
                if not frames:
                    raise
                wanted = 0
                break
            end = body + length
            if most is not None and length > most:
                if not frames:
                    raise FrameTooLong(length, most, end)
                wanted = 0
                break
            if end > size:
                wanted = end - start
                break
            if not start:
                data = bytes(data)  # as in Netstrings
            frames.append(data[body:end])
            start = end
        return frames, start, wanted

    def join(self, frame: bytes, /) -> bytes:
        """Return the frame after its header."""
        return b"Content-Length: %d\r\n\r\n%b" % (len(frame), frame)


_ONE_FIELD = re.compile(rb"Content-Length: *([0-9]{1,10})", re.IGNORECASE)


def _read_content_length(header: bytes) -> int:
    """Return what a header tells, which ends before the empty line."""
    alone = _ONE_FIELD.fullmatch(header)
    if alone:
        return int(alone[1])
    lengths = []
    for line in header.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip():
            raise FramingError(f"the peer sent a line in a header that is no field: {shown(line)}")
        if name.lower() == b"content-length":
            lengths.append(value.strip(b" \t"))
    if len(lengths) != 1 or not lengths[0].isdigit() or len(lengths[0]) > _MAX_DIGITS:
        raise FramingError(f"the peer sent a header without one valid Content-Length: {shown(header)}")
    return int(lengths[0])
