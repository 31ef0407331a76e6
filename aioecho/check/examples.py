"""Findings as tests in Python, to be pasted and run: they use what aioecho gives to users, and nothing of the checks."""

import re
from collections.abc import Sequence

from aioecho.check.player import Outcome
from aioecho.check.subject import Finding, Subject, shorten
from aioecho.serving.handler_types import is_blocking

__all__ = ["ERRORS", "RUNS_ON", "WAITS", "explain", "explain_plain", "list_pieces", "literal", "source_of"]

ERRORS = """
class Server(aioecho.TCPServer):
    mistakes = []  # of its handlers

    def handle_error(self, request, client_address):
        if not self.is_peers_fault(sys.exception()):
            self.mistakes.append(sys.exception())
"""
"""A part of an example: a server that notes what its handlers raise."""

_SAY = '''
async def say(*pieces, pause_at_end={pause}):
    """Return the replies to some pieces, of which the server reads every one by itself."""
    async with {server}(("127.0.0.1", 0), {handler}, grace=0.1) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        replies = b""
        for piece in pieces:
            await asyncio.sleep({pause})
            writer.write(piece)
        if pause_at_end:
            await asyncio.sleep(pause_at_end)
        writer.write_eof()
        try:
            {read}
        finally:
            writer.close()
        return replies
'''

_READ = """with contextlib.suppress(TimeoutError, ConnectionError):
                while data := await asyncio.wait_for(reader.read(2**16), 1):
                    replies += data"""

_READ_TO_END = "replies = await asyncio.wait_for(reader.read(), 5)"

_REPLIES = """
def test_{test}():
    assert asyncio.run(say({said})) == asyncio.run(say({records}))
"""

_RAISES = """
def test_the_handler_raises_nothing():
    asyncio.run(say({said}))
    assert Server.mistakes == []
"""

_ENDS = """
def test_the_handler_ends_with_its_client():
    asyncio.run(say({said}))  # TimeoutError: it does not
"""

WAITS = """
stuck = []


def interrupt(*_):
    stuck.append("the handler ran for 3 seconds without waiting for anything")
    raise RuntimeError(stuck[0])


def test_the_handler_lets_the_loop_go_on():
    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(3)
    asyncio.run({call})
    signal.alarm(0)
    assert not stuck
"""
"""A part of an example: a test that `call`, which is a coroutine, does not keep the loop."""

RUNS_ON = "runs on and on, and waits for nothing,"
"""What a handler does that keeps its loop, or its thread, for seconds."""

_TESTS = {
    "segmentation": "replies_do_not_depend_on_how_a_message_is_cut",
    "coalescing": "messages_that_come_together_are_answered_one_by_one",
    "truncation": "no_reply_is_made_up_for_a_part_of_a_message",
    "half-close": "no_reply_is_lost_when_the_client_ends_its_stream",
}

_MODULES = ("asyncio", "contextlib", "gc", "os", "signal", "socket", "struct", "sys", "tracemalloc")


def source_of(subject: Subject, *parts: str, **values: object) -> str:
    """Return a test: the imports that its parts need, and the parts with their blanks filled in."""
    module, _, path = subject.name.partition(":")
    pause = 0.05 if subject.player.pace == 0 else 0.2
    fills = {"handler": path, "pause": pause, "server": "aioecho.TCPServer", "read": _READ, **values}
    text = "\n".join(re.sub(r"\{(\w+)\}", lambda blank: str(fills[blank[1]]), part) for part in parts)
    imports = "".join(f"import {name}\n" for name in _MODULES if f"{name}." in text)
    return f"{imports}\nimport aioecho\nfrom {module} import {path.partition('.')[0]}\n\n{text}"


def list_pieces(pieces: Sequence[bytes]) -> str:
    """Return some pieces as arguments in a source."""
    return ", ".join(map(literal, pieces))


def literal(data: bytes) -> str:
    """Return some bytes as they stand in a source, in double quotes where that needs no escape."""
    text = repr(data)
    return f'b"{text[2:-1]}"' if text[1] == "'" and '"' not in text else text


def explain(
    subject: Subject,
    check: str,
    pieces: Sequence[bytes],
    records: Sequence[bytes],
    outcome: Outcome,
    *,
    ends_at_once: bool = False,
) -> Finding:
    """Return the finding that pieces are answered in another way than the records, said one by one."""
    expected = subject.player.play(*records)
    said = list_pieces(pieces) + (", pause_at_end=0" if ends_at_once else "")
    if ends_at_once:
        how = f"the end of the stream comes together with {shorten(pieces[-1])}"
    elif check == "truncation":
        how = f"the client sends {shorten(b''.join(pieces))} and ends its stream there"
    else:
        how = f"{' + '.join(map(shorten, pieces))} comes in {'one piece' if len(pieces) == 1 else 'pieces'}"
    hangs = expected.has_ended and not outcome.has_ended
    if outcome.was_stuck and not is_blocking(subject.player.handler):
        source = source_of(subject, _SAY, WAITS, call=f"say({said})")
        return Finding(check, f"the handler {RUNS_ON} when {how}", source)
    if set(outcome.errors) - set(expected.errors):
        source = source_of(subject, ERRORS, _SAY, _RAISES, said=said, server="Server")
        return Finding(check, f"the handler raises {outcome.errors[0]} when {how}", source)
    if outcome.replies != expected.replies and not (check == "truncation" and (hangs or outcome.was_stuck)):
        source = source_of(subject, _SAY, _REPLIES, said=said, records=list_pieces(records), test=_TESTS[check])
        text = f"the reply is {shorten(outcome.replies)} in place of {shorten(expected.replies)} when {how}"
        return Finding(check, text, source)
    source = source_of(subject, _SAY, _ENDS, said=said, read=_READ_TO_END)
    return Finding(check, f"the handler {RUNS_ON if outcome.was_stuck else 'does not end'} when {how}", source)


_EXPECTED = """
def test_the_reply_comes():
    assert {expected} in asyncio.run(say({said}))
"""


def explain_plain(subject: Subject, text: str, expected: bytes | None = None) -> Finding:
    """Return the finding that the plain conversation goes wrong: by what it raises, or as a reply does not come."""
    said = list_pieces(subject.conversation.records)
    if expected is not None:
        return Finding("replies", text, source_of(subject, _SAY, _EXPECTED, said=said, expected=literal(expected)))
    if subject.reference.was_stuck:
        return Finding("replies", text, source_of(subject, _SAY, WAITS, call=f"say({said})"))
    return Finding("replies", text, source_of(subject, ERRORS, _SAY, _RAISES, said=said, server="Server"))
