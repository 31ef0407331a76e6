"""Binding: from an endpoint to the sockets that listen there, or an error that names it, and nothing left open."""

import errno
import ipaddress
import os
import socket
import struct
from typing import Any

from aioecho.exceptions import EndpointError
from aioecho.net import systemd
from aioecho.net.bound import BoundSocket
from aioecho.net.endpoints import (
    Endpoint,
    HostEndpoint,
    InheritedEndpoint,
    PathEndpoint,
    StdioEndpoint,
    SystemdEndpoint,
    UDPEndpoint,
    resolve,
    socket_name,
)
from aioecho.net.paths import folder_lock, group_number, remove_stale, set_mode, user_number
from aioecho.net.stdio import take_standard_streams

__all__ = ["bind_addresses", "bind_endpoint", "bind_sibling", "cannot_listen", "join_group"]

# Two families share port 0's choice only if it is free in both: a few tries find one even on a busy machine.
PORT_TRIES = 20


async def bind_endpoint(endpoint: Endpoint, *, backlog: int, reuse_port: bool = False) -> list[BoundSocket]:
    """Return non-blocking sockets for `endpoint`, which listen: more than one where a host has several addresses.

    Sockets for datagrams are bound only: they have no connections to listen for.

    With `reuse_port` other sockets may be bound beside the ones of a TCP or UDP endpoint: see bind_sibling().

    Raises:
        EndpointError: it can't be listened on; the message names the endpoint and the reason.
    """
    if isinstance(endpoint, HostEndpoint):
        return await _bind_host(endpoint, backlog, reuse_port)
    if isinstance(endpoint, PathEndpoint):
        return [await _bind_unix(endpoint, backlog)]
    if isinstance(endpoint, StdioEndpoint):
        return [BoundSocket(take_standard_streams(), str(endpoint))]
    if isinstance(endpoint, SystemdEndpoint):
        return _adopt_systemd(endpoint, backlog)
    return [_adopt(endpoint, backlog)]


def bind_sibling(bound: BoundSocket) -> BoundSocket:
    """Return another socket bound where `bound` listens; once it listens too, the kernel divides the clients (SO_REUSEPORT).

    Raises:
        EndpointError: it can't be had: `bound` was not bound with `reuse_port`, or the system does not offer it.
    """
    assert bound.endpoint is not None
    sock = socket.socket(bound.sock.family, bound.sock.type)
    try:
        _prepare(sock, bound.endpoint, reuse_port=True)
        sock.bind(bound.sock.getsockname())
    except OSError as error:
        sock.close()
        raise EndpointError(f"cannot listen again on {bound.name}: {error.strerror or error}", error.errno) from error
    return BoundSocket(sock, bound.name, endpoint=bound.endpoint)


def cannot_listen(endpoint: object, error: OSError | str) -> EndpointError:
    """Return the error that says so, and why."""
    if isinstance(error, str):
        return EndpointError(f"cannot listen on {endpoint}: {error}")
    return EndpointError(f"cannot listen on {endpoint}: {error.strerror or error}", error.errno)


async def _bind_host(endpoint: HostEndpoint, backlog: int, reuse_port: bool) -> list[BoundSocket]:
    addresses = await resolve(endpoint)
    for tries_left in reversed(range(PORT_TRIES)):
        sockets: list[socket.socket] = []
        try:
            bind_addresses(addresses, sockets, endpoint, reuse_port)
            for sock in sockets:
                join_group(sock, endpoint)
            # Only after all are bound: none may serve if one can't.
            for sock in sockets:
                _listen(sock, backlog)
        except OSError as error:
            for sock in sockets:
                sock.close()
            # The port that the first of several addresses was given may be taken on another.
            is_unlucky = error.errno == errno.EADDRINUSE and endpoint.port == 0 and len(sockets) > 1
            if not (is_unlucky and tries_left):
                raise cannot_listen(endpoint, error) from error
        else:
            break
    if len(sockets) == 1:
        return [BoundSocket(sockets[0], socket_name(sockets[0]), endpoint=endpoint)]
    name = str(type(endpoint)(endpoint.host, sockets[0].getsockname()[1]))
    return [BoundSocket(sock, name, endpoint=endpoint) for sock in sockets]


def _listen(sock: socket.socket, backlog: int) -> None:
    if sock.type == socket.SOCK_STREAM:
        sock.listen(backlog)


def _prepare(sock: socket.socket, endpoint: HostEndpoint, *, reuse_port: bool) -> None:
    """Set what is to be set before bind()."""
    sock.setblocking(False)
    if sock.type == socket.SOCK_STREAM or endpoint.is_multicast:
        # For other datagrams it would let others share the port, and the last one get them all; of a group's all get a copy.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if isinstance(endpoint, UDPEndpoint):
        reuse_port = reuse_port or endpoint.reuse_port
        if endpoint.broadcast:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    if reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if sock.family == socket.AF_INET6:
        # Else it would take the port for IPv4 as well, or not, as a system setting says.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def join_group(sock: socket.socket, endpoint: HostEndpoint) -> None:
    """Join the multicast group that a socket is bound to, and send to groups through the same interface."""
    if not (isinstance(endpoint, UDPEndpoint) and endpoint.is_multicast):
        return
    group, interface, index = sock.getsockname()[0], endpoint.interface, 0
    address = "0.0.0.0"  # the one that the routing table says
    if interface is not None:
        try:
            address = str(ipaddress.IPv4Address(interface))
        except ValueError:
            index = _interface_index(interface)
    if sock.family == socket.AF_INET6:
        index = index or sock.getsockname()[3]
        sock.setsockopt(
            socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(sock.family, group) + struct.pack("@I", index)
        )
        if index:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        return
    own = struct.pack("@4si", socket.inet_aton(address), index)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + own)
    if interface is not None:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(4) + own)


def _interface_index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise OSError(errno.ENODEV, f"no network interface is called {name!r}") from error


def bind_addresses(
    addresses: list[tuple[socket.AddressFamily, Any]],
    sockets: list[socket.socket],
    endpoint: HostEndpoint,
    reuse_port: bool,
) -> None:
    """Bind a socket to every address, all on the port that the first one gets, and append them to `sockets`.

    Raises:
        OSError: one cannot be bound. `sockets` has the others, for the caller to close.
    """
    absent: OSError | None = None
    for family, address in addresses:
        try:
            sock = socket.socket(family, endpoint.type)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:
                raise
            absent = error  # the kernel lacks this family
            continue
        sockets.append(sock)
        _prepare(sock, endpoint, reuse_port=reuse_port)
        if len(sockets) > 1:
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sock.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or len(addresses) == 1:
                raise
            # One family of several is switched off on this machine: serve on the others.
            absent = error
            sockets.pop().close()
    if not sockets and absent is not None:
        raise absent


async def _bind_unix(endpoint: PathEndpoint, backlog: int) -> BoundSocket:
    path = endpoint.path
    if "\0" in path[1:] and not path.startswith("\0"):
        raise cannot_listen(endpoint, "a path has no NUL in it")
    sock = socket.socket(socket.AF_UNIX, endpoint.type)
    try:
        sock.setblocking(False)
        if path.startswith("\0"):
            sock.bind(path)
            _listen(sock, backlog)
            return BoundSocket(sock, endpoint.name)
        # Between finding a path stale and removing it another process could start to listen there, and be removed.
        # A process that starts through here waits for its turn: by then the other one listens, and can be seen to.
        async with folder_lock(path):
            remove_stale(endpoint)
            owner, group = user_number(endpoint.owner), group_number(endpoint.group)
            if endpoint.mode is not None and endpoint.type == socket.SOCK_DGRAM:
                # Peers can send as soon as it is bound, if they may. On Linux the path gets no more rights than the socket has.
                is_given_away = owner >= 0 or group >= 0
                os.fchmod(sock.fileno(), endpoint.mode & 0o700 if is_given_away else endpoint.mode)
            sock.bind(path)
            try:
                if owner >= 0 or group >= 0:
                    # By now the path may be a link to another file, if the folder is not only this user's.
                    os.chown(path, owner, group, follow_symlinks=False)
                if endpoint.mode is not None:
                    set_mode(path, endpoint.mode)  # before listen(): no client connects under other permissions
                _listen(sock, backlog)
                return BoundSocket(sock, endpoint.name, path)
            except BaseException:
                os.unlink(path)
                raise
    except BaseException as error:  # also if it is cancelled while it waits its turn
        sock.close()
        if isinstance(error, EndpointError) or not isinstance(error, OSError):
            raise
        raise cannot_listen(endpoint, error) from error


def _adopt(endpoint: InheritedEndpoint, backlog: int) -> BoundSocket:
    sock: socket.socket | None = None
    try:
        sock = socket.socket(fileno=endpoint.source) if isinstance(endpoint.source, int) else endpoint.source
        if sock.type != endpoint.type or sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            wanted = "TCP or Unix stream" if endpoint.type == socket.SOCK_STREAM else "UDP or Unix datagram"
            raise cannot_listen(endpoint, f"it is not a {wanted} socket")
        if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.listen(backlog)
        sock.setblocking(False)  # last: one that can't be used stays as it was
        return BoundSocket(sock, socket_name(sock))
    except EndpointError:
        _let_go(sock, endpoint)
        raise
    except OSError as error:
        _let_go(sock, endpoint)
        raise cannot_listen(endpoint, error) from error


def _adopt_systemd(endpoint: SystemdEndpoint, backlog: int) -> list[BoundSocket]:
    passed = systemd.listen_fds()
    if not passed:
        raise cannot_listen(endpoint, "systemd has passed no sockets to this process (LISTEN_FDS, LISTEN_PID)")
    found = [descriptor for name, descriptor in passed if name == endpoint.name]
    if not found:
        names = ", ".join(dict.fromkeys(name for name, _ in passed))
        raise cannot_listen(endpoint, f"systemd has passed none of this name, but {names}")
    bound: list[BoundSocket] = []
    try:
        for descriptor in found:
            os.set_inheritable(descriptor, False)
            bound.append(_adopt(InheritedEndpoint(descriptor, endpoint.type), backlog))
    except OSError as error:  # the count was wrong, or this one can't be used: they stay as they were
        for bound_socket in bound:
            bound_socket.sock.detach()
        raise cannot_listen(endpoint, error.strerror or str(error)) from error
    return bound


def _let_go(sock: socket.socket | None, endpoint: InheritedEndpoint) -> None:
    """Leave a socket that can't be used as it was: with a socket object's owner, or as an open descriptor."""
    if sock is not None and isinstance(endpoint.source, int):
        sock.detach()
