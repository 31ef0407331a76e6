"""The shell command `send`: text or stdin to an endpoint, and the replies to stdout."""

import asyncio
import contextlib
import os
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable

import click

from aioecho import client
from aioecho.cli.console import Mistake, discard_stdout
from aioecho.cli.objects import framing_option
from aioecho.exceptions import AioechoError
from aioecho.framing import Framing, Lines

__all__ = ["send_command"]


@click.command("send", short_help="Send text or stdin to a server, and write what comes back.")
@click.argument("endpoint")
@click.argument("text", required=False)
@click.option("--tls", is_flag=True, help="Speak TLS.")
@click.option(
    "--ca",
    type=click.Path(),
    metavar="FILE",
    help="Trust this certificate authority (PEM), not the system's. Implies --tls.",
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, metavar="SECONDS",
              help="Limit for connecting, and then for silence once all is sent.")  # fmt: skip
@framing_option("Send TEXT, or every line of stdin, as a frame, and write every frame that comes as a line.")
def send_command(
    endpoint: str, text: str | None, tls: bool, ca: str | None, timeout: float, framing: Framing | None
) -> None:
    """Send TEXT, or the lines of stdin, to ENDPOINT, and write to stdout what comes back.

    \b
        python -m aioecho send tcp://127.0.0.1:9999 "Hello, Server!"
        printf 'one\\ntwo\\n' | python -m aioecho send unix:app.sock

    ENDPOINT is tcp://HOST:PORT or unix:PATH, or for datagrams udp://HOST:PORT or unixgram:PATH.

    It ends when the server closes. Over TLS it also ends once as many lines have come as were sent; the last line needs its
    newline there. Each line is one datagram where ENDPOINT is for datagrams, and it ends when as many have come back. With
    --framing frames are counted in the place of lines.

    The exit status is 0 if all went well, 1 if there was no connection, or it broke, or nothing came, 2 for a mistake on
    the command line.
    """
    context = None
    if tls or ca is not None:
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise Mistake(f"cannot use {ca}: {error.strerror or error}") from error
    show: Callable[[bytes], None]
    if framing is None:
        requests, show = _stdin() if text is None else _one(os.fsencode(text) + b"\n"), _write_out
    else:
        requests, show = _split_lines(_stdin()) if text is None else _one(os.fsencode(text)), _write_line
    try:
        asyncio.run(client.exchange(endpoint, requests, show, ssl=context, timeout=timeout, framing=framing))
    except AioechoError as error:  # some are ValueErrors too: before those
        raise click.ClickException(str(error)) from error
    except ValueError as error:
        raise Mistake(str(error)) from error
    except _StdoutClosed:  # by `head`, for example
        discard_stdout()
        sys.exit(1)
    except _CannotWrite as error:
        discard_stdout()
        raise click.ClickException(f"cannot write to stdout: {error}") from error
    except TimeoutError as error:
        why = f": {error}" if str(error) else ""
        raise click.ClickException(f"{endpoint} has sent nothing for {timeout:g} s{why}") from error
    except OSError as error:
        raise click.ClickException(f"the connection to {endpoint} broke: {client.explain(error)}") from error


class _StdoutClosed(Exception):
    """The program that read our output has ended, or has closed its side of the pipe."""


class _CannotWrite(Exception):
    """Our output cannot be written; the message says why. Not an OSError, which would look like the connection's."""


def _write_out(data: bytes) -> None:
    if sys.stdout is None:
        raise _CannotWrite("it is closed")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        raise _StdoutClosed from error
    except OSError as error:
        raise _CannotWrite(error.strerror or error) from error


def _write_line(frame: bytes) -> None:
    _write_out(frame + b"\n")


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _split_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of what comes, without their ends; the last may have none."""
    rest = bytearray()
    async for chunk in chunks:
        scanned = len(rest)
        rest += chunk
        lines, used, _ = Lines().split(rest, scanned)
        del rest[:used]
        for line in lines:
            yield line
    if rest:
        yield bytes(rest)


async def _stdin() -> AsyncIterator[bytes]:
    """Yield what comes from stdin, as it comes. A thread reads: an event loop can't wait for a file or every terminal."""
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes] = asyncio.Queue()
    room = threading.Semaphore(16)
    # Not through sys.stdin.buffer: Python aborts if a thread holds its lock when Python ends. It is None if stdin is closed.
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
