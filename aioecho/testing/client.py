"""The client's side of a test, in an event loop: `connect()` and what it gives."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar, overload

from aioecho.client.opening import close_stream
from aioecho.serving.base import BaseServer
from aioecho.serving.datagram_handlers import DatagramBatchHandler, DatagramRequestHandler, DatagramSessionHandler
from aioecho.streams.frames import Frames
from aioecho.streams.protocol import StreamProtocol
from aioecho.streams.reader import StreamReader
from aioecho.streams.writer import StreamWriter
from aioecho.testing.servers import (
    Address,
    PortlessServer,
    RecordingServer,
    check_lifespan,
    check_no_address,
    check_portless,
    find_framing,
    is_for_datagrams,
    make_server,
    raising,
)

__all__ = ["TIMEOUT", "Client", "DatagramClient", "connect"]

TIMEOUT = 10.0
"""Seconds that a client waits for what it expects."""

Result = TypeVar("Result")


class _BaseClient:
    """What a client for streams and one for datagrams have in common."""

    def __init__(self, server: BaseServer, client_address: Address, timeout: float | None) -> None:
        self._server: Any = server
        self.client_address = client_address
        self.timeout = timeout

    @property
    def server(self) -> Any:
        """The server, which is a `server_class` if one was given."""
        return self._server

    @property
    def handler(self) -> Any:
        """The handler object of this client; None as long as it was not made. Over datagrams, that of its last datagram.

        It is made before `connect()` yields, but where the client has to write first (with `ssl` or `proxy`), where
        `verify_request()` is a coroutine function, and where the limits let the client wait. The constructor of a blocking
        handler does all the work: its object is here once that has returned.
        """
        handlers = self._server._record.handlers
        return handlers.get(self.client_address, handlers.get(None))  # a batch of datagrams is of no client's address

    async def _within_timeout(self, awaitable: Awaitable[Result], what: str) -> Result:
        """Await something for which the handler has to do its part. If it does not, it "has", for people, done `what`."""
        scope = asyncio.timeout(self.timeout)
        try:
            async with scope:
                return await awaitable
        except TimeoutError:
            if not scope.expired():
                raise
            raise TimeoutError(f"the handler has {what} within {self.timeout:g} seconds") from None


class _TimedFrames:
    """``async for frame in client.frames``."""

    def __init__(self, client: "Client", frames: Frames) -> None:
        self._client = client
        self._frames = frames

    def __aiter__(self) -> "_TimedFrames":
        return self

    async def __anext__(self) -> bytes:
        return await self._client._within_timeout(anext(self._frames), "sent no frame")


class Client(_BaseClient):
    """A client of one handler for streams, as :func:`connect` gives it.

    `reader` and `writer` are streams as a handler has them, without a timeout. Every method that waits for the handler raises
    TimeoutError after `timeout` seconds. `client_address` is what the handler has, a `(host, port)`.
    """

    def __init__(
        self,
        server: BaseServer,
        client_address: Address,
        timeout: float | None,
        reader: StreamReader,
        writer: StreamWriter,
    ) -> None:
        super().__init__(server, client_address, timeout)
        self.reader = reader
        self.writer = writer
        self._frames: _TimedFrames | None = None

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Write `data`, and wait until the handler keeps up. What it has not read is at most what the kernel buffers.

        Raises:
            ConnectionError: the connection is closed.
            TimeoutError: the handler read nothing for `timeout` seconds.
        """
        self.writer.write(data)
        await self._within_timeout(self.writer.drain(), "read nothing")

    async def send_frame(self, frame: bytes) -> None:
        """Send what the `framing` of the handler's class makes of `frame`."""
        await self.send(find_framing(self._server).join(frame))

    async def read(self, n: int = -1) -> bytes:
        """Return at most `n` bytes, as soon as there are any; all up to the end of the stream if `n` is -1.

        b"" is the end of the stream.
        """
        return await self._within_timeout(self.reader.read(n), f"sent no {'end of the stream' if n < 0 else 'bytes'}")

    async def readexactly(self, n: int) -> bytes:
        """Return `n` bytes. Raises IncompleteReadError if the stream ends before."""
        return await self._within_timeout(self.reader.readexactly(n), f"sent no {n} bytes")

    async def readline(self) -> bytes:
        """Return a line with its newline; what there is of it at the end of the stream, and then b""."""
        return await self._within_timeout(self.reader.readline(), "sent no line")

    async def read_frame(self) -> bytes:
        """Return the next frame that the handler sends, by the `framing` of its class.

        Raises IncompleteReadError if the stream ends before, and TypeError if the class has no framing.
        """
        reading = self.reader.readframe(find_framing(self._server))
        return await self._within_timeout(reading, "sent no frame")

    @property
    def frames(self) -> AsyncIterator[bytes]:
        """The frames that the handler sends, by the `framing` of its class: ``await anext(client.frames)``, or a loop.

        Raises TypeError if the class has no framing.
        """
        if self._frames is None:
            self._frames = _TimedFrames(self, self.reader.frames(find_framing(self._server)))
        return self._frames

    def write_eof(self) -> None:
        """End the stream to the handler. What the handler sends can still be read."""
        self.writer.write_eof()

    async def aclose(self) -> None:
        """Close the connection, as a client does that is done. May be called more than once; `connect()` does it too."""
        await close_stream(self.writer, self.timeout)


class DatagramClient(_BaseClient):
    """A client of a handler for datagrams, as :func:`connect` gives it: a UDP socket on the loopback interface.

    `client_address` is its own `(host, port)`, which the handler has too.
    """

    def __init__(self, server: BaseServer, sock: socket.socket, timeout: float | None) -> None:
        super().__init__(server, sock.getsockname(), timeout)
        self.socket = sock

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send one datagram. Raises OSError, EMSGSIZE, if it is too large."""
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive(self) -> bytes:
        """Return the next datagram that a handler has sent to this client.

        Raises:
            TimeoutError: none came for `timeout` seconds.
        """
        receiving = asyncio.get_running_loop().sock_recv(self.socket, 2**16)
        return await self._within_timeout(receiving, "sent no datagram")

    async def ask(self, data: bytes | bytearray | memoryview) -> bytes:
        """Send one datagram, and return the next that comes."""
        await self.send(data)
        return await self.receive()

    async def aclose(self) -> None:
        """Close the socket. May be called more than once; `connect()` does it too."""
        self.socket.close()


@overload
def connect(
    RequestHandlerClass: type[DatagramRequestHandler] | type[DatagramSessionHandler] | type[DatagramBatchHandler],
    **options: Any,
) -> AbstractAsyncContextManager[DatagramClient]: ...


@overload
def connect(
    RequestHandlerClass: Callable[..., Any] | BaseServer, **options: Any
) -> AbstractAsyncContextManager[Client]: ...


def connect(
    RequestHandlerClass: Any,
    *,
    client_address: Address | None = None,
    timeout: float | None = TIMEOUT,
    raise_errors: bool = True,
    **options: Any,
) -> AbstractAsyncContextManager[Any]:
    """Serve a handler in the running event loop, and give a client of it: ``async with connect(Upper) as client``.

    The server is a real one: its hooks, limits, timeouts, framing and drain are what they are elsewhere. Its clients come
    through pairs of Unix sockets, and no port is taken. A handler of datagrams has a UDP port of the loopback interface.

    At the end the client is closed, and the server shut down. Then what a handler has raised is raised, so that it fails the
    test: of several, a group. What the peer or the network causes (a line that is cut, a timeout) is no mistake of the
    handler's, and is not raised. If the test itself fails, its exception gets a note with the handler's traceback.

    Args:
        RequestHandlerClass: anything that a server takes: a handler class of aioecho's or socketserver's, a partial of one,
            or a coroutine function of a reader and a writer. Or the `server` of another client: one more client of that,
            such as a second member of a chat room; it takes no `options`.
        client_address: the `(host, port)` that the handler sees: for what depends on it, as `allow` and `max_per_host`. By
            default a port of 127.0.0.1 that no other client has. Not for datagrams.
        timeout: seconds that the client's methods wait for the handler. None: without end.
        raise_errors: False keeps what handlers raise from failing the test. The log has it.
        options: what the server takes, as `limits`, `timeouts`, `ssl`, `lifespan`, and besides: `server_class`, a class
            of servers that is used, by default TCPServer or UDPServer; `state`, what handlers have as `state`; `grace`, the
            seconds that handlers have to end when the client is gone, by default 1.0. Then they are cancelled, which fails no
            test.

    Raises:
        TypeError, ValueError: an argument makes no sense.
        RuntimeError: the lifespan raised at its end.
        What handlers have raised.
    """
    if isinstance(RequestHandlerClass, BaseServer):
        return _connect_another(check_portless(RequestHandlerClass, options), client_address, timeout, raise_errors)
    if is_for_datagrams(RequestHandlerClass):
        check_no_address(client_address)
        return _serve_datagrams(make_server(("127.0.0.1", 0), RequestHandlerClass, **options), timeout, raise_errors)
    return _serve(make_server(("127.0.0.1", 0), RequestHandlerClass, **options), client_address, timeout, raise_errors)


@contextlib.asynccontextmanager
async def _serve(
    server: PortlessServer, client_address: Address | None, timeout: float | None, raise_errors: bool
) -> AsyncIterator[Client]:
    async with _running(server, raise_errors), _connecting(server, client_address, timeout) as client:
        yield client


@contextlib.asynccontextmanager
async def _connect_another(
    server: PortlessServer, client_address: Address | None, timeout: float | None, raise_errors: bool
) -> AsyncIterator[Client]:
    async with _connecting(server, client_address, timeout) as client:
        address = client.client_address
        with raising(server, raise_errors, address):
            yield client
            await client.aclose()
            await server._pairs.wait_ended(address, server.grace)


@contextlib.asynccontextmanager
async def _serve_datagrams(
    server: RecordingServer, timeout: float | None, raise_errors: bool
) -> AsyncIterator[DatagramClient]:
    async with _running(server, raise_errors):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(server.server_address)
            yield DatagramClient(server, sock, timeout)


@contextlib.asynccontextmanager
async def _running(server: RecordingServer, raise_errors: bool) -> AsyncIterator[None]:
    """Start a server, shut it down, and raise what handlers raised."""
    await server.start()
    with raising(server, raise_errors):
        try:
            yield
        finally:
            await server.shutdown()
        check_lifespan(server)


@contextlib.asynccontextmanager
async def _connecting(
    server: PortlessServer, client_address: Address | None, timeout: float | None
) -> AsyncIterator[Client]:
    sock, address = await server._pairs.connect(client_address)
    loop = asyncio.get_running_loop()
    try:
        _, protocol = await loop.create_unix_connection(lambda: StreamProtocol(loop, is_server_side=False), sock=sock)
    except BaseException:
        sock.close()
        raise
    writer = StreamWriter(protocol.transport, protocol, protocol.reader, loop)
    client = Client(server, address, timeout, protocol.reader, writer)
    try:
        yield client
    finally:
        await client.aclose()
