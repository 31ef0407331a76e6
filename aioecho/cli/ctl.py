"""The shell command `ctl`: asks a program that serves, through its control socket, and shows the answer."""

import json
import shutil
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import click

from aioecho.cli.console import Mistake
from aioecho.ops.control import parse_control

__all__ = ["COUNTERS", "ask_control", "ctl_command", "format_bytes", "format_cells", "format_seconds", "format_worker"]

COUNTERS = ("active", "accepted", "completed", "failed", "cancelled", "rejected")
"""The counters of status that are shown."""

TIMEOUT = 15.0
"""Seconds without a byte of an answer."""


@click.command(
    "ctl",
    short_help="Look into a server that runs, or tell it what to do.",
    context_settings={"ignore_unknown_options": True},
)
@click.option("--control", required=True, metavar="unix:PATH", help="The control socket, as serve --control names it.")
@click.option("--json", "as_json", is_flag=True, help="Show the lines of JSON as they come.")
@click.argument("command")
@click.argument("values", nargs=-1, type=click.UNPROCESSED)
def ctl_command(control: str, as_json: bool, command: str, values: tuple[str, ...]) -> None:
    """Send COMMAND to a server that was started with --control.

    \b
        ctl --control unix:/run/chat.ctl status
        ctl --control unix:/run/chat.ctl list --older 1h --sort unsent --limit 20
        ctl --control unix:/run/chat.ctl kick 1.27 2.4
        ctl --control unix:/run/chat.ctl limits max_connections=500
        ctl --control unix:/run/chat.ctl pause --server 2
        ctl --control unix:/run/chat.ctl help

    A value is given as NAME=VALUE or --NAME VALUE. The exit status is 1 if the server could not do it, or did not answer.
    """
    rows: list[dict[str, Any]] = []
    for line in ask_control(control, _as_line(command, values), timeout=None if command == "trace" else TIMEOUT):
        if as_json:
            click.echo(json.dumps(line))
        elif line.get("ok") is False:
            raise click.ClickException(line["error"])
        elif "ok" not in line and command == "list":
            rows.append(line)
        elif "ok" not in line:
            click.echo(_format_row(line))
        else:
            _show(command, line, rows)
        if as_json and line.get("ok") is False:
            raise SystemExit(1)


def _as_line(command: str, values: tuple[str, ...]) -> str:
    words = [command]
    rest = list(values)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals:
                if not rest:
                    raise click.UsageError(f"{word} needs a value")
                value = rest.pop(0)
            word = f"{name}={value}"
        words.append('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"')
    return " ".join(words)


def ask_control(control: str, line: str, timeout: float | None = TIMEOUT) -> Iterator[dict[str, Any]]:
    """Yield the lines of a control socket's answer; ClickException, in one line, if it can't be had."""
    try:
        name = parse_control(control if ":" in control else f"unix:{control}").path
    except ValueError as error:
        raise Mistake(str(error)) from error
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout)
            sock.connect(name)
            sock.sendall(line.encode() + b"\n")
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as lines:
                found: dict[str, Any] = {}
                for text in lines:
                    found = json.loads(text)
                    yield found
        if "ok" not in found:
            raise click.ClickException(f"{control} closed before it had answered")
    except TimeoutError as error:
        raise click.ClickException(f"{control} has not answered in {timeout:g} s") from error
    except OSError as error:
        why = f"cannot ask {control}: {error.strerror or error}"
        raise click.ClickException(f"{why}: is the server running, with this --control?") from error
    except ValueError as error:
        raise click.ClickException(f"{control} is no control socket of aioecho's: {error}") from error


def format_seconds(seconds: float | None) -> str:
    """Return seconds for people: 4.2s, 3m05s, 2h10m, 5d03h."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    for size, name, part, part_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // part:02}{part_name}"
    raise AssertionError


def format_bytes(count: int | None) -> str:
    """Return a number of bytes for people: 512, 1.2k, 34.0M."""
    if count is None:
        return "-"
    size, unit = float(count), ""
    for bigger in "kMGT":
        if size < 1000:
            break
        size, unit = size / 1000, bigger
    return f"{size:.1f}{unit}" if unit else str(count)


def _show(command: str, line: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if command == "list":
        if rows:
            click.echo(_table(rows))
        click.echo(f"{line['shown']} of {line['matched']} connections")
    elif command == "status":
        _show_status(line)
    elif command == "help":
        formatter = click.HelpFormatter(width=shutil.get_terminal_size().columns)
        formatter.write_dl(list(line["commands"].items()))
        click.echo(formatter.getvalue(), nl=False)
    elif command in ("limits", "timeouts") and command in line:
        for server in line.get("servers", [line]):
            _show_settings(command, server)
    elif command == "kick":
        click.echo(
            f"kicked {len(line['kicked'])}" + (f"; gone before: {', '.join(line['gone'])}" if line["gone"] else "")
        )
    elif command == "workers":
        click.echo(f"{line['workers']} workers")
    elif "what" in line:
        click.echo(line["what"])
    elif "ended" in line:
        click.echo("the connection has ended" if line["ended"] else "the connection goes on")
    else:
        click.echo("done")
    for name in line.get("silent", ()):
        click.echo(f"{name} has not answered", err=True)
    for name, error in line.get("errors", {}).items():
        click.echo(f"{name}: {error}", err=True)


def _show_settings(kind: str, server: Mapping[str, Any]) -> None:
    if "server" in server:
        click.echo(f"server {server['server']}, {', '.join(server['endpoints'])}:")
    differing = server.get("differing", {}).get(kind, {})
    for name, value in server[kind].items():
        of_workers = [f"{_show_value(each)} in worker {worker}" for worker, each in differing.get(name, {}).items()]
        click.echo(f"{name:<20} {', '.join(of_workers) or _show_value(value)}")


def _show_value(value: Any) -> str:
    return "none" if value is None else str(value)


def _show_status(line: Mapping[str, Any]) -> None:
    stats = line["stats"]
    click.echo(f"{line['state']}, process {line['pid']}, up {format_seconds(line['uptime_s'])}")
    for server in line.get("servers", ()):
        name, where = server["server"], ", ".join(server["endpoints"])
        click.echo(f"server {name}  {server['state']}  active {server['active']}  listening on {where}")
    for endpoint in () if "servers" in line else line["endpoints"]:
        click.echo(f"listening on {endpoint}")
    click.echo("  ".join(f"{name} {stats.get(name, 0)}" for name in COUNTERS))
    if line["reasons"]:
        reasons = sorted(line["reasons"].items(), key=lambda each: -each[1])
        click.echo("ended by: " + ", ".join(f"{name} {count}" for name, count in reasons))
    for worker in line["workers"]:
        click.echo(f"worker {format_worker(worker)}")


def format_worker(worker: Mapping[str, Any]) -> str:
    """Return what is told of a worker for people."""
    name, active = worker["name"], worker.get("active", "?")
    return f"{name}  slot {worker['slot']}  process {worker['pid']}  {worker['state']}  active {active}"


def _table(rows: list[dict[str, Any]]) -> str:
    head = ("ID", "CLIENT", "AGE", "RECEIVED", "SENT", "UNSENT", "HANDLER", "LABEL")
    lines = [head, *(format_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = {2, 3, 4, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what is told of a connection for people, in the order of a table's columns."""
    sizes = (format_bytes(row[f"{name}_bytes"]) for name in ("received", "sent", "unsent"))
    # A client names itself, by a Unix socket's path or in what becomes a label: that is not to steer the terminal.
    client, label = ("".join(c if c.isprintable() else "?" for c in row[name] or "") for name in ("client", "label"))
    return (row["id"], client, format_seconds(row["age_s"]), *sizes, row["handler"] or "-", label)


def _format_row(row: Mapping[str, Any]) -> str:
    cells = format_cells(row)
    waits = row.get("waits_at") or "-"
    return f"{cells[0]} {cells[1]} age {cells[2]} received {cells[3]} sent {cells[4]} unsent {cells[5]} at {waits}"
