"""The command line: ``python -m aioecho``. Nothing else in the package prints."""

from aioecho.cli.group import main

__all__ = ["main"]
