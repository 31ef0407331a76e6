"""The exchange that ``aioecho send`` does: all requests go to a server, and all that comes back is shown meanwhile."""

import asyncio
import ssl as ssl_module
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Protocol

from aioecho.client.connecting import connect
from aioecho.client.connection import Connection
from aioecho.client.datagrams import DatagramConnection
from aioecho.framing import Framing

__all__ = ["exchange"]


async def exchange(
    endpoint: str,
    requests: AsyncIterator[bytes],
    show: Callable[[bytes], Any],
    *,
    ssl: ssl_module.SSLContext | None = None,
    timeout: float | None = 10.0,
    framing: Framing | None = None,
) -> None:
    """Send all `requests` to `endpoint` and call `show` with everything that comes back, meanwhile and afterwards.

    A stream ends when the server closes it. TLS cannot close the sending side alone, so there the exchange also ends once as
    many lines have come as were sent; but not if the last line was sent without its end, because then nothing tells which
    reply is the last.

    Over datagrams every line of the requests is one datagram. The exchange ends once as many datagrams have come as were sent.
    A lost datagram is not sent again.

    With a `framing` every request is one frame, and so is every reply. Over TLS the exchange also ends once as many
    frames have come as were sent. A frame that comes may have 16 MiB, or the framing's own `max_size`.

    Args:
        endpoint: tcp://HOST:PORT or unix:PATH; for datagrams udp://HOST:PORT or unixgram:PATH.
        requests: bytes in pieces of any size, sent as they come; with a framing, frames.
        show: gets bytes as they were read: any part of a stream, or one datagram; with a framing, one frame.
        ssl: speak TLS, with this context.
        timeout: seconds for connecting, and for silence once all was sent. None waits for ever.
        framing: what makes bytes of a frame, and frames of the bytes that come. For streams alone.

    Raises:
        TimeoutError: all was sent, and then nothing came for `timeout` seconds. The message, if there is one, says why (peer).
        EndpointError: there is no connection; the message names the endpoint and the reason (system).
        OSError: the connection broke, or closed without an answer to what was sent, or in the middle of a frame, or a line is
            too long for a datagram.
        FrameTooLong, FramingError: what came is no frame, or too long for one (peer). They are ValueErrors too.
        ValueError: no client can connect to `endpoint`, or TLS or a framing was asked for datagrams, or the framing has no
            way to write a request (caller).
    """
    connection = await connect(endpoint, framing=framing, tls=ssl or False, connect_timeout=timeout)
    channel: _Channel
    if isinstance(connection, DatagramConnection):
        channel = _Datagrams(connection)
    else:
        channel = _Stream(connection) if framing is None else _FramedStream(connection)
    try:
        await _pump(channel, requests, show, timeout)
    except TimeoutError as error:
        if reason := channel.explain_silence():
            raise TimeoutError(reason) from error
        raise
    finally:
        await channel.close()


class _Channel(Protocol):
    """What an exchange goes through: a stream, or a socket for datagrams."""

    async def send(self, data: bytes) -> None:
        """Send the next piece of the requests."""

    async def end(self) -> None:
        """Send what is still held back, and tell the server, if it can be told, that this was all."""

    async def receive(self) -> bytes | None:
        """Return what came next, None if the server closed."""

    def is_complete(self) -> bool:
        """Tell whether all replies to what was sent have come, as far as it can be known before the server closes."""

    def explain_silence(self) -> str:
        """Return why the server may be silent, if anything is known."""

    async def close(self) -> None:
        """Close the connection."""


async def _pump(
    channel: _Channel, requests: AsyncIterator[bytes], show: Callable[[bytes], Any], timeout: float | None
) -> None:
    """Send and receive at the same time. Silence is limited to `timeout` seconds from the moment that all was sent."""
    loop = asyncio.get_running_loop()
    silence: asyncio.Timeout | None = None

    async def send() -> None:
        async for request in requests:
            await channel.send(request)
        await channel.end()

    async def receive() -> None:
        nonlocal silence
        while not (sending.done() and channel.is_complete()):
            async with asyncio.timeout(timeout if sending.done() else None) as silence:
                data = await channel.receive()
            if data is None:
                return
            show(data)

    sending, receiving = asyncio.create_task(send()), asyncio.create_task(receive())
    try:
        await asyncio.wait([sending, receiving], return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
            if channel.is_complete() and not receiving.done():
                return
            if silence is not None and timeout is not None and not receiving.done():
                silence.reschedule(loop.time() + timeout)  # receive() is inside this wait: it awaits nothing else
        await receiving
    finally:
        for task in (sending, receiving):
            task.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)


class _Stream:
    """A stream: TCP, Unix or TLS."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._writer = connection.writer
        self._owed = 0
        self._has_sent = self._has_ended = self._has_received = self._is_unfinished = False

    async def send(self, data: bytes) -> None:
        """Write data, and wait while the buffer is over high water. A lost connection is for `receive` to report."""
        self._has_sent = True
        self._owed += data.count(b"\n")
        self._is_unfinished = not data.endswith(b"\n")
        with suppress(OSError):  # receive() meets the same, and what came before it
            await self._connection.send(data)

    async def end(self) -> None:
        """Write EOF where the transport can: over TLS it cannot."""
        self._has_ended = True
        with suppress(OSError):
            if self._writer.can_write_eof():
                self._writer.write_eof()

    async def receive(self) -> bytes | None:
        """Return what comes next, 64 KiB at most, or None at the end of the stream.

        Raises ConnectionError if the server closes without an answer, and the transport's OSError if the connection is lost.
        """
        if data := await self._connection.reader.read(2**16):
            self._has_received = True
            self._owed -= data.count(b"\n")
            return data
        self._check_end()
        return None

    def _check_end(self) -> None:
        """Raise ConnectionError if the server closed without an answer."""
        if not self._has_received and (self._has_sent or not self._has_ended):
            # So ends a server that refused the client: with TLS 1.3 no loop tells the peer why (3.13, uvloop 0.23).
            raise ConnectionError("it was closed without an answer")

    def is_complete(self) -> bool:
        """Whether an answer to every line has come, where the server is not told that the requests have ended."""
        return self._has_received and self._owed <= 0 and not self._is_unfinished and not self._writer.can_write_eof()

    def explain_silence(self) -> str:
        """Return why no answer may have come, or an empty string."""
        if self._is_unfinished and not self._writer.can_write_eof():
            return "the last line was sent without its end, which over TLS has to be a newline"
        return ""

    async def close(self) -> None:
        """Close the stream. TLS is aborted: it does not wait for the server's goodbye."""
        self._writer.close()
        if not self._writer.can_write_eof():
            # TLS has told the server that this is the end, and would wait for the server's own; the loop ends now.
            self._writer.transport.abort()


class _FramedStream(_Stream):
    """A stream of which frames are sent and received."""

    async def send(self, data: bytes) -> None:
        """Write a frame, and wait while the buffer is over high water. A lost connection is for `receive` to report."""
        self._has_sent = True
        self._owed += 1
        with suppress(OSError):  # as in _Stream
            await self._connection.send(data)

    async def receive(self) -> bytes | None:
        """Return the next frame, or None at the end of the stream. Raises as _Stream's does, and in the middle of a frame."""
        frame = await anext(self._connection, None)
        if frame is None:
            self._check_end()
            return None
        self._has_received = True
        self._owed -= 1
        return frame


class _Datagrams:
    """A connected socket for datagrams."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rest = b""  # of the requests: the beginning of a line
        self._owed = 0

    async def send(self, data: bytes) -> None:
        """Send every whole line as a datagram, and keep the beginning of the next."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            await self._send_one(line + b"\n")

    async def end(self) -> None:
        """Send the last line if it has no end."""
        if self._rest:
            await self._send_one(self._rest)

    async def _send_one(self, data: bytes) -> None:
        self._owed += 1
        await self._connection.send(data)

    async def receive(self) -> bytes:
        """Return the next datagram."""
        data = await self._connection.receive()
        self._owed -= 1
        return data

    def is_complete(self) -> bool:
        """Whether as many datagrams have come as were sent."""
        return self._owed <= 0

    def explain_silence(self) -> str:
        """Return an empty string: a datagram may be lost anywhere."""
        return ""

    async def close(self) -> None:
        """Close the socket."""
        await self._connection.close()
