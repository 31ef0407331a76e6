"""The shell command `check`: a handler of the user's own is played conversations, and its mistakes are shown as tests."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from aioecho.cli.console import Mistake
from aioecho.cli.handlers import find_framed_handlers, find_handler
from aioecho.cli.objects import FRAMING_HELP, find_framing
from aioecho.echo import FRAME_HANDLERS, HANDLERS
from aioecho.framing import Framing, Lines
from aioecho.serving.handler_types import serves_datagrams, undo_partial

if TYPE_CHECKING:
    from aioecho.check import Conversation, Finding

__all__ = ["check_command"]


@click.command("check", short_help="Look for mistakes in a handler that only a network shows.")
@click.argument("handler")
@click.option(
    "--say",
    metavar="FILE",
    help="What to send: every line is a record; or lines '> sent' and '< expected', with \\n, \\r, \\t, \\0, \\\\ and \\xHH.",
)
@click.option(
    "--framing", metavar="SPEC", help=f"What cuts the stream into records; by default lines. SPEC is {FRAMING_HELP}"
)
def check_command(handler: str, say: str | None, framing: str | None) -> None:
    """Play conversations with HANDLER, module:Class or a ready-made one, and look for mistakes that only a network shows.

    \b
        python -m aioecho check chat:Room
        python -m aioecho check store:Store --say session.txt

    Records that come in pieces or together, a client that ends in mid-message, resets, reads nothing or sends without end, a
    server that stops, and what a conversation leaves behind. A handler for datagrams is sent what is malformed, or comes
    twice. Every finding is a line, and below them a test in Python shows it. It takes some seconds, in which the handler runs
    in this process, and what it prints is discarded.

    It needs the package hypothesis: pip install "aioecho[check]".

    The exit status is 0 if nothing was found, 1 if something was, 2 for a mistake on the command line.
    """
    try:
        from aioecho.check import check
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise Mistake('check needs the package hypothesis: pip install "aioecho[check]"') from error
    kind = _find(handler, framing)
    conversation = _read_conversation(kind, say, framing)
    name = handler
    if handler in HANDLERS:
        ready_made = HANDLERS[handler] if framing is None else FRAME_HANDLERS[handler]
        name = f"{ready_made.__module__}:{ready_made.__qualname__}"
    try:
        results = check(kind, conversation, name)
    except (TypeError, ValueError) as error:
        raise Mistake(str(error)) from error
    shown = ", ".join(map(repr, conversation.records[:5])) + (", ..." if len(conversation.records) > 5 else "")
    click.echo(f"checking {name}, which is sent {shown}")
    found: list[Finding] = []
    with open(os.devnull, "w", encoding="utf-8") as null:
        while True:
            with contextlib.redirect_stdout(null):  # what the handler prints
                result = next(results, None)
            if result is None:
                break
            for text in [f"FOUND {finding.text}" for finding in result.findings] or [
                f"note: {result.note}" if result.note else "ok"
            ]:
                click.echo(f"{result.check + ':':<14}{text}")
            found += result.findings
    for finding in found:
        click.echo(f"\n# {finding.check}: {finding.text}\n{finding.source}", nl=False)
    click.echo(f"\n{len(found) or 'nothing'} found in {name}")
    sys.exit(1 if found else 0)


def _find(handler: str, framing: str | None) -> Callable[..., Any]:
    if framing is not None and handler in HANDLERS:
        return find_framed_handlers(framing, ".", [(handler, False)])[handler]
    found: Callable[..., Any] = find_handler(handler, ".", HANDLERS)
    return found


def _read_conversation(handler: Callable[..., Any], say: str | None, framing: str | None) -> "Conversation":
    from aioecho.check import Whole, default_conversation, parse_script

    own = getattr(undo_partial(handler), "framing", None)
    cut = find_framing(framing) if framing is not None else own if isinstance(own, Framing) else None
    if cut is None and serves_datagrams(undo_partial(handler)):
        cut = Whole()
    try:
        if say is None:
            return default_conversation(cut or Lines())
        with open(say, "rb") as script:
            return parse_script(script.read(), cut)
    except ValueError as error:
        raise Mistake(str(error) if say is None else f"{say}: {error}") from error
    except OSError as error:
        raise Mistake(f"cannot read {say}: {error.strerror or error}") from error
