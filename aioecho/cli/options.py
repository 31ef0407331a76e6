"""The options of `serve`. Their names are the keys of its configuration file too."""

from collections.abc import Callable
from typing import Any

import click

from aioecho.cli.config_file import config_option
from aioecho.cli.logs import DEFAULT_QUEUE
from aioecho.cli.objects import FRAMING_HELP
from aioecho.cli.settings import setting_options
from aioecho.config import Limits
from aioecho.net.proxy_protocol import VERSIONS
from aioecho.runtime.loops import LOOPS
from aioecho.serving.drain import DEFAULT_GRACE
from aioecho.workers.program import HEALTHCHECK

__all__ = ["DEFAULT_HOST", "DEFAULT_PORT", "serve_options"]

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9999

_File = click.Path()
_Seconds = click.FloatRange(0)


class _Workers(click.IntRange):
    """A number of worker processes, or as many as there are processors."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or "auto" as it is. Anything else is a usage error."""
        if value == "auto":
            return value
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a number from {self.min} nor auto.", param, ctx)

    def get_metavar(self, *args: Any, **options: Any) -> str:
        """Return what help shows as the value."""
        return self.name


# fmt: off
_OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "-b", "--bind", "endpoints", multiple=True, metavar="[HANDLER=]ENDPOINT",
        help="Where to listen: tcp://HOST:PORT, or unix:PATH with options as unix:PATH?mode=660; for datagrams"
        " udp://HOST:PORT or unixgram:PATH; on a socket that is open already fd://N or systemd:NAME; stdio: is one"
        " connection on stdin and stdout. May be repeated, with another handler for an endpoint as echo=udp://HOST:PORT."
        " Port 0 is any free one."),
    click.option("--host", metavar="HOST",
                 help=f"Listen on this TCP host; short for --bind.  [default: {DEFAULT_HOST}]"),
    click.option("--port", type=click.IntRange(0, 65535), metavar="N",
                 help=f"Listen on this TCP port.  [default: {DEFAULT_PORT}]"),
    click.option("--uds", metavar="PATH", help="Listen on this Unix socket."),
    click.option("--fd", type=click.IntRange(0), metavar="N", help="Listen on this inherited descriptor."),
    click.option("--allow", multiple=True, metavar="NETWORK",
                 help="Serve clients of this network, as 10.0.0.0/8, and of no other. May be repeated."),
    click.option("--deny", multiple=True, metavar="NETWORK",
                 help="Disconnect clients of this network at once, also if it is allowed. May be repeated."),
    click.option("--framing", metavar="SPEC", help=f"Let echo and upper answer frames. SPEC is {FRAMING_HELP}"),
    click.option("--factory", is_flag=True,
                 help="HANDLER is module:function: called without arguments, it returns the server, or a list of servers,"
                 " with where they listen and their own limits."),
    click.option("--workers", type=_Workers(1), default=1, show_default=True,
                 help="Processes that serve; auto is one for each processor they may use. They share the sockets."),
    click.option("--reuse-port", is_flag=True,
                 help="Give each worker a TCP or UDP socket of its own (SO_REUSEPORT)."),
    click.option("--limit-max-requests", type=click.IntRange(1), metavar="N",
                 help="Replace a worker process after N connections, or datagrams or their sessions."),
    click.option("--limit-max-requests-jitter", type=click.IntRange(0), default=0, show_default=True, metavar="N",
                 help="Add up to N to that, at random for each worker."),
    click.option("--timeout-worker-healthcheck", type=_Seconds, default=HEALTHCHECK, show_default=True,
                 metavar="SECONDS", help="Replace a worker whose event loop is held up for so long; 0 is never."),
    click.option("--loop", type=click.Choice(LOOPS), default="auto", show_default=True, help="The event loop."),
    click.option("--backlog", type=click.IntRange(1), default=Limits().backlog, show_default=True, metavar="N",
                 help="Clients that the kernel queues until they are accepted."),
    click.option("--limit-concurrency", type=click.IntRange(1), metavar="N",
                 help="Connections at once, for each process; more clients wait. For datagrams: handlers, or sessions,"
                 " at once."),
    click.option("--timeout-graceful-shutdown", "grace", type=_Seconds, default=DEFAULT_GRACE, show_default=True,
                 metavar="SECONDS", help="Time that handlers have to finish after SIGTERM or SIGINT."),
    click.option("--ssl-certfile", type=_File, metavar="FILE", help="Serve TLS with this certificate (PEM)."),
    click.option("--ssl-keyfile", type=_File, metavar="FILE",
                 help="Its private key, if it is not in the same file."),
    click.option("--ssl-keyfile-password", metavar="TEXT", help="The password of the private key."),
    click.option("--ssl-ca-certs", type=_File, metavar="FILE",
                 help="Ask clients for a certificate that one of these has signed."),
    click.option("--ssl-cert-reqs", type=click.Choice(["required", "optional"]), default="required",
                 show_default=True, help="Whether a client must have one, with --ssl-ca-certs."),
    click.option("--ssl-ciphers", metavar="LIST", help="The cipher suites of TLS 1.2, in OpenSSL's words."),
    click.option("--ssl-version-min", type=click.Choice(["TLSv1.2", "TLSv1.3"]), default="TLSv1.2",
                 show_default=True, help="The oldest version of TLS."),
    click.option("--ssl-reload-interval", type=_Seconds, default=60.0, show_default=True, metavar="SECONDS",
                 help="How often to look whether these files have changed, to load them anew; 0 is never."),
    click.option("--proxy-protocol", type=click.Choice(list(VERSIONS)),
                 help="Expect a PROXY header, of this version, at the beginning of every connection or datagram."),
    click.option("--proxy-allow-from", metavar="NETWORKS",
                 help="The trusted balancers: addresses or networks, with commas between them; * is every address."
                 " Peers of Unix sockets need none."),
    click.option("--metrics", metavar="HOST:PORT|unix:PATH",
                 help="Tell Prometheus here, as 127.0.0.1:9464, and health checks: /metrics, /healthz, /readyz."),
    click.option("--control", metavar="unix:PATH",
                 help="Open a Unix socket for the command ctl; see the docs on live control."),
    click.option("--log-level", type=click.Choice(["critical", "error", "warning", "info", "debug"]), default="info",
                 show_default=True, help="The lowest level that is logged, to stderr."),
    click.option("--access-log/--no-access-log", default=False,
                 help="Log a line for each connection that has ended: client, endpoint, milliseconds to TLS, to the first"
                 " byte and to the end, bytes in and out, outcome and reason."),
    click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
                 help="How a log record is written: as a line of text, or as a JSON object in a line."),
    click.option("--use-colors/--no-use-colors", default=None,
                 help="Color the levels in the log.  [default: on a terminal]"),
    click.option("--log-config", type=_File, metavar="FILE",
                 help="Configure logging by this file instead: .json and .toml for logging.config.dictConfig(), .ini for"
                 " fileConfig()."),
    click.option("--log-queue", type=click.IntRange(0), default=DEFAULT_QUEUE, show_default=True, metavar="BYTES",
                 help="Log records that wait until stderr is read, in bytes. More are dropped and counted. 0: the"
                 " server waits."),
    click.option("--pid", "pid_file", type=_File, metavar="FILE",
                 help="Write the process id to this file once it listens, and remove it at the end."),
    click.option("--user", metavar="NAME", help="Serve as this user, a name or a number, once it listens."),
    click.option("--group", metavar="NAME", help="Serve as this group.  [default: the user's]"),
    click.option("--reload", is_flag=True,
                 help="For development: replace the process that serves when a .py file in --app-dir changes."),
    click.option("--app-dir", default=".", show_default=True, metavar="FOLDER",
                 help="Look for module:Class here first."),
    config_option,
    click.option("--check-config", is_flag=True,
                 help="Check all that is asked for, and exit: with status 0 if it could start. Nothing is listened on."),
    *setting_options(),
]
# fmt: on


def serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function all options, in the order of the list."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
