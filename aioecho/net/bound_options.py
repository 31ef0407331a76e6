"""What the options of an endpoint mean for its sockets: PROXY headers come first, or no TLS is spoken."""

import socket
from collections.abc import Sequence

from aioecho.exceptions import EndpointError
from aioecho.net.bound import BoundSocket
from aioecho.net.endpoints import Endpoint
from aioecho.net.proxy_protocol import ProxyProtocol, check_trust

__all__ = ["note_options"]


def note_options(
    bound: Sequence[BoundSocket], endpoint: Endpoint, proxy: ProxyProtocol | None
) -> Sequence[BoundSocket]:
    """Note the options of an endpoint on its sockets, and return them. `proxy` is for one that says nothing of it.

    Raises:
        EndpointError: PROXY headers come first to a socket of the network, as one that was passed may be, and no balancer is
            trusted. All are closed.
    """
    for bound_socket in bound:
        bound_socket.proxy = endpoint.proxy or proxy
        bound_socket.is_in_clear = endpoint.tls is False
    try:
        for bound_socket in bound:
            if bound_socket.sock.family != socket.AF_UNIX:
                check_trust(bound_socket.proxy, bound_socket.name)
    except ValueError as error:
        for bound_socket in bound:
            bound_socket.close()
        raise EndpointError(str(error)) from None
    return bound
