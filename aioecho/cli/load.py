"""The shell command `load`: options in, a load run, its presentation out, and an exit code for CI."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aioecho.cli.objects import framing_option
from aioecho.cli.outputs import Output
from aioecho.framing import Lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioecho.load import LoadResult, LoadSettings
    from aioecho.load.script import Script
    from aioecho.load.settings import LoadProgress

__all__ = ["load_command"]

_EXTRA = 'the load generator needs the bench extra: pip install "aioecho[bench]" ({} is missing)'


@click.command("load", short_help="Load an echo server, and measure it.", context_settings={"show_default": True})
@click.argument("endpoint")
@click.option("-c", "--connections", default=10, metavar="N", help="Connections held open, over all processes.")
@click.option("-d", "--depth", default=1, metavar="N", help="Messages in flight on each connection.")
@click.option("-r", "--rate", type=float, metavar="N", help="Open loop: messages due a second, over all connections.")
@click.option("--churn", is_flag=True, help="A connection per message; its set-up counts as latency.")
@click.option("-s", "--size", "size_bytes", default=64, metavar="BYTES", help="Bytes per message, or per frame.")
@click.option("--lines", is_flag=True, help="Messages are printable and end in a newline.")
@framing_option("Messages are frames, and a reply is one whole frame.")
@click.option(
    "--send", "send", metavar="TEXT|@FILE", help=r"Send this, with \n, \r, \xHH; for servers that do not echo."
)
@click.option(
    "--expect",
    "expect",
    metavar="REPLY",
    help="The reply to it: REGEX, bytes:N, framing (any one frame), or @FILE, with these bytes.",
)
@click.option("--script", "script_file", metavar="FILE", help="Exchanges to repeat: lines send TEXT and expect REPLY.")
@click.option("-t", "--duration", "duration_s", default=10.0, metavar="SECONDS", help="Seconds measured.")
@click.option("--warmup", "warmup_s", default=1.0, metavar="SECONDS", help="Seconds of load before that.")
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    metavar="SECONDS",
    show_default="10, for datagrams 2",
    help="Seconds without a byte until a message is lost.",
)
@click.option("--processes", default=1, metavar="N", help="Processes that share connections and rate.")
@click.option("--tls", is_flag=True, help="Speak TLS.")
@click.option(
    "--ca",
    "ca_file",
    type=click.Path(exists=True, dir_okay=False),
    help="Trust this certificate authority (PEM), not the system's. Implies --tls.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write the result as JSON. - is stdout, for these three.")
@click.option("--hdr", "hdr_path", metavar="FILE", help="Write an HdrHistogram log, in us, an interval a second.")
@click.option("--plot", "plot_path", metavar="FILE", help="Plot latency by percentile and over time, to .png or .svg.")
@click.option(
    "--fail-if", "fail_if", multiple=True, metavar="CONDITION", help='Exit with 1 if it holds, as "p99_us>2000".'
)
def load_command(
    json_path: str | None,
    hdr_path: str | None,
    plot_path: str | None,
    fail_if: tuple[str, ...],
    send: str | None,
    expect: str | None,
    script_file: str | None,
    **options: Any,
) -> None:
    """Load the server at ENDPOINT and measure it.

    \b
        python -m aioecho load tcp://127.0.0.1:9999 --connections 100
        python -m aioecho load unix:app.sock --rate 5000 --fail-if "p99_us>2000"
        python -m aioecho load unix:app.sock --lines --send PING --expect PONG

    ENDPOINT is tcp://HOST:PORT or unix:PATH, or for datagrams udp://HOST:PORT or unixgram:PATH.

    The server echoes, and every reply is compared with what was sent; or --send and --expect say what goes and comes. Without
    --rate the loop is closed: each connection sends when its reply has come. With --rate it is open, and latency counts from
    the moment a message was due.

    The exit status is 0 if all was measured, 1 if a message was lost, the run was interrupted or a --fail-if held, 2 for a
    mistake on the command line.
    """
    try:
        from aioecho.load import LoadSettings
        from aioecho.load import report as load_report
        from aioecho.load.plot import write_plot

        if plot_path is not None:
            import matplotlib.figure  # noqa: F401 - now, and not after the run
    except ModuleNotFoundError as error:
        raise click.ClickException(_EXTRA.format(error.name)) from None
    options["tls"] = options["tls"] or options["ca_file"] is not None
    try:
        conditions = [load_report.Condition.parse(text) for text in fail_if]
        options["script"] = _read_script(send, expect, script_file, options["framing"] is not None or options["lines"])
        if options["script"] is not None and options["lines"]:
            options["framing"], options["lines"] = Lines(), False
        settings = LoadSettings(**options)
        if plot_path is not None and plot_path != "-" and Path(plot_path).suffix not in (".png", ".svg"):
            raise ValueError(f"expected a plot ending in .png or .svg, not {plot_path!r}")
        if [json_path, hdr_path, plot_path].count("-") > 1:
            raise ValueError("only one of --json, --hdr and --plot can be - for stdout")
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with ExitStack() as stack:
        outputs = [
            None if path is None else stack.enter_context(Output(path)) for path in (json_path, hdr_path, plot_path)
        ]
        uses_stdout = "-" in (json_path, hdr_path, plot_path)
        try:
            with load_report.LiveLine() as line:
                result = _load(settings, line.update)
            load_report.print_result(result, to_stderr=uses_stdout)
        except ModuleNotFoundError as error:
            raise click.ClickException(_EXTRA.format(error.name)) from None
        except OSError as error:
            raise click.ClickException(str(error)) from None
        json_file, hdr_file, plot_file = outputs
        if json_file is not None:
            json_file.write(lambda file: load_report.write_json(result, file))
        if hdr_file is not None:
            hdr_file.write(lambda file: load_report.write_hdr(result, file))
        if plot_file is not None:
            kind = "png" if str(plot_path).endswith(".png") else "svg"
            plot_file.write(lambda file: write_plot(result, file, kind))
    failed = result.interrupted
    if result.problem is not None:
        click.echo(f"{result.endpoint}: {result.problem}", err=True)
        failed = True
    for condition in conditions:
        value = getattr(result, condition.name)
        if condition.holds(result):
            click.echo(f"failed: {condition}, it is {'not measured' if value is None else f'{value:.12g}'}", err=True)
            failed = True
        else:
            click.echo(f"passed: not {condition}, it is {value:.12g}", err=uses_stdout)
    sys.exit(1 if failed else 0)


def _load(settings: LoadSettings, on_progress: Callable[[LoadProgress], None]) -> LoadResult:
    """Run a load. Raises ClickException if the host does not resolve."""
    from aioecho.load import load

    try:
        return load(settings, on_progress=on_progress)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label that is too long or empty
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.ClickException(f"cannot resolve the host of {settings.endpoint}: {reason}") from None


def _read_script(send: str | None, expect: str | None, file: str | None, has_frames: bool) -> Script | None:
    """Return the script that the options are, None without any. Raises ValueError if they do not go together."""
    from aioecho.load.script import make_script, parse_script

    if file is not None:
        if send is not None or expect is not None:
            raise ValueError("--script has its own send and expect: leave out --send and --expect")
        try:
            return parse_script(Path(file).read_text("utf-8", "surrogateescape"))
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror or error}") from None
    if send is None:
        if expect is not None:
            raise ValueError("--expect is the reply to what --send sends: give that too")
        return None
    if expect is None and not has_frames:
        raise ValueError(
            "nothing tells where a reply to --send ends: give --expect REGEX or --expect bytes:N, or --framing or --lines"
        )
    return make_script(send, expect)
