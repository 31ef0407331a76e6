"""Framings: how a stream of bytes is cut into frames, and how frames become bytes again.

A framing is two pure functions. It keeps nothing between calls, so that one object serves any number of connections.

``split(buffer, scanned=0) -> (frames, used, wanted)``
    Cut the whole frames off the front of `buffer`, which is bytes or a bytearray. It is neither changed nor kept.

    `frames` is a list of bytes objects. `used` is the number of bytes to remove from the front of the buffer. It may be
    above 0 where `frames` is empty: what some framings ignore, such as SLIP's empty packets, goes too.
    `wanted` says when to call again: when that many bytes are there, counted from `used`. It is the size of the next
    frame where its header has come, and never more than that. Where nothing is known, it is one byte more than is there.
    Where it is no more than what is there already, call again at once, with `scanned` 0.

    `scanned` is for the call after that: how many bytes were there, from the same place, at the call before, which found no
    whole frame in them. A framing that searches for an end goes on from there, so that a frame that comes byte by byte
    costs no more than its length.

``join(frame) -> bytes``
    Return the bytes to write for one frame. Raises ValueError, the caller's fault, where no bytes are split into this frame.

**Frames that are refused.** `split` raises FrameTooLong as soon as it is certain that the first frame is longer than
`max_size`: by its header, before its body comes, where there is one. It raises FramingError where the buffer begins with
what the framing does not allow. Neither loses frames: the ones before the bad one are returned first, with a `wanted`
that asks for a call at once, and that call raises. The outcome does not depend on how the stream was segmented.

The attribute `skip` of both says how to find the next frame:

- a number: that many bytes, from the start of the buffer, belong to the bad record. They need not have come.
- None: the end of the record is not known. Call ``resync(buffer) -> (used, found)`` with the whole buffer: remove `used` bytes,
  and call it again when more have come, until `found` is true. Nothing has to be kept of what is skipped.
- 0, with FramingError alone: nothing tells where the next frame begins. The next call raises the same again.

**Limits.** `max_size` is the most bytes of a frame as `split` returns it. None: the server's limits decide. The
class attribute `limit` names the one that does: ``"max_buffer"`` where a frame ends with a separator, ``"max_frame"``
where its length comes first. ``framing.limited(n)`` returns the framing with `max_size` n, unless it has one of its own, so
a reader calls ``framing.limited(getattr(limits, framing.limit))`` once. Used by itself, a framing without `max_size`
has no limit. `join` ignores `max_size`: it bounds what a peer makes this process hold.

**Datagrams.** ``split_datagram(datagram)`` yields the frames of a datagram that holds several. It calls `split`, so there
is no need to override it but for a separator that senders leave out at the end.

**A framing of one's own** inherits from Framing. Frames that end with a byte that tells what they are::

    class Statements(Framing):
        limit = "max_buffer"

        def split(self, buffer, scanned=0):
            frames, start = [], 0
            while (end := buffer.find(b";", max(start, scanned))) >= 0:
                frames.append(bytes(buffer[start:end]))
                start = end + 1
            return frames, start, len(buffer) - start + 1

        def join(self, frame):
            if b";" in frame:
                raise ValueError(f"a statement cannot contain a semicolon: {frame!r}")
            return frame + b";"
"""

from aioecho.framing.announced import FixedSize, LengthPrefixed, Varint
from aioecho.framing.base import Buffer, Framing
from aioecho.framing.decimal import ContentLength, Netstrings, OctetCounted
from aioecho.framing.separated import Delimited, Lines
from aioecho.framing.spec import format_framing, parse_framing
from aioecho.framing.stuffed import COBS, SLIP

__all__ = [
    "COBS",
    "SLIP",
    "Buffer",
    "ContentLength",
    "Delimited",
    "FixedSize",
    "Framing",
    "LengthPrefixed",
    "Lines",
    "Netstrings",
    "OctetCounted",
    "Varint",
    "format_framing",
    "parse_framing",
]
