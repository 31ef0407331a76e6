"""The addresses that a load may go to."""

from __future__ import annotations

import socket
from typing import Any

from aioecho.net.endpoints import HostEndpoint

__all__ = ["find_addresses"]


def find_addresses(where: HostEndpoint) -> list[tuple[int, Any]]:
    """Return the addresses of an endpoint's host as (family, address), in the system's order. Without a host, localhost's.

    Raises:
        OSError: there are none.
    """
    found = socket.getaddrinfo(where.host or "localhost", where.port, type=where.type)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))
