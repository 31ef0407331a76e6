"""Which of a server's sockets expect PROXY headers."""

import socket
from collections.abc import Sequence

from aioecho.exceptions import EndpointError
from aioecho.net.bound import BoundSocket
from aioecho.net.proxy_protocol import ProxyProtocol, check_trust

__all__ = ["expect_headers"]


def expect_headers(bound: Sequence[BoundSocket], proxy: ProxyProtocol | None) -> Sequence[BoundSocket]:
    """Have the sockets of an endpoint expect PROXY headers, unless `proxy` is None, and return them.

    Raises:
        EndpointError: one is of the network, as a socket that was passed may be, and no balancer is trusted. All are closed.
    """
    for each in bound:
        each.proxy = proxy
    try:
        for each in bound:
            if each.sock.family != socket.AF_UNIX:
                check_trust(proxy, each.name)
    except ValueError as error:
        for each in bound:
            each.close()
        raise EndpointError(str(error)) from None
    return bound
