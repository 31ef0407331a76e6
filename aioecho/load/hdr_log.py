"""The HdrHistogram log format, written without the package: what readers and plotters in every language read.

A log is text, one line an interval, with a histogram as base64 of the format that HdrHistogram calls V2 compressed:
https://github.com/HdrHistogram/HdrHistogram. Its buckets are log-linear. Values below 2,048 have a bucket of their own; from
there on each power of two is 1,024 buckets wide, which is three significant digits.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Mapping

__all__ = ["encode_histogram", "format_log"]

_DIGITS = 3
_SUB_BUCKET_BITS = 11  # the smallest power of two above 2 * 10 ** _DIGITS
_HALF = 1 << (_SUB_BUCKET_BITS - 1)
_LOWEST, _HIGHEST = 1, 3_600_000_000  # an hour in us; logs that are to be added must agree in it

_COOKIE, _COMPRESSED_COOKIE = 0x1C849303 | 0x10, 0x1C849304 | 0x10


def _index(value: int) -> int:
    """Return the number of the bucket that counts `value`."""
    shift = max(0, value.bit_length() - _SUB_BUCKET_BITS)
    return shift * _HALF + (value >> shift)


def _encode_number(number: int) -> bytes:
    """Return a number as ZigZag LEB128: its sign in the lowest bit, then seven bits a byte, the lowest first."""
    rest = number << 1 if number >= 0 else (-number << 1) - 1
    encoded = bytearray()
    while rest > 0x7F:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)


def encode_histogram(counts: Mapping[int, int]) -> bytes:
    """Return counts of values (int, from 0 to 3,600,000,000; more counts as that) as HdrHistogram's V2 encoding."""
    buckets: dict[int, int] = {}
    for value, count in counts.items():
        index = _index(min(value, _HIGHEST))
        buckets[index] = buckets.get(index, 0) + count
    payload, end = bytearray(), 0
    for index, count in sorted(buckets.items()):
        if index > end:
            payload += _encode_number(end - index)  # so many empty buckets, as a negative number
        payload += _encode_number(count)
        end = index + 1
    header = struct.pack(">iiiiqqd", _COOKIE, len(payload), 0, _DIGITS, _LOWEST, _HIGHEST, 1.0)
    return header + payload


def format_log(intervals: Iterable[tuple[float, float, Mapping[int, int]]], *, comment: str) -> str:
    """Return a log of intervals: when one begins (seconds), how long it is (seconds), counts. `comment` is one line."""
    lines = [
        f"#[{comment}]",
        "#[Histogram log format version 1.2]",
        '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"',
    ]
    for start, seconds, counts in intervals:
        compressed = zlib.compress(encode_histogram(counts))
        histogram = base64.b64encode(struct.pack(">ii", _COMPRESSED_COOKIE, len(compressed)) + compressed).decode()
        lines.append(f"{start:.3f},{seconds:.3f},{max(counts, default=0):.3f},{histogram}")
    return "\n".join(lines) + "\n"
