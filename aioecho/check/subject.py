"""What is checked: a handler, what is said to it, and how it replies when every record waits for the reply to the last."""

from collections.abc import Sequence
from dataclasses import dataclass

from aioecho.check.conversation import Conversation
from aioecho.check.player import Outcome, Player

__all__ = ["Finding", "Subject", "shorten"]

SLOW_PACE = 0.05
"""Seconds of silence that end a reply of a handler that waits for something beside its client."""

NOT_ENDING = 0.1
"""Seconds that are waited for the end of a handler that does not end with its client's stream."""


@dataclass(frozen=True)
class Finding:
    """A fault that was found."""

    check: str
    """Which check found it."""

    text: str
    """What is wrong, in a line."""

    source: str
    """A test in Python that shows it."""


class Subject:
    """A handler under check. `name` is ``module:Class``, as the examples import it."""

    def __init__(self, player: Player, conversation: Conversation, name: str) -> None:
        self.player, self.conversation, self.name = player, conversation, name
        self.reference = Outcome()
        self.is_repeatable = False
        self.found: set[str] = set()
        """The checks that have found something."""

    def learn(self) -> None:
        """Play the conversation record by record, twice: note how it goes, and whether it goes the same way again.

        A handler that waits for something beside its client, as a thread or a timer, is given time to reply, if that makes a
        difference.
        """
        records, player = self.conversation.records, self.player
        first = player.play(*records, is_cached=False)
        if not first.has_ended:
            player.patience = NOT_ENDING
        player.pace = SLOW_PACE
        self.reference = player.play(*records, is_cached=False)
        if self.reference.is_endless or first.facts == self.reference.facts:
            player.pace = 0.0
        else:
            first = player.play(*records, is_cached=False)
        self.is_repeatable = first.facts == self.reference.facts and not self.reference.is_endless

    def replies_to(self, count: int) -> bytes:
        """Return the replies to the first records, each of which waits for the reply to the one before."""
        return self.player.play(*self.conversation.records[:count]).replies

    def seems_different(self, pieces: Sequence[bytes], records: Sequence[bytes], *, ends_at_once: bool = False) -> bool:
        """Tell whether it goes differently when `records` are said in these pieces, as far as one time tells."""
        return self.player.play(*pieces, ends_at_once=ends_at_once).facts != self.player.play(*records).facts

    def differs(
        self, pieces: Sequence[bytes], records: Sequence[bytes], *, ends_at_once: bool = False
    ) -> Outcome | None:
        """Return how it goes when `records` are said in these pieces, if it goes in another way than record by record.

        None too if it does not go the same way each time: that tells nothing.
        """
        if not self.seems_different(pieces, records, ends_at_once=ends_at_once):
            return None
        expected, got = [], []
        for _ in range(2):
            expected.append(self.player.play(*records, is_cached=False).facts)
            outcome = self.player.play(*pieces, ends_at_once=ends_at_once, is_cached=False)
            got.append(outcome.facts)
        if expected[0] != expected[1] or got[0] != got[1]:
            self.is_repeatable = False
            return None
        return outcome if got[0] != expected[0] else None


def shorten(data: bytes) -> str:
    """Return some bytes as they are shown in a line."""
    return repr(data) if len(data) <= 60 else f"{data[:40]!r}… ({len(data)} bytes)"
