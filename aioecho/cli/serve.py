"""The shell command `serve`: options in, a server or its workers run until a signal, and an exit status."""

import dataclasses
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from aioecho.certificates import TLS
from aioecho.choice import serve as make_server_for
from aioecho.cli.checking import check_start
from aioecho.cli.config_file import drop_overridden
from aioecho.cli.console import ImportMistake, Mistake, discard_stdout
from aioecho.cli.factory import refuse_with_factory, was_raised_by
from aioecho.cli.handlers import find_framed_handlers, find_handler, sort_by_handler, split_bind
from aioecho.cli.logs import LogSettings, configure_log, flush_log
from aioecho.cli.options import DEFAULT_HOST, DEFAULT_PORT, serve_options
from aioecho.cli.owner import Owner, find_control, find_metrics, find_owner, give_sockets
from aioecho.cli.process import PIDFile, introduce
from aioecho.cli.proxy import make_proxy
from aioecho.cli.reload import check_can_watch, watch
from aioecho.cli.settings import make_limits, make_timeouts
from aioecho.config import Limits, Timeouts
from aioecho.echo import DATAGRAM_HANDLERS, HANDLERS
from aioecho.exceptions import AioechoError, CertificateError
from aioecho.net.proxy_protocol import ProxyProtocol
from aioecho.runtime.log_config import renew_log
from aioecho.runtime.loops import loop_factory
from aioecho.server import StdioServer
from aioecho.serving.base import BaseServer
from aioecho.several import make_servers
from aioecho.stats import DrainReport
from aioecho.workers.processors import count_processors
from aioecho.workers.program import MakeServer, check_sessions, make_servers_in_worker, needs_workers, run_workers
from aioecho.workers.single import run_server
from aioecho.workers.worker import SIGNALS

__all__ = ["serve_command"]

logger = logging.getLogger("aioecho.cli")


@click.command("serve", short_help="Serve a ready-made handler, or a class of yours.")
@click.argument("handler", default="echo")
@serve_options
@click.pass_context
def serve_command(context: click.Context, /, handler: str, **options: Any) -> None:
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
    SIGTERM and SIGINT (Ctrl-C) let handlers finish; a second one ends it at once. SIGUSR1 logs the stats. SIGHUP loads
    certificates anew and opens log files anew; with workers it replaces them one after another, SIGTTIN adds one and
    SIGTTOU removes one.

    The exit status is 0 if all handlers finished, 1 if a handler was cancelled or serving failed, 2 for a mistake on the
    command line.
    """
    drop_overridden(context, options)
    program = _find_program(context, handler, options)
    if options["check_config"]:
        check_start(program.server, metrics=program.metrics, control=program.control, pid_file=options["pid_file"])
        click.echo("the configuration is valid", err=True)
        return
    pid_file = None if options["pid_file"] is None else PIDFile(options["pid_file"])
    try:
        report = (_supervise if program.is_supervised else _serve)(program, options, pid_file)
    except AioechoError as error:
        raise click.ClickException(str(error)) from error
    finally:
        if pid_file is not None:
            pid_file.remove()
        flush_log()  # before a line that is not logged, and before a signal can end the process
    has_failed = program.is_stdio and not program.server.stats.completed
    status = 1 if report.cancelled or report.aborted or has_failed else 0
    _let_signals_end(status)
    sys.exit(status)


@dataclasses.dataclass(frozen=True)
class _Program:
    """What the command line describes: a server that is not started, and how to run it."""

    server: BaseServer
    make_server: MakeServer
    is_supervised: bool
    """Whether worker processes serve, even a single one, and not this process."""
    loop_name: str
    metrics: str | None
    control: str | None
    owner: Owner | None
    log: LogSettings
    app_dir: str

    @property
    def is_stdio(self) -> bool:
        """Whether stdin and stdout are its one connection."""
        return isinstance(self.server, StdioServer)


def _find_program(context: click.Context, handler: str, options: Mapping[str, Any]) -> _Program:
    """Return what the command line describes. Nothing is listened on yet.

    Raises:
        Mistake, ImportMistake: an option, or what it names, cannot be used (caller).
    """
    workers, reuse_port = options["workers"], options["reuse_port"]
    if options["reload"]:
        check_can_watch()
    is_supervised = needs_workers(workers, reuse_port, options["limit_max_requests"]) or options["reload"]
    owner = find_owner(options["user"], options["group"])
    log = _find_log_settings(context, options, has_process=is_supervised)
    app_dir = str(Path(options["app_dir"]).resolve())
    server, make_server = _find_server(context, handler, options, log, app_dir)
    try:
        loop_name = "uvloop" if loop_factory(options["loop"]).__module__.startswith("uvloop") else "asyncio"
        metrics = None if options["metrics"] is None else find_metrics(options["metrics"], owner)
        control = None if options["control"] is None else find_control(options["control"], owner)
        if workers != 1:
            check_sessions(server, reuse_port=reuse_port)
        give_sockets(server, owner)
        program = _Program(server, make_server, is_supervised, loop_name, metrics, control, owner, log, app_dir)
        if is_supervised and program.is_stdio:
            raise ValueError("stdio: is one connection, and no workers share it")
    except (ImportError, ValueError) as error:
        raise Mistake(str(error)) from error
    return program


def _find_server(
    context: click.Context, handler: str, options: Mapping[str, Any], log: LogSettings, app_dir: str
) -> tuple[BaseServer, MakeServer]:
    """Return the server, and what makes one like it in another process."""
    make_server: MakeServer
    if options["factory"]:
        refuse_with_factory(context)
        make_server = functools.partial(_make_by_factory, name=handler, app_dir=app_dir, log=log)
        return make_server([]), make_server
    served, bind = sort_by_handler([split_bind(text, handler) for text in _find_endpoints(options)])
    make_server = functools.partial(
        _make_server,
        served=served,
        app_dir=app_dir,
        framing=options["framing"],
        log=log,
        ssl=_tls(options),
        proxy=make_proxy(options["proxy_protocol"], options["proxy_allow_from"]),
        limits=make_limits(options, limit_concurrency=options["limit_concurrency"]),
        timeouts=make_timeouts(options),
        options={name: options[name] for name in ("grace", "access_log", "allow", "deny")},
    )
    return make_server([[text] for text in bind]), make_server


def _supervise(program: _Program, options: Mapping[str, Any], pid_file: PIDFile | None) -> DrainReport:
    """Have worker processes serve until a signal."""

    def when_serving(names: Sequence[str]) -> None:
        if pid_file is not None:
            pid_file.write()
        _announce(names, program, options)
        if options["reload"]:
            watch(program.app_dir)

    return run_workers(
        program.server,
        functools.partial(_make_server_in_worker, program.make_server, program.owner),
        workers=options["workers"],
        loop=options["loop"],
        reuse_port=options["reuse_port"],
        max_requests=options["limit_max_requests"],
        max_requests_jitter=options["limit_max_requests_jitter"],
        timeout_worker_healthcheck=options["timeout_worker_healthcheck"] or None,
        when_serving=when_serving,
        when_reloading=functools.partial(renew_log, program.log.config),
        metrics=program.metrics,
        control=program.control,
    )


def _serve(program: _Program, options: Mapping[str, Any], pid_file: PIDFile | None) -> DrainReport:
    """Serve in this process until a signal."""

    def when_bound() -> None:
        if pid_file is not None:
            pid_file.write()
        if program.owner is not None:
            program.owner.take_over()

    program.server.when_bound = when_bound
    return run_server(
        program.server,
        loop=options["loop"],
        when_serving=lambda server: None if program.is_stdio else _announce(server.names, program, options),
        when_reloading=functools.partial(renew_log, program.log.config),
        metrics=program.metrics,
        control=program.control,
    )


def _find_endpoints(options: Mapping[str, Any]) -> list[str]:
    """Return what to listen on, by all options that say so."""
    found = list(options["endpoints"])
    uds, fd, host, port = (options[name] for name in ("uds", "fd", "host", "port"))
    if uds is not None:
        found.append(f"unix:{uds}")
    if fd is not None:
        found.append(f"fd://{fd}")
    if host is not None or port is not None or not found:
        host = DEFAULT_HOST if host is None else host
        found.append(f"tcp://{f'[{host}]' if ':' in host else host}:{DEFAULT_PORT if port is None else port}")
    return found


def _find_log_settings(context: click.Context, options: Mapping[str, Any], *, has_process: bool) -> LogSettings:
    is_default = context.get_parameter_source("log_level") in (None, ParameterSource.DEFAULT)
    config = options["log_config"]
    return LogSettings(
        level=None if is_default and config is not None else options["log_level"].upper(),
        format=options["log_format"],
        queue=options["log_queue"],
        colors=options["use_colors"],
        config=config if config is None else str(Path(config).resolve()),
        has_access_log=options["access_log"],
        has_process=has_process,
    )


def _let_signals_end(status: int) -> None:
    """Make a signal end the process with `status`: Python may still wait for a thread of the user's, or be ending itself."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, lambda *_: os._exit(status))


def _make_server(
    endpoints: list[list[str]],
    *,
    served: list[tuple[str, bool]],
    app_dir: str,
    framing: str | None,
    log: LogSettings,
    ssl: TLS | None,
    proxy: ProxyProtocol | None,
    limits: Limits,
    timeouts: Timeouts,
    options: Mapping[str, Any],
) -> BaseServer:
    """Make the server that the command line describes. Each process does: modules and certificates are not sent to workers."""
    configure_log(log)
    _check_certificates(ssl)
    options = {**options, "ssl": ssl, "proxy": proxy, "limits": limits, "timeouts": timeouts}
    by_class: dict[Any, list[str]] = {}
    framed = {} if framing is None else find_framed_handlers(framing, app_dir, served)
    for (handler, for_datagrams), group in zip(served, endpoints, strict=True):
        # Outside of the `try`: what the user's own module raises comes with a traceback.
        handler_class = find_handler(handler, app_dir, DATAGRAM_HANDLERS if for_datagrams else {**HANDLERS, **framed})
        by_class.setdefault(handler_class, []).extend(group)
    try:
        if len(by_class) > 1:
            return make_server_for(by_class, **options)
        ((handler_class, texts),) = by_class.items()
        return make_server_for(handler_class, *texts, **options)
    except (TypeError, ValueError) as error:
        raise Mistake(str(error)) from error


def _make_by_factory(endpoints: list[list[str]], *, name: str, app_dir: str, log: LogSettings) -> BaseServer:
    """Make the servers that the user's factory gives; with `endpoints`, to serve on these."""
    configure_log(log)
    factory = find_handler(name, app_dir, {})
    try:
        return make_servers_in_worker(factory, None, endpoints) if endpoints else make_servers(factory)
    except (TypeError, ValueError) as error:
        if was_raised_by(error, factory):
            raise  # with its traceback
        raise Mistake(str(error)) from error


def _make_server_in_worker(make_server: MakeServer, owner: Owner | None, endpoints: list[list[str]]) -> BaseServer:
    try:
        server = make_server(endpoints)
    except (
        Mistake,
        ImportMistake,
    ) as error:  # certificates or a handler that were there at the start, and no longer are
        raise AioechoError(error.message) from error
    if owner is not None:
        server.when_bound = owner.take_over
    return server


def _announce(names: Sequence[str], program: _Program, options: Mapping[str, Any]) -> None:
    """Say where it listens, and to a person at a terminal what it is."""
    _write_names(names)
    if program.log.level in (None, "INFO", "DEBUG"):
        count = count_processors() if options["workers"] == "auto" else options["workers"]
        introduce(program.loop_name, count if program.is_supervised else None)


def _write_names(names: Sequence[str]) -> None:
    try:
        for name in names:
            click.echo(f"listening on {name}")
    except OSError as error:  # no reason not to serve
        discard_stdout()
        if not isinstance(error, BrokenPipeError):  # its reader has closed it, as it may
            logger.warning("cannot write to stdout where it listens: %s", error.strerror or error)


def _tls(options: Mapping[str, Any]) -> TLS | None:
    """Return what to serve TLS with, None for none."""
    given = {name: options[f"ssl_{name}"] for name in ("certfile", "keyfile", "keyfile_password", "ca_certs")}
    if given["certfile"] is None:
        if any(given.values()):
            raise Mistake("TLS needs a certificate: --ssl-certfile")
        return None
    return TLS(
        given["certfile"],
        key=given["keyfile"],
        password=given["keyfile_password"],
        client_ca=given["ca_certs"],
        client_cert=options["ssl_cert_reqs"],
        ciphers=options["ssl_ciphers"],
        min_version=options["ssl_version_min"],
        poll=options["ssl_reload_interval"] or None,
        num_tickets=0,  # a client that closes with session tickets unread resets the connection
    )


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
