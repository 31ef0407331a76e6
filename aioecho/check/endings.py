"""What a handler does when its client ends in mid-message or early, breaks the connection, or when the server stops."""

import asyncio
import contextlib
import functools
from collections.abc import Iterator

from aioecho.check.examples import ERRORS, RUNS_ON, WAITS, explain, list_pieces, literal, source_of
from aioecho.check.player import PATIENCE, Outcome, Session
from aioecho.check.subject import Finding, Subject, shorten

__all__ = ["check_half_close", "check_reset", "check_stop", "check_truncation", "note_truncation"]

GRACE = 0.3
"""Seconds of grace of a stop in mid-request."""


def _parts(subject: Subject) -> Iterator[tuple[int, bytes]]:
    """Yield beginnings of the first and the last record, with the number of records before."""
    records = subject.conversation.records
    for number in sorted({0, len(records) - 1}):
        record = records[number]
        for length in sorted({1, len(record) // 2, len(record) - 1}):
            if 0 < length < len(record):
                yield number, record[:length]


def check_truncation(subject: Subject) -> Iterator[Finding]:
    """End the stream in mid-message: no reply is made up, and the handler ends, without a mistake of its own."""
    for number, part in _parts(subject):
        before = subject.conversation.records[:number]
        outcome = subject.player.play(*before, part)
        whole = subject.player.play(*before)
        hangs = whole.has_ended and not outcome.has_ended
        if outcome.was_stuck or hangs or set(outcome.errors) - set(whole.errors) or _is_made_up(subject, number, part):
            if outcome.facts != subject.player.play(*before, part, is_cached=False).facts:
                continue
            yield explain(subject, "truncation", (*before, part), before, outcome)
            return


def _is_made_up(subject: Subject, number: int, part: bytes) -> bool:
    """Tell whether a part of a record is answered as a whole one, which it is not, and no reply to it would be right."""
    if not subject.is_repeatable or subject.conversation.is_text:
        return False
    return _is_answered(subject, number, part)


def _is_answered(subject: Subject, number: int, part: bytes) -> bool:
    conversation = subject.conversation
    before = conversation.records[:number]
    replies = subject.player.play(*before, part).replies
    if replies == subject.replies_to(number):
        return False
    if replies == subject.replies_to(number + 1):
        return True
    shorter = conversation.end(part, number)
    return shorter is not None and replies == subject.player.play(*before, shorter).replies


def note_truncation(subject: Subject) -> str:
    """Return a note if a line that lacks its end is answered as one that has it, which some protocols allow; else nothing."""
    if subject.is_repeatable and subject.conversation.is_text:
        for number, part in _parts(subject):
            if _is_answered(subject, number, part):
                return f"a last line without its end is answered like a whole one: {shorten(part)}"
    return ""


def check_half_close(subject: Subject) -> Iterator[Finding]:
    """Let the end of the stream come together with the only record, and with the last one: every reply has to come."""
    records = subject.conversation.records
    for said in (records[:1], records):
        outcome = subject.differs(said, said, ends_at_once=True)
        if outcome is not None:
            yield explain(subject, "half-close", said, said, outcome, ends_at_once=True)
            return


_RESET = """
async def reset_connection(data):
    async with Server(("127.0.0.1", 0), {handler}, timeouts=aioecho.Timeouts(lost=1), grace=0.1) as server:
        client = socket.create_connection(server.server_address)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        await asyncio.sleep({pause})
        client.sendall(data)
        await asyncio.sleep({wait})
        client.close()
        for _ in range(40):
            await asyncio.sleep(0.1)
            if not server.connections:
                return
        raise TimeoutError("the handler has not ended")
"""

_RESET_ENDS = """
def test_a_reset_ends_the_handler():
    asyncio.run(reset_connection({data}))
    assert Server.mistakes == []
"""


def check_reset(subject: Subject) -> Iterator[Finding]:
    """Reset the connection in mid-request, at once after a request, and in mid-reply: the handler ends without a mistake."""
    records = subject.conversation.records
    everything = b"".join(records)
    known = set(subject.reference.errors)
    for data, waits in (
        (records[0], True),
        (records[0][: len(records[0]) // 2], True),
        (everything, False),
        (everything, True),
    ):
        wait = 0.1 if waits else 0
        play = functools.partial(subject.player.run, functools.partial(_reset, data=data, waits=waits))
        outcome = play()
        end = _RESET_ENDS
        when = f"its client sends {shorten(data)} and resets the connection"
        if outcome.was_stuck:
            text, end = f"the handler {RUNS_ON} when {when}", WAITS
        elif set(outcome.errors) - known:
            text = f"the handler raises {outcome.errors[0]} when {when}"
        elif not outcome.has_ended and not play().has_ended:  # twice: a busy machine may hold it up once
            text = f"the handler goes on for more than {PATIENCE:g} s when {when}"
        else:
            continue
        call = f"reset_connection({literal(data)})"
        yield Finding("reset", text, source_of(subject, ERRORS, _RESET, end, data=literal(data), wait=wait, call=call))
        return


async def _reset(session: Session, data: bytes, waits: bool) -> None:
    await session.connect(reads=False)
    with contextlib.suppress(OSError):
        session.send_now(data)
        if waits:
            await session.settle()
    session.reset()
    session.outcome.has_ended = await session.wait_handler(PATIENCE)


_STOP = '''
async def stop_after(*pieces):
    """Return the replies when the server stops after these."""
    async with {server}(("127.0.0.1", 0), {handler}) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        for piece in pieces:
            await asyncio.sleep({pause})
            writer.write(piece)
        await asyncio.sleep(0.2)
        await server.shutdown(grace={grace})
        replies = await reader.read()
        writer.close()
        return replies
'''

_STOP_REPLIES = """
def test_a_stop_makes_up_no_reply():
    assert asyncio.run(stop_after({said})) == asyncio.run(stop_after({before}))
"""

_STOP_RAISES = """
def test_a_stop_is_no_mistake():
    asyncio.run(stop_after({said}))
    assert Server.mistakes == []
"""


def check_stop(subject: Subject) -> Iterator[Finding]:
    """Stop the server while half a request is there: it is not answered as if it were whole, and the handler ends."""
    records = subject.conversation.records
    for number in sorted({0, len(records) - 1}):
        part = records[number][: len(records[number]) // 2]
        if not part:
            continue
        before = records[:number]
        between = subject.player.run(functools.partial(_stop, said=before))
        play = functools.partial(subject.player.run, functools.partial(_stop, said=(*before, part)))
        outcome = play()
        when = f"the server stops after half a request, {shorten(part)}"
        said = list_pieces((*before, part))
        if outcome.was_stuck:
            text, end = f"the handler {RUNS_ON} when {when}", WAITS
        elif set(outcome.errors) - set(subject.reference.errors) - set(between.errors):
            text, end = f"the handler raises {outcome.errors[0]} when {when}", _STOP_RAISES
        elif (
            outcome.replies != between.replies
            and _is_reply(subject, number, part, outcome)
            and _is_reply(subject, number, part, play())  # twice: a busy machine may be late with the reply to the part
        ):
            text, end = f"the reply {shorten(outcome.replies)} is made up when {when}", _STOP_REPLIES
        else:
            continue
        values = {"said": said, "before": list_pieces(before), "grace": GRACE, "call": f"stop_after({said})"}
        if end is _STOP_RAISES:
            source = source_of(subject, ERRORS, _STOP, end, **values, server="Server")
        else:
            source = source_of(subject, _STOP, end, **values)
        yield Finding("stop", text, source)
        return


def _is_reply(subject: Subject, number: int, part: bytes, outcome: Outcome) -> bool:
    """Tell whether what came at a stop is what would be sent if the request had been whole."""
    if not subject.is_repeatable:
        return False
    shorter = subject.conversation.end(part, number)
    before = subject.conversation.records[:number]
    answers = {subject.replies_to(number + 1), subject.player.play(*before, part).replies}
    if shorter is not None:
        answers.add(subject.player.play(*before, shorter).replies)
    # Of one that answers every byte as it comes, as an echo, the reply to the part is there before the stop.
    return outcome.replies in answers - {subject.replies_to(number)} and outcome.replies != outcome.before_stop


async def _stop(session: Session, said: tuple[bytes, ...]) -> None:
    await session.connect()
    await session.send(*said)
    # A connection that is younger is given time for its first request: see docs/pages/stopping.md.
    await asyncio.sleep(0.12)
    session.outcome.before_stop = session.take_replies()
    await session.server.shutdown(GRACE)
    session.outcome.has_ended = await session.wait_end(PATIENCE)
