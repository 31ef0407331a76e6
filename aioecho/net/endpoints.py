"""Endpoints: what a string such as ``tcp://127.0.0.1:9999`` names, and what string names an endpoint.

===================================  ==========================================================================
``tcp://HOST:PORT``                  HOST is a name, an IPv4 address, an IPv6 address in brackets, or ``*`` (or nothing)
                                     for every address of both kinds. Port 0 is chosen once, the same for all addresses.
``udp://HOST:PORT``                  likewise, for datagrams. Options follow a ``?``, with ``&`` between them: ``broadcast``,
                                     to send to broadcast addresses; ``reuse_port``, for other processes to bind it too;
                                     ``interface=NAME``, which joins the multicast group HOST on this interface
``unix:PATH``, ``unix:PATH?mode=660``  a Unix stream socket, with file permissions in octal, ``owner=`` and ``group=``.
                                     ``unix:@NAME`` has no file.
``unixgram:PATH``                    likewise, for datagrams
``fd://N``                           a listening or bound socket that this process inherited as descriptor N
``systemd:NAME``                     the sockets that systemd has passed under this name, for streams or for datagrams:
                                     FileDescriptorName= in the socket unit, by default its own, such as ``echo.socket``
``stdio:``                           the one connection that the program was started with, on descriptors 0 and 1
===================================  ==========================================================================

All but ``stdio:`` may have the options of the PROXY protocol, as ``tcp://*:9999?proxy=v2&proxy_from=10.0.0.0/8``: ``proxy=v1``,
``v2`` or ``any``, and the networks of trusted balancers, with commas between them. The ones for streams may have ``tls=off``,
for no TLS on this endpoint of a server that has certificates, or ``tls=on``.
"""

import asyncio
import ipaddress
import os
import re
import socket
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, Union
from urllib.parse import parse_qsl

from aioecho.exceptions import EndpointError
from aioecho.net.endpoint_hints import hint_at_endpoint
from aioecho.net.endpoint_options import OptionalEndpoint, split_options
from aioecho.net.numbers import MOST_FD, MOST_ID, is_at_most

__all__ = [
    "Endpoint",
    "HostEndpoint",
    "InheritedEndpoint",
    "PathEndpoint",
    "StdioEndpoint",
    "SystemdEndpoint",
    "TCPEndpoint",
    "UDPEndpoint",
    "UnixDatagramEndpoint",
    "UnixEndpoint",
    "parse_endpoint",
    "resolve",
    "socket_name",
]

FORMS = (
    "tcp://HOST:PORT, unix:PATH, unix:PATH?mode=660, fd://N, systemd:NAME, stdio:, or, for datagrams, udp://HOST:PORT or"
    " unixgram:PATH"
)

UDP_FLAGS = ("broadcast", "reuse_port")


@dataclass(frozen=True)
class HostEndpoint(OptionalEndpoint):
    """An endpoint at an address of the network."""

    host: str
    port: int

    scheme: ClassVar[str]
    type: ClassVar[socket.SocketKind]

    @classmethod
    def at(cls, address: Any) -> Self:
        """Return the endpoint at a `(host, port)`, as socketserver takes it.

        Raises:
            ValueError: it is none.
        """
        match address:
            case (str() | None as host, int(port)) if not isinstance(port, bool) and 0 <= port <= 65535:
                return cls(host or "", port)
        raise ValueError(f"expected a (host, port) with a port from 0 to 65535, not {address!r}")

    @property
    def is_multicast(self) -> bool:
        """Whether `host` is the address of a multicast group."""
        try:
            return ipaddress.ip_address(self.host).is_multicast
        except ValueError:
            return False

    @property
    def _place(self) -> str:
        return f"{self.scheme}://{_bracketed(self.host) or '*'}:{self.port}"

    def __str__(self) -> str:
        return self.show(self._place)


class TCPEndpoint(HostEndpoint):
    """`host` may be "", for all addresses; `port` may be 0, for any that is free."""

    scheme = "tcp"
    type = socket.SOCK_STREAM


@dataclass(frozen=True)
class UDPEndpoint(HostEndpoint):
    """`host` and `port` are as in :class:`TCPEndpoint`."""

    broadcast: bool = False
    """Whether replies may go to broadcast addresses (SO_BROADCAST)."""
    reuse_port: bool = False
    """Whether other processes may bind the same address and port, and share what comes (SO_REUSEPORT)."""
    interface: str | None = None
    """The interface on which the multicast group `host` is joined, by its name or its IPv4 address."""

    scheme = "udp"
    type = socket.SOCK_DGRAM

    def __str__(self) -> str:
        flags = [name for name in UDP_FLAGS if getattr(self, name)]
        options = flags + ([] if self.interface is None else [f"interface={self.interface}"])
        return self.show(self._place + (f"?{'&'.join(options)}" if options else ""))


@dataclass(frozen=True)
class PathEndpoint(OptionalEndpoint):
    """An endpoint in the file system, or beside it."""

    path: str
    mode: int | None = None
    owner: str | None = None
    """A user's name or number."""
    group: str | None = None

    scheme: ClassVar[str]
    type: ClassVar[socket.SocketKind]

    @classmethod
    def at(cls, address: Any, mode: int | None) -> Self:
        """Return the endpoint at a path, or that of an endpoint string, which may name a mode itself.

        Raises:
            ValueError: it is neither, or there are two modes.
        """
        if not isinstance(address, str | bytes | os.PathLike):
            raise ValueError(f"expected the path of a Unix socket, not {address!r}")
        path = os.fsdecode(address)
        if not path.startswith(f"{cls.scheme}:"):
            return cls(path, mode)
        if mode is not None:
            raise ValueError(f"give the permissions once: in {path!r} as ?mode=, or as the argument mode")
        found = parse_endpoint(path)
        assert isinstance(found, cls)
        return found

    @property
    def has_file(self) -> bool:
        """Whether it is in the file system, and not in Linux's abstract namespace."""
        return not self.path.startswith("\0")

    @property
    def name(self) -> str:
        """The endpoint string of where it is, for clients: without its permissions."""
        return f"{self.scheme}:{'@' + self.path[1:] if self.path.startswith(chr(0)) else self.path}"

    def __str__(self) -> str:
        options = [] if self.mode is None else [f"mode={self.mode:03o}"]
        options += [f"{what}={value}" for what in ("owner", "group") if (value := getattr(self, what)) is not None]
        return self.show(self.name + (f"?{'&'.join(options)}" if options else ""))


class UnixEndpoint(PathEndpoint):
    """`path` starts with NUL for a socket without a file. `mode` are permission bits, or None to leave them to the umask."""

    scheme = "unix"
    type = socket.SOCK_STREAM


class UnixDatagramEndpoint(PathEndpoint):
    """`path` and `mode` are as in :class:`UnixEndpoint`."""

    scheme = "unixgram"
    type = socket.SOCK_DGRAM


@dataclass(frozen=True)
class InheritedEndpoint(OptionalEndpoint):
    """A socket that is bound already: a descriptor, or a socket object of the caller's. `type` is what it has to be."""

    source: int | socket.socket
    type: int = socket.SOCK_STREAM

    def __str__(self) -> str:
        return self.show(f"fd://{self.source if isinstance(self.source, int) else self.source.fileno()}")


@dataclass(frozen=True)
class SystemdEndpoint(OptionalEndpoint):
    """What systemd has passed as `name`. `type` is what these sockets have to be."""

    name: str
    type: int = socket.SOCK_STREAM

    def __str__(self) -> str:
        return self.show(f"systemd:{self.name}")


@dataclass(frozen=True)
class StdioEndpoint:
    """The one connection that the program was started with, on its descriptors 0 and 1."""

    type: ClassVar[int] = socket.SOCK_STREAM
    proxy: ClassVar[None] = None
    tls: ClassVar[None] = None
    query: ClassVar[str] = ""

    def __str__(self) -> str:
        return "stdio:"


Endpoint = Union[  # noqa: UP007 - shown as one name in signatures
    TCPEndpoint, UDPEndpoint, UnixEndpoint, UnixDatagramEndpoint, InheritedEndpoint, SystemdEndpoint, StdioEndpoint
]


# What stands before a colon, and is no host.
SCHEMES = {"tcp", "udp", "unix", "unixgram", "fd", "systemd", "stdio"}


def parse_endpoint(text: str, inherited_type: int = socket.SOCK_STREAM) -> Endpoint:
    """Return the endpoint that `text` names; `inherited_type` is the type that inherited sockets are to have.

    Raises:
        ValueError: it names none; the message says what was wrong and what is expected.
        TypeError: it is not a string.
    """
    if not isinstance(text, str):
        if isinstance(text, tuple) and len(text) == 2:
            raise TypeError(f"an endpoint is a string: write tcp://{text[0]}:{text[1]} in place of {text!r}")
        if callable(text):
            raise TypeError(
                f"the handler comes first, and then the endpoints: {text!r} stands where an endpoint is expected"
            )
        raise TypeError(f"an endpoint is a string, {FORMS}, not {text!r}")
    rest, options = split_options(text)
    if not options:
        return _parse(text, inherited_type)
    endpoint = _parse(rest, inherited_type)
    if isinstance(endpoint, StdioEndpoint):
        raise ValueError(f"bad endpoint {text!r}: stdio: takes no options after a ?")
    if "tls" in options and endpoint.type == socket.SOCK_DGRAM:
        raise ValueError(f"bad endpoint {text!r}: TLS does not go over datagrams")
    return replace(endpoint, **options)


# How endpoint strings are written.
HOST_FORM = re.compile(
    r"(?P<scheme>tcp|udp)://(?:\[(?P<ipv6>[^\]]*)\]|(?P<host>[^:\[\]/]*)):(?P<port>[0-9]+)/?(?:\?(?P<query>.*))?"
)
PATH_FORM = re.compile(r"(?P<scheme>unix|unixgram):(?://(?=/))?(?P<path>[^?]+)(?:\?(?P<query>.*))?")
FD_FORM = re.compile(r"fd://(?P<fd>[0-9]+)")
SYSTEMD_FORM = re.compile(r"systemd:(?P<name>[^:/]+)")
BARE_FORM = re.compile(r"(?:\[[^\]]+\]|(?P<host>[^:\[\]/?]+)):[0-9]+")  # HOST:PORT, which stands for tcp://HOST:PORT


def _parse(text: str, inherited_type: int) -> Endpoint:
    if match := HOST_FORM.fullmatch(text):
        return _read_host(text, match)
    if match := PATH_FORM.fullmatch(text):
        return _read_path(text, match)
    if match := FD_FORM.fullmatch(text):
        # Of a larger one socket.socket() would take the lower bits, and so another one.
        if not is_at_most(MOST_FD, match["fd"]):
            raise ValueError(f"bad endpoint {text!r}: a descriptor is at most {MOST_FD}")
        return InheritedEndpoint(int(match["fd"]), inherited_type)
    if text == "stdio:":
        return StdioEndpoint()
    if match := SYSTEMD_FORM.fullmatch(text):
        return SystemdEndpoint(match["name"], inherited_type)
    match = BARE_FORM.fullmatch(text)
    if match is not None and match["host"] not in SCHEMES:
        try:
            return _parse(f"tcp://{text}", inherited_type)
        except ValueError as error:
            raise ValueError(str(error).replace(f"tcp://{text}", text, 1)) from None
    raise ValueError(f"bad endpoint {text!r}: {hint_at_endpoint(text)}expected {FORMS}")


def _read_host(text: str, match: re.Match[str]) -> TCPEndpoint | UDPEndpoint:
    if match["ipv6"] is not None and not _is_ipv6(match["ipv6"]):
        raise ValueError(
            f"bad endpoint {text!r}: brackets are for an IPv6 address, such as {match['scheme']}://[::1]:9999"
        )
    if not is_at_most(65535, match["port"]):
        raise ValueError(f"bad endpoint {text!r}: a port is at most 65535")
    port = int(match["port"])
    host = match["ipv6"] or match["host"] or ""
    host = "" if host == "*" else host
    if match["scheme"] == "udp":
        return _with_options(text, UDPEndpoint(host, port), match["query"])
    if match["query"] is not None:
        raise ValueError(f"bad endpoint {text!r}: tcp:// takes no options after a ? but tls=, proxy= and proxy_from=")
    return TCPEndpoint(host, port)


def _read_path(text: str, match: re.Match[str]) -> UnixEndpoint | UnixDatagramEndpoint:
    path = match["path"]
    options: dict[str, Any] = {}
    for name, value in parse_qsl(match["query"] or "", keep_blank_values=True):
        is_mode = name == "mode" and re.fullmatch("[0-7]{3,4}", value)
        if not is_mode and not (name in ("owner", "group") and value):
            raise ValueError(
                f"bad endpoint {text!r}: after ? comes mode= with permissions in octal, such as mode=660, or owner= or"
                " group= with a name or a number"
            )
        if path.startswith("@"):
            raise ValueError(f"bad endpoint {text!r}: a name behind @ has no file, and so no {name}")
        if not is_mode and value.isdecimal() and not is_at_most(MOST_ID, value):
            raise ValueError(f"bad endpoint {text!r}: the number of a user or a group is at most {MOST_ID}")
        options[name] = int(value, 8) if is_mode else value
    if path == "@":
        raise ValueError(f"bad endpoint {text!r}: there is no name behind @")
    kind = UnixEndpoint if match["scheme"] == "unix" else UnixDatagramEndpoint
    return kind("\0" + path[1:] if path.startswith("@") else path, **options)


def _with_options(text: str, endpoint: UDPEndpoint, query: str | None) -> UDPEndpoint:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query or "", keep_blank_values=True):
        if name in UDP_FLAGS and value in ("", "1"):
            options[name] = True
        elif name == "interface" and value:
            if not endpoint.is_multicast:
                raise ValueError(f"bad endpoint {text!r}: interface= is for the address of a multicast group")
            options[name] = value
        else:
            raise ValueError(
                f"bad endpoint {text!r}: after ? comes broadcast, reuse_port, or interface= with the name of one"
            )
    return replace(endpoint, **options)


async def resolve(endpoint: HostEndpoint) -> list[tuple[socket.AddressFamily, Any]]:
    """Return the addresses of an endpoint as (family, address), without duplicates.

    Only a name that has to be looked up takes a thread.

    Raises:
        EndpointError: the host does not resolve.
    """
    host = endpoint.host or None
    flags = socket.AI_PASSIVE
    try:
        try:
            found = socket.getaddrinfo(host, endpoint.port, type=endpoint.type, flags=flags | socket.AI_NUMERICHOST)
        except socket.gaierror:
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host, endpoint.port, type=endpoint.type, flags=flags)
    except (OSError, UnicodeError) as error:  # UnicodeError: a label that is too long or empty
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EndpointError(
            f"cannot resolve the host of {endpoint}: {reason}", getattr(error, "errno", None)
        ) from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def socket_name(sock: socket.socket) -> str:
    """Return the endpoint string for where a socket is bound."""
    address = sock.getsockname()
    is_stream = sock.type == socket.SOCK_STREAM
    if sock.family == socket.AF_UNIX:
        path = os.fsdecode(address)
        return str(UnixEndpoint(path) if is_stream else UnixDatagramEndpoint(path))
    host = address[0]
    if sock.family == socket.AF_INET6 and address[3]:  # a link-local address says nothing without its interface
        try:
            host += f"%{socket.if_indextoname(address[3])}"
        except OSError:
            host += f"%{address[3]}"
    return str((TCPEndpoint if is_stream else UDPEndpoint)(host, address[1]))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
