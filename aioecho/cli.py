"""The command line: ``python -m aioecho``. Nothing else in the package prints."""

import asyncio
import contextlib
import importlib
import logging
import os
import platform
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import click

from aioecho import __version__, client
from aioecho.config import Limits
from aioecho.echo import DATAGRAM_HANDLERS, HANDLERS
from aioecho.endpoints import parse_endpoint
from aioecho.exceptions import AioechoError
from aioecho.loops import LOOPS, loop_factory
from aioecho.server import DEFAULT_GRACE, BaseServer
from aioecho.serving import are_for_datagrams, serve as make_server
from aioecho.workers import run_server

__all__ = ["main"]

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9999


class _Group(click.Group):
    """Loads `load`, which needs more than the rest, only when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), "load"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "load":
            from aioecho.load_cli import load_command

            return load_command
        return super().get_command(ctx, cmd_name)


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
    if context.invoked_subcommand is None:
        context.invoke(serve)


@main.command()
@click.argument("handler", default="echo")
@click.option(
    "-b", "--bind", "endpoints", multiple=True, metavar="ENDPOINT",
    help="tcp://HOST:PORT, unix:PATH, unix:PATH?mode=660 or fd://N; for datagrams udp://HOST:PORT or unixgram:PATH. May be"
    " repeated. Port 0 is any free one.",
)  # fmt: skip
@click.option("--host", help=f"Listen on this TCP host; the same as --bind.  [default: {DEFAULT_HOST}]")
@click.option("--port", type=click.IntRange(0, 65535), help=f"Listen on this TCP port.  [default: {DEFAULT_PORT}]")
@click.option("--uds", metavar="PATH", help="Listen on this Unix socket.")
@click.option("--fd", type=click.IntRange(0), help="Listen on this inherited descriptor.")
@click.option("--loop", type=click.Choice(LOOPS), default="auto", show_default=True, help="The event loop.")
@click.option("--backlog", type=click.IntRange(1), default=Limits().backlog, show_default=True,
              help="Clients that the kernel queues until they are accepted.")  # fmt: skip
@click.option(
    "--limit-concurrency",
    type=click.IntRange(1),
    help="Connections at once; more clients wait. Of datagrams: handlers, or sessions, at once.",
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

    For each endpoint, a line `listening on ENDPOINT` goes to stdout when it serves; everything else goes to stderr.
    SIGTERM and SIGINT (Ctrl-C) let handlers finish, a second one ends it at once. The exit status is 0 if all could, 1 if
    something was cut off or failed, 2 for a mistake on the command line.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    bind = list(endpoints)
    if uds is not None:
        bind.append(f"unix:{uds}")
    if fd is not None:
        bind.append(f"fd://{fd}")
    if host is not None or port is not None or not bind:
        host = DEFAULT_HOST if host is None else host
        bind.append(f"tcp://{f'[{host}]' if ':' in host else host}:{DEFAULT_PORT if port is None else port}")
    context = _tls_context(ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs)
    try:
        for_datagrams = are_for_datagrams(*bind)
    except ValueError as error:
        raise _Mistake(str(error)) from error
    ready_made = DATAGRAM_HANDLERS if for_datagrams else HANDLERS
    # Apart: what the user's own module raises comes with a traceback.
    handler_class = find_handler(handler, app_dir, ready_made)
    try:
        limits = Limits(backlog=backlog, max_connections=limit_concurrency)
        if for_datagrams and limit_concurrency is not None:
            limits = Limits(max_handlers=limit_concurrency, max_sessions=limit_concurrency)
        server = make_server(handler_class, *bind, ssl=context, limits=limits, grace=grace)
        loop_factory(loop)
    except (ImportError, TypeError, ValueError) as error:
        raise _Mistake(str(error)) from error
    try:
        report = run_server(server, loop=loop, when_serving=_announce)
    except AioechoError as error:
        raise click.ClickException(str(error)) from error
    if report.cancelled or report.aborted:
        sys.exit(1)


def _announce(server: BaseServer) -> None:
    try:
        for name in server.names:
            click.echo(f"listening on {name}")
    except BrokenPipeError:
        _forget_stdout()  # nobody reads it: no reason not to serve


def _forget_stdout() -> None:
    """Let what is still buffered for stdout go nowhere, since Python would complain when it can't write it at its end."""
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
        reason = getattr(error, "strerror", None) or error
        raise _Mistake(f"cannot use {certfile}{f' with {keyfile}' if keyfile else ''}: {reason}") from error
    if ca_certs is not None:
        try:
            context.load_verify_locations(ca_certs)
        except OSError as error:
            raise _Mistake(f"cannot use {ca_certs}: {error.strerror or error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@main.command()
@click.argument("endpoint")
@click.argument("text", required=False)
@click.option("--tls", is_flag=True, help="Speak TLS.")
@click.option("--ca", type=click.Path(), help="Trust this certificate authority (PEM). Implies --tls.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, metavar="SECONDS",
              help="For connecting; and then for silence, once all is sent.")  # fmt: skip
def send(endpoint: str, text: str | None, tls: bool, ca: str | None, timeout: float) -> None:
    """Send TEXT, or the lines of stdin, to ENDPOINT, and write to stdout what comes back.

    It ends when the server closes; with TLS also once as many lines have come as were sent. The exit status is 1 if there
    was no connection, or it broke, or nothing came.
    """
    context = None
    if tls or ca is not None:
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise _Mistake(f"cannot use {ca}: {error.strerror or error}") from error
    try:
        parse_endpoint(endpoint)
        asyncio.run(_send(endpoint, text, context, timeout))
    except ValueError as error:
        raise _Mistake(str(error)) from error
    except AioechoError as error:
        raise click.ClickException(str(error)) from error
    except _NobodyReads:  # as `head`, which has seen enough
        _forget_stdout()
        sys.exit(1)
    except TimeoutError as error:
        raise click.ClickException(f"{endpoint} has sent nothing for {timeout:g} s") from error
    except OSError as error:
        raise click.ClickException(f"the connection to {endpoint} broke: {client.explain(error)}") from error


async def _send(endpoint: str, text: str | None, context: ssl.SSLContext | None, timeout: float) -> None:
    reader, writer = await client.connect(endpoint, ssl=context, timeout=timeout)
    requests = _stdin() if text is None else _one(os.fsencode(text) + b"\n")
    await client.exchange(reader, writer, requests, _write_out, timeout=timeout)


class _NobodyReads(Exception):
    """Whoever read our output has left."""


def _write_out(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        raise _NobodyReads from error


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
