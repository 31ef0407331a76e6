"""The suite's commands: `python -m benchmarks [run|report|list]`."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from . import abuse, crowd
from .catalog import SERVERS, find_missing
from .plan import make_plan
from .processes import ROOT
from .scenarios import SCENARIOS

__all__ = ["main"]

_RESULTS = ROOT / "benchmarks" / "results"


@click.group()
def main() -> None:
    """Compare aioecho with socketserver and others, on this machine."""


@main.command("list")
def list_command() -> None:
    """List servers and scenarios."""
    click.echo("servers")
    for server in SERVERS:
        missing = find_missing(server)
        note = f"  (not available: there is no module {missing})" if missing else ""
        limit = f"  (up to {server.max_clients:,}: {server.why_limited})" if server.why_limited else ""
        click.echo(f"  {server.name:16} {server.label}{limit}{note}")
    click.echo("scenarios")
    for scenario in SCENARIOS.values():
        click.echo(f"  {scenario.name:16} {scenario.title}. {scenario.question}")
    for alone in (abuse, crowd):
        click.echo(f"  {alone.NAME:16} {alone.QUESTION}")


@main.command("run")
@click.option("--quick", is_flag=True, help="Within 3 minutes: fewer servers and loads, shorter turns.")
@click.option("--resume", is_flag=True, help="Go on with the data file's last run.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Data file, appended to: results/NAME.jsonl."
)
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    type=click.Choice([*SCENARIOS, abuse.NAME, crowd.NAME]),
    help="Only these.",
)
@click.option(
    "--server", "servers", multiple=True, type=click.Choice([server.name for server in SERVERS]), help="Only these."
)
@click.option(
    "--connections", type=click.IntRange(100), help="Of the crowd; by default as many as there is memory for."
)
def run_command(
    quick: bool,
    resume: bool,
    output: Path | None,
    scenarios: tuple[str, ...],
    servers: tuple[str, ...],
    connections: int | None,
) -> None:
    """Measure, and append every turn to a data file as soon as it is over.

    `--scenario abuse` and `--scenario crowd` are measured by themselves, write a table to results/abuse.md or crowd.md, and
    print it. The crowd takes minutes, and all of the machine.
    """
    _need_extra()
    if crowd.NAME in scenarios:
        if len(scenarios) > 1 or quick or resume or servers:
            raise click.UsageError("the scenario crowd is measured alone, and with aioecho only")
        with _interruptible("nothing of it is kept"):
            found = crowd.run_crowd(lambda text: click.echo(text, err=True), connections)
        click.echo(crowd.write_table(output or _RESULTS / "crowd.md", found))
        return
    if connections is not None:
        raise click.UsageError("--connections is for the scenario crowd")
    if abuse.NAME in scenarios:
        if len(scenarios) > 1 or quick or resume:
            raise click.UsageError("the scenario abuse is measured alone, and always in full")
        with _interruptible("nothing of it is kept"):
            samples = abuse.run_abuse(lambda text: click.echo(text, err=True), servers)
        click.echo(
            abuse.write_table(output or _RESULTS / "abuse.md", "python -m benchmarks run --scenario abuse", samples)
        )
        return
    from .environment import describe_environment
    from .runner import last_run, read_lines, run_plan

    plan = make_plan("quick" if quick else "full", scenarios, servers)
    if not plan.cells:
        raise click.UsageError(f"none of these servers takes part in these scenarios of the {plan.name} plan")
    path = output or _RESULTS / f"{plan.name}.jsonl"
    options = ["--quick"] * quick + [f"--scenario {name}" for name in scenarios] + [f"--server {n}" for n in servers]
    header = describe_environment(" ".join(["python -m benchmarks run", *options]))
    total = plan.total_s
    click.echo(f"{plan.count_turns():,} turns, about {total / 60:.0f} minutes; data: {_shown(path)}", err=True)
    try:
        with _interruptible("what was measured is kept, and --resume goes on"), _progress(total) as report:
            run_plan(plan, path, header, resume=resume, report=report)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    lines = last_run(read_lines(path))
    for text in _failures(lines):
        click.echo(text, err=True)
    if not any(line["kind"] == "sample" and not line["errors"] and not line.get("left_out") for line in lines):
        raise click.ClickException("nothing was measured")
    click.echo("now: python -m benchmarks report", err=True)


@main.command("report")
@click.argument("data", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for the report: beside the data file."
)
@click.option(
    "--readme",
    "readmes",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also refresh the block between this page's benchmark markers. May be repeated.",
)
def report_command(data: Path | None, output: Path | None, readmes: tuple[Path, ...]) -> None:
    """Make tables, pictures and an HTML page of DATA's last run; without DATA, of the run measured last."""
    _need_extra()
    from .report import refresh_readme, write_report

    if data is None:
        files = sorted(_RESULTS.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        if not files:
            raise click.UsageError("nothing has been measured yet: python -m benchmarks run --quick")
        data = files[-1]
    folder = output or data.with_suffix("")
    try:
        written = write_report(data, folder)
        for readme in readmes:
            refresh_readme(readme, data, folder)
            written.append(readme)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    for path in written:
        click.echo(_shown(path))


@contextmanager
def _interruptible(kept: str) -> Iterator[None]:
    """End what was started also at SIGTERM, as at SIGINT, and say in one line what is `kept`, or what has failed."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"interrupted; {kept}", err=True)
        sys.exit(1)
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip().rpartition("\n")[2] if error.stderr else ""
        raise click.ClickException(f"{error.cmd[0]} failed: {words or f'exit status {error.returncode}'}") from None
    except OSError as error:
        raise click.ClickException(str(error)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _failures(lines: list[dict[str, Any]]) -> list[str]:
    """Return a line for each server that was left out, and for each at a load where messages or replies were lost."""
    found: dict[str, None] = {}
    for line in lines:
        if line["kind"] == "left out":
            what = ", ".join(line[key] for key in ("cell", "server") if key in line)
            found[f"left out: {what}: {line['why']}"] = None
        elif line["kind"] == "sample" and (line["errors"] or line.get("left_out")):
            how = "left out" if line.get("left_out") else "void"
            why = line["problem"] or f"{line['errors']} errors"
            found.setdefault(f"{how}: {line['cell']}, {line['server']}: {why}")
    return list(found)


def _shown(path: Path) -> str:
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(path)


def _progress(total_s: float) -> AbstractContextManager[Callable[[str, float], None]]:
    """Show a bar with an estimate on a terminal, a line a cell elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def say(text: str, behind_s: float) -> None:
            cell = text.partition(",")[0]
            if cell and cell not in seen:
                seen.add(cell)
                click.echo(f"{behind_s / total_s:4.0%} {cell}", err=True)

        return nullcontext(say)
    columns = (TextColumn("{task.percentage:3.0f} %"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    # Nothing may draw while a turn is measured, so the bar moves only between turns.
    progress = Progress(
        *columns, TimeRemainingColumn(), TextColumn("{task.description}"), console=console, auto_refresh=False
    )
    task = progress.add_task("starting", total=total_s)

    class Bar:
        def __enter__(self) -> Callable[[str, float], None]:
            progress.start()
            return self.move

        def __exit__(self, *error: Any) -> None:
            progress.stop()

        def move(self, text: str, behind_s: float) -> None:
            progress.update(task, completed=behind_s, description=text)
            progress.refresh()

    return Bar()


def _need_extra() -> None:
    for name in ("jinja2", "matplotlib", "numpy", "rich"):
        if importlib.util.find_spec(name) is None:
            raise click.ClickException(f'pip install "aioecho[bench]" first: {name} is missing')
