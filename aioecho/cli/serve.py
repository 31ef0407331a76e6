"""The shell command `serve`: options in, a server or its workers run until a signal, and an exit status."""

import dataclasses
import functools
import itertools
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from aioecho.certificates import TLS
from aioecho.choice import are_for_datagrams
from aioecho.choice import serve as make_server_for
from aioecho.cli.console import Mistake, discard_stdout
from aioecho.cli.logs import DEFAULT_QUEUE, configure_log, flush_log
from aioecho.cli.objects import FRAMING_HELP, find_framing, find_object, is_object_name
from aioecho.config import Limits
from aioecho.echo import DATAGRAM_HANDLERS, FRAME_HANDLERS, HANDLERS
from aioecho.exceptions import AioechoError, CertificateError
from aioecho.ops.control import parse_control
from aioecho.runtime.loops import LOOPS, loop_factory
from aioecho.server import StdioServer
from aioecho.serving.base import BaseServer
from aioecho.serving.drain import DEFAULT_GRACE
from aioecho.serving.handlers import StreamRequestHandler
from aioecho.workers.program import HEALTHCHECK, check_sessions, run_server, run_workers
from aioecho.workers.worker import SIGNALS

__all__ = ["serve_command"]

logger = logging.getLogger("aioecho.cli")

_DEFAULT_HOST, _DEFAULT_PORT = "127.0.0.1", 9999

_ENDPOINT = re.compile("(tcp|udp|fd)://|(unix|unixgram|systemd|stdio):")


class _Workers(click.IntRange):
    """A number of worker processes, or as many as there are processors."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or "auto" as it is. Anything else is a usage error."""
        return value if value == "auto" else super().convert(value, param, ctx)

    def get_metavar(self, *args: Any, **options: Any) -> str:
        """Return what help shows as the value."""
        return self.name


@click.command("serve", short_help="Serve a ready-made handler, or a class of yours.")
@click.argument("handler", default="echo")
@click.option(
    "-b", "--bind", "endpoints", multiple=True, metavar="[HANDLER=]ENDPOINT",
    help="Where to listen: tcp://HOST:PORT, or unix:PATH with options as unix:PATH?mode=660; for datagrams udp://HOST:PORT"
    " or unixgram:PATH; on a socket that is open already fd://N or systemd:NAME; stdio: is one connection on stdin and"
    " stdout. May be repeated, with another handler for an endpoint as echo=udp://HOST:PORT. Port 0 is any free one.",
)  # fmt: skip
@click.option("--host", metavar="HOST", help=f"Listen on this TCP host; short for --bind.  [default: {_DEFAULT_HOST}]")
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", help=f"Listen on this TCP port.  [default: {_DEFAULT_PORT}]"
)
@click.option("--uds", metavar="PATH", help="Listen on this Unix socket.")
@click.option("--fd", type=click.IntRange(0), metavar="N", help="Listen on this inherited descriptor.")
@click.option("--framing", metavar="SPEC", help=f"Let echo and upper answer frames. SPEC is {FRAMING_HELP}")
@click.option("--workers", type=_Workers(1), default=1, show_default=True,
              help="Processes that serve; auto is one for each processor they may use. They share the sockets.")  # fmt: skip
@click.option("--reuse-port", is_flag=True, help="Give each worker a TCP or UDP socket of its own (SO_REUSEPORT).")
@click.option("--limit-max-requests", type=click.IntRange(1), metavar="N",
              help="Replace a worker process after N connections.")  # fmt: skip
@click.option("--limit-max-requests-jitter", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Add up to N to that, at random for each worker.")  # fmt: skip
@click.option("--timeout-worker-healthcheck", type=click.FloatRange(0), default=HEALTHCHECK, show_default=True,
              metavar="SECONDS", help="Replace a worker whose event loop is held up for so long; 0 is never.")  # fmt: skip
@click.option("--loop", type=click.Choice(LOOPS), default="auto", show_default=True, help="The event loop.")
@click.option("--backlog", type=click.IntRange(1), default=Limits().backlog, show_default=True, metavar="N",
              help="Clients that the kernel queues until they are accepted.")  # fmt: skip
@click.option(
    "--limit-concurrency",
    type=click.IntRange(1),
    metavar="N",
    help="Connections at once, for each process; more clients wait. For datagrams: handlers, or sessions, at once.",
)
@click.option("--timeout-graceful-shutdown", "grace", type=click.FloatRange(0), default=DEFAULT_GRACE, show_default=True,
              metavar="SECONDS", help="Time that handlers have to finish after SIGTERM or SIGINT.")  # fmt: skip
@click.option("--ssl-certfile", type=click.Path(), metavar="FILE", help="Serve TLS with this certificate (PEM).")
@click.option(
    "--ssl-keyfile", type=click.Path(), metavar="FILE", help="Its private key, if it is not in the same file."
)
@click.option("--ssl-keyfile-password", metavar="TEXT", help="The password of the private key.")
@click.option(
    "--ssl-ca-certs",
    type=click.Path(),
    metavar="FILE",
    help="Ask clients for a certificate that one of these has signed.",
)
@click.option("--ssl-cert-reqs", type=click.Choice(["required", "optional"]), default="required", show_default=True,
              help="Whether a client must have one, with --ssl-ca-certs.")  # fmt: skip
@click.option("--ssl-ciphers", metavar="LIST", help="The cipher suites of TLS 1.2, in OpenSSL's words.")
@click.option("--ssl-version-min", type=click.Choice(["TLSv1.2", "TLSv1.3"]), default="TLSv1.2", show_default=True,
              help="The oldest version of TLS.")  # fmt: skip
@click.option("--ssl-reload-interval", type=click.FloatRange(0), default=60.0, show_default=True, metavar="SECONDS",
              help="How often to look whether these files have changed, to load them anew; 0 is never.")  # fmt: skip
@click.option("--log-level", type=click.Choice(["critical", "error", "warning", "info", "debug"]), default="info",
              show_default=True, help="The lowest level that is logged, to stderr.")  # fmt: skip
@click.option("--log-queue", type=click.IntRange(0), default=DEFAULT_QUEUE, show_default=True, metavar="BYTES",
              help="Log records that wait until stderr is read, in bytes. More are dropped and counted. 0: the"
              " server waits.")  # fmt: skip
@click.option(
    "--control", metavar="unix:PATH", help="Open a Unix socket for the command ctl; see the docs on live control."
)
@click.option("--app-dir", default=".", show_default=True, metavar="FOLDER", help="Look for module:Class here first.")
def serve_command(
    handler: str,
    endpoints: tuple[str, ...],
    framing: str | None,
    host: str | None,
    port: int | None,
    uds: str | None,
    fd: int | None,
    workers: int | str,
    reuse_port: bool,
    limit_max_requests: int | None,
    limit_max_requests_jitter: int,
    timeout_worker_healthcheck: float,
    loop: str,
    backlog: int,
    limit_concurrency: int | None,
    grace: float,
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
    ssl_keyfile_password: str | None,
    ssl_ca_certs: str | None,
    ssl_cert_reqs: str,
    ssl_ciphers: str | None,
    ssl_version_min: str,
    ssl_reload_interval: float,
    log_level: str,
    log_queue: int,
    control: str | None,
    app_dir: str,
) -> None:
    """Serve HANDLER, a ready-made one or a class of yours as module:Class.

    \b
        python -m aioecho serve upper --port 7000
        python -m aioecho serve chat:Room --bind unix:/run/chat.sock

    \b
    Ready-made handlers, of which echo is the default:
        echo     sends back what it reads
        upper    sends back every line in upper case
        discard  reads, and sends nothing
        chargen  sends lines as fast as the client reads
        daytime  sends the date and time as a line, and closes
        time     sends the time as 4 bytes, and closes
        agent    answers HAProxy's agent-check

    All but agent serve datagrams too. Never offer them over UDP to a network that you do not trust.

    When it serves, it writes `listening on ENDPOINT` to stdout, a line for each endpoint. Everything else goes to stderr.
    SIGTERM and SIGINT (Ctrl-C) let handlers finish; a second one ends it at once. SIGUSR1 logs the stats. With workers,
    SIGHUP replaces them one after another, SIGTTIN adds one and SIGTTOU removes one.

    The exit status is 0 if all handlers finished, 1 if a handler was cancelled or serving failed, 2 for a mistake on the
    command line.
    """
    supervised = workers != 1 or reuse_port or limit_max_requests is not None
    bind = list(endpoints)
    if uds is not None:
        bind.append(f"unix:{uds}")
    if fd is not None:
        bind.append(f"fd://{fd}")
    if host is not None or port is not None or not bind:
        host = _DEFAULT_HOST if host is None else host
        bind.append(f"tcp://{f'[{host}]' if ':' in host else host}:{_DEFAULT_PORT if port is None else port}")
    served, bind = _sort_by_handler([_split_bind(text, handler) for text in bind])
    make_server = functools.partial(
        _make_server,
        served=served,
        app_dir=str(Path(app_dir).resolve()),
        framing=framing,
        tls=_tls(
            ssl_certfile,
            key=ssl_keyfile,
            password=ssl_keyfile_password,
            client_ca=ssl_ca_certs,
            client_cert=ssl_cert_reqs,
            ciphers=ssl_ciphers,
            min_version=ssl_version_min,
            poll=ssl_reload_interval or None,
        ),
        backlog=backlog,
        limit_concurrency=limit_concurrency,
        grace=grace,
        log_level=log_level.upper(),
        log_queue=log_queue,
        log_format=f"%(asctime)s %(levelname)s %(name)s{'[%(process)d]' if supervised else ''}: %(message)s",
    )
    server = make_server([[text] for text in bind])
    is_stdio = isinstance(server, StdioServer)
    try:
        loop_factory(loop)
        if control is not None:
            parse_control(control)
        if workers != 1:
            check_sessions(server, reuse_port=reuse_port)
        if supervised and is_stdio:
            raise ValueError("stdio: is one connection, and no workers share it")
    except (ImportError, ValueError) as error:
        raise Mistake(str(error)) from error
    try:
        if supervised:
            report = run_workers(
                server,
                functools.partial(_make_server_in_worker, make_server),
                workers=workers,
                loop=loop,
                reuse_port=reuse_port,
                max_requests=limit_max_requests,
                max_requests_jitter=limit_max_requests_jitter,
                timeout_worker_healthcheck=timeout_worker_healthcheck or None,
                when_serving=_announce,
                control=control,
            )
        else:
            report = run_server(
                server,
                loop=loop,
                when_serving=lambda server: None if is_stdio else _announce(server.names),
                control=control,
            )
    except AioechoError as error:
        raise click.ClickException(str(error)) from error
    finally:
        flush_log()  # before a line that is not logged, and before a signal can end the process
    has_failed = is_stdio and not server.stats.completed
    status = 1 if report.cancelled or report.aborted or has_failed else 0
    _let_signals_end(status)
    sys.exit(status)


def _let_signals_end(status: int) -> None:
    """Make a signal end the process with `status`: Python may still wait for a thread of the user's, or be ending itself."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, lambda *_: os._exit(status))


def _split_bind(text: str, default: str) -> tuple[str, str]:
    """Return the handler and the endpoint that ``HANDLER=ENDPOINT``, or an endpoint alone, names."""
    # An endpoint may have a = in its path or its options, and a handler a colon: what begins like an endpoint is one.
    match = None if _ENDPOINT.match(text) else re.fullmatch(r"(?P<handler>[^=/?]+)=(?P<endpoint>.+)", text)
    return (default, text) if match is None else (match["handler"], match["endpoint"])


def _sort_by_handler(binds: list[tuple[str, str]]) -> tuple[list[tuple[str, bool]], list[str]]:
    """Return the handler of every endpoint, with whether it is for datagrams, and the endpoints: one handler's together."""
    groups: dict[tuple[str, bool], list[str]] = {}
    try:
        for handler, endpoint in binds:
            groups.setdefault((handler, are_for_datagrams(endpoint)), []).append(endpoint)
    except ValueError as error:
        raise Mistake(str(error)) from error
    served = [of_handler for of_handler, endpoints in groups.items() for _ in endpoints]
    return served, list(itertools.chain(*groups.values()))


def _make_server(
    endpoints: list[list[str]],
    *,
    served: list[tuple[str, bool]],
    app_dir: str,
    framing: str | None,
    tls: TLS | None,
    backlog: int,
    limit_concurrency: int | None,
    grace: float,
    log_level: str,
    log_queue: int,
    log_format: str,
) -> BaseServer:
    """Make the server that the command line describes. Each process does: modules and certificates are not sent to workers."""
    configure_log(log_level, log_format, log_queue)
    _check_certificates(tls)
    by_class: dict[Any, list[str]] = {}
    framed = {} if framing is None else _find_framed_handlers(framing, app_dir, served)
    for (handler, for_datagrams), group in zip(served, endpoints, strict=True):
        # Outside of the `try`: what the user's own module raises comes with a traceback.
        handler_class = _find_handler(handler, app_dir, DATAGRAM_HANDLERS if for_datagrams else {**HANDLERS, **framed})
        by_class.setdefault(handler_class, []).extend(group)
    limits = Limits(backlog=backlog, max_connections=limit_concurrency)
    if limit_concurrency is not None:
        limits = dataclasses.replace(limits, max_handlers=limit_concurrency, max_sessions=limit_concurrency)
    try:
        if len(by_class) > 1:
            return make_server_for(by_class, ssl=tls, limits=limits, grace=grace)
        ((handler_class, texts),) = by_class.items()
        return make_server_for(handler_class, *texts, ssl=tls, limits=limits, grace=grace)
    except (TypeError, ValueError) as error:
        raise Mistake(str(error)) from error


def _make_server_in_worker(
    make_server: Callable[[list[list[str]]], BaseServer], endpoints: list[list[str]]
) -> BaseServer:
    try:
        return make_server(endpoints)
    except Mistake as error:  # certificates or a handler that were there at the start, and no longer are
        raise AioechoError(error.message) from error


def _announce(names: Sequence[str]) -> None:
    try:
        for name in names:
            click.echo(f"listening on {name}")
    except OSError as error:  # no reason not to serve
        discard_stdout()
        if not isinstance(error, BrokenPipeError):  # its reader has closed it, as it may
            logger.warning("cannot write to stdout where it listens: %s", error.strerror or error)


def _find_framed_handlers(
    text: str, folder: str, served: list[tuple[str, bool]]
) -> dict[str, type[StreamRequestHandler]]:
    """Return the ready-made handlers of frames, with the framing that `text` names.

    Raises:
        Mistake: it names none, or a handler is `served` that has no use for one (caller).
    """
    for handler, for_datagrams in served:
        if handler not in FRAME_HANDLERS or for_datagrams:
            what = f"{handler} over datagrams" if for_datagrams else handler
            raise Mistake(
                f"--framing is for the ready-made {' and '.join(FRAME_HANDLERS)} over streams, not for {what}: a class of"
                " yours has a `framing` of its own"
            )
    framing = find_framing(text, folder)
    return {name: type(kind.__name__, (kind,), {"framing": framing}) for name, kind in FRAME_HANDLERS.items()}


def _find_handler(name: str, folder: str, ready_made: Mapping[str, Any]) -> Any:
    """Return the ready-made handler called `name`, or import "module:Class". `folder` comes first on the path.

    Raises:
        Mistake: there is none; the message says what was looked for, and where (caller).
    """
    if name in ready_made:
        return ready_made[name]
    if not is_object_name(name):
        raise Mistake(
            f"no handler is called {name!r}: the ready-made ones are {', '.join(ready_made)}; for your own say module:Class"
        )
    return find_object(name, folder)


def _tls(cert: str | None, **options: Any) -> TLS | None:
    """Return what to serve TLS with, None for none."""
    if cert is None:
        if options["key"] or options["client_ca"] or options["password"]:
            raise Mistake("TLS needs a certificate: --ssl-certfile")
        return None
    # A client that closes with session tickets unread resets the connection.
    return TLS(cert, num_tickets=0, **options)


# What helps on the command line, by the end of what is wrong.
_HINTS = {
    "there is no private key (PEM) in {}": ": name its file with --ssl-keyfile",
    "the private key is encrypted: give its password": " with --ssl-keyfile-password",
}


def _check_certificates(tls: TLS | None) -> None:
    if tls is None:
        return
    try:
        tls.load()
    except CertificateError as error:
        message = str(error)
        ends = ((end.format(tls.key or tls.cert), hint) for end, hint in _HINTS.items())
        raise Mistake(message + "".join(hint for end, hint in ends if message.endswith(end))) from error
