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
"""Bytes of a header of ContentLength. Headers that are in use take fewer than 100."""

_COLON, _SPACE, _COMMA, _ZERO, _NINE = b": ,09"


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
        known: dict[bytes, int] = {}  # see _read_length()
        start, width, wanted = 0, 0, 3
        try:
            while start < size:
                colon = start + width
                length = known.get(data[start:colon], -1) if known else -1
                if length < 0 or colon >= size or data[colon] != _COLON:
                    length, width = _read_length(data, start, b":", known)
                    if length < 0:
                        wanted = max(3, size - start + 1)
                        break
                    colon = start + width
                    if width > 1 and data[start] == _ZERO:
                        raise FramingError(
                            f"the peer sent a netstring whose length has leading zeros: {shown(data[start:])}"
                        )
                end = colon + 1 + length
                if length > most:
                    raise FrameTooLong(length, most, end + 1 - start)
                if end >= size:
                    wanted = end + 1 - start
                    break
                if data[end] != _COMMA:
                    raise FramingError(f"the peer sent a netstring of {length} bytes with no comma after them")
                if not start:
                    data = bytes(data)  # once a frame is whole: not for every piece in which a long one comes
                append(data[colon + 1 : end])
                start = end + 1
        except (FrameTooLong, FramingError):
            if not start:
                raise
            wanted = 0
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
        append = frames.append
        known: dict[bytes, int] = {}  # see _read_length()
        start, width, wanted = 0, 0, 1
        try:
            while start < size:
                body = start + width
                length = known.get(data[start:body], -1) if known else -1
                if length < 0 or body >= size or data[body] != _SPACE:
                    if not _ZERO < data[start] <= _NINE:
                        end = data.find(b"\n", max(start, scanned))
                        length = (end if end >= 0 else size) - start
                        if length > most:
                            raise FrameTooLong(*(length, most, length + 1) if end >= 0 else (None, most))
                        if end < 0:
                            wanted = size - start + 1
                            break
                        if length:
                            if not frames:
                                data = bytes(data)  # as in Netstrings
                            append(data[start:end])
                        start = end + 1
                        continue
                    length, width = _read_length(data, start, b" ", known)
                    if length < 0:
                        wanted = size - start + 1
                        break
                    body = start + width
                end = body + 1 + length
                if length > most:
                    raise FrameTooLong(length, most, end - start)
                if end > size:
                    wanted = end - start
                    break
                if not frames:
                    data = bytes(data)  # as in Netstrings
                append(data[body + 1 : end])
                start = end
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


def _read_length(data: Any, start: int, mark: bytes, known: dict[bytes, int]) -> tuple[int, int]:
    """Return a length in digits before a mark, and how many digits it has. (-1, 0): the mark has not come.

    What is read is added to `known`: frames of one chunk often share their length, and to look it up costs half of this.
    """
    at = data.find(mark, start, start + _MAX_DIGITS + 1)
    digits = bytes(data[start:at] if at >= 0 else data[start : start + _MAX_DIGITS + 1])
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        newline = data.find(b"\n", start) if mark == b" " else start - 1
        raise FramingError(
            f"the peer sent no length, in at most {_MAX_DIGITS} digits before {mark!r}: {shown(digits)}",
            None if newline < 0 else newline + 1 - start,
        )
    if at < 0:
        return -1, 0
    length = known[digits] = int(digits)
    return length, at - start


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
        start, wanted = 0, len(b"\r\n\r\n")  # an empty header is refused
        try:
            while start < size:
                # Always from the start: `scanned` may mean that the header was found, and headers are short.
                body = data.find(b"\r\n\r\n", start, start + _MAX_HEADER) + 4
                if body == 3:
                    if size - start >= _MAX_HEADER:
                        raise FramingError(
                            f"the peer sent a header of more than {_MAX_HEADER} bytes: {shown(data[start:])}"
                        )
                    wanted = max(wanted, size - start + 1)
                    break
                length = _read_content_length(bytes(data[start : body - 4]))
                end = body + length
                if most is not None and length > most:
                    raise FrameTooLong(length, most, end - start)
                if end > size:
                    wanted = end - start
                    break
                if not start:
                    data = bytes(data)  # as in Netstrings
                frames.append(data[body:end])
                start = end
        except (FrameTooLong, FramingError):
            if not start:
                raise
            wanted = 0
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
