"""What a client talks through: a Connection, which is a stream's."""

import asyncio
from abc import ABC, abstractmethod
from asyncio import IncompleteReadError
from collections.abc import Callable
from types import TracebackType
from typing import Self

from aioecho.client.opening import close_stream, explain, find_errno
from aioecho.exceptions import ConnectionClosed, ConnectionTimeout, FrameTooLong, FramingError
from aioecho.framing import Framing
from aioecho.streams.reader import StreamReader
from aioecho.streams.writer import StreamWriter

__all__ = ["MAX_FRAME", "Connection", "StreamConnection"]

MAX_FRAME = 2**24
"""Bytes of a frame that a client accepts where the framing has no `max_size`: as many as a server does."""

CLOSING = 2.0
"""Seconds that close() waits for a server that does not read, or over TLS does not say goodbye."""

Match = Callable[[bytes], object]


class Connection(ABC):
    """A connection to a server, as :func:`connect` gives it. A message is a frame of its framing, or a datagram.

    ``async for message in connection`` gives messages until the server closes. It raises as :meth:`receive` does, but where the
    stream ends between two messages. As a context manager it is closed at the end of the block.

    To cancel :meth:`receive` loses no message: the next call gives it.
    """

    def __init__(self, endpoint: str, timeout: float | None) -> None:
        self.endpoint = endpoint
        """The endpoint string of the server."""

        self.timeout = timeout
        """Seconds that one call of send(), receive() or ask() may take. None: as long as it takes. It may be set."""

    @property
    def reader(self) -> StreamReader:
        """The stream that comes, as asyncio's. Raises RuntimeError for datagrams."""
        raise RuntimeError(f"there is no stream from {self.endpoint}: receive() gives datagrams")

    @property
    def writer(self) -> StreamWriter:
        """The stream that goes, as asyncio's. Raises RuntimeError for datagrams."""
        raise RuntimeError(f"there is no stream to {self.endpoint}: send() sends datagrams")

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send a message; without a framing, the bytes. Wait while the server reads too slowly.

        That it returns does not mean that the server has it: only a reply does.

        Raises:
            ConnectionClosed: the connection has ended (peer, system).
            ConnectionTimeout: the server did not read for `timeout` seconds. Part of the message may have gone (peer).
            EndpointError: no server receives datagrams there (system).
            ValueError: the framing cannot write this message (caller).
        """

    @abstractmethod
    async def receive(self) -> bytes:
        """Return the next message.

        Raises:
            ConnectionClosed: the server has closed, also in the middle of a message, or the connection broke (peer, system).
            ConnectionTimeout: no whole message came for `timeout` seconds. The connection can be used on (peer).
            FrameTooLong: the message is too long: give the framing a larger `max_size`. The next call skips it (peer).
            FramingError: what came is no message of the framing (peer).
            EndpointError: no server receives datagrams there (system).
            RuntimeError: another task receives already, or a stream has no framing (caller).
        """

    @abstractmethod
    async def ask(
        self, data: bytes, *, timeout: float | None = None, retries: int = 0, match: Match | None = None
    ) -> bytes:
        """Send a message and return the next that comes: the reply. Tasks that ask at the same time take turns.

        On a stream a request is sent once. Where no reply comes the connection is aborted, as a late one would be the reply to
        the next request. A datagram may be lost: with `retries` it is sent again so many times.

        Args:
            data: the request.
            timeout: seconds for the reply; for datagrams, of every attempt. None: the connection's, and 2 for datagrams if it
                has none.
            retries: for datagrams alone: how many times the request is sent again. The server must not mind to get it twice.
            match: for datagrams alone: tells whether a datagram is the reply. Without it the next is, and datagrams that had
                come before are dropped. A late reply to an earlier request is told from this one's by `match` alone.

        Raises:
            Exception: as send() and receive().
        """

    @abstractmethod
    async def close(self) -> None:
        """Close in good order: what was sent goes out first. After 2 seconds the connection is aborted. Does not raise."""

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    async def __anext__(self) -> bytes: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class StreamConnection(Connection):
    """A connection of bytes, and of messages if there is a framing."""

    def __init__(
        self,
        endpoint: str,
        reader: StreamReader,
        writer: StreamWriter,
        framing: Framing | None,
        timeout: float | None,
    ) -> None:
        super().__init__(endpoint, timeout)
        self._reader = reader
        self._writer = writer
        self._framing = framing
        self._frames = None if framing is None else reader.frames(framing.limited(MAX_FRAME))
        self._turn = asyncio.Lock()
        self._is_closed = self._has_received = False

    @property
    def reader(self) -> StreamReader:
        """The stream that comes. What :meth:`receive` has returned is not in it any more."""
        return self._reader

    @property
    def writer(self) -> StreamWriter:
        """The stream that goes. :meth:`send` writes to it."""
        return self._writer

    async def send(self, data: bytes) -> None:
        """Write a message, or bytes if there is no framing: see :meth:`Connection.send`."""
        await self._send(data if self._framing is None else self._framing.join(data), self.timeout)

    async def _send(self, joined: bytes, timeout: float | None) -> None:
        if self._is_closed:
            raise ConnectionClosed(f"the connection to {self.endpoint} was closed by this program")
        self._writer.write(joined)
        try:
            async with asyncio.timeout(timeout):
                await self._writer.drain()
        except OSError as error:
            raise self._explain(error, timeout, "did not read what was sent") from error

    async def receive(self) -> bytes:
        """Return the next frame: see :meth:`Connection.receive`."""
        try:
            return await self._receive(self.timeout)
        except StopAsyncIteration:
            raise self._explain_end() from None

    async def __anext__(self) -> bytes:
        return await self._receive(self.timeout)

    async def _receive(self, timeout: float | None) -> bytes:
        """Return the next frame. Raises StopAsyncIteration where the stream has ended, and what receive() raises."""
        if self._frames is None:
            raise self._explain_no_framing()
        try:
            # A timer for every message, but only where a timeout was asked for: a client has few connections.
            if timeout is None:
                frame = await anext(self._frames)
            else:
                async with asyncio.timeout(timeout):
                    frame = await anext(self._frames)
        except IncompleteReadError as error:
            raise ConnectionClosed(
                f"{self.endpoint} closed the connection in the middle of a message, after {len(error.partial)} bytes",
                partial=error.partial,
            ) from error
        except FrameTooLong as error:
            error.peer = self.endpoint
            raise
        except FramingError as error:
            error.message = error.message.replace("the peer", self.endpoint, 1)
            raise
        except OSError as error:
            raise self._explain(error, timeout, "sent no whole message") from error
        self._has_received = True
        return frame

    async def ask(
        self, data: bytes, *, timeout: float | None = None, retries: int = 0, match: Match | None = None
    ) -> bytes:
        """Send a frame and return the next: see :meth:`Connection.ask`."""
        if retries or match is not None:
            raise ValueError(
                f"retries and match are for datagrams: what is sent to {self.endpoint} arrives in order, or the"
                " connection breaks"
            )
        if self._framing is None:
            raise self._explain_no_framing()
        joined = self._framing.join(data)
        timeout = self.timeout if timeout is None else timeout
        async with self._turn:
            if self._reader.is_awaited():  # before the request is sent: the other task would get the reply
                raise RuntimeError(f"another task receives from {self.endpoint} already")
            try:
                async with asyncio.timeout(timeout) as limit:
                    await self._send(joined, None)
                    return await self._receive(None)
            except StopAsyncIteration:
                raise self._explain_end() from None
            except (FrameTooLong, FramingError):  # it is the reply, and will be skipped
                raise
            except BaseException as error:
                self._abort()
                if isinstance(error, TimeoutError) and limit.expired():
                    raise self._explain(error, timeout, "sent no reply") from error
                raise

    def _explain(self, error: OSError, timeout: float | None, what: str) -> ConnectionClosed | ConnectionTimeout:
        """Return the error to raise in place of a loop's."""
        if isinstance(error, TimeoutError) and error.errno is None and timeout is not None:
            return ConnectionTimeout("timeout", timeout, f"{self.endpoint} {what} within {timeout:g} s")
        if error.errno is None and not str(error).strip():
            return self._explain_end()
        return ConnectionClosed(f"the connection to {self.endpoint} broke: {explain(error)}", find_errno(error))

    def _explain_end(self) -> ConnectionClosed:
        if self._is_closed:
            return ConnectionClosed(f"the connection to {self.endpoint} was closed by this program")
        # So ends a server that refused the client: with TLS 1.3 no loop tells the peer why (3.13, uvloop 0.23).
        what = "" if self._has_received else " without a message"
        return ConnectionClosed(f"{self.endpoint} closed the connection{what}")

    def _explain_no_framing(self) -> RuntimeError:
        return RuntimeError(
            f"nothing tells where a message from {self.endpoint} ends: connect with a framing, such as"
            " framing=aioecho.framing.Lines(), or read from its reader"
        )

    def _abort(self) -> None:
        self._is_closed = True
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close in good order, for 2 seconds at most: see :meth:`Connection.close`."""
        self._is_closed = True
        await close_stream(self._writer, CLOSING)
