"""Frames whose length is announced in binary, or fixed."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from aioecho.exceptions import FrameTooLong, FramingError
from aioecho.framing.base import Buffer, Framing, check_max_size, drop_from_too_long

__all__ = ["FixedSize", "LengthPrefixed", "Varint"]

_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}
_MAX_VARINT = 10
"""Bytes, of 64 bits. Protocol Buffers' own encoders write no more than 5, but may be read to write leading zeros."""


@dataclass(frozen=True)
class LengthPrefixed(Framing):
    """Frames with a header that holds their length, as an unsigned number.

    The length field takes `size` bytes, 1 to 8, after `offset` other bytes. In all, a frame takes
    ``offset + size + length + adjust`` bytes. So `adjust` is ``-(offset + size)`` where the length counts the header too.
    With `strip` a frame is what follows the length field; without, it is all of these bytes. `max_size` is of the frame.
    An `offset` needs ``strip=False``: otherwise joining could not give back the bytes before the length.

    `join` writes the length: with ``strip=False`` into the frame's header, whatever stands there.

    ================  ==================================  ==================================
    here              Netty, LengthFieldBasedFrameDecoder  tokio, LengthDelimitedCodec
    ================  ==================================  ==================================
    ``size``          lengthFieldLength                   length_field_length
    ``byteorder``     byteOrder                           big_endian, little_endian
    ``offset``        lengthFieldOffset                   length_field_offset
    ``adjust``        lengthAdjustment                    length_adjustment
    ``strip=True``    initialBytesToStrip = size          num_skip = size (its default)
    ``strip=False``   initialBytesToStrip = 0             num_skip = 0
    ``max_size``      maxFrameLength (of the whole)       max_frame_length (of what follows)
    ================  ==================================  ==================================

    Modbus/TCP (MBAP) is ``LengthPrefixed(2, offset=4, strip=False)``. PostgreSQL's messages are
    ``LengthPrefixed(4, offset=1, adjust=-4, strip=False)``: a type, then a length that counts itself.
    """

    size: int = 4
    byteorder: Literal["big", "little"] = "big"
    offset: int = 0
    adjust: int = 0
    strip: bool = True
    max_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_size(self.max_size)
        if type(self.size) is not int or not 1 <= self.size <= 8:
            raise ValueError(f"size must be a number of bytes from 1 to 8, not {self.size!r}")
        if self.byteorder not in ("big", "little"):
            raise ValueError(f'byteorder must be "big" or "little", not {self.byteorder!r}')
        if type(self.offset) is not int or self.offset < 0:
            raise ValueError(f"offset must be a number of bytes, 0 or more, not {self.offset!r}")
        if type(self.adjust) is not int or self.adjust <= -(256**self.size):
            raise ValueError(f"adjust must be a number of bytes that leaves a length above 0, not {self.adjust!r}")
        if self.offset and self.strip:
            raise ValueError(
                f"offset={self.offset} needs strip=False: the bytes before the length would be lost, and join() could not"
                " write them"
            )

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole frames off."""
        data: Any = buffer
        size, most, offset, adjust = len(data), self.max_size, self.offset, self.adjust
        unpack = _unpacker(self.size, self.byteorder)
        head = offset + self.size
        dropped = head if self.strip else 0
        frames: list[bytes] = []
        append = frames.append
        start, wanted = 0, head
        while (body := start + head) <= size:
            end = body + adjust + unpack(data, start + offset)[0]
            if not body <= end <= size:
                wanted = self._check_announced(end - body, bool(frames))
                break
            if not start:
                data = bytes(data)  # once a frame is whole: not for every piece in which a long one comes
            append(data[start + dropped : end])
            start = end
        if most is not None and size > most and frames and max(map(len, frames)) > most:
            return frames, drop_from_too_long(frames, most, dropped), 0
        return frames, start, wanted

    def _check_announced(self, length: int, later: bool) -> int:
        """Return how many bytes a frame takes that is not whole, or 0 if it has to be refused when its turn comes.

        Raises what is wrong with it if that is now.
        """
        head, most = self.offset + self.size, self.max_size
        counted = length if self.strip else head + length
        if length >= 0 and (most is None or counted <= most):
            return head + length
        if later:
            return 0
        if length < 0:
            raise FramingError(f"the peer sent a frame whose length is {-length} bytes too small to be one")
        assert most is not None
        raise FrameTooLong(counted, most, head + length)

    def join(self, frame: bytes, /) -> bytes:
        """Return the frame with its length.

        Raises ValueError if it is longer than the length field can tell, or too short.
        """
        length = len(frame) - self.adjust
        try:
            if self.strip:
                return length.to_bytes(self.size, self.byteorder) + frame
            head = self.offset + self.size
            if len(frame) < head:
                raise ValueError(f"a frame must begin with its header of {head} bytes, but has only {len(frame)}")
            length -= head
            return b"%b%b%b" % (frame[: self.offset], length.to_bytes(self.size, self.byteorder), frame[head:])
        except OverflowError:
            raise ValueError(
                f"a frame of {len(frame)} bytes has the length {length} here, which {self.size} bytes cannot tell"
            ) from None


@lru_cache
def _unpacker(size: int, byteorder: Literal["big", "little"]) -> Callable[[Buffer, int], tuple[Any, ...]]:
    if size in _FORMATS:
        return struct.Struct((">" if byteorder == "big" else "<") + _FORMATS[size]).unpack_from
    return lambda buffer, at: (int.from_bytes(buffer[at : at + size], byteorder),)


@dataclass(frozen=True)
class FixedSize(Framing):
    """Frames of `size` bytes, with nothing between them. `max_size` is `size`."""

    size: int

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size must be a number of bytes above 0, not {self.size!r}")
        object.__setattr__(self, "max_size", self.size)

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole frames off."""
        size = self.size
        used = len(buffer) // size * size
        if not used:
            return [], 0, size
        buffer = bytes(buffer)
        return [buffer[at : at + size] for at in range(0, used, size)], used, size

    def join(self, frame: bytes, /) -> bytes:
        """Return the frame. Raises ValueError if it has another size."""
        if len(frame) != self.size:
            raise ValueError(f"a frame must have {self.size} bytes, not {len(frame)}")
        return bytes(frame)


@dataclass(frozen=True)
class Varint(Framing):
    """Frames after their length as a varint, seven bits a byte, the lowest first: Protocol Buffers' delimited messages.

    `offset` other bytes may come before the length, which does not count them. A frame is these bytes and what follows the
    length: MQTT's packets are ``Varint(1)``, a byte for the type and then what the length announces. `max_size` is of the
    frame.

    A length of more than 64 bits raises FramingError. One with more bytes than it needs is read, as Protocol Buffers does.
    `join` writes none.
    """

    offset: int = 0
    max_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_size(self.max_size)
        if type(self.offset) is not int or self.offset < 0:
            raise ValueError(f"offset must be a number of bytes, 0 or more, not {self.offset!r}")

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole frames off."""
        data: Any = buffer
        size, offset = len(data), self.offset
        most = (2**64 if self.max_size is None else self.max_size) - offset
        frames: list[bytes] = []
        append = frames.append
        start, wanted = 0, offset + 1
        try:
            while (head := start + offset) < size:
                body = head + 1
                length = data[head]
                if length > 127:
                    length, body = _read_varint(data, head)
                    if not body:
                        wanted = size - start + 1
                        break
                end = body + length
                if length > most:
                    raise FrameTooLong(offset + length, offset + most, end - start)
                if end > size:
                    wanted = end - start
                    break
                if not start:
                    data = bytes(data)  # as in LengthPrefixed
                append(data[start:head] + data[body:end] if offset else data[body:end])
                start = end
        except (FrameTooLong, FramingError):
            if not start:
                raise
            wanted = 0
        return frames, start, wanted

    def join(self, frame: bytes, /) -> bytes:
        """Return the frame with its length.

        Raises ValueError if it has fewer than `offset` bytes.
        """
        offset = self.offset
        length, head = len(frame) - offset, bytearray(frame[:offset])
        if length < 0:
            raise ValueError(f"a frame must begin with {offset} bytes before its length, but has only {len(frame)}")
        while length > 127:
            head.append(length & 127 | 128)
            length >>= 7
        head.append(length)
        return bytes(head) + (frame[offset:] if offset else frame)


def _read_varint(buffer: Buffer, start: int) -> tuple[int, int]:
    """Return a varint and where it ends, (0, 0) if its end has not come."""
    number = 0
    for index, byte in enumerate(buffer[start : start + _MAX_VARINT]):
        number |= (byte & 127) << 7 * index
        if byte < 128:
            if number >= 2**64:
                break
            return number, start + index + 1
    else:
        if len(buffer) - start < _MAX_VARINT:
            return 0, 0
    raise FramingError("the peer sent a length of more than 64 bits, which is no varint")
