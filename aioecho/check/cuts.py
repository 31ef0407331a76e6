"""The replies must not depend on how the bytes of a conversation are cut: a read is no message."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, errors, find, settings
from hypothesis import strategies as st

from aioecho.check.examples import explain
from aioecho.check.subject import Finding, Subject

__all__ = ["check_coalescing", "check_segmentation"]

MOST_PLACES = 120
"""Places where the bytes are cut at one place alone, at most, and as many at which they are cut together."""

RANDOM = 60
"""Ways of cutting that are chosen at random, but the same in every run."""

SECONDS = 4.0
"""What a search may take, and shrinking what it has found again."""

Cuts = frozenset[int]


def check_segmentation(subject: Subject) -> Iterator[Finding]:
    """Cut records into pieces: one that comes in several must be answered as one that comes whole."""
    records = subject.conversation.records
    bounds, inner = _places(records)
    few = inner[:: -(-len(inner) // MOST_PLACES)] if inner else []
    # One cut first: what is found by it is the simplest. Then byte by byte, but not all of a long conversation: every piece
    # is waited for.
    ways = itertools.chain((frozenset({place}) for place in few), [frozenset(inner[:MOST_PLACES])])
    found = _search(subject, (way | bounds for way in ways), _chosen(inner, bounds))
    if found is not None:
        yield from _shrink(subject, found, "segmentation")


def check_coalescing(subject: Subject) -> Iterator[Finding]:
    """Send records together: those that come in one piece must be answered as those that come one by one."""
    bounds, inner = _places(subject.conversation.records)
    pairs = (bounds - {place} for place in sorted(bounds))
    # Besides, pieces that begin in one record and end in another, where records in pieces are no trouble by themselves.
    places = [*bounds] if "segmentation" in subject.found else [*inner, *bounds]
    found = _search(subject, itertools.chain([frozenset[int]()], pairs), _chosen(places, frozenset()))
    if found is not None:
        yield from _shrink(subject, found, "coalescing")


def _places(records: Sequence[bytes]) -> tuple[Cuts, list[int]]:
    """Return where records end, but the last one, and all other places where the stream can be cut."""
    ends = list(itertools.accumulate(map(len, records)))
    bounds = frozenset(ends[:-1])
    return bounds, [place for place in range(1, ends[-1]) if place not in bounds]


def _cut(data: bytes, cuts: Iterable[int]) -> tuple[bytes, ...]:
    places = [0, *sorted(cuts), len(data)]
    return tuple(data[start:end] for start, end in itertools.pairwise(places))


def _chosen(places: Sequence[int], always: Cuts) -> Any:
    """Return a strategy for sets of cuts."""
    if not places:
        return st.nothing()
    return st.sets(st.sampled_from(sorted(places)), min_size=1, max_size=8).map(lambda cuts: frozenset(cuts) | always)


def _search(subject: Subject, ways: Iterable[Cuts], strategy: Any) -> Cuts | None:
    """Return the first way of cutting that changes the replies: one of `ways`, or one of the strategy's."""
    data = b"".join(subject.conversation.records)
    over = time.monotonic() + SECONDS

    def is_one(cuts: Cuts) -> bool:
        return (
            time.monotonic() < over
            and subject.is_repeatable
            and subject.differs(_cut(data, cuts), subject.conversation.records) is not None
        )

    found = next((cuts for cuts in ways if is_one(cuts)), None)
    return found if found is not None or strategy.is_empty else _find(strategy, is_one, RANDOM)


def _shrink(subject: Subject, cuts: Cuts, check: str) -> Iterator[Finding]:
    """Drop records and cuts as long as the replies still differ, and yield what is left as a finding.

    Nothing, if not even the cuts as they were found make a difference again: then it was none of the handler's.
    """
    records = subject.conversation.records
    over = time.monotonic() + SECONDS
    ends = [0, *itertools.accumulate(map(len, records))]
    places = sorted(cuts)

    def build(kept: Sequence[int]) -> tuple[list[bytes], tuple[bytes, ...]]:
        """Return the records that are kept, and the pieces that they are sent in."""
        numbers = [number for number in range(len(records)) if kept[number]] or [len(records) - 1]
        left = [place for place, is_kept in zip(places, kept[len(records) :], strict=True) if is_kept]
        pieces = [b""]
        for number in numbers:
            start, end = ends[number], ends[number + 1]
            first, *others = _cut(records[number], [place - start for place in left if start < place < end])
            if pieces != [b""] and (check == "segmentation" or start in left):
                pieces.append(first)
            else:
                pieces[-1] += first
            pieces += others
        return [records[number] for number in numbers], tuple(pieces)

    def is_one(kept: Sequence[int]) -> bool:
        if time.monotonic() > over:
            return False
        left, pieces = build(kept)
        return tuple(left) != pieces and subject.seems_different(pieces, left)

    count = len(records) + len(places)
    # 0 drops a record or a cut, which is what is simplest. Nine in ten stay at first.
    kept = _find(st.lists(st.integers(0, 9), min_size=count, max_size=count), is_one, RANDOM)
    for flags in ([1] * count if kept is None else kept), [1] * count:
        left, pieces = build(flags)
        outcome = subject.differs(pieces, left)
        if outcome is not None:
            yield explain(subject, check, pieces, left, outcome)
            return


def _find(strategy: Any, condition: Callable[[Any], bool], count: int) -> Any:
    """Return the simplest example that hypothesis finds, the same in every run; None if it finds none."""
    known: dict[Any, bool] = {}

    def holds(example: Any) -> bool:
        key = tuple(example) if isinstance(example, list) else example
        if key not in known:
            known[key] = condition(example)
        return known[key]

    options = settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    try:
        return find(strategy, holds, settings=options)
    except errors.NoSuchExample:
        return None
