"""Blocking handlers for datagrams: one for each, in a thread of a bounded pool."""

import socket
import time
from typing import Any

from aioecho.blocking.request import Threaded
from aioecho.net.datagram_transport import DatagramTransport
from aioecho.net.proxy_datagrams import ProxiedTransport
from aioecho.net.proxy_header import ProxyHeader
from aioecho.net.room import connected_probe, is_writable
from aioecho.runtime.threads import ThreadPool
from aioecho.serving.base import BaseServer
from aioecho.serving.ends import Reason

__all__ = ["ReplySocket", "ThreadedDatagram"]


class ReplySocket:
    """What a blocking handler replies through, in place of the server's socket, as which it behaves otherwise.

    It sends from the address that the peer has asked. It is for handlers' threads.
    """

    def __init__(self, transport: DatagramTransport, send_timeout: float | None) -> None:
        self._send, self._transport = transport.send_now, transport
        self.proxy: ProxyHeader | None = transport.get_extra_info("proxy")
        self._sock: socket.socket = transport.get_extra_info("socket")
        self._send_timeout = send_timeout

    def sendto(self, data: bytes | bytearray | memoryview, *flags_and_address: Any) -> int:
        """Send a datagram, with the arguments of socket.sendto(); wait until there is room, for ``Timeouts.send`` at most.

        Flags are not passed on.

        Raises:
            TimeoutError: there was no room.
            OSError: the system will not send it, to that address or at all.
        """
        deadline = None if self._send_timeout is None else time.monotonic() + self._send_timeout
        while True:
            try:
                self._send(data, flags_and_address[-1])
                return memoryview(data).nbytes
            except (BlockingIOError, InterruptedError):
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not self._wait_for_room(flags_and_address[-1], left):
                    raise TimeoutError("the socket has no room for a reply") from None

    def _wait_for_room(self, address: Any, seconds: float | None) -> bool:
        """Return whether there may be room within so many seconds."""
        if self._sock.family != socket.AF_UNIX or not is_writable(self._sock):
            return is_writable(self._sock, seconds)
        transport = self._transport
        peer = transport.find_peer(address) if isinstance(transport, ProxiedTransport) else address
        with connected_probe(peer) as probe:
            return is_writable(probe, seconds)

    # The socket itself must not block: it is the event loop's, which reads it.

    def settimeout(self, value: float | None) -> None:
        """Set how many seconds sendto() waits; None is for ever."""
        self._send_timeout = value

    def gettimeout(self) -> float | None:
        """Return how many seconds sendto() waits; None is for ever."""
        return self._send_timeout

    def setblocking(self, flag: bool) -> None:
        """Let sendto() wait for ever, or not at all."""
        self._send_timeout = None if flag else 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class ThreadedDatagram(Threaded):
    """A datagram with a blocking handler, in `server.connections`. `request` is `(data, socket)`.

    `thread` is None until it has one; `handler` is always None.
    """

    __slots__ = ()

    def __init__(
        self,
        server: BaseServer,
        pool: ThreadPool,
        data: bytes,
        client_address: Any,
        transport: DatagramTransport,
    ) -> None:
        request = (data, ReplySocket(transport, server.timeouts.send))
        super().__init__(server, pool, request, client_address, server.RequestHandlerClass)

    def _get_verification_limit(self) -> tuple[float | None, Reason]:
        return self._server.timeouts.datagram_handler, "datagram_handler"

    def _return(self) -> None:
        super()._return()
        self._server.unregister_connection(self)
