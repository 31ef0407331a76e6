"""The shell command `top`: a server's rates, reasons, workers and connections, live in a terminal."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from aioecho.cli.console import Mistake
from aioecho.cli.ctl import COUNTERS, ask_control, format_cells, format_seconds, format_worker

__all__ = ["top_command"]


COLUMNS = ("id", "client", "age", "received", "sent", "unsent", "handler", "label")
CLIENT, HANDLER, LABEL = (COLUMNS.index(name) for name in ("client", "handler", "label"))

# Places: of an IPv4 address with its port, and of the name of a handler class.
SHORTEST_CLIENT, LONGEST_HANDLER = 15, 16


@click.command("top", short_help="Watch a server that runs, in the terminal.")
@click.option("--control", required=True, metavar="unix:PATH", help="The control socket, as serve --control names it.")
@click.option(
    "--every", type=click.FloatRange(0.2), default=1.0, show_default=True, metavar="SECONDS", help="How often."
)
@click.option("--sort", type=click.Choice(["age", "sent", "received", "unsent"]), default="age", show_default=True,
              help="Which connections come first.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after so many looks.")
def top_command(control: str, every: float, sort: str, count: int | None) -> None:
    """Watch a server that was started with --control, until q or Ctrl-C.

    It needs the package rich: pip install 'aioecho[top]'.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise Mistake("top needs the package rich: pip install 'aioecho[top]'") from error
    console = Console()
    before: dict[str, Any] | None = None
    with _keys() as wait_for_key, contextlib.suppress(KeyboardInterrupt):
        (status,) = _ask(control, "status")  # before the screen is cleared: a mistake stays readable
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                most = max(console.size.height // 3, 1)  # of the workers' lines
                height = max(console.size.height - 12 - min(len(status["workers"]), most), 3)
                rows = _ask(control, f"list sort={sort} limit={height}")
                live.update(_screen(status, before, rows, sort, most, console.size.width), refresh=True)
                count = None if count is None else count - 1
                if count == 0 or wait_for_key(every) in ("q", "Q"):
                    return
                before = status
                (status,) = _ask(control, "status")


def _ask(control: str, line: str) -> list[dict[str, Any]]:
    """Return the lines of an answer. Raises ClickException if it says that this cannot be done."""
    lines = list(ask_control(control, line))
    if not lines[-1]["ok"]:
        raise click.ClickException(lines[-1]["error"])
    return lines


def _screen(
    status: dict[str, Any],
    before: dict[str, Any] | None,
    rows: list[dict[str, Any]],
    sort: str,
    most_workers: int,
    width: int,
) -> Any:
    from rich.console import Group
    from rich.text import Text

    colour = {"serving": "green", "paused": "yellow"}.get(status["state"], "red")
    head = Text.assemble(
        ("aioecho ", "bold"), (status["state"], f"bold {colour}"),
        f"  process {status['pid']}  up {format_seconds(status['uptime_s'])}  q quits",
    )  # fmt: skip
    reasons = sorted(status["reasons"].items(), key=lambda each: -each[1])[:6]
    ended_by = Text("ended by  " + ("  ".join(f"{name} {number}" for name, number in reasons) or "-"), no_wrap=True)
    lines = [f"worker {format_worker(worker)}" for worker in status["workers"]]
    if len(lines) > most_workers:
        lines[most_workers - 1 :] = [f"and {len(lines) - most_workers + 1} more workers"]
    workers = [Text(line, no_wrap=True) for line in lines]
    count = Text(f"{rows[-1].get('shown', 0)} of {rows[-1].get('matched', 0)} connections", style="dim")
    where = Text(f"listening on {', '.join(status['endpoints'])}", no_wrap=True, overflow="ellipsis")
    connections = _connections(rows[:-1], sort, width)
    return Group(head, where, _counts(status, before), ended_by, *workers, "", connections, count)


def _counts(status: dict[str, Any], before: dict[str, Any] | None) -> Any:
    """Return a table of the counters, and of how fast they have grown since `before`."""
    from rich.table import Table

    table = Table(box=None, header_style="", padding=(0, 1, 0, 0))
    table.add_column()
    for name in COUNTERS:
        table.add_column(name, justify="right", no_wrap=True)
    stats = status["stats"]
    table.add_row("in all", *(str(stats.get(name, 0)) for name in COUNTERS))
    rates = ["-"] * len(COUNTERS[1:])
    if before is not None:
        seconds = max(status["uptime_s"] - before["uptime_s"], 0.1)
        grown = (max(stats.get(name, 0) - before["stats"].get(name, 0), 0) for name in COUNTERS[1:])
        rates = [f"{count / seconds:.1f}" for count in grown]
    table.add_row("per second", "", *rates)
    return table


def _connections(rows: list[dict[str, Any]], sort: str, width: int) -> Any:
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, expand=True, header_style="reverse", padding=(0, 1, 0, 0))
    heads = [f"{name} v" if name == sort else name for name in COLUMNS]
    lines = [format_cells(row) for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(heads, *lines, strict=True)]
    # The numbers and the id, which kick takes, are shown whole, and the rest of the line is shared by the others.
    widths[HANDLER] = min(widths[HANDLER], LONGEST_HANDLER)
    left = width - len(heads) - sum(widths) + widths[CLIENT] + widths[LABEL]
    widths[CLIENT] = min(widths[CLIENT], max(left - widths[LABEL], left // 2, SHORTEST_CLIENT))
    widths[LABEL] = max(left - widths[CLIENT], len(COLUMNS[LABEL]))
    for name, head in zip(COLUMNS, heads, strict=True):
        is_number = name in ("age", "received", "sent", "unsent")
        table.add_column(head, justify="right" if is_number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(_cut(cell, most)) for cell, most in zip(line, widths, strict=True)))
    return table


def _cut(text: str, most: int) -> str:
    """Return a text that takes up `most` places at the most: of one that is longer, its two ends."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= most:
        return text
    tail = text[len(text) - most // 2 :]
    while cell_len(tail) > most // 2:
        tail = tail[1:]
    return f"{set_cell_size(text, max(most - cell_len(tail) - 1, 0)).rstrip()}…{tail}"


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Give a function that waits for a key so many seconds, and returns it, or "" if none came."""
    if not sys.stdin.isatty():

        def wait_only(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait_only
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    saved = termios.tcgetattr(descriptor)

    def wait(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 1).decode("utf-8", "replace") if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield wait
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)
