"""IP_PKTINFO and its kin: to which of a host's addresses a datagram was sent, and how a reply comes from there."""

import socket
import struct
import sys
from typing import Any

__all__ = ["ROOM_FOR_PKTINFO", "Ancillary", "address_of", "enable_pktinfo", "source_from"]

# The socket module has it only since 3.14.
IP_PKTINFO = {"linux": 8, "darwin": 26}.get(sys.platform)

# struct in_pktinfo: interface, local address to reply from, address in the header. struct in6_pktinfo: address, interface.
IN_PKTINFO = struct.Struct("@i4s4s")
IN6_PKTINFO = struct.Struct("@16sI")

ROOM_FOR_PKTINFO = socket.CMSG_SPACE(IN_PKTINFO.size) + socket.CMSG_SPACE(IN6_PKTINFO.size)
"""Bytes of ancillary data that recvmsg() is to have room for."""

Ancillary = list[tuple[int, int, bytes]]
"""What recvmsg() gives and sendmsg() takes besides the data: level, type and value of each item."""


def enable_pktinfo(sock: socket.socket) -> bool:
    """Ask the kernel to tell to which address a datagram was sent; return whether it does."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        return True
    if IP_PKTINFO is None:
        return False
    sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    return True


def source_from(level: int, kind: int, data: bytes) -> Ancillary | None:
    """Return the ancillary data that makes a reply come from where the datagram was sent to; None if it can't."""
    if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
        _, local, _ = IN_PKTINFO.unpack(data[: IN_PKTINFO.size])
        # Without the interface: by which one a reply leaves is routing's business.
        return [(level, kind, IN_PKTINFO.pack(0, local, bytes(4)))] if any(local) else None
    if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
        address, interface = IN6_PKTINFO.unpack(data[: IN6_PKTINFO.size])
        if address[0] == 0xFF or not any(address):  # nothing is sent from a multicast address
            return None
        is_link_local = address[0] == 0xFE and address[1] & 0xC0 == 0x80
        return [(level, kind, IN6_PKTINFO.pack(address, interface if is_link_local else 0))]
    return None


def address_of(source: Ancillary, port: int) -> tuple[Any, ...]:
    """Return where replies come from with such ancillary data, as recvfrom() at their peer would."""
    [(level, _, data)] = source
    if level == socket.IPPROTO_IP:
        return socket.inet_ntop(socket.AF_INET, IN_PKTINFO.unpack(data)[1]), port
    address, interface = IN6_PKTINFO.unpack(data)
    return socket.inet_ntop(socket.AF_INET6, address), port, 0, interface
