"""Loading servers that do not echo: what is sent and expected, exchanges, and what is made of other replies."""

import pickle
import re

import pytest

pytest.importorskip("rich")

from test_load import certificates, invoke, run, serving
from timing import more_than

from aioecho.framing import Lines, Netstrings
from aioecho.load.run import LoadSettings
from aioecho.load.script import AnyFrame, Exact, Exchange, Pattern, Script, Sized, make_script, parse_script

__all__ = ["certificates"]  # a fixture

PING = make_script(r"PING\r\n", r"\+PONG\r\n")


def lines_of(sock):
    with sock.makefile("rb") as lines:
        yield from lines


def answer(replies):
    """Return what serves lines by a dictionary of replies."""

    def handle(sock):
        for line in lines_of(sock):
            sock.sendall(replies[line.strip()])

    return handle


pong = answer({b"PING": b"+PONG\r\n"})


def greet(sock):
    """Serve as an SMTP server begins."""
    sock.sendall(b"220 ready\r\n")
    lines = lines_of(sock)
    assert next(lines) == b"HELO me\r\n"
    sock.sendall(b"250-hello\r\n250 go on\r\n")
    for number, line in enumerate(lines):
        assert line == (b"NOOP\r\n" if number % 2 else b"VRFY x\r\n")
        sock.sendall(b"250 ok\r\n" if number % 2 else b"252 maybe\r\n")


GREETED = parse_script(
    r"""
    # What comes first, once a connection
    expect 220 .*\r\n
    send HELO me\r\n
    expect (250-.*\r\n)*250 .*\r\n

    repeat
    send VRFY\x20x
    send \r\n
    expect 252 .*\r\n
    send NOOP\r\n
    expect bytes:8
    """
)


@pytest.mark.parametrize(
    "options",
    [{}, {"depth": 5}, {"churn": True}, {"rate": 300.0}],
    ids=str,
)
def test_a_server_that_does_not_echo_is_loaded(options):
    with serving(pong) as server:
        result = run(server.endpoint, script=PING, **options)
    assert (result.problem, result.errors) == (None, 0)
    more_than(20, result.messages)
    assert (result.size_bytes, result.script) == (6, r"'PING\r\n' for '\+PONG\r\n'")


@pytest.mark.parametrize("options", [{}, {"depth": 4}, {"rate": 300.0}], ids=str)
def test_exchanges_are_repeated_after_what_comes_once(options):
    with serving(greet) as server:
        result = run(server.endpoint, script=GREETED, **options)
    assert (result.problem, result.errors) == (None, 0)
    more_than(20, result.messages)


def test_a_connection_per_message_is_greeted_each_time():
    script = Script(GREETED.exchanges[:1], GREETED.before)
    with serving(greet) as server:
        result = run(server.endpoint, script=script, churn=True)
    assert (result.problem, result.errors) == (None, 0)
    more_than(20, result.messages)


def test_exchanges_go_over_tls(certificates):
    context, ca_file = certificates
    with serving(greet, context=context) as server:
        result = run(server.endpoint, script=GREETED, tls=True, ca_file=ca_file)
    assert (result.problem, result.errors) == (None, 0)
    more_than(5, result.messages)


def test_a_reply_that_is_longer_than_what_was_sent_is_read_whole_over_tls(certificates):
    context, ca_file = certificates
    script = make_script(r"PING\n", "bytes:16000")
    with serving(answer({b"PING": bytes(16_000)}), context=context) as server:
        result = run(server.endpoint, script=script, tls=True, ca_file=ca_file)
    assert (result.problem, result.errors) == (None, 0)
    more_than(5, result.messages)


@pytest.mark.parametrize("depth", [1, 4])
def test_with_a_framing_a_reply_is_a_frame_that_matches_anywhere(depth):
    def count(sock):
        for number, _ in enumerate(lines_of(sock)):
            sock.sendall(b"7:reply %d," % (number % 10))

    class Mixed(Netstrings):
        def join(self, frame):
            return frame + b"\n"

    for expect in ("ply [0-9]$", "framing", "bytes:7"):
        with serving(count) as server:
            result = run(server.endpoint, script=make_script("x", expect), framing=Mixed(), depth=depth)
        assert (result.problem, result.errors) == (None, 0)
        more_than(20, result.messages)


def test_a_file_is_sent_and_a_file_is_expected(tmp_path):
    (tmp_path / "request").write_bytes(bytes(range(10)) * 100_000)
    (tmp_path / "reply").write_bytes(b"y" * 300_000)

    def take_all(sock):
        received = 0
        while data := sock.recv(65536):
            received += len(data)
            if received == 1_000_000:
                received = 0
                sock.sendall(b"y" * 300_000)

    with serving(take_all) as server:
        result = run(server.endpoint, script=make_script(f"@{tmp_path}/request", f"@{tmp_path}/reply"))
    assert (result.problem, result.errors) == (None, 0)
    more_than(2, result.messages)
    assert result.size_bytes == 1_000_000


def test_a_reply_may_come_byte_by_byte():
    def in_pieces(sock):
        for _ in lines_of(sock):
            for byte in b"+PONG\r\n":
                sock.sendall(bytes((byte,)))

    with serving(in_pieces) as server:
        result = run(server.endpoint, script=PING, connections=1)
    assert (result.problem, result.errors) == (None, 0)
    more_than(2, result.messages)


@pytest.mark.parametrize(
    ("reply", "options", "error", "said"),
    [
        (b"-ERR\r\n", {"timeout_s": 0.1}, "timed_out", r"expected '\+PONG\r\n' within 0.1 s, and got b'-ERR\r\n'"),
        (b"+PONG\r\n+PONG\r\n", {}, "wrong_bytes", r"the server sent more than was expected: b'+PONG\r\n+PONG\r\n'"),
        (b"-ERR\r\n", {"framing": Lines()}, "wrong_bytes", r"expected '\+PONG', got the frame b'-ERR"),
        (b"+PONG\nx\n", {"framing": Lines()}, "wrong_bytes", "the server sent more than was expected"),
        (b"x", {"timeout_s": 0.1, "script": make_script("PING", "y")}, "timed_out", "has no newline at its end"),
    ],
    ids=str,
)
def test_other_replies_are_noticed(reply, options, error, said):
    script = make_script("PING", r"\+PONG") if "framing" in options else PING
    with serving(answer({b"PING": reply})) as server:
        result = run(server.endpoint, **{"script": script, **options})
    assert getattr(result, f"errors_{error}") == result.errors > 0
    assert said in result.problem


def test_an_exact_reply_is_wrong_from_its_first_other_byte_on(tmp_path):
    (tmp_path / "reply").write_bytes(b"+PONG\r\n" + bytes(1000))
    with serving(pong) as server:
        assert run(server.endpoint, script=make_script(r"PING\n", f"@{tmp_path}/reply"), timeout_s=0.1).errors_timed_out
    with serving(answer({b"PING": b"+PUNG\r\n"})) as server:
        result = run(server.endpoint, script=make_script(r"PING\n", f"@{tmp_path}/reply"))
    assert result.errors_wrong_bytes == result.errors > 0
    assert r"got b'+PUNG\r\n'" in result.problem


def test_a_greeting_that_is_another_ends_the_connection():
    def refuse(sock):
        sock.sendall(b"421 too many\r\n")

    def say_more(sock):
        sock.sendall(b"220 ready\r\n")
        sock.recv(100)
        sock.sendall(b"250 hello\r\n250 hello\r\n")
        sock.recv(100)

    with serving(refuse) as server:
        result = run(server.endpoint, script=GREETED)
    assert result.errors_closed_early == result.errors == 3
    assert r"the server closed before it had sent '220 .*\r\n'" in result.problem
    with serving(say_more) as server:
        result = run(server.endpoint, script=GREETED)
    assert result.errors_wrong_bytes == result.errors == 3


# What a script is


def test_what_a_script_says_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"\0a")
    assert Script((Exchange(b"PING\r\n", Pattern(re.compile(rb"\+PONG\r\n"))),)) == PING
    assert make_script("é", None).exchanges[0] == Exchange("é".encode(), AnyFrame())
    script = parse_script(
        f"send @{tmp_path}/a\nexpect @{tmp_path}/a\nsend x y\nexpect bytes:3\nsend x\nexpect framing\n"
    )
    assert [exchange.expect for exchange in script.exchanges] == [Exact(b"\0a"), Sized(3), AnyFrame()]
    assert [exchange.send for exchange in script.exchanges] == [b"\0a", b"x y", b"x"]
    assert pickle.loads(pickle.dumps(GREETED)) == GREETED, "processes share it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the script has no exchange to repeat"),
        ("send x\nexpect y\nrepeat\n", "the script has no exchange to repeat"),
        ("send x\n", "the script ends with a send"),
        ("expect x\n", "repeats an expect with no send before it: put what comes once before a line repeat"),
        ("send x\nexpect y\nrepeat\nsend x\nexpect y\nrepeat", "line 6 of the script, 'repeat': expected send TEXT"),
        ("sent x\n", "line 1 of the script, 'sent x': expected send TEXT, expect REPLY"),
        (r"send \q", r"line 1 of the script, 'send \\q': the text to send has an escape '\q'"),
        ("send @/no/file", "cannot read /no/file: No such file or directory"),
        ("send x\nexpect bytes:0", "expected bytes:N with a number above 0, not 'bytes:0'"),
        ("send x\nexpect (", "'(' is no regular expression"),
        ("send x\nexpect .*", "'.*' matches nothing at all"),
        ("send x\nexpect @/dev/null", "/dev/null is empty"),
    ],
)
def test_a_script_that_cannot_be_read_names_the_line(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_script(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"endpoint": "udp://127.0.0.1:1"}, "script is for streams"),
        ({"lines": True}, "lines and script exclude one another"),
        ({"churn": True, "script": Script(PING.exchanges * 2)}, "churn makes one exchange a connection"),
        ({"script": make_script("x", "framing")}, "a reply that is a frame needs a framing"),
        ({"framing": Lines(), "script": make_script(r"x\ny", None)}, "newline"),
    ],
    ids=str,
)
def test_settings_that_a_script_excludes_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        LoadSettings(**{"endpoint": "unix:x", "script": PING, **options})


# The command


def test_the_command_sends_and_expects(tmp_path):
    (tmp_path / "script").write_text("send PING\nexpect PONG\n")
    with serving(pong) as server:
        for arguments in (
            ("--send", r"PING\n", "--expect", r"\+PONG\r\n"),
            ("--send", "PING", "--lines"),
            ("--send", "PING", "--framing", "lines", "--expect", "framing"),
            ("--script", tmp_path / "script", "--lines"),
        ):
            outcome = invoke(server.endpoint, "-t", 0.1, "--warmup", 0, *arguments)
            assert (outcome.exit_code, outcome.stderr) == (0, "")
            assert "'PING" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--send", "x"], "nothing tells where a reply to --send ends: give --expect REGEX"),
        (["--expect", "x"], "--expect is the reply to what --send sends: give that too"),
        (["--script", "x", "--send", "x"], "leave out --send and --expect"),
        (["--script", "/no/file"], "cannot read /no/file: No such file"),
        (["--send", "@/no/file", "--expect", "x"], "cannot read /no/file: No such file"),
        (["--send", "x", "--expect", "framing"], "a reply that is a frame needs a framing"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(arguments, said):
    outcome = invoke("tcp://127.0.0.1:1", *arguments)
    assert outcome.exit_code == 2
    assert said in outcome.stderr
