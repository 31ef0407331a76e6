"""IPv4 addresses on sockets for both families, which the system gives and takes as IPv6 ones: ::ffff:192.0.2.1."""

import socket
from typing import Any

__all__ = ["is_dual_stack", "to_mapped", "unmapped"]

PREFIX = "::ffff:"


def is_dual_stack(sock: socket.socket) -> bool:
    """Return whether a socket's IPv6 addresses may be IPv4 ones."""
    if sock.family != socket.AF_INET6:
        return False
    return not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def unmapped(address: Any) -> Any:
    """Return a peer's address as it is, and ``("::ffff:192.0.2.1", port, 0, 0)`` as ``("192.0.2.1", port)``.

    So a limit per host, an allow list and a log meet one address for one host, by whichever socket it comes.
    """
    if isinstance(address, tuple) and len(address) == 4:
        host = address[0]
        if host.startswith(PREFIX) and "." in host:
            return host[len(PREFIX) :], address[1]
    return address


def to_mapped(address: Any) -> Any:
    """Return ``("192.0.2.1", port)`` as a socket for both families takes it; what is no such address as it is."""
    if isinstance(address, tuple) and len(address) == 2 and isinstance(address[0], str):
        try:
            socket.inet_pton(socket.AF_INET, address[0])
        except OSError:  # a name, or an IPv6 address
            return address
        return PREFIX + address[0], address[1], 0, 0
    return address
