"""Opening a way to a server: a stream, or a socket for datagrams, and one line that says why there is none."""

import asyncio
import os
import socket
import ssl as ssl_module
from typing import Any

from aioecho.exceptions import EndpointError
from aioecho.net.endpoints import TCPEndpoint, UDPEndpoint, UnixDatagramEndpoint, UnixEndpoint, parse_endpoint, resolve
from aioecho.net.kernel import set_keepalive
from aioecho.streams.protocol import StreamProtocol
from aioecho.streams.reader import StreamReader
from aioecho.streams.writer import StreamWriter

__all__ = [
    "DatagramAddress",
    "close_stream",
    "connect_datagrams",
    "explain",
    "find_errno",
    "open_connection",
    "open_datagrams",
]

KEEPALIVE = 60.0
"""Seconds until a server that has vanished is noticed by the kernel: as in a server's Timeouts."""


async def open_connection(
    endpoint: str,
    *,
    ssl: ssl_module.SSLContext | None = None,
    server_hostname: str | None = None,
    timeout: float | None = 10.0,
) -> tuple[StreamReader, StreamWriter]:
    """Return a `(reader, writer)` that is connected to `endpoint`, as asyncio's function of that name does.

    Args:
        endpoint: tcp://HOST:PORT or unix:PATH.
        ssl: speak TLS, with this context.
        server_hostname: the name that the certificate must have, if it is not the endpoint's host.
        timeout: seconds for all of it, the TLS handshake too. None waits for ever.

    Raises:
        EndpointError: there is no connection; the message names the endpoint and the reason (system).
        ValueError: no client can connect a stream to `endpoint` (caller).
    """
    where = parse_endpoint(endpoint)
    if not isinstance(where, TCPEndpoint | UnixEndpoint):
        raise ValueError(f"cannot connect to {endpoint}: only to tcp://HOST:PORT and unix:PATH")
    where.check_for_client()
    loop = asyncio.get_running_loop()

    def make_protocol() -> StreamProtocol:
        return StreamProtocol(loop, is_server_side=False)

    try:
        async with asyncio.timeout(timeout):
            if isinstance(where, TCPEndpoint):
                transport, protocol = await loop.create_connection(make_protocol, where.host or "localhost", where.port)
                set_keepalive(transport.get_extra_info("socket"), KEEPALIVE, None)
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
            writer = StreamWriter(protocol.transport, protocol, protocol.reader, loop)
            if ssl is not None:
                host = where.host or "localhost" if isinstance(where, TCPEndpoint) else ""
                await writer.start_tls(ssl, server_hostname=server_hostname or host)
    except TimeoutError as error:
        raise EndpointError(f"cannot connect to {where}: {_explain_timeout(error, timeout)}", error.errno) from error
    except (OSError, UnicodeError) as error:
        raise EndpointError(f"cannot connect to {where}: {explain(error)}", find_errno(error)) from error
    return protocol.reader, writer


async def close_stream(writer: StreamWriter, seconds: float | None) -> None:
    """Close a client's stream in good order, and abort it if that takes longer: over TLS it waits for its peer."""
    writer.close()
    try:
        async with asyncio.timeout(seconds):
            await writer.wait_closed()
    except TimeoutError:
        writer.transport.abort()
    except OSError:  # it broke: closed all the same
        pass


def _explain_timeout(error: TimeoutError, timeout: float | None) -> str:
    return explain(error) if error.errno else f"no answer within {timeout} s"


DatagramAddress = tuple[int, Any]
"""The family and the address of a socket for datagrams."""


async def open_datagrams(
    where: UDPEndpoint | UnixDatagramEndpoint, timeout: float | None
) -> tuple[socket.socket, list[DatagramAddress]]:
    """Return a socket that sends to `where` and receives from there alone, and further addresses of its host.

    `timeout` is for finding the host's addresses.

    Raises:
        EndpointError: there is none; the message names the endpoint and the reason (system).
    """
    addresses: list[DatagramAddress]
    if isinstance(where, UDPEndpoint):
        where = UDPEndpoint(where.host or "localhost", where.port)
        try:
            async with asyncio.timeout(timeout):
                addresses = [(int(family), address) for family, address in await resolve(where)]
        except TimeoutError as error:
            raise EndpointError(f"cannot resolve the host of {where}: no answer within {timeout} s") from error
    else:
        addresses = [(socket.AF_UNIX, where.path)]
    try:
        return connect_datagrams(addresses)
    except OSError as error:
        raise EndpointError(f"cannot connect to {where}: {explain(error)}", error.errno) from error


def connect_datagrams(addresses: list[DatagramAddress]) -> tuple[socket.socket, list[DatagramAddress]]:
    """Return a socket that is connected to the first of `addresses` for which that can be done, and the ones after it.

    Raises:
        OSError: it can be done for none: the error of the first.
    """
    failure: OSError | None = None
    for at, (family, address) in enumerate(addresses, 1):
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            try:
                sock.setblocking(False)
                if family == socket.AF_UNIX:
                    sock.bind("")  # to a name that the kernel chooses: a server cannot reply to a socket without a name
                sock.connect(address)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            failure = failure or error
        else:
            return sock, addresses[at:]
    assert failure is not None
    raise failure


def find_errno(error: BaseException) -> int | None:
    """Return the system's number of an error, None if it has none: OpenSSL has numbers of its own."""
    return None if isinstance(error, ssl_module.SSLError) else getattr(error, "errno", None)


def explain(error: BaseException) -> str:
    """Return in one line why a connection failed."""
    if isinstance(error, ssl_module.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl_module.SSLError):  # its errno is OpenSSL's own, its reason like WRONG_VERSION_NUMBER
        reason = getattr(error, "reason", None) or str(error)  # one that Python code raises has none
        return f"the server sent a TLS alert: {reason}" if "ALERT" in reason else f"no TLS there: {reason}"
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    number = getattr(error, "errno", None)
    # Not strerror: asyncio packs "Multiple exceptions: ..." or "Connect call failed ('127.0.0.1', 9)" into it.
    return os.strerror(number) if number else str(error) or type(error).__name__
