"""The client's side of a synchronous test: `connect_sync()`, which serves in a thread, and what it gives."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, overload

from aioecho.background import BackgroundServer, running
from aioecho.framing.base import check_split
from aioecho.serving.base import BaseServer
from aioecho.serving.datagram_handlers import DatagramBatchHandler, DatagramRequestHandler, DatagramSessionHandler
from aioecho.testing.client import TIMEOUT
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

__all__ = ["BlockingClient", "BlockingDatagramClient", "connect_sync"]


class _BaseClient:
    """What a client for streams and one for datagrams have in common."""

    def __init__(self, server: BaseServer, client_address: Address, sock: socket.socket, timeout: float | None) -> None:
        self._server: Any = server
        self.client_address = client_address
        self.socket = sock
        self.timeout = timeout
        sock.settimeout(timeout)

    @property
    def server(self) -> Any:
        """The server, which lives in another thread: see :class:`aioecho.BackgroundServer` for what may be done with it."""
        return self._server

    @property
    def handler(self) -> Any:
        """The handler object of this client, as :attr:`Client.handler` has it. It lives in another thread."""
        handlers = self._server._record.handlers
        return handlers.get(self.client_address, handlers.get(None))

    def close(self) -> None:
        """Close the connection. May be called more than once; `connect_sync()` does it too."""
        self.socket.close()

    def _receive(self, what: str) -> bytes:
        try:
            return self.socket.recv(2**16)
        except TimeoutError:
            raise TimeoutError(f"the handler has sent no {what} within {self.timeout:g} seconds") from None


class BlockingClient(_BaseClient):
    """A client of one handler for streams, for a thread without an event loop, as :func:`connect_sync` gives it.

    Its methods are those of :class:`Client`. `socket` is its socket: what was read by a method is not there any more.
    For TLS wrap it, and set it to the result.
    """

    def __init__(self, server: BaseServer, client_address: Address, sock: socket.socket, timeout: float | None) -> None:
        super().__init__(server, client_address, sock, timeout)
        self._buffer = bytearray()
        self._frames: Iterator[bytes] | None = None

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. Raises TimeoutError if the handler reads nothing for `timeout` seconds."""
        try:
            self.socket.sendall(data)
        except TimeoutError:
            raise TimeoutError(f"the handler has read nothing within {self.timeout:g} seconds") from None

    def send_frame(self, frame: bytes) -> None:
        """Send what the `framing` of the handler's class makes of `frame`."""
        self.send(find_framing(self._server).join(frame))

    def read(self, n: int = -1) -> bytes:
        """Return at most `n` bytes, as soon as there are any; all up to the end of the stream if `n` is -1.

        b"" is the end of the stream.
        """
        while (n < 0 or not self._buffer) and self._fill("end of the stream" if n < 0 else "bytes"):
            pass
        return self._take(len(self._buffer) if n < 0 else n)

    def readexactly(self, n: int) -> bytes:
        """Return `n` bytes. Raises IncompleteReadError if the stream ends before."""
        while len(self._buffer) < n:
            if not self._fill(f"{n} bytes"):
                raise asyncio.IncompleteReadError(self._take(n), n)
        return self._take(n)

    def readline(self) -> bytes:
        """Return a line with its newline; what there is of it at the end of the stream, and then b""."""
        while (end := self._buffer.find(b"\n") + 1) == 0:
            if not self._fill("line"):
                return self._take(len(self._buffer))
        return self._take(end)

    def read_frame(self) -> bytes:
        """Return the next frame that the handler sends, by the `framing` of its class.

        Raises IncompleteReadError if the stream ends before, and TypeError if the class has no framing.
        """
        for frame in self.frames:
            return frame
        raise asyncio.IncompleteReadError(b"", None)

    @property
    def frames(self) -> Iterator[bytes]:
        """The frames that the handler sends, by the `framing` of its class: ``next(client.frames)``, or a loop.

        Raises TypeError if the class has no framing.
        """
        if self._frames is None:
            self._frames = self._split(find_framing(self._server))
        return self._frames

    def write_eof(self) -> None:
        """End the stream to the handler. What the handler sends can still be read."""
        self.socket.shutdown(socket.SHUT_WR)

    def _split(self, framing: Any) -> Iterator[bytes]:
        while True:
            frames, used, wanted = framing.split(self._buffer)
            if not 0 < used <= len(self._buffer):
                check_split(framing, len(self._buffer), frames, used, wanted)
            del self._buffer[:used]
            yield from frames
            while len(self._buffer) < wanted:
                if not self._fill("frame"):
                    if self._buffer:
                        raise asyncio.IncompleteReadError(self._take(len(self._buffer)), None)
                    return

    def _fill(self, what: str) -> bool:
        data = self._receive(what)
        self._buffer += data
        return bool(data)

    def _take(self, n: int) -> bytes:
        taken = bytes(self._buffer[:n])
        del self._buffer[:n]
        return taken


class BlockingDatagramClient(_BaseClient):
    """A client of a handler for datagrams, for a thread without an event loop, as :func:`connect_sync` gives it.

    Its methods are those of :class:`DatagramClient`.
    """

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send one datagram."""
        self.socket.send(data)

    def receive(self) -> bytes:
        """Return the next datagram that a handler has sent to this client.

        Raises:
            TimeoutError: none came for `timeout` seconds.
        """
        return self._receive("datagram")

    def ask(self, data: bytes | bytearray | memoryview) -> bytes:
        """Send one datagram, and return the next that comes."""
        self.send(data)
        return self.receive()


@overload
def connect_sync(
    RequestHandlerClass: type[DatagramRequestHandler] | type[DatagramSessionHandler] | type[DatagramBatchHandler],
    **options: Any,
) -> AbstractContextManager[BlockingDatagramClient]: ...


@overload
def connect_sync(
    RequestHandlerClass: Callable[..., Any] | BaseServer, **options: Any
) -> AbstractContextManager[BlockingClient]: ...


def connect_sync(
    RequestHandlerClass: Any,
    *,
    client_address: Address | None = None,
    timeout: float | None = TIMEOUT,
    raise_errors: bool = True,
    loop: str = "auto",
    **options: Any,
) -> AbstractContextManager[Any]:
    """Serve a handler in a thread, connect a client to it, and give that: ``with connect_sync(Upper) as client``.

    For tests that are no coroutines, and for blocking handlers. The rest is as for :func:`connect`: what a handler raises is
    raised at the end, in the test's thread.

    Args:
        RequestHandlerClass, client_address, timeout, raise_errors, options: as for :func:`connect`.
        loop: the event loop of the thread: "uvloop", "asyncio", or "auto", which is uvloop if it is installed.

    Raises: as :func:`connect`.
    """
    if isinstance(RequestHandlerClass, BaseServer):
        return _connect(check_portless(RequestHandlerClass, options), client_address, timeout)
    server = make_server(("127.0.0.1", 0), RequestHandlerClass, **options)
    connecting: AbstractContextManager[Any]
    if is_for_datagrams(RequestHandlerClass):
        check_no_address(client_address)
        connecting = _connect_datagrams(server, timeout)
    else:
        connecting = _connect(server, client_address, timeout)
    return _serve(server, connecting, raise_errors, loop)


@contextlib.contextmanager
def _serve(
    server: RecordingServer, connecting: AbstractContextManager[Any], raise_errors: bool, loop: str
) -> Iterator[Any]:
    with raising(server, raise_errors):
        with running(BackgroundServer(server, loop)), connecting as client:
            yield client
        check_lifespan(server)


@contextlib.contextmanager
def _connect(server: PortlessServer, client_address: Address | None, timeout: float | None) -> Iterator[BlockingClient]:
    assert server.event_loop is not None
    coroutine = server._pairs.connect(client_address)
    try:
        connecting = asyncio.run_coroutine_threadsafe(coroutine, server.event_loop)
    except RuntimeError:  # the loop is closed
        coroutine.close()
        raise ConnectionRefusedError("the server has been shut down, and accepts no client") from None
    try:
        sock, address = connecting.result(TIMEOUT)
    except BaseException:
        connecting.cancel()  # which closes the client's socket
        raise
    client = BlockingClient(server, address, sock, timeout)
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def _connect_datagrams(server: RecordingServer, timeout: float | None) -> Iterator[BlockingDatagramClient]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(server.server_address)
        yield BlockingDatagramClient(server, sock.getsockname(), sock, timeout)
