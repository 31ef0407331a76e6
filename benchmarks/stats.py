"""From turns to rows: medians and spread, ratios with bootstrap intervals, and which rows are void or prove nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .catalog import BASELINE, SERVERS
from .runner import Sample

__all__ = ["FIGURES", "Figure", "Ratio", "Row", "Spread", "compute_ratio", "make_rows", "summarise"]

_RESAMPLES = 10_000
_LEVEL = 1.05
_SEED = 20_240_229  # any, but the same, so that a report made twice says the same


@dataclass(frozen=True)
class Figure:
    """One measured figure: its name in the data, what tables call it, its unit, and whether more of it is better."""

    name: str
    title: str
    unit: str
    more_is_better: bool


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("achieved_rate", "messages", "1/s", True),
        Figure("p50_us", "p50", "us", False),
        Figure("p99_us", "p99", "us", False),
        Figure("server_cpu_us", "processor time per message", "us", False),
        Figure("memory_kib", "memory", "KiB", False),
        Figure("elapsed_s", "time until all are served", "s", False),
        Figure("connection_kib", "memory per connection", "KiB", False),
    )
}


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of a figure over the repeats."""

    median: float
    least: float
    greatest: float
    count: int


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Tell whether the interval leaves 1 out."""
        return self.low > 1 or self.high < 1

    @property
    def is_level(self) -> bool:
        """Tell whether all of the interval is within 5 % of 1."""
        return self.low >= 1 / _LEVEL and self.high <= _LEVEL


@dataclass(frozen=True)
class Row:
    """One server at one cell.

    `status`: "measured", "bound" (the generator set the pace: figures, but no ratio) or "void" (messages were lost: no
    figures). `why` says so in words. `ratios` say, by figure, how many times as good as the baseline in the same cell it is:
    above 1 it is better, whichever way the figure counts.
    """

    pinned: bool
    scenario: str
    x: int
    server: str
    status: str
    why: str = ""
    figures: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    offered_rate: float | None = None
    server_cpu_share: float | None = None
    generator_cpu_share: float | None = None


def summarise(values: Sequence[float]) -> Spread:
    """Summarise a figure's repeats.

    Raises:
        ValueError: there is none (caller).
    """
    if not values:
        raise ValueError("no values to summarise")
    return Spread(float(np.median(values)), float(min(values)), float(max(values)), len(values))


def compute_ratio(candidate: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Compute how many times the baseline's median the candidate's is, from repeats taken in turns.

    Where less is better, give them the other way round: a ratio above 1 then still says that the candidate is better.

    The interval comes from resampling rounds, each with both its values, since the two of one round met the machine in
    the same mood; 10,000 times, percentiles 2.5 and 97.5.

    Raises:
        ValueError: different numbers of values, none, or a baseline that is not positive (caller).
    """
    a, b = np.asarray(candidate, float), np.asarray(baseline, float)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"expected as many values on both sides and at least one, not {a.size} and {b.size}")
    if (b <= 0).any():
        raise ValueError("a ratio needs positive baseline values")
    rounds = np.random.default_rng(_SEED).integers(0, a.size, (_RESAMPLES, a.size))
    resampled = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def make_rows(lines: Iterable[Sample], baseline: str = BASELINE) -> list[Row]:
    """Make one run's rows, in the order of its cells, servers in the catalogue's order; ratios are against `baseline`.

    A row is void if any repeat lost a message, and bound if the generator was in any repeat; then it gives no ratio,
    nor does anything against it. A figure's ratio uses the rounds in which both servers took their turn.
    """
    turns: dict[str, dict[str, dict[int, Sample]]] = {}
    for line in lines:
        if line.get("kind") == "sample" and not line.get("left_out"):
            turns.setdefault(line["cell"], {}).setdefault(line["server"], {})[line["repeat"]] = line
    order = {server.name: i for i, server in enumerate(SERVERS)}
    return [
        _make_row(cell, server, turns[cell], baseline)
        for cell in turns
        for server in sorted(turns[cell], key=lambda name: order.get(name, len(order)))
    ]


def _make_row(cell: str, server: str, turns: dict[str, dict[int, Sample]], baseline: str) -> Row:
    table, scenario, x = cell.split("/")
    mine = turns[server]
    status, why = _judge(mine.values())
    row: dict[str, Any] = {"pinned": table == "pinned", "scenario": scenario, "x": int(x), "server": server}
    if status == "void":
        return Row(**row, status=status, why=why)
    figures = {
        name: summarise(values) for name in FIGURES if (values := [t[name] for t in mine.values() if _has(t, name)])
    }
    ratios = {}
    its = turns.get(baseline, {})
    if server != baseline and its and status == "measured" and _judge(its.values())[0] == "measured":
        for name in figures:
            rounds = [i for i in mine if i in its and _has(mine[i], name) and _has(its[i], name)]
            ours, theirs = [mine[i][name] for i in rounds], [its[i][name] for i in rounds]
            if rounds and min(theirs) > 0 and min(ours) > 0:
                ratios[name] = (
                    compute_ratio(ours, theirs) if FIGURES[name].more_is_better else compute_ratio(theirs, ours)
                )
    shares: dict[str, Any] = {
        name: float(np.median(values))
        for name in ("server_cpu_share", "generator_cpu_share", "offered_rate")
        if (values := [t[name] for t in mine.values() if _has(t, name)])
    }
    return Row(**row, status=status, why=why, figures=figures, ratios=ratios, **shares)


def _has(turn: Sample, name: str) -> bool:
    return turn.get(name) is not None


def _judge(turns: Iterable[Sample]) -> tuple[str, str]:
    turns = list(turns)
    for turn in turns:
        if turn.get("errors") or turn.get("problem"):
            return "void", str(turn.get("problem") or f"{turn['errors']} messages lost")
    bound = sum(bool(turn.get("generator_bound")) for turn in turns)
    if bound:
        return "bound", f"the generator used over 90 % of its processor in {bound} of {len(turns)} repeats"
    return "measured", ""
