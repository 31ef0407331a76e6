"""The command line: ``python -m aioecho``."""

from aioecho.cli.commands import main

__all__ = ["main"]
