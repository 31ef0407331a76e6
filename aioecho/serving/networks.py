"""The networks that may connect, and the networks that may not."""

import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["NetworkLists", "read_networks"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class _Networks:
    """A set of networks. To look an address up takes as long as they have different lengths, however many they are."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._found: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}  # by version, then by the bits that do not count
        for network in networks:
            shift = network.max_prefixlen - network.prefixlen
            numbers = self._found[network.version].setdefault(shift, set())
            numbers.add(int(network.network_address) >> shift)

    def __bool__(self) -> bool:
        return any(self._found.values())

    def has(self, version: int, number: int) -> bool:
        """Tell whether an address is in one of them."""
        return any(number >> shift in numbers for shift, numbers in self._found[version].items())


class NetworkLists:
    """The networks that may connect, or all if there is none; and the ones that may not, which outweigh the others."""

    def __init__(self, allowed: Iterable[Network], denied: Iterable[Network]) -> None:
        self._allowed, self._denied = _Networks(allowed), _Networks(denied)

    def allow(self, client_address: Any) -> bool:
        """Tell whether a client may connect. One of a Unix socket may, and an IPv4 address in an IPv6 one counts as IPv4."""
        if not isinstance(client_address, tuple):
            return True
        host = client_address[0].partition("%")[0]
        try:
            version, packed = (
                (6, socket.inet_pton(socket.AF_INET6, host)) if ":" in host else (4, socket.inet_aton(host))
            )
        except OSError:  # no address: it is in no list
            return not self._allowed
        if version == 6 and packed.startswith(MAPPED):
            version, packed = 4, packed[len(MAPPED) :]
        number = int.from_bytes(packed, "big")
        if self._denied.has(version, number):
            return False
        return not self._allowed or self._allowed.has(version, number)

    def guard(
        self, receive: Callable[[bytes, Any, Any], None], drop: Callable[[str, Any], None]
    ) -> Callable[[bytes, Any, Any], None]:
        """Return what receives the datagrams that are allowed, by `receive`, and has the others dropped."""

        def receive_allowed(data: bytes, client_address: Any, transport: Any) -> None:
            if self.allow(client_address):
                receive(data, client_address, transport)
            else:
                drop("not allowed", client_address)

        return receive_allowed


# What the IPv6 address of an IPv4 host begins with.
MAPPED = bytes(10) + b"\xff\xff"


def read_networks(allow: Sequence[str], deny: Sequence[str]) -> NetworkLists | None:
    """Return the lists that texts name; None if there is no network in them.

    Raises:
        ValueError, TypeError: a text names no network (caller).
    """
    allowed, denied = _read("allow", allow), _read("deny", deny)
    return NetworkLists(allowed, denied) if allowed or denied else None


def _read(name: str, texts: Sequence[str]) -> list[Network]:
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a list of networks, not {texts!r}: put it in brackets")
    return [_read_network(name, text) for text in texts]


def _read_network(name: str, text: Any) -> Network:
    try:
        network: Network = ipaddress.ip_network(text if isinstance(text, Network) else str(text))
    except ValueError as error:
        raise ValueError(f"{name}: {text!r} is no network, as 10.0.0.0/8 is: {error}") from None
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        packed = network.network_address.packed
        if packed.startswith(MAPPED):
            return ipaddress.IPv4Network((packed[len(MAPPED) :], network.prefixlen - 96))
    return network
