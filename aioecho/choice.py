"""Choosing the server for some endpoints."""

import socket
from collections.abc import Callable, Mapping
from typing import Any

from aioecho.datagrams.server import ONE_HANDLER_CLASS, DatagramServer
from aioecho.net import systemd
from aioecho.net.endpoints import InheritedEndpoint, SystemdEndpoint, parse_endpoint
from aioecho.server import BaseServer
from aioecho.serving.handler_types import serves_datagrams

__all__ = ["are_for_datagrams", "serve"]


def serve(
    RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any], *endpoints: str, **options: Any
) -> BaseServer:
    """Return a server on all of `endpoints`, to be used with ``async with``.

    It is a :class:`BaseServer` or, where the endpoints are for datagrams, a :class:`DatagramServer`, whose options it takes.

    Or with several handler classes for streams, async and blocking ones, each with its endpoint or a list of them:
    ``serve({Chat: "tcp://127.0.0.1:7000", Legacy: ["tcp://127.0.0.1:7001", "unix:legacy.sock"]})``.

    Raises:
        ValueError: they are for both; that takes two servers. Or an argument makes no sense.
    """
    if isinstance(RequestHandlerClass, Mapping):
        if any(serves_datagrams(each) for each in RequestHandlerClass):
            raise TypeError(ONE_HANDLER_CLASS)
        return BaseServer(endpoints or None, RequestHandlerClass, **options)
    if are_for_datagrams(*endpoints, sock=options.get("sock"), RequestHandlerClass=RequestHandlerClass):
        return DatagramServer(endpoints or None, RequestHandlerClass, **options)
    return BaseServer(endpoints or None, RequestHandlerClass, **options)


def are_for_datagrams(
    *endpoints: str, sock: socket.socket | None = None, RequestHandlerClass: Callable[..., Any] | None = None
) -> bool:
    """Return whether endpoints, and a socket object, are for datagrams.

    A socket that exists is for what the handler class serves, if that is known, and else for what it can do: with the wrong
    one the server itself says so when it starts.

    Raises:
        ValueError: some are and some are not, or one is no endpoint.
    """
    wanted = serves_datagrams(RequestHandlerClass)
    kinds = {text: _is_for_datagrams(text, wanted) for text in endpoints}
    if sock is not None:
        kinds["sock"] = sock.type == socket.SOCK_DGRAM if wanted is None else wanted
    if len(set(kinds.values())) > 1:
        stream, datagram = (next(text for text, kind in kinds.items() if kind is which) for which in (False, True))
        raise ValueError(f"{stream} is for streams and {datagram} is for datagrams: that takes two servers")
    return any(kinds.values())


def _is_for_datagrams(text: str, wanted: bool | None) -> bool:
    endpoint = parse_endpoint(text)
    if not isinstance(endpoint, InheritedEndpoint | SystemdEndpoint):
        return endpoint.type == socket.SOCK_DGRAM
    if wanted is not None:
        return wanted
    if isinstance(endpoint, SystemdEndpoint):
        descriptor = next((number for name, number in systemd.listen_fds() if name == endpoint.name), -1)
    else:
        assert isinstance(endpoint.source, int)
        descriptor = endpoint.source
    try:
        sock = socket.socket(fileno=descriptor)
    except (OSError, ValueError):  # no socket: who tries to listen on it will say so
        return False
    try:
        return sock.type == socket.SOCK_DGRAM
    finally:
        sock.detach()
