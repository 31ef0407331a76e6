"""What the commands have in common: how a mistake is told, and what happens when stdout cannot be written."""

import os
import sys

import click

__all__ = ["Mistake", "discard_stdout"]


class Mistake(click.ClickException):
    """A mistake on the command line. It gets one line and exit status 2, without click's reminder of the usage."""

    exit_code = 2


def discard_stdout() -> None:
    """Send what is still buffered for stdout to /dev/null. Python would complain at its end that it cannot write it."""
    if sys.stdout is None:  # it was closed when Python started
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
