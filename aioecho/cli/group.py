"""The group of commands: ``python -m aioecho``. A command's module is imported when it is named, or for --help."""

import errno
import importlib
import platform
import sys
from typing import Any

import click

from aioecho import __version__
from aioecho.cli.console import discard_stdout
from aioecho.runtime.stdio import fill_standard_streams

__all__ = ["main"]

_COMMANDS = {
    "serve": ("aioecho.cli.serve", "serve_command"),
    "send": ("aioecho.cli.send", "send_command"),
    "ctl": ("aioecho.cli.ctl", "ctl_command"),
    "top": ("aioecho.cli.top", "top_command"),
    "check": ("aioecho.cli.check", "check_command"),
    "load": ("aioecho.cli.load", "load_command"),
    "doctor": ("aioecho.cli.doctor", "doctor_command"),
}


class _Group(click.Group):
    """The commands, whose modules are imported only when they are asked for."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line, and exit with status 1 and one line if stdout has no space left for help or version."""
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            discard_stdout()  # of --help or --version: commands handle what they write themselves
            click.echo(f"Error: cannot write to stdout: {error.strerror}", err=True)
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, sorted."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if there is none of that name."""
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


def _version() -> str:
    try:
        import uvloop

        loop = f"uvloop {uvloop.__version__}"  # type: ignore[attr-defined]
    except ImportError:
        loop = "without uvloop"
    return f"%(prog)s %(version)s (Python {platform.python_version()}, {loop})"


@click.group(cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message=_version(), prog_name="aioecho")
@click.pass_context
def main(context: click.Context) -> None:
    """Serve sockets with handler objects: one object and one coroutine for each connection.

    \b
    Alone it serves `echo` on tcp://127.0.0.1:9999. Try, in two terminals:
        python -m aioecho serve upper
        python -m aioecho send tcp://127.0.0.1:9999 "Hello, Server!"
    """
    fill_standard_streams()
    if context.invoked_subcommand is None:
        serve = main.get_command(context, "serve")
        assert serve is not None
        context.invoke(serve)
