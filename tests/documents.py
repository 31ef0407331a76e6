"""The code blocks of README and docs, and how they are run: in this process where nothing of a process is their subject."""

import contextlib
import io
import re
import shlex
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
from click.testing import CliRunner, Result
from programs import ask

import aioecho
from aioecho.cli import main

__all__ = ["FENCE", "Blocks", "ask_server", "execute", "load", "on_free_ports", "output_of", "served"]

# What names a fence is its second word, or its title: ```python upper, ```python title="chat.py"
FENCE = re.compile(
    r'^```(?P<language>\w*)(?: (?P<name>[\w.-]+)| title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)

Test = TypeVar("Test", bound=Callable[..., Any])


class Blocks(dict[str, str]):
    """The blocks of some pages by their names, and which of them tests have said that they run."""

    def __init__(self, *pages: Path) -> None:
        self.have_run: set[str] = set()
        self.unnamed: list[str] = []
        for page in pages:
            text = page.read_text("utf-8")
            named = [match for match in FENCE.finditer(text) if match["name"] or match["title"]]
            for match in named:
                name = match["name"] or match["title"]
                assert name not in self, f"two blocks are called {name}"
                self[name] = match["text"]
            if len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) != 2 * len(named):
                self.unnamed.append(page.name)

    def runs(self, *names: str) -> Callable[[Test], Test]:
        """Mark a test as the one that runs these blocks."""
        self.have_run.update(names)
        return lambda test: test


def load(command: str, endpoint: str, p99_us: int = 10**8) -> Result:
    """Run a command line of `load`, but against `endpoint`, for a moment, and where it fails from a p99 on, from this one."""
    command = re.sub(r"(?<=p99_us>)\d+", str(p99_us), command)
    arguments = shlex.split(command.replace("tcp://127.0.0.1:9999", endpoint))[3:]
    outcome = CliRunner().invoke(main, [*arguments, "--duration", "0.3", "--warmup", "0.1"])
    if outcome.stderr.startswith("Error: the load generator needs the bench extra"):
        pytest.skip(outcome.stderr)
    return outcome


def on_free_ports(text: str) -> str:
    """Return a block that serves on any free port, in place of the one that it names."""
    changed = re.sub(r'(?<="(?:tcp|udp)://127\.0\.0\.1:)\d+', "0", text).replace(
        '("127.0.0.1", 9999)', '("127.0.0.1", 0)'
    )
    assert changed != text
    return changed


def execute(text: str) -> dict[str, Any]:
    """Run a block as the program that it is, and return its names."""
    module = types.ModuleType("__main__")
    exec(compile(text, "<block>", "exec"), vars(module))
    return vars(module)


def output_of(text: str) -> str:
    """Run a block that ends, and return its output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        execute(text)
    return output.getvalue()


@contextlib.contextmanager
def served(text: str, ports: Callable[[str], str] = on_free_ports) -> Iterator[aioecho.BackgroundServer]:
    """Run a block that calls aioecho.run(), with its arguments but in a thread, on free ports, for as long as the ``with``."""
    with mock.patch.object(aioecho, "run") as run:
        execute(ports(text))
    run.assert_called_once()
    with aioecho.run_in_thread(*run.call_args.args, **run.call_args.kwargs) as server:
        yield server


def ask_server(server: aioecho.BackgroundServer, sent: bytes = b"") -> bytes:
    """Send bytes and the end of the stream to where a server first listens, and return all that comes back."""
    return ask(server.names[0], sent)
