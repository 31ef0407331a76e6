"""Collections of a program that holds very many objects."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from aioecho.runtime import collector
from aioecho.runtime.collector import short_collections


class Node:
    """Garbage that refers to itself, when nothing else does."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    """So many objects that a full collection is a long one."""
    monkeypatch.setattr(collector, "LONG", 0.0)
    gc.collect()
    yield [Node() for _ in range(1000)]
    assert gc.get_freeze_count() == 0


def test_what_survives_a_long_collection_is_set_aside_until_the_end(crowd: list[Node]) -> None:
    with short_collections():
        gc.collect()
        assert gc.get_freeze_count() > len(crowd)
        assert not any(isinstance(found, Node) for found in gc.get_objects())
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None


def test_what_was_set_aside_goes_when_nothing_refers_to_it(crowd: list[Node]) -> None:
    node = Node()
    node.itself = None  # type: ignore[assignment]
    seen = weakref.ref(node)
    with short_collections():
        gc.collect()
        del node
        assert seen() is None


def test_garbage_that_was_set_aside_is_collected_once_the_time_for_it_has_come(
    crowd: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    with short_collections():
        gc.collect()
        seen = weakref.ref(crowd.pop())
        gc.collect()
        assert seen() is not None
        monkeypatch.setattr(collector, "WHOLE_EVERY", 0.0)
        gc.collect()
        assert seen() is None


def test_short_collections_set_nothing_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "LONG", 60.0)
    before = gc.get_freeze_count()
    with short_collections():
        gc.collect()
        assert gc.get_freeze_count() == before


def test_young_objects_are_looked_at_less_often_until_the_end() -> None:
    before = gc.get_threshold()
    with short_collections():
        assert gc.get_threshold() == (collector.YOUNG, *before[1:])
    assert gc.get_threshold() == before


@pytest.mark.parametrize("first", [0, 2 * collector.YOUNG], ids=["disabled", "seldom already"])
def test_a_collector_that_looks_less_often_is_left_so(first: int) -> None:
    before = gc.get_threshold()
    gc.set_threshold(first, *before[1:])
    try:
        with short_collections():
            assert gc.get_threshold() == (first, *before[1:])
    finally:
        gc.set_threshold(*before)
