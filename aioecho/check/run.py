"""All checks of a handler, one after another."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aioecho.check.bounds import check_leaks, check_slow_reader, check_too_long
from aioecho.check.conversation import Conversation
from aioecho.check.cuts import check_coalescing, check_segmentation
from aioecho.check.datagrams import DATAGRAM_CHECKS, DatagramSubject, note_amplification
from aioecho.check.endings import check_half_close, check_reset, check_stop, check_truncation, note_truncation
from aioecho.check.player import Player
from aioecho.check.replies import check_replies
from aioecho.check.subject import Finding, Subject
from aioecho.datagrams.server import UDPServer
from aioecho.server import TCPServer
from aioecho.serving.handler_types import serves_datagrams, undo_partial

__all__ = ["CHECKS", "Result", "check"]

CHECKS: dict[str, Callable[[Subject], Iterator[Finding]]] = {
    "replies": check_replies,
    "segmentation": check_segmentation,
    "coalescing": check_coalescing,
    "truncation": check_truncation,
    "half-close": check_half_close,
    "stop": check_stop,
    "reset": check_reset,
    "too long": check_too_long,
    "slow reader": check_slow_reader,
    "leaks": check_leaks,
}
"""The checks by their names, in the order in which they are made."""

COMPARES = ("segmentation", "coalescing", "half-close")
"""The checks that need a handler which replies the same whenever it is told the same."""


@dataclass(frozen=True)
class Result:
    """What a check has found."""

    check: str
    findings: tuple[Finding, ...] = ()
    note: str = ""
    """What else there is to say: why nothing could be told, or what some protocols allow and others do not."""


def check(handler: Callable[..., Any], conversation: Conversation, name: str) -> Iterator[Result]:
    """Make all checks of a handler, and return an iterator of what every one has found, as soon as it has ended.

    The handler runs in this process and thread, with a server for every conversation. Meanwhile nothing is logged. `name` is
    ``module:Class``, as the examples of the findings import it. The same handler has the same findings in every run.

    Raises:
        TypeError: this is no handler (caller).
        ValueError: a record does not fit into a datagram, for a handler of datagrams (caller).
    """
    is_for_datagrams = serves_datagrams(undo_partial(handler))
    (UDPServer if is_for_datagrams else TCPServer)(("127.0.0.1", 0), handler)  # it raises; it is not started
    if is_for_datagrams:
        return _quietly(_check_datagrams(DatagramSubject(handler, conversation, name)))
    return _quietly(_check(handler, conversation, name))


def _quietly(results: Iterator[Result]) -> Iterator[Result]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield from results
    finally:
        logging.disable(disabled)


def _check(handler: Callable[..., Any], conversation: Conversation, name: str) -> Iterator[Result]:
    with Player(handler) as player:
        subject = Subject(player, conversation, name)
        subject.learn()
        for what, find in CHECKS.items():
            yield _make(what, find, subject)


def _check_datagrams(subject: DatagramSubject) -> Iterator[Result]:
    for what, find in DATAGRAM_CHECKS.items():
        yield Result(what, tuple(find(subject)))
    yield Result("reply size", note=note_amplification(subject))


def _make(what: str, find: Callable[[Subject], Iterator[Finding]], subject: Subject) -> Result:
    note = "not told: the handler replies differently when it is told the same again"
    if subject.reference.is_endless:
        note = "not told: the handler sends without end"
    if what in COMPARES and not subject.is_repeatable:
        return Result(what, note=note)
    findings = tuple(find(subject))
    if what in COMPARES and not subject.is_repeatable:
        return Result(what, note=note)
    if findings:
        subject.found.add(what)
    return Result(what, findings, note_truncation(subject) if what == "truncation" and not findings else "")
