"""Choosing the server for some endpoints."""

import socket
from collections.abc import Callable
from typing import Any

from aioecho.datagram import DatagramServer
from aioecho.endpoints import InheritedEndpoint, parse_endpoint
from aioecho.server import BaseServer

__all__ = ["are_for_datagrams", "serve"]


def serve(RequestHandlerClass: Callable[..., Any], *endpoints: str, **options: Any) -> BaseServer:
    """Return a server on all of `endpoints`, to be used with ``async with``.

    It is a :class:`BaseServer` or, where the endpoints are for datagrams, a :class:`DatagramServer`, whose options it takes.

    Raises:
        ValueError: they are for both; that takes two servers. Or an argument makes no sense.
    """
    if are_for_datagrams(*endpoints, sock=options.get("sock")):
        return DatagramServer(endpoints or None, RequestHandlerClass, **options)
    return BaseServer(endpoints or None, RequestHandlerClass, **options)


def are_for_datagrams(*endpoints: str, sock: socket.socket | None = None) -> bool:
    """Return whether endpoints, and a socket object, are for datagrams.

    Raises:
        ValueError: some are and some are not, or one is no endpoint.
    """
    kinds = {text: _is_for_datagrams(text) for text in endpoints}
    if sock is not None:
        kinds["sock"] = sock.type == socket.SOCK_DGRAM
    if len(set(kinds.values())) > 1:
        stream, datagram = (next(text for text, kind in kinds.items() if kind is which) for which in (False, True))
        raise ValueError(f"{stream} is for streams and {datagram} is for datagrams: that takes two servers")
    return any(kinds.values())


def _is_for_datagrams(text: str) -> bool:
    endpoint = parse_endpoint(text)
    if isinstance(endpoint, InheritedEndpoint) and isinstance(endpoint.source, int):
        try:
            sock = socket.socket(fileno=endpoint.source)
        except OSError:  # no socket: who tries to listen on it will say so
            return False
        try:
            return sock.type == socket.SOCK_DGRAM
        finally:
            sock.detach()
    return endpoint.type == socket.SOCK_DGRAM
