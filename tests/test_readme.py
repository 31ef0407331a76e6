"""The README: each of its code blocks is run, by the test that names it."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from documents import FENCE, Blocks, load, output_of, served
from programs import ROOT, Program, ask, connect, read_line

import aioecho
from aioecho.cli import main
from aioecho.echo import Echo

README = ROOT / "README.md"
TEXT = README.read_text("utf-8")
BLOCKS = Blocks(README)
runs = BLOCKS.runs


def test_every_block_has_a_name_of_its_own_and_is_run() -> None:
    assert not BLOCKS.unnamed
    assert set(BLOCKS) == BLOCKS.have_run


def test_it_opens_with_a_sentence_a_handler_and_two_commands() -> None:
    matches = list(FENCE.finditer(TEXT))
    assert [match["language"] for match in matches[:4]] == ["python", "sh", "sh", "python"]
    assert len(matches[0]["text"].splitlines()) <= 12
    assert matches[1]["text"].count("\n") == matches[2]["text"].count("\n") == 1
    before = TEXT[: matches[0].start()].strip().splitlines()
    assert before[0] == "# aioecho"
    assert len(before) == 3


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 250


def test_it_links_every_page() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "pages").rglob("*.md")}
    assert pages <= set(re.findall(r"\]\((docs/pages/[^)#]*)\)", TEXT))


# A handler and a client


@runs("upper")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_handler_at_the_top_is_a_program(tmp_path: Path, number: int) -> None:
    # On any free port, which its log tells: as a program that has configured none it does not.
    text = BLOCKS["upper"].replace(":9999", ":0").replace("import aioecho", "import logging\n\nimport aioecho", 1)
    (tmp_path / "program.py").write_text(
        text.replace("    aioecho.run", '    logging.basicConfig(level="INFO")\n    aioecho.run')
    )
    with Program(sys.executable, "program.py", cwd=tmp_path) as server:
        with connect(server.says(r"listening on (\S+)\n")[1]) as sock:
            sock.sendall(b"Hello, Server!\n")
            assert read_line(sock) == b"HELLO, SERVER!\n"
            server.signal(number)
            assert sock.recv(1) == b""
        assert server.wait() == 0


@runs("client")
def test_the_client_gets_its_answer() -> None:
    with served(BLOCKS["upper"]) as server:
        text = BLOCKS["client"].replace('("127.0.0.1", 9999)', repr(server.server_address))
        assert text != BLOCKS["client"]
        assert output_of(text) == "HELLO, SERVER!\n"


# Three ways to use it


@runs("shell")
def test_the_shell_serves_and_sends(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(BLOCKS["upper"].replace("Upper", "Room"))
    *serves, send = (shlex.split(line) for line in BLOCKS["shell"].splitlines())
    assert len(serves) == 2
    for command in serves:
        # Ports that are named may be taken, and a worker for each processor takes its time.
        arguments = [re.sub(r"\b7000\b", "0", part).replace("auto", "1") for part in command[1:]]
        with Program(sys.executable, *arguments, cwd=tmp_path) as server:
            endpoint = server.listening()
            outcome = CliRunner().invoke(main, [send[3], endpoint.replace("*", "127.0.0.1"), send[5]])
            assert (outcome.exit_code, outcome.output) == (0, "HELLO, SERVER!\n")
            assert server.stop() == 0


@runs("inside")
def test_it_serves_inside_an_application() -> None:
    assert output_of(BLOCKS["inside"]) == "b'HELLO, SERVER!\\n'\n1\n"


@runs("load")
def test_the_load_generator_loads() -> None:
    with aioecho.run_in_thread(Echo, "tcp://127.0.0.1:0") as server:
        outcome = load(BLOCKS["load"].strip(), server.names[0])
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        assert "p99" in outcome.stdout
        outcome = load(BLOCKS["load"].strip(), server.names[0], p99_us=0)
        assert outcome.exit_code == 1
        assert outcome.stderr.startswith("failed: p99_us > 0, it is ")


# The two commands


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the repository holds, and nothing else."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git checkout")
    folder = tmp_path / "checkout"
    for name in done.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@contextmanager
def shell(command: str, folder: Path, **environment: str) -> Iterator[Program]:
    """Run a command as on a fresh machine: `python3` is the Python of the tests, and nothing is installed for it."""
    programs = folder.parent / "bin"
    programs.mkdir(exist_ok=True)
    python = programs / "python3"
    python.write_text(f'#!/bin/sh\nexec "{os.path.realpath(sys.executable)}" "$@"\n')
    python.chmod(0o755)
    search = f"{programs}:{os.environ['PATH']}"
    with Program("sh", "-c", command, cwd=folder, env={"PATH": search, "PYTHONPATH": "", **environment}) as program:
        yield program


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.timeout(300)
@runs("install-and-run")
def test_the_first_command_installs_and_serves(checkout: Path) -> None:
    # To its end goes only that it takes a free port. exec, so that the process is the server at last.
    setup, _, serve = BLOCKS["install-and-run"].strip().rpartition(" && ")
    for _ in range(2):  # the second time on what is there
        with shell(f"({setup}) >&2 && exec {serve} serve --port 0", checkout) as server:
            endpoint = server.listening()
            assert ask(endpoint, b"Hello, Server!\n") == b"Hello, Server!\n"
            assert server.stop() == 0


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.timeout(600)
@runs("install-and-test")
def test_the_second_command_installs_and_finds_the_tests(checkout: Path) -> None:
    with shell(BLOCKS["install-and-test"], checkout, PYTEST_ADDOPTS="--collect-only -q --assert=plain") as program:
        code, output, errors = program.end(timeout=590)
    assert code == 0, (output[-2000:], errors)
    assert b"tests/test_readme.py::test_the_second_command_installs_and_finds_the_tests" in output
