"""What a load sends: messages that differ in pairs, one after another, with or without a framing."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from aioecho.framing import Framing, format_framing

__all__ = ["CHUNK_BYTES", "MAX_REPLY", "FrameMessages", "make_frames", "make_pool", "repeat_start"]

CHUNK_BYTES = 262_144  # most that one recv or send moves
MAX_REPLY = 2**24  # bytes of a reply that is not known beforehand
POOL_BYTES = 262_144  # small enough to stay in a processor's cache

# What messages are made of: any bytes, or for a framing that does not allow all of them, fewer.
_PRINTABLE = bytes(range(33, 127))
_DIGITS = b"0123456789"


def make_pool(size_bytes: int, lines: bool) -> tuple[bytes, int]:
    """Make what all connections send: pairwise different messages one after another, and their total length.

    Connection i starts at its own message and goes round, so that a reply that is stale or belongs to another
    connection differs. The start is repeated at the end, so that no chunk need be split at the seam.
    """
    count = max(16, POOL_BYTES // size_bytes)
    pool = bytearray(Random(size_bytes).randbytes(count * size_bytes))
    if lines:
        pool = pool.translate(_only(_PRINTABLE))
        pool[size_bytes - 1 :: size_bytes] = b"\n" * count
    return repeat_start(bytes(pool)), len(pool)


@dataclass(frozen=True)
class FrameMessages:
    """Messages that are frames: `frames` as they are compared, `joined` as they are sent."""

    frames: list[bytes]
    joined: list[bytes]

    def pool(self) -> tuple[bytes, int]:
        """Return what all connections send, and its length without the part that is repeated, as make_pool() does."""
        pool = b"".join(self.joined)
        return repeat_start(pool), len(pool)


def make_frames(framing: Framing, size_bytes: int, count: int | None = None) -> FrameMessages:
    """Make frames of `size_bytes` that the framing can write: of any bytes, or else printable, or else digits.

    `count` is their number; by default they are as many as a pool has.

    Raises:
        ValueError: the framing has no frames of that size; the message says why (caller).
    """
    if count is None:
        count = max(16, POOL_BYTES // size_bytes)
    for alphabet in (bytes(256), _PRINTABLE, _DIGITS):
        whole = Random(size_bytes).randbytes(count * size_bytes)
        if any(alphabet):
            whole = whole.translate(_only(alphabet))
        try:
            return _join_all(framing, [whole[at : at + size_bytes] for at in range(0, len(whole), size_bytes)])
        except ValueError as error:
            problem = error
    raise ValueError(f"the framing {format_framing(framing)} has no frames of {size_bytes} bytes: {problem}")


def _join_all(framing: Framing, payloads: list[bytes]) -> FrameMessages:
    frames, joined = [], [framing.join(payload) for payload in payloads]
    for message in joined:
        # Not the payload: a framing that keeps its header has written the length into it.
        got, used, _ = framing.split(message)
        if len(got) != 1 or used != len(message):
            raise ValueError(
                f"its split() makes {len(got)} frames, used={used}, of one that its join() has made of {len(message)} bytes"
            )
        frames += got
    return FrameMessages(frames, joined)


def _only(alphabet: bytes) -> bytes:
    return bytes(alphabet[value % len(alphabet)] for value in range(256))


def repeat_start(pool: bytes) -> bytes:
    """Return a pool with its start behind it, once more or as often as it takes for one chunk."""
    repeated = bytearray(pool)
    while len(repeated) < len(pool) + CHUNK_BYTES:
        repeated += pool[: len(pool) + CHUNK_BYTES - len(repeated)]
    return bytes(repeated)
