"""Connecting to a server, once or again and again: connect()."""

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from types import TracebackType

from aioecho.client.backoff import Backoff
from aioecho.client.connection import Connection, StreamConnection
from aioecho.client.datagrams import DatagramConnection
from aioecho.client.opening import open_connection, open_datagrams
from aioecho.exceptions import CertificateError, EndpointError
from aioecho.framing import Framing
from aioecho.net.endpoints import TCPEndpoint, UDPEndpoint, UnixDatagramEndpoint, UnixEndpoint, parse_endpoint

__all__ = ["Connecting", "connect"]

logger = logging.getLogger("aioecho.client.connecting")

TrustedBy = bool | str | os.PathLike[str] | ssl.SSLContext


def connect(
    endpoint: str,
    *,
    framing: Framing | None = None,
    tls: TrustedBy = False,
    server_hostname: str | None = None,
    connect_timeout: float | None = 10.0,
    timeout: float | None = None,
    reconnect: Backoff | None = None,
) -> "Connecting":
    """Connect to a server.

    ``async with connect(...) as connection`` gives a :class:`Connection` and closes it at the end of the block; ``await
    connect(...)`` gives one to close.

    ``async for connection in connect(...)`` gives one after another. When the body of the loop is done with a connection, it is
    closed, and after a pause the next is made. No request is sent again: the body decides about what had no reply. A
    connection that lasted for less than `Backoff.cap` counts as a failure, so that there is a pause too where a server accepts
    and closes. Attempts that fail are logged, the first in a row as a WARNING.

    Keep-alive finds a TCP server that has vanished, within a minute. Only `timeout` finds one that is there and silent.

    Args:
        endpoint: tcp://HOST:PORT or unix:PATH; for datagrams udp://HOST:PORT or unixgram:PATH.
        framing: what a message is, an object of aioecho.framing. None: there are `reader` and `writer` alone. A frame that
            comes may have 16 MiB, or the framing's own `max_size`.
        tls: speak TLS. True: trust the system's authorities. A file name: trust the ones in it (PEM). An ssl.SSLContext: as it
            says.
        server_hostname: the name that the certificate must have, if it is not the endpoint's host.
        connect_timeout: seconds for one attempt to connect, the TLS handshake too. None waits for ever.
        timeout: seconds that one send(), receive() or ask() may take. None waits for ever.
        reconnect: pauses between attempts. With one, ``await`` and ``async with`` repeat attempts that fail too, until there is
            a connection. Without it only ``async for`` repeats them, with the pauses of `Backoff()`. A certificate that is not
            accepted is an error at once.

    Raises:
        EndpointError: there is no connection; the message names the endpoint and the reason (system). Awaiting raises it.
        CertificateError: the file that `tls` names cannot be used (caller).
        ValueError: no client can connect to `endpoint`, or the options do not fit it (caller).
    """
    where = parse_endpoint(endpoint)
    if not isinstance(where, TCPEndpoint | UnixEndpoint | UDPEndpoint | UnixDatagramEndpoint) or (
        isinstance(where, TCPEndpoint | UDPEndpoint) and not where.port
    ):
        raise ValueError(
            f"cannot connect to {endpoint}: only to tcp://HOST:PORT, unix:PATH, udp://HOST:PORT and unixgram:PATH, with the"
            " server's port"
        )
    where.check_for_client()
    if framing is not None and not isinstance(framing, Framing):
        raise TypeError(f"framing must be an aioecho.framing.Framing, as Lines(), not {framing!r}")
    if isinstance(where, UDPEndpoint | UnixDatagramEndpoint):
        for name, value in (("TLS", tls), ("a framing", framing)):
            if value:
                raise ValueError(f"{name} is for streams, and {endpoint} is for datagrams")
    context = _load_context(tls)
    if context is None and server_hostname is not None:
        raise ValueError("server_hostname is for TLS: give tls=True too, or the file of an authority")
    if (
        context is not None
        and context.check_hostname
        and server_hostname is None
        and not isinstance(where, TCPEndpoint)
    ):
        raise ValueError(f"{endpoint} has no host name: give the one of its certificate as server_hostname")
    return Connecting(where, framing, context, server_hostname, connect_timeout, timeout, reconnect)


class Connecting:
    """What :func:`connect` returns: it connects when it is awaited, entered or looped over, every time anew."""

    def __init__(
        self,
        where: TCPEndpoint | UnixEndpoint | UDPEndpoint | UnixDatagramEndpoint,
        framing: Framing | None,
        context: ssl.SSLContext | None,
        server_hostname: str | None,
        connect_timeout: float | None,
        timeout: float | None,
        reconnect: Backoff | None,
    ) -> None:
        self._where = where
        self._framing = framing
        self._context = context
        self._server_hostname = server_hostname
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._reconnect = reconnect
        self._is_entered = False
        self._entered: Connection | None = None

    def __await__(self) -> Generator[object, None, Connection]:
        return self._connect(self._reconnect, 0).__await__()

    async def __aenter__(self) -> Connection:
        if self._is_entered:
            raise RuntimeError(
                "it is entered already, and would not know which connection to close: call connect() again"
            )
        self._is_entered = True  # before it waits: another task may enter meanwhile
        try:
            self._entered = await self
        except BaseException:
            self._is_entered = False
            raise
        return self._entered

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection, self._entered = self._entered, None
        self._is_entered = False
        assert connection is not None
        await connection.close()

    def __aiter__(self) -> AsyncIterator[Connection]:
        return self._repeat(self._reconnect or Backoff())

    async def _repeat(self, backoff: Backoff) -> AsyncGenerator[Connection, None]:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            connection = await self._connect(backoff, failures)
            began = loop.time()
            try:
                yield connection
            finally:
                await connection.close()
            # Not 0 once there is a connection: a server that accepts and closes would be asked in a busy loop.
            failures = 1 if loop.time() - began >= backoff.cap else failures + 1
            await asyncio.sleep(backoff.pause(failures))

    async def _connect(self, backoff: Backoff | None, failures: int) -> Connection:
        """Return a connection, after attempts that failed if `backoff` allows them; so many failures came before."""
        attempts = 0
        while True:
            try:
                connection = await self._connect_once()
            except EndpointError as error:
                attempts += 1
                is_last = backoff is not None and backoff.attempts is not None and attempts >= backoff.attempts
                if backoff is None or is_last or isinstance(error.__cause__, ssl.SSLCertVerificationError):
                    raise
                pause = backoff.pause(failures + attempts)
                # The pauses bound how many there are, and further ones say nothing new.
                level = logging.WARNING if attempts == 1 else logging.DEBUG
                logger.log(level, "%s; the next attempt is in %.1f s", error, pause)
            else:
                if attempts:
                    logger.info("connected to %s after %d attempts that failed", connection.endpoint, attempts)
                return connection
            await asyncio.sleep(pause)

    async def _connect_once(self) -> Connection:
        where = self._where
        # Permissions and options are a server's.
        name = where.name if isinstance(where, UnixEndpoint | UnixDatagramEndpoint) else str(where)
        if isinstance(where, UDPEndpoint | UnixDatagramEndpoint):
            return DatagramConnection(name, *await open_datagrams(where, self._connect_timeout), self._timeout)
        reader, writer = await open_connection(
            name, ssl=self._context, server_hostname=self._server_hostname, timeout=self._connect_timeout
        )
        return StreamConnection(name, reader, writer, self._framing, self._timeout)


def _load_context(tls: TrustedBy) -> ssl.SSLContext | None:
    if isinstance(tls, ssl.SSLContext):
        return tls
    if tls is True or tls is False or tls is None:
        return ssl.create_default_context() if tls else None
    try:
        return ssl.create_default_context(cafile=tls)
    except (OSError, TypeError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise CertificateError(f"cannot trust the authorities in {tls}: {reason}") from error
