"""Checks of a handler for datagrams: what a network does to them, and what any sender may write into one."""

import asyncio
import contextlib
import random
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aioecho.check.conversation import Conversation
from aioecho.check.examples import list_pieces
from aioecho.check.loop import HandlerStuck, QuietLoop
from aioecho.check.player import SETTLE, STOP
from aioecho.check.subject import Finding, shorten
from aioecho.datagrams.server import UDPServer

__all__ = ["DATAGRAM_CHECKS", "DatagramSubject", "note_amplification"]

MOST = 64
"""Cuts, and changes, of one record: of a longer one some are tried."""

LARGE = 1472
"""Bytes of the largest datagram that goes through an Ethernet in one piece."""

LARGEST = 65_507
"""Bytes of the largest datagram over IPv4."""

GARBAGE = 60
"""Datagrams of random bytes."""

IMPATIENT = 0.01
"""Seconds for a datagram, where the handler of one before it has not ended within SETTLE."""

MOST_TIMES = 3
"""The size of all replies to a datagram, as a multiple of its own, from which on a sender has to prove its address in QUIC."""

_SOURCE = '''
import asyncio

from aioecho.testing import connect
from {module} import {name}


async def say(*datagrams):
    """Send some datagrams, one after another, and raise what the handler has raised."""
    async with connect({handler}, grace=0.1) as client:
        for datagram in datagrams:
            await client.send(datagram)
            await asyncio.sleep(0.05)


def test_the_handler_raises_nothing():
    asyncio.run(say({said}))
'''

_EXPECTED = '''
import asyncio

from aioecho.testing import connect
from {module} import {name}


async def ask(*datagrams):
    """Return the replies to some datagrams: every one waits for the replies to the one before."""
    replies = []
    async with connect({handler}, grace=0.1, timeout=0.25) as client:
        for datagram in datagrams:
            await client.send(datagram)
            try:
                while True:
                    replies.append(await client.receive())
            except TimeoutError:
                pass
    return replies


def test_the_reply_comes():
    assert any({expected} in reply for reply in asyncio.run(ask({said})))
'''


@dataclass
class _Heard:
    """What came of one datagram."""

    errors: list[str] = field(default_factory=list)
    """What the handler has raised that is a mistake of its own."""

    replies: list[bytes] = field(default_factory=list)


class _Server(UDPServer):
    """Notes what handlers raise."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        super().__init__(("127.0.0.1", 0), handler, grace=STOP)
        self.mistakes: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what the handler has raised, if that is a mistake of its own."""
        error = sys.exception()
        if error is not None and not isinstance(error, HandlerStuck) and not self.is_peers_fault(error):
            self.mistakes.append(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


class DatagramSubject:
    """A handler for datagrams under check. `name` is ``module:Class``, as the examples import it.

    Raises ValueError if a record does not fit into a datagram (caller).
    """

    def __init__(self, handler: Callable[..., Any], conversation: Conversation, name: str) -> None:
        if (size := max(map(len, conversation.records))) > LARGEST:
            raise ValueError(f"a record of {size} bytes is too long for a datagram, which has {LARGEST} at most")
        self.handler, self.conversation, self.name = handler, conversation, name
        self.heard: dict[bytes, _Heard] = {}
        """What came of every datagram that was sent, for the first time that it was."""
        self.stuck_by: tuple[bytes, ...] = ()
        """What was sent to a handler that kept the loop then."""
        self._patience = SETTLE

    def play(self, *datagrams: bytes) -> list[_Heard]:
        """Send datagrams from one address, with time for the replies to every one; return what came of them.

        Of one that keeps the loop nothing comes, and of the ones behind it: they are not sent.
        """
        loop = QuietLoop()
        loop.set_exception_handler(lambda loop, context: None)
        heard: list[_Heard] = []
        with loop.watched():
            try:
                with asyncio.Runner(loop_factory=lambda: loop) as runner:
                    runner.run(self._play(loop, datagrams, heard))
            except BaseException as error:
                if not loop.was_stuck or isinstance(error, KeyboardInterrupt):
                    raise
        if loop.was_stuck:
            self.stuck_by = datagrams[: len(heard) + 1]
        for datagram, one in zip(datagrams, heard, strict=False):
            self.heard.setdefault(datagram, one)
        return heard

    async def _play(self, loop: QuietLoop, datagrams: Sequence[bytes], heard: list[_Heard]) -> None:
        async with _Server(self.handler) as server:
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect(server.server_address)
                for count, datagram in enumerate(datagrams, 1):
                    sock.send(datagram)
                    await self._settle(loop, server, count)
                    if loop.was_stuck:
                        return
                    one = _Heard(server.mistakes)
                    server.mistakes = []
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            one.replies.append(sock.recv(2**16))
                    heard.append(one)

    async def _settle(self, loop: QuietLoop, server: _Server, count: int) -> None:
        """Wait until the server has read so many datagrams, and has done what it can."""
        deadline = loop.time() + self._patience
        while loop.time() < deadline:
            stats = server.stats
            is_done = stats.received >= count and not stats.queued and (server.has_sessions or not stats.active)
            if is_done and await loop.quiet(SETTLE):
                return
            await asyncio.sleep(0.001)  # a thread of the handler's tells of nothing
        self._patience = IMPATIENT  # it waits for something else, and hundreds of datagrams are still to come

    def explain(self, check: str, text: str, said: Sequence[bytes], expected: bytes | None = None) -> Finding:
        """Return a finding, with the test that shows it."""
        module, _, path = self.name.partition(":")
        values = {"module": module, "name": path.partition(".")[0], "handler": path, "said": list_pieces(said)}
        template = _SOURCE if expected is None else _EXPECTED
        return Finding(check, text, template.format(**values, expected=expected).lstrip())


def _check_replies(subject: DatagramSubject) -> Iterator[Finding]:
    """Send the records, one by one: the handler raises nothing, and the replies that a script expects come in order."""
    records = subject.conversation.records
    heard = subject.play(*records)
    if subject.stuck_by:
        yield subject.explain("replies", "the handler keeps the loop for seconds", subject.stuck_by)
        return
    errors = [error for one in heard for error in one.errors]
    if errors:
        yield subject.explain("replies", f"the handler raises {errors[0]} in the plain conversation", records)
        return
    replies = iter([reply for one in heard for reply in one.replies])
    for expected in subject.conversation.expected:
        if not any(expected in reply for reply in replies):
            yield subject.explain("replies", f"the reply {shorten(expected)} does not come", records, expected)
            return


def _check_malformed(subject: DatagramSubject) -> Iterator[Finding]:
    """Send what is no record: nothing, parts, bytes that were changed, garbage. The handler raises nothing."""
    yield from _find_errors(subject, "malformed", [(bad,) for bad in _malformed(subject.conversation.records)])


def _check_order(subject: DatagramSubject) -> Iterator[Finding]:
    """Send every record twice, as a network may, and then all in reverse: the handler raises nothing."""
    records = subject.conversation.records
    twice = tuple(record for record in records for _ in range(2))
    yield from _find_errors(subject, "order", [twice, records[::-1]])


def _find_errors(subject: DatagramSubject, check: str, tries: Sequence[tuple[bytes, ...]]) -> Iterator[Finding]:
    """Yield a finding for every type of exception that the handler raises, by the shortest datagrams that make it do so."""
    alone = all(len(one) == 1 for one in tries)
    plays = [tuple(one[0] for one in tries)] if alone else tries
    raised: list[tuple[bytes, ...]] = []
    for said in plays:
        heard = subject.play(*said)
        if subject.stuck_by:
            last = subject.stuck_by[-1:] if alone else subject.stuck_by
            yield subject.explain(check, f"the handler keeps the loop when it is sent {_shown(last)}", last)
            subject.stuck_by = ()
            return
        if alone:
            raised += [(datagram,) for datagram, one in zip(said, heard, strict=True) if one.errors]
        elif any(one.errors for one in heard):
            raised.append(said)
    found = set()
    for said in sorted(raised, key=lambda said: sum(map(len, said))):
        # By itself, as the test does: what came before may have been the reason.
        errors = [error for one in subject.play(*said) for error in one.errors]
        if errors and errors[0].partition(":")[0] not in found:
            found.add(errors[0].partition(":")[0])
            yield subject.explain(check, f"the handler raises {errors[0]} when it is sent {_shown(said)}", said)


def _shown(said: Sequence[bytes]) -> str:
    return ", then ".join(map(shorten, said[:4])) + (", ..." if len(said) > 4 else "")


def _malformed(records: Sequence[bytes]) -> list[bytes]:
    """Return datagrams that are hardly records, the same every time, none twice."""
    found = [b""]
    for record in records:
        step = len(record) // MOST + 1
        for at in range(0, len(record), step):
            before, after = record[:at], record[at + 1 :]
            found += [before, before + bytes([record[at] ^ 0xFF]) + after, before + b"\0" + after]
        found += [record + b"\0", record + record]
    source = random.Random(0)
    found += [source.randbytes(source.choice((1, 2, 4, 12, 40, 512))) for _ in range(GARBAGE)]
    found += [b"\0" * LARGE, b"\xff" * LARGE, b"9" * LARGE]
    return [datagram for datagram in dict.fromkeys(found) if datagram not in records and len(datagram) <= LARGEST]


def note_amplification(subject: DatagramSubject) -> str:
    """Return what there is to say about replies that are much larger than what they reply to; "" if none are."""
    times = {
        datagram: sum(map(len, one.replies)) / len(datagram)
        for datagram, one in subject.heard.items()
        if len(datagram) and one.replies
    }
    most = max(times, key=times.__getitem__, default=b"")
    if not most or times[most] <= MOST_TIMES:
        return ""
    size = sum(map(len, subject.heard[most].replies))
    return (
        f"{shorten(most)} is replied to by {size} bytes, {times[most]:.0f} times its own: a sender may have made up its"
        f" address, and then another gets them. Up to {MOST_TIMES} times is usual for one that has proved nothing"
    )


DATAGRAM_CHECKS: dict[str, Callable[[DatagramSubject], Iterator[Finding]]] = {
    "replies": _check_replies,
    "malformed": _check_malformed,
    "order": _check_order,
}
"""The checks by their names, in the order in which they are made."""
