"""Checking endpoints without listening on them: what would keep a server from its start."""

import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import replace

from aioecho.exceptions import EndpointError
from aioecho.net.binding import bind_addresses, cannot_listen, join_group
from aioecho.net.endpoints import Endpoint, HostEndpoint, PathEndpoint, UDPEndpoint, resolve
from aioecho.net.paths import find_use, group_number, user_number

__all__ = ["check_endpoints", "check_folder"]


async def check_endpoints(endpoints: Sequence[Endpoint]) -> None:
    """Check that this process could listen on all of `endpoints`, as far as that can be told without listening.

    Addresses are bound for a moment. One that is in use is no mistake: the program that is about to be restarted may have it.
    Inherited sockets are not looked for.

    Raises:
        EndpointError: one could not be listened on, or is there twice; the message names it and the reason.
    """
    places: set[tuple[object, ...]] = set()
    for endpoint in endpoints:
        if isinstance(endpoint, HostEndpoint):
            await _check_host(endpoint)
        elif isinstance(endpoint, PathEndpoint):
            _check_path(endpoint)
        place = _find_place(endpoint)
        if place is not None and place in places:
            raise cannot_listen(endpoint, "it is asked for twice")
        places.add(place or ())


async def _check_host(endpoint: HostEndpoint) -> None:
    sockets: list[socket.socket] = []
    # A socket beside another process' one would get a share of the datagrams that come meanwhile, and drop them.
    alone = replace(endpoint, reuse_port=False) if isinstance(endpoint, UDPEndpoint) else endpoint
    try:
        bind_addresses(await resolve(endpoint), sockets, alone, reuse_port=False)
        for sock in sockets:
            join_group(sock, endpoint)
    except EndpointError:
        raise
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise cannot_listen(endpoint, error) from error
    finally:
        for sock in sockets:
            sock.close()


def _check_path(endpoint: PathEndpoint) -> None:
    try:
        if endpoint.has_file:
            check_folder(endpoint.path)
        user_number(endpoint.owner)
        group_number(endpoint.group)
        find_use(endpoint, unnoticed=True)
    except EndpointError:
        raise
    except OSError as error:
        raise cannot_listen(endpoint, error) from error


def _find_place(endpoint: Endpoint) -> tuple[object, ...] | None:
    """Return what no other endpoint may have too; None where others may."""
    if isinstance(endpoint, PathEndpoint):
        return (os.path.abspath(endpoint.path) if endpoint.has_file else endpoint.path,)
    if not isinstance(endpoint, HostEndpoint) or endpoint.port == 0 or endpoint.is_multicast:
        return None
    is_shared = isinstance(endpoint, UDPEndpoint) and endpoint.reuse_port
    return None if is_shared else (endpoint.type, endpoint.host, endpoint.port)


def check_folder(path: str) -> None:
    """Raise OSError if this process cannot make a file at `path`: there is no such folder, or it may not write there."""
    folder = os.path.dirname(path) or "."
    os.stat(os.path.join(folder, "."))  # which fails where it is no folder
    if not os.access(folder, os.W_OK | os.X_OK):
        is_read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
        number = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(number, os.strerror(number))
