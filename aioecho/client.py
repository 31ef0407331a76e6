"""Talking to a server: a stream pair connected to an endpoint, and the exchanges that ``aioecho send`` does."""

import asyncio
import os
import socket
import ssl as ssl_module
from collections.abc import AsyncIterator, Callable
from typing import Any

from aioecho.exceptions import EndpointError
from aioecho.net.endpoints import TCPEndpoint, UDPEndpoint, UnixDatagramEndpoint, UnixEndpoint, parse_endpoint, resolve
from aioecho.streams.protocol import StreamProtocol, StreamWriter
from aioecho.streams.reader import StreamReader

__all__ = ["connect", "exchange", "exchange_datagrams", "explain"]


async def connect(
    endpoint: str,
    *,
    ssl: ssl_module.SSLContext | None = None,
    server_hostname: str | None = None,
    timeout: float | None = 10.0,
) -> tuple[StreamReader, StreamWriter]:
    """Return a `(reader, writer)` that is connected to `endpoint`.

    Args:
        endpoint: tcp://HOST:PORT or unix:PATH.
        ssl: speak TLS, with this context.
        server_hostname: the name that the certificate must have, if not the endpoint's host.
        timeout: seconds for all of it, the TLS handshake too. None is for ever.

    Raises:
        EndpointError: there is no connection; the message names the endpoint and the reason.
        ValueError: it is not an endpoint that one can connect to.
    """
    where = parse_endpoint(endpoint)
    loop = asyncio.get_running_loop()

    def make_protocol() -> StreamProtocol:
        return StreamProtocol(loop, is_server_side=False)

    try:
        async with asyncio.timeout(timeout):
            if not isinstance(where, TCPEndpoint | UnixEndpoint):
                raise ValueError(f"cannot connect to {endpoint}: only to tcp://HOST:PORT and unix:PATH")
            if isinstance(where, TCPEndpoint):
                _, protocol = await loop.create_connection(make_protocol, where.host or "localhost", where.port)
            else:
                # Not left to the loop: uvloop can't connect to an abstract name (0.23).
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    sock.setblocking(False)
                    await loop.sock_connect(sock, where.path)
                    _, protocol = await loop.create_unix_connection(make_protocol, sock=sock)
                except BaseException:
                    sock.close()
                    raise
            writer = protocol.make_writer()
            if ssl is not None:
                host = where.host or "localhost" if isinstance(where, TCPEndpoint) else ""
                await writer.start_tls(ssl, server_hostname=server_hostname or host)
    except TimeoutError as error:
        raise EndpointError(f"cannot connect to {where}: no answer within {timeout} s") from error
    except (OSError, UnicodeError) as error:
        raise EndpointError(f"cannot connect to {where}: {explain(error)}", getattr(error, "errno", None)) from error
    return protocol.reader, writer


async def exchange(
    reader: StreamReader,
    writer: StreamWriter,
    requests: AsyncIterator[bytes],
    show: Callable[[bytes], Any],
    *,
    timeout: float | None,
) -> None:
    """Send all `requests` and `show` whatever comes, meanwhile and after, until the server closes.

    Where the sending side alone can't be closed, which is TLS, the exchange ends once as many lines have come as were sent;
    but not if the last of them has no end: nothing tells what its reply is, or the server that it was all.

    Raises:
        TimeoutError: all was sent, and then nothing came for `timeout` seconds. It has a message if that last line was the
            cause.
        OSError: the connection broke; or it was closed and nothing had come, though something was sent.
    """
    lines_owed = 0
    has_sent = has_received = is_unfinished = False
    all_is_sent = asyncio.Event()

    async def send() -> None:
        nonlocal has_sent, is_unfinished, lines_owed
        async for request in requests:
            has_sent = True
            lines_owed += request.count(b"\n")
            is_unfinished = not request.endswith(b"\n")
            writer.write(request)
            await writer.drain()
        all_is_sent.set()
        if writer.can_write_eof():
            writer.write_eof()
        elif has_received and lines_owed <= 0 and not is_unfinished:
            reader.feed_eof()  # all has come before it was known to be all

    async def receive() -> None:
        nonlocal has_received, lines_owed
        while True:
            async with asyncio.timeout(timeout if all_is_sent.is_set() else None) as silence:
                # The clock starts when there is nothing left to send, also in the middle of this wait.
                starter = asyncio.create_task(_start_clock(all_is_sent, silence, timeout))
                try:
                    data = await reader.read(2**16)
                finally:
                    starter.cancel()
            if not data:
                if not has_received and (has_sent or not all_is_sent.is_set()):
                    # As a server does that has refused us: with TLS 1.3 no loop tells the peer why (3.13, uvloop 0.23).
                    raise ConnectionError("it was closed without an answer")
                return
            has_received = True
            show(data)
            lines_owed -= data.count(b"\n")
            if all_is_sent.is_set() and lines_owed <= 0 and not is_unfinished and not writer.can_write_eof():
                return

    sending = asyncio.create_task(send())
    try:
        await receive()
    except TimeoutError:
        if not is_unfinished or writer.can_write_eof():
            raise
        raise TimeoutError("the last line was sent without its end, which over TLS has to be a newline") from None
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()


async def exchange_datagrams(
    endpoint: str, requests: AsyncIterator[bytes], show: Callable[[bytes], Any], *, timeout: float | None
) -> None:
    """Send each line of `requests` as a datagram, and `show` each that comes back, until there are as many as were sent.

    Nothing is sent again that was lost.

    Args:
        endpoint: udp://HOST:PORT or unixgram:PATH.

    Raises:
        TimeoutError: all was sent, and then nothing came for `timeout` seconds, though replies were missing.
        EndpointError: there is no such host or path.
        OSError: nobody is there, or a line is longer than a datagram may be.
        ValueError: it is not an endpoint for datagrams.
    """
    where = parse_endpoint(endpoint)
    if isinstance(where, UDPEndpoint):
        where = UDPEndpoint(where.host or "localhost", where.port)
        family, address = (await resolve(where))[0]
    elif isinstance(where, UnixDatagramEndpoint):
        family, address = socket.AF_UNIX, where.path
    else:
        raise ValueError(f"cannot send datagrams to {endpoint}: only to udp://HOST:PORT and unixgram:PATH")
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        if family == socket.AF_UNIX:
            sock.bind("")  # to a name that the kernel chooses: without one nobody could reply
        try:
            sock.connect(address)
        except OSError as error:
            raise EndpointError(f"cannot connect to {where}: {explain(error)}", error.errno) from error
        await _exchange_datagrams(sock, requests, show, timeout)


async def _exchange_datagrams(
    sock: socket.socket, requests: AsyncIterator[bytes], show: Callable[[bytes], Any], timeout: float | None
) -> None:
    loop = asyncio.get_running_loop()
    owed = 0
    all_is_sent = asyncio.Event()

    async def send() -> None:
        nonlocal owed
        rest = b""
        async for chunk in requests:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                owed += 1
                await loop.sock_sendall(sock, line + b"\n")
        if rest:
            owed += 1
            await loop.sock_sendall(sock, rest)
        all_is_sent.set()

    async def receive() -> None:
        nonlocal owed
        while owed or not all_is_sent.is_set():
            async with asyncio.timeout(timeout if all_is_sent.is_set() else None) as silence:
                starter = asyncio.create_task(_start_clock(all_is_sent, silence, timeout))
                try:
                    data = await loop.sock_recv(sock, 2**16)
                finally:
                    starter.cancel()
            show(data)
            owed -= 1

    sending, receiving = asyncio.create_task(send()), asyncio.create_task(receive())
    try:
        # If nothing was sent there is nothing to wait for.
        await asyncio.wait([sending, receiving], return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
        if owed or receiving.done():
            await receiving
            await sending
    finally:
        for task in (sending, receiving):
            task.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)


async def _start_clock(event: asyncio.Event, clock: asyncio.Timeout, seconds: float | None) -> None:
    await event.wait()
    if clock.when() is None and seconds is not None:
        clock.reschedule(asyncio.get_running_loop().time() + seconds)


def explain(error: BaseException) -> str:
    """Return in one line why a connection failed."""
    if isinstance(error, ssl_module.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl_module.SSLError):  # its errno is OpenSSL's own, its reason like WRONG_VERSION_NUMBER
        return f"no TLS there: {error.reason or error}"
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    number = getattr(error, "errno", None)
    # Not strerror: asyncio packs "Multiple exceptions: ..." or "Connect call failed ('127.0.0.1', 9)" into it.
    return os.strerror(number) if number else str(error) or type(error).__name__
