"""Sessions of the command line that are shown on pages: they are run, and what a terminal shows is what the page says."""

import contextlib
import doctest
import os
import pty
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

__all__ = ["need", "replay"]

# Words that begin a command and are no program that may be missing.
BUILTIN = {"cat", "cd", "echo", "printf", "sh", "sleep", "wait"}


def need(*programs: str) -> None:
    """Skip the test if a program is not installed. .ci/run gathers the reasons."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"not tried: there is no {program} on this machine")


def replay(session: str, replaced: Mapping[str, object], cwd: Path | None = None) -> None:
    """Run the commands of a session, the lines that begin with ``$ ``, and check what they show: `...` stands for anything.

    `replaced` says what the page's ports, and other words, are here. Skips the test if a program is not installed.
    """
    parts = re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    assert parts, session
    need(*(name for command, _ in parts for name in _programs(command)))
    for command, expected in parts:
        for word, here in replaced.items():
            command = re.sub(rf"(?<![\w.]){re.escape(word)}(?!\w)", str(here), command)
        shown = _show(command, cwd)
        for word, here in replaced.items():
            shown = re.sub(rf"(?<![\w.]){re.escape(str(here))}(?!\w)", word, shown)
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(expected, shown, options), (command, expected, shown)


def _programs(command: str) -> list[str]:
    """Return the programs that a command line starts."""
    starts, names = True, []
    for word in shlex.shlex(command.replace("\\\n", ""), posix=True, punctuation_chars=True):
        if word in ("|", "||", "&&", ";", "(", "&"):
            starts = True
        elif starts:
            starts = False
            if word not in BUILTIN:
                names.append(word)
    return names


def _show(command: str, cwd: Path | None) -> str:
    """Run a command line and return what it writes to its terminal; it is typed nothing. Only the test's timeout bounds it."""
    ours, its = pty.openpty()
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=its,
            stderr=its,
            env=env,
        )
    finally:
        os.close(its)
    shown = b""
    with (
        open(ours, "rb", buffering=0) as terminal,
        contextlib.suppress(OSError),
    ):  # EIO: no process has it open any more
        while chunk := terminal.read(2**16):
            shown += chunk
    process.wait()
    return re.sub(r"\r+(?=\n)|\x1b\[[\d;]*m", "", shown.decode())  # bold print is for the eye
