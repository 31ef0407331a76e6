"""What a datagram is read from, and what replies to it from the address that was asked."""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Protocol

from aioecho.stats import DatagramStats

__all__ = ["DatagramSource", "DatagramTransport"]

Buffer = bytes | bytearray | memoryview


class SendingSocket(Protocol):
    """What a transport sends through: see :class:`~aioecho.net.datagram_socket.DatagramSocket`."""

    sock: socket.socket
    stats: DatagramStats
    sent: "asyncio.Future[None]"

    def count_unsendable(self, error: OSError, address: Any) -> None:
        """Count a datagram that the system would not send; raise the error if it is the sender's fault."""

    async def send_later(self, send: Callable[[Any, Any], object], data: bytes, address: Any) -> None:
        """Send when there is room, or drop and count it when there is none in time."""


class DatagramTransport:
    """Sends from one local address of a server: the second part of a datagram handler's `request`.

    Where the server is bound to every address there is one per address that peers have asked.
    """

    __slots__ = ("_socket", "key", "local_address", "send_now")

    def __init__(
        self, sock: SendingSocket, send: Callable[[Any, Any], object], key: object, local_address: Any
    ) -> None:
        self._socket = sock
        self.send_now = send
        """Called with data and an address: send, or raise BlockingIOError where the socket has no room. Counts nothing."""
        self.key = key
        self.local_address = local_address
        """What it sends from, in the form of a handler's `client_address`."""

    def sendto(self, data: Buffer, addr: Any) -> Awaitable[None]:
        """Send a datagram to `addr`, at once if the socket has room. Otherwise what is returned decides:

        awaited, it sends as soon as there is room, at the latest after ``Timeouts.send`` seconds; not awaited, the datagram
        is dropped. Whatever is dropped is counted in ``stats.send_drops``. A datagram that the system will not send, as its
        peer is unreachable or nowhere, is dropped too, and counted in ``stats.send_errors``: peers lie about where they are.
        A WARNING says if the system forbids it, as it does to send to a broadcast address without the endpoint's option.

        Raises:
            OSError: EMSGSIZE: the datagram is too large to be sent at all, the caller's fault.
        """
        send = self.send_now  # not called as a method is, which costs more
        try:
            send(data, addr)
        except (BlockingIOError, InterruptedError):
            return _Unsent(self, data, addr)
        except OSError as error:
            self._socket.count_unsendable(error, addr)
        except TypeError:
            if addr is not None:
                raise
            # A Unix socket without a name, as a client has that does not expect a reply.
            self._socket.count_unsendable(OSError(errno.EDESTADDRREQ, "the peer has no address"), addr)
        return self._socket.sent

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return "socket" or "sockname" of what it sends through, as asyncio's transports do."""
        if name == "socket":
            return self._socket.sock
        if name == "sockname":
            return self._socket.sock.getsockname()
        return default


class _Unsent(Awaitable[None]):
    """A datagram for which the socket had no room: it is sent if the handler awaits that, and else dropped."""

    __slots__ = ("_address", "_data", "_is_awaited", "_transport")

    def __init__(self, transport: DatagramTransport, data: Buffer, address: Any) -> None:
        self._transport = transport
        self._data = bytes(data)  # the caller may change what is its own
        self._address = address
        self._is_awaited = False

    def __await__(self) -> Generator[Any, Any, None]:
        self._is_awaited = True
        transport = self._transport
        return transport._socket.send_later(transport.send_now, self._data, self._address).__await__()

    def __del__(self) -> None:
        if not self._is_awaited:
            self._transport._socket.stats.send_drops += 1


class DatagramSource(Protocol):
    """What datagrams are read from."""

    transport: DatagramTransport
    """What replies to the datagram that was read last."""

    has_one_transport: bool
    """Whether that is the same for all."""

    longest: int
    """Bytes that a datagram has at most. A longer one was cut, and is to be dropped."""

    is_reading: bool
    """Whether to go on reading: False from a pause on."""
