"""The balancers that may send PROXY headers, and which: what a server, or one of its endpoints, is given as `proxy`."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from aioecho.net.proxy_header import ProxyHeader, parse
from aioecho.runtime.addresses import unmapped

__all__ = ["VERSIONS", "ProxyProtocol", "addresses_of", "check_trust"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

VERSIONS = {"v1": (1,), "v2": (2,), "any": (1, 2)}
"""What the strings of endpoints, and the command line, call the versions."""

# The shortest header that can be allowed: an IPv4 one of version 2. And the longest that there is.
LEAST, MOST = 28, 16 + 2**16 - 1

# Addresses that are remembered as trusted or not.
REMEMBERED = 1024


@dataclass(frozen=True)
class ProxyProtocol:
    """Has a server expect a PROXY header (version 1 or 2) before everything else that a connection, or a datagram, has.

    Args:
        trusted: the addresses, or networks such as "10.0.0.0/8", of the trusted balancers; "*" is every
            address. Anything else that connects is rejected before a byte of it is read. There is no default: over TCP and
            UDP a server is not made without one. Peers of Unix sockets are always trusted, as the file's permissions decide.
        versions: the versions that are accepted.
        max_size: the longest header, in bytes.

    A connection without a header is rejected: no guess is made. How long to wait for it is `Timeouts.proxy`.

    Raises:
        TypeError, ValueError: an argument makes no sense; the message names it.
    """

    trusted: Iterable[Any] = ()
    versions: Iterable[int] = (1, 2)
    max_size: int = 4096
    _networks: tuple[Network, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.trusted, str | bytes):
            raise TypeError(f"trusted must be a list of networks, such as ['10.0.0.0/8'], not {self.trusted!r}")
        trusted = tuple(str(each) for each in self.trusted)
        networks: list[Network] = []
        for text in trusted:
            networks += _parse_networks(text)
        if isinstance(self.versions, int | str):
            raise TypeError(f"versions must be a tuple of 1 and 2, such as (2,), not {self.versions!r}")
        versions = tuple(sorted(set(self.versions)))
        if not versions or not set(versions) <= {1, 2} or any(isinstance(each, bool) for each in versions):
            raise ValueError(f"versions must be 1, 2 or both, not {self.versions!r}")
        size = self.max_size
        if not isinstance(size, int) or isinstance(size, bool) or not LEAST <= size <= MOST:
            raise ValueError(f"max_size must be a whole number of bytes from {LEAST} to {MOST}, not {size!r}")
        object.__setattr__(self, "trusted", trusted)
        object.__setattr__(self, "versions", versions)
        object.__setattr__(self, "_networks", tuple(networks))

    @classmethod
    def named(cls, name: str, trusted: str | None) -> "ProxyProtocol":
        """Return what "v1", "v2" or "any" stands for, with networks that are separated by commas.

        Raises:
            ValueError: it is none of them, or what is trusted is no network.
        """
        if name not in VERSIONS:
            raise ValueError(f"the PROXY protocol is {', '.join(VERSIONS)}, not {name!r}")
        networks = [] if trusted is None else [each.strip() for each in trusted.split(",")]
        return cls(trusted=networks, versions=VERSIONS[name])

    @property
    def query(self) -> str:
        """The options of an endpoint string that say this, without `max_size`."""
        name = next(name for name, versions in VERSIONS.items() if versions == self.versions)
        trusted = ",".join(self.trusted)
        return f"proxy={name}" + (f"&proxy_from={trusted}" if trusted else "")

    def trusts(self, address: Any) -> bool:
        """Tell whether a peer is trusted to send headers, by its address as accept() gives it."""
        return not isinstance(address, tuple) or _is_in(unmapped(address)[0], self._networks)

    def parse(self, buffer: bytes | bytearray) -> ProxyHeader | None:
        """Return the header that a buffer begins with, or None if it may be the beginning of one.

        Raises:
            ProxyHeaderError: there is none, or it is not to be accepted.
        """
        return parse(buffer, versions=self.versions, max_size=self.max_size)  # type: ignore[arg-type]  # a tuple


def _parse_networks(text: str) -> list[Network]:
    if text == "*":
        return [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")]
    try:
        return [ipaddress.ip_network(text)]
    except ValueError as error:
        raise ValueError(
            f"trusted has {text!r}, which is neither an address, a network such as 10.0.0.0/8, nor *: {error}"
        ) from None


@lru_cache(REMEMBERED)
def _is_in(host: str, networks: tuple[Network, ...]) -> bool:
    address = ipaddress.ip_address(host)
    return any(address in network for network in networks)


def check_trust(proxy: ProxyProtocol | None, name: str) -> None:
    """Raise ValueError if PROXY headers are expected on an address of the network called `name`, and none is trusted."""
    if proxy is not None and not proxy.trusted:
        raise ValueError(
            f"no balancer is trusted to send PROXY headers to {name}: name its network with proxy_from= in the endpoint,"
            " trusted= of ProxyProtocol, or --proxy-allow-from"
        )


def addresses_of(header: ProxyHeader, peer: Any) -> tuple[Any, Any]:
    """Return the client's address, and that by which it is counted for limits per host: None for no such limit.

    `peer` is the balancer's address. It is what the client has where the header names none; such clients may be many, and so
    may be the ones for which a balancer writes 0.0.0.0, as varnish does for a Unix socket's.
    """
    if header.is_local:
        return peer, None
    source = header.source
    return source, None if isinstance(source, tuple) and source[0] in ("0.0.0.0", "::") else source
