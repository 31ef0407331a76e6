"""The command line: ``python -m aioecho``. Nothing else in the package prints."""

import asyncio
import contextlib
import errno
import functools
import importlib
import itertools
import logging
import os
import platform
import signal
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from aioecho import __version__, client
from aioecho.config import Limits
from aioecho.echo import DATAGRAM_HANDLERS, HANDLERS
from aioecho.exceptions import AioechoError
from aioecho.runtime.loops import LOOPS, loop_factory
from aioecho.runtime.stdio import fill_standard_streams
from aioecho.server import are_for_datagrams
from aioecho.server import serve as make_server_for
from aioecho.serving.base import BaseServer
from aioecho.serving.drain import DEFAULT_GRACE
from aioecho.workers.program import check_sessions, run_server, run_workers
from aioecho.workers.worker import SIGNALS

__all__ = ["main"]

logger = logging.getLogger("aioecho.cli")

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9999


class _Group(click.Group):
    """Loads `load`, which needs more than the rest, only when it is named."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _forget_stdout()  # of --help or --version: commands see to what they write themselves
            click.echo(f"Error: cannot write to stdout: {error.strerror}", err=True)
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), "load"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "load":
            from aioecho.cli.load import load_command

            return load_command
        return super().get_command(ctx, cmd_name)


class _Workers(click.IntRange):
    """A number of worker processes, or as many as there are processors."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)

    def get_metavar(self, *args: Any, **options: Any) -> str:
        return self.name


class _Mistake(click.ClickException):
    """The user's, on the command line: one line and exit status 2, without click's reminder of the usage."""

    exit_code = 2


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
        context.invoke(serve)


@main.command()
@click.argument("handler", default="echo")
@click.option(
    "-b", "--bind", "endpoints", multiple=True, metavar="ENDPOINT",
    help="tcp://HOST:PORT, unix:PATH or unix:PATH?mode=660; for datagrams udp://HOST:PORT or unixgram:PATH; for either"
    " fd://N or systemd:NAME. May be repeated. Port 0 is any free one.",
)  # fmt: skip
@click.option("--host", help=f"Listen on this TCP host; short for --bind.  [default: {DEFAULT_HOST}]")
@click.option("--port", type=click.IntRange(0, 65535), help=f"Listen on this TCP port.  [default: {DEFAULT_PORT}]")
@click.option("--uds", metavar="PATH", help="Listen on this Unix socket.")
@click.option("--fd", type=click.IntRange(0), help="Listen on this inherited descriptor.")
@click.option("--workers", type=_Workers(1), default=1, show_default=True,
              help="Processes that serve; auto is one for each processor. They share the sockets.")  # fmt: skip
@click.option("--reuse-port", is_flag=True, help="Give each worker a TCP or UDP socket of its own (SO_REUSEPORT).")
@click.option("--limit-max-requests", type=click.IntRange(1), metavar="N",
              help="Replace a worker process after so many connections.")  # fmt: skip
@click.option("--limit-max-requests-jitter", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Up to so many more than that, chosen for each worker.")  # fmt: skip
@click.option("--loop", type=click.Choice(LOOPS), default="auto", show_default=True, help="The event loop.")
@click.option("--backlog", type=click.IntRange(1), default=Limits().backlog, show_default=True,
              help="Clients that the kernel queues until they are accepted.")  # fmt: skip
@click.option(
    "--limit-concurrency",
    type=click.IntRange(1),
    help="Connections at once, for each process; more clients wait. For datagrams: handlers, or sessions, at once.",
)
@click.option("--timeout-graceful-shutdown", "grace", type=click.FloatRange(0), default=DEFAULT_GRACE, show_default=True,
              metavar="SECONDS", help="What handlers have to finish after SIGTERM or SIGINT.")  # fmt: skip
@click.option("--ssl-certfile", type=click.Path(), help="Serve TLS with this certificate (PEM).")
@click.option("--ssl-keyfile", type=click.Path(), help="Its private key, if it is not in the same file.")
@click.option("--ssl-keyfile-password", help="What the private key is encrypted with.")
@click.option("--ssl-ca-certs", type=click.Path(), help="Ask clients for a certificate that one of these has signed.")
@click.option("--log-level", type=click.Choice(["critical", "error", "warning", "info", "debug"]), default="info",
              show_default=True, help="The least that is logged, to stderr.")  # fmt: skip
@click.option(
    "--app-dir", default=".", show_default=True, metavar="FOLDER", help="Where module:Class is looked for first."
)
def serve(
    handler: str,
    endpoints: tuple[str, ...],
    host: str | None,
    port: int | None,
    uds: str | None,
    fd: int | None,
    workers: int | str,
    reuse_port: bool,
    limit_max_requests: int | None,
    limit_max_requests_jitter: int,
    loop: str,
    backlog: int,
    limit_concurrency: int | None,
    grace: float,
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
    ssl_keyfile_password: str | None,
    ssl_ca_certs: str | None,
    log_level: str,
    app_dir: str,
) -> None:
    """Serve HANDLER: echo (the default), upper, discard, chargen, daytime, time, or a class of yours as module:Class.

    The ready-made ones serve streams or datagrams, as the endpoints are. Never offer them over UDP to a network that you do
    not trust.

    For each endpoint, a line `listening on ENDPOINT` goes to stdout when it serves; everything else goes to stderr.
    SIGTERM and SIGINT (Ctrl-C) let handlers finish, a second one ends it at once. SIGUSR1 logs the stats. With workers,
    SIGHUP replaces them one after another, SIGTTIN and SIGTTOU add and remove one.

    The exit status is 0 if all handlers could finish, 1 if something was cut off or failed, 2 for a mistake on the command
    line.
    """
    supervised = workers != 1 or reuse_port or limit_max_requests is not None
    bind = list(endpoints)
    if uds is not None:
        bind.append(f"unix:{uds}")
    if fd is not None:
        bind.append(f"fd://{fd}")
    if host is not None or port is not None or not bind:
        host = DEFAULT_HOST if host is None else host
        bind.append(f"tcp://{f'[{host}]' if ':' in host else host}:{DEFAULT_PORT if port is None else port}")
    try:
        for_datagrams = are_for_datagrams(*bind)
    except ValueError as error:
        raise _Mistake(str(error)) from error
    make_server = functools.partial(
        _make_server,
        handler=handler,
        for_datagrams=for_datagrams,
        app_dir=str(Path(app_dir).resolve()),
        tls=(ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs),
        limits=(
            {"max_handlers": limit_concurrency, "max_sessions": limit_concurrency}
            if for_datagrams and limit_concurrency is not None
            else {"backlog": backlog, "max_connections": limit_concurrency}
        ),
        grace=grace,
        log_level=log_level.upper(),
        log_format=f"%(asctime)s %(levelname)s %(name)s{'[%(process)d]' if supervised else ''}: %(message)s",
    )
    server = make_server(bind)
    try:
        loop_factory(loop)
        if workers != 1:
            check_sessions(server, reuse_port=reuse_port)
    except (ImportError, ValueError) as error:
        raise _Mistake(str(error)) from error
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
                when_serving=_announce,
            )
        else:
            report = run_server(server, loop=loop, when_serving=lambda server: _announce(server.names))
    except AioechoError as error:
        raise click.ClickException(str(error)) from error
    status = 1 if report.cancelled or report.aborted else 0
    _let_signals_end(status)
    sys.exit(status)


def _let_signals_end(status: int) -> None:
    """All is over: let a signal that comes while Python ends, or waits for a thread of the user's, not change the status."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, lambda *_: os._exit(status))


def _make_server(
    endpoints: list[str],
    *,
    handler: str,
    for_datagrams: bool,
    app_dir: str,
    tls: tuple[str | None, str | None, str | None, str | None],
    limits: dict[str, int | None],
    grace: float,
    log_level: str,
    log_format: str,
) -> BaseServer:
    """Do what the command line says; in each process, as neither modules nor certificates are sent from one to another."""
    logging.basicConfig(level=log_level, format=log_format)
    context = _tls_context(*tls)
    # Apart: what the user's own module raises comes with a traceback.
    handler_class = find_handler(handler, app_dir, DATAGRAM_HANDLERS if for_datagrams else HANDLERS)
    try:
        return make_server_for(handler_class, *endpoints, ssl=context, limits=Limits(**limits), grace=grace)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise _Mistake(str(error)) from error


def _make_server_in_worker(make_server: Callable[[list[str]], BaseServer], endpoints: list[list[str]]) -> BaseServer:
    try:
        return make_server(list(itertools.chain(*endpoints)))
    except _Mistake as error:  # since the start: certificates or a handler that are no longer there
        raise AioechoError(error.message) from error


def _announce(names: Sequence[str]) -> None:
    try:
        for name in names:
            click.echo(f"listening on {name}")
    except OSError as error:  # no reason not to serve
        _forget_stdout()
        if not isinstance(error, BrokenPipeError):  # nobody reads it
            logger.warning("cannot write to stdout where it listens: %s", error.strerror or error)


def _forget_stdout() -> None:
    """Let what is still buffered for stdout go nowhere, since Python would complain when it can't write it at its end."""
    if sys.stdout is None:  # it was closed when Python started
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def find_handler(name: str, folder: str, ready_made: Mapping[str, Any]) -> Any:
    """Return the ready-made handler called `name`, or import it, as "module:Class", from `folder` first.

    Raises:
        _Mistake: there is none; the message says what was looked for and where.
    """
    if name in ready_made:
        return ready_made[name]
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute and all(module_name.split("."))):
        raise _Mistake(
            f"no handler is called {name!r}: the ready-made ones are {', '.join(ready_made)}; for your own say module:Class"
        )
    where = str(Path(folder).resolve())
    sys.path.insert(0, where)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there, and imports something that is not
        raise _Mistake(f"no module {module_name!r} in {where} nor among the installed ones") from error
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            file = getattr(module, "__file__", None) or module_name
            raise _Mistake(f"no {attribute!r} in module {module_name!r} ({file})") from None
    return found


def _tls_context(
    certfile: str | None, keyfile: str | None, password: str | None, ca_certs: str | None
) -> ssl.SSLContext | None:
    if certfile is None:
        if keyfile or ca_certs or password:
            raise _Mistake("TLS needs a certificate: --ssl-certfile")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password OpenSSL would ask for it on the terminal, and stand there.
        context.load_cert_chain(certfile, keyfile, password or "")
    except (OSError, ValueError) as error:
        reason = _explain_certificate(error, certfile, keyfile, password)
        raise _Mistake(f"cannot use {certfile}{f' with {keyfile}' if keyfile else ''}: {reason}") from error
    if ca_certs is not None:
        try:
            context.load_verify_locations(ca_certs)
        except OSError as error:
            raise _Mistake(f"cannot use {ca_certs}: {error.strerror or error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _explain_certificate(error: Exception, certfile: str, keyfile: str | None, password: str | None) -> object:
    """Return why a certificate and its key can't be loaded; OpenSSL calls most of it "PEM lib"."""
    if not isinstance(error, ssl.SSLError):
        return getattr(error, "strerror", None) or error
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the private key is not that of the certificate"
    try:
        certificate, key = Path(certfile).read_bytes(), Path(keyfile or certfile).read_bytes()
    except OSError:  # such as a pipe's, that was read
        return error.strerror or error
    if b"CERTIFICATE-----" not in certificate:
        return f"there is no certificate (PEM) in {certfile}"
    if b"PRIVATE KEY-----" not in key:
        return f"there is no private key (PEM) in {keyfile or certfile}: name its file with --ssl-keyfile"
    if b"ENCRYPTED" in key:
        return (
            "the password is not the private key's"
            if password
            else ("the private key is encrypted: give its password with --ssl-keyfile-password")
        )
    return error.strerror or error


@main.command()
@click.argument("endpoint")
@click.argument("text", required=False)
@click.option("--tls", is_flag=True, help="Speak TLS.")
@click.option(
    "--ca", type=click.Path(), help="Trust this certificate authority (PEM), not the system's. Implies --tls."
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, metavar="SECONDS",
              help="For connecting; and then for silence, once all is sent.")  # fmt: skip
def send(endpoint: str, text: str | None, tls: bool, ca: str | None, timeout: float) -> None:
    """Send TEXT, or the lines of stdin, to ENDPOINT, and write to stdout what comes back.

    ENDPOINT is tcp://HOST:PORT or unix:PATH, or for datagrams udp://HOST:PORT or unixgram:PATH.

    It ends when the server closes; with TLS also once as many lines have come as were sent, the last of which needs its
    newline there. For datagrams each line is one, and it ends when as many have come back.

    The exit status is 0 if all went well, 1 if there was no connection, or it broke, or nothing came, 2 for a mistake on
    the command line.
    """
    context = None
    if tls or ca is not None:
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise _Mistake(f"cannot use {ca}: {error.strerror or error}") from error
    try:
        is_for_datagrams = are_for_datagrams(endpoint)
        if is_for_datagrams and context is not None:
            raise _Mistake(f"no TLS goes to {endpoint}: it is for datagrams")
        asyncio.run(
            _send_datagrams(endpoint, text, timeout) if is_for_datagrams else _send(endpoint, text, context, timeout)
        )
    except ValueError as error:
        raise _Mistake(str(error)) from error
    except AioechoError as error:
        raise click.ClickException(str(error)) from error
    except _NobodyReads:  # as `head`, which has seen enough
        _forget_stdout()
        sys.exit(1)
    except _CannotWrite as error:
        _forget_stdout()
        raise click.ClickException(f"cannot write to stdout: {error}") from error
    except TimeoutError as error:
        why = f": {error}" if str(error) else ""
        raise click.ClickException(f"{endpoint} has sent nothing for {timeout:g} s{why}") from error
    except OSError as error:
        raise click.ClickException(f"the connection to {endpoint} broke: {client.explain(error)}") from error


async def _send(endpoint: str, text: str | None, context: ssl.SSLContext | None, timeout: float) -> None:
    reader, writer = await client.connect(endpoint, ssl=context, timeout=timeout)
    requests = _stdin() if text is None else _one(os.fsencode(text) + b"\n")
    await client.exchange(reader, writer, requests, _write_out, timeout=timeout)


async def _send_datagrams(endpoint: str, text: str | None, timeout: float) -> None:
    requests = _stdin() if text is None else _one(os.fsencode(text) + b"\n")
    await client.exchange_datagrams(endpoint, requests, _write_out, timeout=timeout)


class _NobodyReads(Exception):
    """Whoever read our output has left."""


class _CannotWrite(Exception):
    """Our output can't be written; the message says why. It is no OSError, to be told from the connection's."""


def _write_out(data: bytes) -> None:
    if sys.stdout is None:
        raise _CannotWrite("it is closed")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        raise _NobodyReads from error
    except OSError as error:
        raise _CannotWrite(error.strerror or error) from error


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _stdin() -> AsyncIterator[bytes]:
    """Yield what comes from stdin, as it comes. A thread reads: an event loop can't wait for a file or every terminal."""
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes] = asyncio.Queue()
    room = threading.Semaphore(16)
    # Not through sys.stdin.buffer: Python aborts if at its end a thread is in there. It is None if stdin is closed.
    descriptor = sys.stdin.fileno() if sys.stdin is not None else None

    def read() -> None:
        chunk = b"any"
        with contextlib.suppress(RuntimeError):  # the loop is closed: the program ends
            while chunk:
                room.acquire()
                try:
                    chunk = os.read(descriptor, 2**16) if descriptor is not None else b""
                except OSError:
                    chunk = b""
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

    # A daemon, so that the program can end while it still waits for a line.
    threading.Thread(target=read, daemon=True, name="stdin").start()
    while chunk := await chunks.get():
        room.release()
        yield chunk
