"""What a handler does when every record waits for the reply to the one before, as its author has tried it."""

from collections.abc import Iterator

from aioecho.check.examples import RUNS_ON, explain_plain
from aioecho.check.subject import Finding, Subject, shorten

__all__ = ["check_replies"]


def check_replies(subject: Subject) -> Iterator[Finding]:
    """Say the conversation as it is: the handler raises nothing, and the replies that a script expects come in order."""
    outcome, conversation = subject.reference, subject.conversation
    if outcome.was_stuck:
        yield explain_plain(subject, f"the handler {RUNS_ON} in the plain conversation")
        return
    if outcome.errors:
        yield explain_plain(subject, f"the handler raises {outcome.errors[0]} in the plain conversation")
    at = 0
    for expected in conversation.expected:
        found = outcome.replies.find(expected, at)
        if found < 0:
            text = f"the reply {shorten(expected)} does not come; the rest of the replies is {shorten(outcome.replies[at:])}"
            yield explain_plain(subject, text, expected=expected)
            return
        at = found + len(expected)
