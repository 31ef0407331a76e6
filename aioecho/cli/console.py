"""What the commands have in common: how a mistake is told, and what happens when stdout cannot be written."""

import os
import sys
import traceback
from types import FrameType

import click

__all__ = ["ImportMistake", "Mistake", "discard_stdout"]


class Mistake(click.ClickException):
    """A mistake on the command line. It gets one line and exit status 2, without click's reminder of the usage."""

    exit_code = 2


class ImportMistake(click.ClickException):
    """What a module of the user's raised as it was imported: its traceback, without what is ours. Exit status 1."""

    def __init__(self, module: str, error: BaseException) -> None:
        found = error.__traceback__
        while found is not None and _is_importing(found.tb_frame):
            found = found.tb_next
        text = "".join(traceback.format_exception(type(error), error, found)).rstrip()
        super().__init__(f"cannot import {module!r}, which raised {type(error).__name__}\n{text}")


def _is_importing(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.startswith(("aioecho.cli.", "importlib")) or frame.f_code.co_filename.startswith("<frozen importlib")


def discard_stdout() -> None:
    """Send what is still buffered for stdout to /dev/null. Python would complain at its end that it cannot write it."""
    if sys.stdout is None:  # it was closed when Python started
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
