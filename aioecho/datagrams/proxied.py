"""Datagrams that begin with a PROXY header: every one has its own, in front of what its client has sent."""

import logging
from collections.abc import Callable
from typing import Any

from aioecho.datagrams.serving import DatagramServing
from aioecho.net.datagram_transport import DatagramTransport
from aioecho.net.proxy_datagrams import ProxiedTransport
from aioecho.net.proxy_header import ProxyHeaderError
from aioecho.net.proxy_protocol import ProxyProtocol, addresses_of
from aioecho.runtime.logs import format_address
from aioecho.serving.ends import PROXY_REASONS
from aioecho.serving.networks import NetworkLists

__all__ = ["Receive", "behind_header"]

logger = logging.getLogger("aioecho.datagram")

Receive = Callable[[bytes, Any, DatagramTransport], None]


def behind_header(
    server: DatagramServing, proxy: ProxyProtocol, receive: Receive, networks: NetworkLists | None
) -> Receive:
    """Return what receives datagrams for `server` and hands them on, without their headers and as their clients', to `receive`.

    A datagram without an acceptable header is dropped, and so is one of a client that `networks` do not allow.
    Nothing is above DEBUG: a sender's address can be forged.
    """

    def receive_proxied(data: bytes, peer: Any, transport: DatagramTransport) -> None:
        if not proxy.trusts(peer):
            server.drop("proxy untrusted", peer)
            return
        if len(data) > server.limits.max_datagram:  # what was read of it is not all
            server.drop("truncated", peer)
            return
        try:
            header = proxy.parse(data)
        except ProxyHeaderError as error:
            logger.debug("dropped a datagram from %s: %s", format_address(peer), error)
            server.drop(PROXY_REASONS[error.reason], peer)
            return
        if header is None:
            logger.debug("dropped a datagram from %s, which ends in its PROXY header", format_address(peer))
            server.drop("proxy malformed" if data else "proxy missing", peer)
            return
        client, _ = addresses_of(header, peer)
        if networks is not None and not header.is_local and not networks.allow(client):
            server.drop("not allowed", client)
            return
        receive(data[header.size :], client, ProxiedTransport(transport, client, peer, header))

    return receive_proxied
