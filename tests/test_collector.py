"""Collections of a program that holds very many objects."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from aioecho.runtime import collector
from aioecho.runtime.collector import collect_little, short_collections


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
    gc.collect()  # 3.12's sets immortal objects aside by itself
    before = gc.get_freeze_count()
    with short_collections():
        gc.collect()
        assert gc.get_freeze_count() == before


@pytest.fixture
def thresholds() -> Iterator[tuple[int, int, int]]:
    """Python's own."""
    before = gc.get_threshold()
    gc.set_threshold(*collector.PYTHONS_OWN[0])
    yield gc.get_threshold()
    gc.set_threshold(*before)


def test_collections_are_fewer_and_full_ones_come_sooner_until_the_end(thresholds: tuple[int, int, int]) -> None:
    if thresholds not in collector.PYTHONS_OWN:
        pytest.skip("3.14.0 to 3.14.4 have no third threshold")
    with short_collections():
        young, middle, old = gc.get_threshold()
        assert young > 4 * thresholds[0]
        assert young * (middle + 1) * (old + 1) < thresholds[0] * (thresholds[1] + 1) * (thresholds[2] + 1) / 2
        collect_little()
        young, middle, old = gc.get_threshold()
        assert young * (middle + 1) * (old + 1) > 10 * thresholds[0] * (thresholds[1] + 1) * (thresholds[2] + 1)
    assert gc.get_threshold() == thresholds


@pytest.mark.usefixtures("thresholds")
@pytest.mark.parametrize("own", [(50_000, 20, 100), (700, 10, 1000), (0, 10, 10)], ids=["all", "full", "off"])
def test_thresholds_that_the_program_has_set_are_kept(own: tuple[int, int, int]) -> None:
    gc.set_threshold(*own)
    own = gc.get_threshold()
    with short_collections():
        assert gc.get_threshold() == own
        collect_little()
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


@pytest.mark.usefixtures("thresholds")
def test_thresholds_that_a_lifespan_sets_are_kept_to_the_end() -> None:
    with short_collections():
        gc.set_threshold(50_000, 20, 1000)
        own = gc.get_threshold()
        collect_little()
        assert gc.get_threshold() == own
