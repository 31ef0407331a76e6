"""The classes that a handler is made from."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from aioecho.streams import StreamReader, StreamWriter

if TYPE_CHECKING:  # the server is above, and a handler has one
    from aioecho.server import BaseServer

__all__ = ["BaseRequestHandler", "StreamRequestHandler"]


class BaseRequestHandler(ABC):
    """One object for each request, as in socketserver; its methods are coroutines and run in the request's own task.

    To be overridden: :meth:`handle`, and where needed :meth:`setup` and :meth:`finish`. The constructor only stores its
    arguments: whoever overrides it does no more than that, and takes `(request, client_address, server)`.
    """

    def __init__(self, request: Any, client_address: Any, server: "BaseServer") -> None:
        self.request = request
        self.client_address = client_address
        self.server = server

    async def setup(self) -> None:
        """Prepare; called before :meth:`handle`. If it raises, neither :meth:`handle` nor :meth:`finish` is called."""

    @abstractmethod
    async def handle(self) -> None:
        """Serve the request. The connection is closed, in good order, when it returns."""

    async def finish(self) -> None:
        """Clean up; called after :meth:`handle`, also when that raised or was cancelled."""


class StreamRequestHandler(BaseRequestHandler):
    """One object for each connection. `request` is `(reader, writer)`.

    `client_address` is `(host, port)` for IPv4, `(host, port, flowinfo, scope_id)` for IPv6, and a path, mostly "", for
    Unix sockets.
    """

    request: tuple[StreamReader, StreamWriter]
    reader: StreamReader
    writer: StreamWriter

    def __init__(self, request: tuple[StreamReader, StreamWriter], client_address: Any, server: "BaseServer") -> None:
        super().__init__(request, client_address, server)
        self.reader, self.writer = request

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Write `data` and wait until the peer keeps up: ``writer.write(data)`` and ``await writer.drain()``.

        Raises:
            ConnectionResetError: the connection is gone.
            OSError: the connection broke.
        """
        # The two written out, as far as there is nothing to wait for: each would cost as much as all of this.
        writer = self.writer
        transport, protocol, reader = writer._transport, writer._protocol, writer._reader
        transport.write(data)
        if (
            protocol._paused
            or protocol._connection_lost
            or transport.is_closing()
            or (reader is not None and reader._exception is not None)
        ):
            await writer.drain()
