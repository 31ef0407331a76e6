"""Latencies as a histogram of characters, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from aioecho.load.latencies import Latencies

__all__ = ["draw_histogram"]

MOST_ROWS = 12
LONGEST_BAR = 40

# How much of a character a bar fills, in eighths.
PARTS = " ▏▎▍▌▋▊▉█"


def draw_histogram(latencies: Latencies, width: int, *, is_ascii: bool = False) -> Iterator[str]:
    """Yield the lines of a histogram, at most `width` characters each; none if nothing was counted.

    A row is for latencies below its number, in microseconds, and not below that of the row before it: powers of two, or of
    four and so on where there would be more than 12 rows. A row in which anything was counted shows some bar.
    """
    if not latencies.total:
        return
    shortest, longest = (value.bit_length() for value in (next(iter(latencies.counts)), max(latencies.counts)))
    step = -(-(longest - shortest + 1) // MOST_ROWS)
    rows = [0] * (-(-(longest - shortest + 1) // step))
    for value, count in latencies.counts.items():
        rows[(value.bit_length() - shortest) // step] += count
    bounds = [f"{1 << (shortest + (index + 1) * step - 1):,}" for index in range(len(rows))]
    counts = [f"{count:,}" for count in rows]
    bound_width = max(len("below"), *map(len, bounds))
    count_width = max(len("messages"), *map(len, counts))
    room = max(1, min(LONGEST_BAR, width - bound_width - count_width - len(" 100.0 %") - 4))
    yield f"{'below':>{bound_width}}  {'':{room}}  {'messages':>{count_width}}"
    for bound, count, shown in zip(bounds, rows, counts, strict=True):
        bar = _draw_bar(count, max(rows), room, is_ascii)
        yield f"{bound:>{bound_width}}  {bar:{room}}  {shown:>{count_width}} {100 * count / latencies.total:5.1f} %"


def _draw_bar(count: int, most: int, room: int, is_ascii: bool) -> str:
    if is_ascii:
        return "#" * -(-count * room // most)
    whole, part = divmod(-(-count * room * 8 // most), 8)
    return PARTS[8] * whole + (PARTS[part] if part else "")
