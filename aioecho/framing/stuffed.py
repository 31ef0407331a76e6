"""Byte stuffing: frames that end with a byte which their encoding keeps out of them."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from aioecho.exceptions import FrameTooLong, FramingError
from aioecho.framing.base import Buffer, Framing, check_max_size, shown
from aioecho.framing.separated import skip_to

__all__ = ["COBS", "SLIP"]


@dataclass(frozen=True)
class _Stuffed(Framing):
    """What SLIP and COBS share: packets end with a byte, and empty ones are ignored."""

    limit: ClassVar[Literal["max_buffer", "max_frame"]] = "max_buffer"
    _end: ClassVar[bytes]

    max_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_size(self.max_size)

    @abstractmethod
    def _decode(self, packet: bytes) -> bytes | None:
        """Return what was encoded, or None if this is malformed."""

    @abstractmethod
    def _most_encoded(self, size: int) -> int:
        """Return the most bytes that a frame of `size` bytes takes before its end."""

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Cut the whole packets off."""
        size, most = len(buffer), self.max_size
        if buffer.find(self._end, scanned) < 0:
            if most is not None and size > self._most_encoded(most):
                raise FrameTooLong(None, most)
            return [], 0, size + 1
        packets = bytes(buffer).split(self._end)
        rest = len(packets.pop())
        frames: list[bytes] = []
        decode, start = self._decode, 0
        longest, most_encoded = (size, size) if most is None else (most, self._most_encoded(most))
        for packet in packets:
            if packet:
                # One that is too long to be right is not decoded: in pieces it would be refused before it is whole.
                frame = decode(packet) if len(packet) <= most_encoded else None
                if frame is None or len(frame) > longest:
                    if start:
                        return frames, start, 0
                    raise self._refusal(packet, frame)
                frames.append(frame)
            start += len(packet) + 1
        return frames, start, rest + 1 if rest <= most_encoded else 0

    def _refusal(self, packet: bytes, frame: bytes | None) -> FrameTooLong | FramingError:
        """Return what is wrong with a packet that is whole."""
        most, skip = self.max_size, len(packet) + 1
        if most is not None and (frame is not None or len(packet) > self._most_encoded(most)):
            return FrameTooLong(None if frame is None else len(frame), most, skip)
        return FramingError(f"the peer sent a malformed {type(self).__name__} packet: {shown(packet)}", skip)

    def resync(self, buffer: Buffer, /) -> tuple[int, bool]:
        """Look for the end of a packet that is skipped."""
        return skip_to(self._end, buffer)


@dataclass(frozen=True)
class SLIP(_Stuffed):
    """SLIP packets (RFC 1055): END, 0xC0, ends them, and is escaped in them.

    `join` writes END before a packet too, as RFC 1055 advises. Empty packets are ignored, so a frame cannot be empty. An
    escape that is none raises FramingError, and the packet is skipped. Where `max_size` is exceeded before the
    end of a packet has come, this is found at twice as many bytes, as all may be escaped.
    """

    _end: ClassVar[bytes] = b"\xc0"

    def _most_encoded(self, size: int) -> int:
        return 2 * size

    def _decode(self, packet: bytes) -> bytes | None:
        escapes = packet.count(b"\xdb")
        if not escapes:
            return packet
        if packet.count(b"\xdb\xdc") + packet.count(b"\xdb\xdd") != escapes:
            return None
        return packet.replace(b"\xdb\xdc", b"\xc0").replace(b"\xdb\xdd", b"\xdb")

    def join(self, frame: bytes, /) -> bytes:
        """Return the packet for a frame. Raises ValueError if it is empty."""
        if not frame:
            raise ValueError("a SLIP packet must not be empty: its receiver ignores such packets")
        return b"\xc0%b\xc0" % frame.replace(b"\xdb", b"\xdb\xdd").replace(b"\xc0", b"\xdb\xdc")


@dataclass(frozen=True)
class COBS(_Stuffed):
    """COBS packets (Consistent Overhead Byte Stuffing, Cheshire and Baker 1999), which end with a zero byte.

    Empty packets, of two zero bytes in a row, are ignored. A packet that ends too early raises FramingError, and is skipped.
    """

    _end: ClassVar[bytes] = b"\0"

    def _most_encoded(self, size: int) -> int:
        return size + size // 254 + 1

    def _decode(self, packet: bytes) -> bytes | None:
        parts = []
        at, size = 0, len(packet)
        while True:
            code = packet[at]
            end = at + code
            if end > size:
                return None
            parts.append(packet[at + 1 : end])
            if end == size:
                return b"".join(parts)
            if code != 255:
                parts.append(b"\0")
            at = end

    def join(self, frame: bytes, /) -> bytes:
        """Return the packet for a frame."""
        parts = []
        for part in frame.split(b"\0"):
            at = 0
            while len(part) - at >= 254:
                parts += [b"\xff", part[at : at + 254]]
                at += 254
            parts += [bytes((len(part) - at + 1,)), part[at:]]
        # What ends with a block of 254 bytes needs no more: the byte that would follow says that there is a zero byte.
        if parts[-2:] == [b"\1", b""] and parts[-4:-3] == [b"\xff"]:
            del parts[-2:]
        parts.append(b"\0")
        return b"".join(parts)
