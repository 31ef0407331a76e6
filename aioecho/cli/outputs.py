"""Files that a command writes at its end and opens at its start, so that nothing has been done in vain; or stdout."""

import io
import os
import stat
import sys
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Self

import click

from aioecho.cli.console import Mistake, discard_stdout

__all__ = ["Output"]


class Output:
    """A file to write, or stdout where the name is ``-``. What is in the file stays there until something is written.

    Raises Mistake if the file cannot be opened.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._file: BinaryIO | None = None
        if name != "-":
            try:
                self._file = open(name, "ab")  # noqa: SIM115 - closed at the end of the block
            except OSError as error:
                raise Mistake(f"cannot write {name}: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, render: Callable[[BinaryIO], object]) -> None:
        """Write what `render` writes to the file that it is given. A pipe whose reader has gone ends the program."""
        rendered = io.BytesIO()
        render(rendered)
        try:
            file = sys.stdout.buffer if self._file is None else self._file
            if self._file is not None and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._file.truncate(0)
            file.write(rendered.getbuffer())
            file.flush()
        except BrokenPipeError:
            if self._file is None:
                discard_stdout()
            sys.exit(1)
        except OSError as error:
            raise click.ClickException(f"cannot write {self._name}: {error.strerror or error}") from error
