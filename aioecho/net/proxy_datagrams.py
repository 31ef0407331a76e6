"""Datagrams that begin with a PROXY header: what their handlers reply through."""

from collections.abc import Awaitable
from typing import Any

from aioecho.net.datagram_transport import DatagramTransport
from aioecho.net.proxy_header import ProxyHeader

__all__ = ["ProxiedTransport"]


class ProxiedTransport(DatagramTransport):
    """What a handler replies through: a reply to its client goes to the balancer, which has sent the client's datagram.

    `proxy` is the datagram's header. Of a session it is the first datagram's.
    """

    __slots__ = ("_client", "_peer", "proxy")

    def __init__(self, inner: DatagramTransport, client: Any, peer: Any, header: ProxyHeader) -> None:
        send = inner.send_now

        def send_now(data: Any, address: Any) -> None:
            send(data, peer if address == client else address)

        super().__init__(inner._socket, send_now, (inner.key, peer), inner.local_address)
        self._client, self._peer, self.proxy = client, peer, header

    def find_peer(self, addr: Any) -> Any:
        """Return where a datagram for an address is sent."""
        return self._peer if addr == self._client else addr

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any) -> Awaitable[None]:
        """Send a datagram, as :meth:`DatagramTransport.sendto`; one for the client to the balancer."""
        return super().sendto(data, self.find_peer(addr))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the header as "proxy", and else what any transport does."""
        return self.proxy if name == "proxy" else super().get_extra_info(name, default)
