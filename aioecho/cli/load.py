"""The shell command `load`: options in, a load run, its presentation out, and an exit code for CI."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from aioecho.cli.objects import framing_option

__all__ = ["load_command"]

_EXTRA = 'the load generator needs the bench extra: pip install "aioecho[bench]" ({} is missing)'


@click.command("load", context_settings={"show_default": True})
@click.argument("endpoint")
@click.option("-c", "--connections", default=10, help="Connections held open, over all processes.")
@click.option("-d", "--depth", default=1, help="Messages in flight on each connection.")
@click.option("-r", "--rate", type=float, help="Open loop: messages due a second, over all connections.")
@click.option("--churn", is_flag=True, help="A connection per message; its set-up counts as latency.")
@click.option("-s", "--size", "size_bytes", default=64, help="Bytes per message, or per frame.")
@click.option("--lines", is_flag=True, help="Messages are printable and end in a newline.")
@framing_option("Messages are frames, and a reply is one whole frame.")
@click.option("-t", "--duration", "duration_s", default=10.0, help="Seconds measured.")
@click.option("--warmup", "warmup_s", default=1.0, help="Seconds of load before that.")
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    show_default="10, for datagrams 2",
    help="Seconds without a byte until a message is lost.",
)
@click.option("--processes", default=1, help="Processes that share connections and rate.")
@click.option("--tls", is_flag=True, help="Speak TLS.")
@click.option(
    "--ca",
    "ca_file",
    type=click.Path(exists=True, dir_okay=False),
    help="Trust this certificate authority (PEM), not the system's. Implies --tls.",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
@click.option(
    "--hdr", "hdr_path", type=click.Path(dir_okay=False, path_type=Path), help="Write an HdrHistogram log, in us."
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Plot latency by percentile, to .png or .svg.",
)
@click.option(
    "--fail-if", "fail_if", multiple=True, metavar="CONDITION", help='Exit with 1 if it holds, as "p99_us>2000".'
)
def load_command(
    json_path: Path | None, hdr_path: Path | None, plot_path: Path | None, fail_if: tuple[str, ...], **options: Any
) -> None:
    """Load the echo server at ENDPOINT and measure it.

    ENDPOINT is tcp://HOST:PORT or unix:PATH, or for datagrams udp://HOST:PORT or unixgram:PATH.

    Every reply is compared with what was sent. Without --rate the loop is closed: each connection sends when its reply
    has come. With --rate it is open, and latency counts from the moment a message was due.

    The exit status is 0 if all was measured, 1 if a message was lost, the run was interrupted or a --fail-if held, 2 for a
    mistake on the command line.
    """
    try:
        import aioecho.load as load_module
        from aioecho.load import report as load_report
    except ModuleNotFoundError as error:
        raise click.ClickException(_EXTRA.format(error.name)) from None
    options["tls"] = options["tls"] or options["ca_file"] is not None
    try:
        conditions = [load_report.Condition.parse(text) for text in fail_if]
        settings = load_module.LoadSettings(**options)
        if plot_path is not None and plot_path.suffix not in (".png", ".svg"):
            raise ValueError(f"expected a plot ending in .png or .svg, not {str(plot_path)!r}")
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        with load_report.LiveLine() as line:
            result = load_module.load(settings, on_progress=line.update)
        load_report.print_result(result)
        if json_path is not None:
            load_report.write_json(result, json_path)
        if hdr_path is not None:
            load_report.write_hdr(result, hdr_path)
        if plot_path is not None:
            load_report.write_plot(result, plot_path)
    except ModuleNotFoundError as error:
        raise click.ClickException(_EXTRA.format(error.name)) from None
    except OSError as error:
        raise click.ClickException(str(error)) from None
    failed = result.interrupted
    if result.problem is not None:
        click.echo(f"{result.endpoint}: {result.problem}", err=True)
        failed = True
    for condition in conditions:
        if condition.holds(result):
            value = getattr(result, condition.name)
            click.echo(f"failed: {condition}, it is {'not measured' if value is None else f'{value:g}'}", err=True)
            failed = True
    sys.exit(1 if failed else 0)
