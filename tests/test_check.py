"""`check` finds the mistakes of a handler that only a network shows, and shows each by a test; and finds none in sound ones."""

import asyncio
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty
import pytest
from helpers import check_mistake, handler, invoke

import aioecho
from aioecho import echo
from aioecho.check import CHECKS, Conversation, Finding, Whole, check, default_conversation, parse_script, run
from aioecho.check.endings import note_truncation
from aioecho.check.player import Player
from aioecho.check.subject import Subject
from aioecho.framing import COBS, Delimited, FixedSize, Framing, LengthPrefixed, Lines

SLOW = pytest.mark.slow

pytestmark = pytest.mark.filterwarnings(
    # Handlers that leave something are the subject.
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
)


def framing_of(kind: Any) -> Framing:
    return getattr(kind, "framing", None) or Lines()


def find(kind: Any, what: str, conversation: Conversation | None = None) -> list[Finding]:
    """Return what one check finds in a handler."""
    with Player(kind) as player:
        name = f"{kind.__module__}:{kind.__qualname__}"
        subject = Subject(player, conversation or default_conversation(framing_of(kind)), name)
        subject.learn()
        return list(CHECKS[what](subject))


def run_example(source: str) -> None:
    """Run a finding's source as pytest would."""
    names: dict[str, Any] = {}
    exec(compile(source, "example", "exec"), names)
    tests = [function for name, function in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


# What is found

FAULTS = [
    ("segmentation", faulty.OneReadIsOneMessage, echo.Upper, "comes in pieces"),
    ("segmentation", faulty.BlockingOneReadIsOneMessage, faulty.Blocking, "comes in pieces"),
    ("segmentation", faulty.LosesALineFeed, faulty.Ended, "comes in pieces"),
    ("coalescing", faulty.AnswersTheFirstLineOfAChunk, echo.Upper, "comes in one piece"),
    ("truncation", faulty.AnswersAPartOfAFrame, faulty.Framed, "and ends its stream there"),
    ("reset", faulty.RaisesAtAReset, echo.Upper, "raises RuntimeError: the client has gone when"),
    ("too long", faulty.KeepsALineOfAnyLength, echo.Upper, "when its client sends a record of 32 MiB"),
    ("too long", faulty.RaisesAtALongLine, echo.Upper, "raises RuntimeError: no such line was expected when"),
    ("leaks", faulty.LeavesATask, echo.Upper, "leaves 1 task behind: LeavesATask.watch"),
    ("leaks", faulty.LeavesAFile, echo.Upper, "leaves 1 descriptor behind"),
    ("leaks", faulty.LeavesItself, echo.Upper, "bytes behind, most of them from faulty.py:"),
    ("replies", faulty.RaisesAtALine, echo.Upper, "raises ValueError"),
    pytest.param("half-close", faulty.DropsTheReplyToTheLastLine, echo.Upper, "comes together with", marks=SLOW),
    pytest.param("stop", faulty.AnswersWhatIsLeftAtAStop, echo.Upper, "is made up when the server stops", marks=SLOW),
    pytest.param("slow reader", faulty.NeverDrains, echo.Upper, "does not drain", marks=SLOW),
    pytest.param("slow reader", faulty.QueuesReplies, echo.Upper, "and reads nothing", marks=SLOW),
    pytest.param("truncation", faulty.RunsOnAtTheEnd, faulty.Framed, "runs on and on", marks=SLOW),
    pytest.param("reset", faulty.StaysAfterAReset, echo.Upper, "goes on for more than 1 s", marks=SLOW),
]


@pytest.mark.parametrize(("what", "fault", "sound", "text"), FAULTS)
def test_a_mistake_is_found_and_its_example_fails_until_it_is_mended(
    what: str, fault: Any, sound: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What has to go on for some time to be found is found sooner here.
    monkeypatch.setattr("aioecho.check.endings.PATIENCE", 1.0)
    if fault is faulty.RunsOnAtTheEnd:
        monkeypatch.setattr("aioecho.check.loop.STUCK", 1.0)
    # A million short lines would take seconds.
    said = parse_script(b"x" * 100, None) if what == "slow reader" else None
    (finding,) = find(fault, what, conversation=said)
    assert finding.check == what
    assert text in finding.text
    assert "\n" not in finding.text
    with pytest.raises((AssertionError, TimeoutError)):
        run_example(finding.source.replace("range(40)", "range(10)"))  # tenths of a second until a handler has ended
    line = f"from faulty import {fault.__name__}\n"
    assert finding.source.count(line) == 1
    mended = finding.source.replace(line, f"from {sound.__module__} import {sound.__name__} as {fault.__name__}\n")
    run_example(mended.replace("writer.drain(), 10)", "writer.drain(), 1)"))  # the sound one reads no more


def test_an_example_uses_only_what_users_get() -> None:
    for what, fault in (("segmentation", faulty.OneReadIsOneMessage), ("reset", faulty.RaisesAtAReset)):
        (finding,) = find(fault, what)
        assert "aioecho.check" not in finding.source
        assert {name for name in dir(aioecho) if f"aioecho.{name}" in finding.source} <= set(aioecho.__all__)


def test_an_example_is_as_small_as_can_be() -> None:
    records = b"".join(b"> %d\n" % number for number in range(5)) + b"> forty-two\n"
    said = parse_script(records, None)
    (finding,) = find(faulty.OneReadIsOneMessage, "segmentation", conversation=said)
    last = finding.source.splitlines()[-1]
    assert last.count('b"') <= 3, last  # one record, in two pieces
    (finding,) = find(faulty.AnswersTheFirstLineOfAChunk, "coalescing", conversation=said)
    last = finding.source.splitlines()[-1]
    assert last.count('b"') == 3, last  # two records, in one piece


def test_the_same_is_found_in_every_run() -> None:
    first, second = (find(faulty.LosesALineFeed, "segmentation") for _ in range(2))
    assert first == second


# What is not


@SLOW
@pytest.mark.parametrize(
    ("kind", "whats"),
    [
        (echo.Upper, [*CHECKS]),
        # The others make the checks in which they do what might pass for a mistake; the rest would be the same again.
        (echo.Echo, ["truncation", "half-close", "stop"]),  # replies to parts of records
        (echo.Discard, ["stop", "slow reader"]),  # replies nothing
        (echo.Chargen, ["segmentation", "slow reader"]),  # replies without end
        (echo.Time, ["segmentation", "truncation", "reset"]),  # closes at once, and what it says changes every second
        (faulty.Framed, ["truncation", "stop", "too long"]),
        (handler(echo.UpperFrames.handle, framing=COBS()), ["truncation", "too long"]),
        (faulty.Bye, ["coalescing", "half-close"]),  # closes before it has read all
        (faulty.Greets, ["stop"]),  # speaks first
        (faulty.Room, ["half-close", "stop", "reset"]),  # says more when a client goes, and when the server stops
        (faulty.InThreads, ["half-close", "stop", "reset"]),  # replies when the loop has nothing to do
        (faulty.Publisher, ["reset"]),  # ends only when it is cancelled
        (faulty.Blocking, ["stop", "reset", "too long", "slow reader", "leaks"]),
    ],
)
def test_nothing_is_found_in_a_sound_handler(kind: Any, whats: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # What never ends is waited for, and cancelled, sooner.
    monkeypatch.setattr("aioecho.check.player.PATIENCE", 1.0)
    monkeypatch.setattr("aioecho.check.player.TIMEOUTS", aioecho.Timeouts(lost=0.2, linger=0.1))
    monkeypatch.setattr(run, "CHECKS", {what: CHECKS[what] for what in whats})
    results = list(check(kind, default_conversation(framing_of(kind)), "module:Class"))
    assert [result.check for result in results] == whats
    assert [finding.text for result in results for finding in result.findings] == []


@SLOW
def test_nothing_is_found_in_a_store_with_pipelining(monkeypatch: pytest.MonkeyPatch) -> None:
    whats = ("replies", "segmentation", "coalescing", "truncation")
    monkeypatch.setattr(run, "CHECKS", {what: CHECKS[what] for what in whats})
    script = rb"""
> *3\r\n$3\r\nSET\r\n$1\r\na\r\n$5\r\nhello\r\n
< +OK
> *2\r\n$3\r\nGET\r\n$1\r\na\r\n
< $5\r\nhello\r\n
> *2\r\n$3\r\nGET\r\n$1\r\nb\r\n
< -ERR
"""
    results = list(check(faulty.Store, parse_script(script, None), "module:Class"))
    assert [finding.text for result in results for finding in result.findings] == []


def test_a_handler_that_replies_differently_each_time_is_not_judged_by_its_replies(few_checks: None) -> None:
    results = {result.check: result for result in check(faulty.Random, default_conversation(Lines()), "module:Class")}
    assert not any(result.findings for result in results.values())
    assert "replies differently when it is told the same again" in results["segmentation"].note


def test_a_line_without_its_end_that_is_answered_is_noted_and_no_finding() -> None:
    with Player(faulty.Bye) as player:
        subject = Subject(player, default_conversation(Lines()), "faulty:Bye")
        subject.learn()
        assert list(CHECKS["truncation"](subject)) == []
        assert "a last line without its end is answered like a whole one" in note_truncation(subject)


# Datagrams


def check_of_datagrams(kind: Any, said: bytes = b"hello\n42") -> dict[str, Any]:
    return {result.check: result for result in check(kind, parse_script(said, Whole()), f"faulty:{kind.__qualname__}")}


@pytest.mark.parametrize(
    ("what", "fault", "sound", "text"),
    [
        ("malformed", faulty.NeedsAByte, "DatagramEcho", "raises IndexError: index out of range when it is sent b''"),
        ("replies", faulty.NeedsANumber, "Sums", "raises ValueError: invalid literal for int() with base 10: b'hello'"),
        (
            "order",
            faulty.TakesNoneTwice,
            "DatagramEcho",
            "raises KeyError: b'hello' when it is sent b'hello', then b'hello'",
        ),
    ],
)
def test_a_mistake_of_a_handler_for_datagrams_is_found_and_its_example_shows_it(
    what: str, fault: Any, sound: str, text: str
) -> None:
    results = check_of_datagrams(fault)
    (finding,) = results[what].findings
    assert text in finding.text
    with pytest.raises((IndexError, ValueError, KeyError, ExceptionGroup)):
        run_example(finding.source)
    line = f"from faulty import {fault.__name__}\n"
    assert finding.source.count(line) == 1
    module = "faulty" if hasattr(faulty, sound) else "aioecho.echo"
    run_example(finding.source.replace(line, f"from {module} import {sound} as {fault.__name__}\n"))


def test_a_handler_for_datagrams_that_keeps_the_loop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioecho.check.loop.STUCK", 0.5)
    (finding,) = check_of_datagrams(faulty.RunsOnAtAZero)["malformed"].findings
    assert finding.text.startswith("the handler keeps the loop when it is sent b'")


def test_a_reply_of_a_datagram_that_does_not_come_is_found() -> None:
    (finding,) = check_of_datagrams(echo.DatagramUpper, b"> hello\n< HELLO\n> you\n< me")["replies"].findings
    assert finding.text == "the reply b'me' does not come"
    with pytest.raises(AssertionError):
        run_example(finding.source.replace("from faulty", "from aioecho.echo"))


@pytest.mark.parametrize("kind", [echo.DatagramUpper, echo.DatagramDiscard, faulty.Sums])
def test_nothing_is_found_in_a_sound_handler_for_datagrams(kind: Any) -> None:
    results = check_of_datagrams(kind)
    assert [(name, result.findings, result.note) for name, result in results.items()] == [
        (name, (), "") for name in ("replies", "malformed", "order", "reply size")
    ]


def test_a_record_of_which_no_two_fit_into_a_datagram_is_checked() -> None:
    assert not any(result.findings for result in check_of_datagrams(echo.DatagramDiscard, b"x" * 40_000).values())


def test_replies_that_are_much_larger_than_what_they_reply_to_are_noted() -> None:
    assert "4 times its own" in check_of_datagrams(faulty.Amplifies)["reply size"].note


# What is said


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make only the checks that take no time."""
    monkeypatch.setattr(run, "CHECKS", {what: CHECKS[what] for what in ("replies", "segmentation")})


def test_a_script_says_what_is_sent_and_what_is_expected() -> None:
    said = parse_script(b"# a comment\n> hello\n< HELLO\n\n> \\x41\\t\\\\\\n\n", None)
    assert said.records == (b"hello\n", b"A\t\\\n")
    assert said.expected == (b"HELLO",)


def test_a_plain_script_is_sent_as_it_is() -> None:
    assert parse_script(b"GET / HTTP/1.0\r\n\r\n", None).records == (b"GET / HTTP/1.0\r\n", b"\r\n")
    assert parse_script(b"a\\n\nb", LengthPrefixed(1)).records == (b"\x03a\\n", b"\x01b")


@pytest.mark.parametrize("framing", [Lines(), LengthPrefixed(4), COBS(), FixedSize(8), Delimited(b"\r\n")])
def test_what_is_said_without_a_script_is_three_records(framing: Framing) -> None:
    said = default_conversation(framing)
    frames, used, _ = framing.split(b"".join(said.records))
    assert tuple(frames) == said.payloads
    assert len(frames) == 3
    assert used == sum(map(len, said.records))


class Words(Framing):
    """Its frames are lists."""

    def split(self, buffer: Any, scanned: int = 0) -> tuple[list[Any], int, int]:
        *lines, rest = bytes(buffer).split(b"\n")
        return [line.split() for line in lines], len(buffer) - len(rest), len(rest) + 1

    def join(self, frame: Any) -> bytes:
        return b" ".join(frame) + b"\n"


def test_the_lines_of_a_script_are_sent_as_they_are_where_frames_are_more_than_bytes() -> None:
    with pytest.raises(ValueError, match="say with a script what to send"):
        default_conversation(Words())
    assert parse_script(b"one two\nthree\n", Words()).records == (b"one two\n", b"three\n")


def test_a_reply_that_a_script_expects_and_that_does_not_come_is_found() -> None:
    said = parse_script(b"> hello\n< HELLO\n> you\n< me\n", None)
    (finding,) = find(echo.Upper, "replies", conversation=said)
    assert finding.text == "the reply b'me' does not come; the rest of the replies is b'\\nYOU\\n'"
    with pytest.raises(AssertionError):
        run_example(finding.source)


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a module of a user's own, handlers.py."""
    source = Path(faulty.__file__).read_text("utf-8")
    (tmp_path / "handlers.py").write_text(source)
    yield tmp_path
    sys.modules.pop("handlers", None)


def test_the_command_shows_what_it_finds(folder: Path, few_checks: None) -> None:
    code, output, errors = invoke("check", "handlers:OneReadIsOneMessage", cwd=folder)
    assert (code, errors) == (1, "")
    lines = output.decode().splitlines()
    assert lines[0].startswith("checking handlers:OneReadIsOneMessage, which is sent b'hello\\n', ")
    assert lines[1].split() == ["replies:", "ok"]
    assert lines[2].startswith("segmentation: FOUND the reply is ")
    assert lines[-1] == "1 found in handlers:OneReadIsOneMessage"
    assert "from handlers import OneReadIsOneMessage" in lines


def test_the_command_finds_nothing_in_a_ready_made_handler(few_checks: None) -> None:
    code, output, errors = invoke("check", "upper", "--framing", "length:2")
    assert (code, errors) == (0, "")
    assert output.decode().splitlines()[-1] == "nothing found in aioecho.echo:UpperFrames"


def test_the_command_discards_what_a_handler_prints(folder: Path, few_checks: None) -> None:
    (folder / "said.txt").write_text("1\n2\n")
    code, output, errors = invoke("check", "handlers:RaisesAtALine", "--say", "said.txt", cwd=folder)
    assert (code, errors) == (0, "")
    assert b"a line:" not in output
    assert output.endswith(b"nothing found in handlers:RaisesAtALine\n")


def test_the_command_says_with_which_package_it_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("hypothesis.", "aioecho.check"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    check_mistake(invoke("check", "handlers:Bye", cwd=folder), 'pip install "aioecho[check]"')


def test_the_command_checks_handlers_for_datagrams(folder: Path) -> None:
    code, output, errors = invoke("check", "handlers:NeedsAByte", cwd=folder)
    assert (code, errors) == (1, "")
    assert b"checking handlers:NeedsAByte, which is sent b'hello', " in output
    assert b"malformed:    FOUND the handler raises IndexError" in output
    assert output.endswith(b"\n1 found in handlers:NeedsAByte\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], "no handler is called 'nothing'"),
        (["handlers:Nothing"], "no 'Nothing' in module 'handlers'"),
        (["handlers:DatagramHandler"], "is a handler of datagrams: it can't serve streams"),
        (["handlers:Bye", "--framing", "words"], "no framing is called 'words'"),
        (["handlers:Bye", "--say", "bad.txt"], "bad.txt: line 2 begins with none of '> ', '< ' and '#': 'you'"),
        (["handlers:Bye", "--say", "escape.txt"], r"escape.txt: line 1 has an escape '\q'"),
        (["handlers:Bye", "--say", "empty.txt"], "empty.txt: a conversation has to send something"),
        (["handlers:Bye", "--say", "absent.txt"], "cannot read absent.txt: No such file or directory"),
        (["handlers:Bye", "--say", "hello.txt", "--framing", "fixed:8"], "hello.txt: "),
        (["handlers:NeedsAByte", "--say", "long.txt"], "a record of 70000 bytes is too long for a datagram"),
        (["chargen", "--framing", "cobs"], "--framing is for the ready-made echo and upper"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(folder: Path, arguments: list[str], expected: str) -> None:
    with (folder / "handlers.py").open("a") as module:
        module.write("\n\nclass DatagramHandler(socketserver.DatagramRequestHandler):\n    pass\n")
    (folder / "bad.txt").write_text("> hello\nyou\n")
    (folder / "escape.txt").write_text("> \\q\n")
    (folder / "hello.txt").write_text("> hello\n")
    (folder / "empty.txt").write_text("")
    (folder / "long.txt").write_text("x" * 70_000)
    check_mistake(invoke("check", *arguments, cwd=folder), expected)


def test_logging_and_the_loop_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CHECKS", {"replies": CHECKS["replies"]})
    before = logging.root.manager.disable
    list(check(echo.Upper, default_conversation(Lines()), "module:Class"))
    assert logging.root.manager.disable == before
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()
