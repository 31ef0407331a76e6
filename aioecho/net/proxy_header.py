"""The header of the PROXY protocol, by which a balancer tells for which client it connects: from bytes to what they say.

By the specification 3.4 of HAProxy's (proxy-protocol.txt): version 1 is a line of text, version 2 is binary. This module reads
and writes nothing. Its rule: a header is taken by its exact form or not at all, as what follows it is a client's, and a header
that is half understood would let that client say where it comes from.
"""

import os
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from aioecho.exceptions import AioechoError
from aioecho.net.proxy_tlvs import MalformedTLV, ProxyTLS, WrongChecksum, check_checksum, parse_tlvs
from aioecho.runtime.addresses import unmapped

__all__ = ["ProxyHeader", "ProxyHeaderError", "ProxyTLS", "find_missing", "parse"]

Reason = Literal["bad signature", "version not allowed", "malformed", "too large", "bad checksum"]
Transport = Literal["tcp", "udp", "unix", "unixgram"]

START_OF_V1 = b"PROXY "
SIGNATURE_OF_V2 = b"\r\n\r\n\0\r\nQUIT\n"

# The longest line of version 1, with its end.
LONGEST_LINE = 107

# The shortest is PROXY UNKNOWN. A header of version 2 has a byte more. The others have so many spaces.
SHORTEST_LINE = 15
SPACES = 5

FIXED_PART = struct.Struct("!12sBBH")
INET, INET6, UNIX = struct.Struct("!4s4sHH"), struct.Struct("!16s16sHH"), struct.Struct("!108s108s")

LOCAL, PROXY = 0, 1
ADDRESS_PART = {0: 0, 1: INET.size, 2: INET6.size, 3: UNIX.size}  # bytes, by the family
TRANSPORTS: dict[tuple[int, int], Transport] = {
    (1, 1): "tcp",
    (1, 2): "udp",
    (2, 1): "tcp",
    (2, 2): "udp",
    (3, 1): "unix",
    (3, 2): "unixgram",
}


class ProxyHeaderError(AioechoError):
    """What came is no PROXY header that is to be accepted: the peer's doing, or a mistake in a balancer's configuration.

    `reason` is "bad signature" (no header at all), "version not allowed", "malformed", "too large" or "bad checksum".
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class ProxyHeader:
    """What a PROXY header says.

    Addresses are as sockets give them: `(host, port)` for IPv4, `(host, port, 0, 0)` for IPv6, and a path, or a name behind a
    NUL as bytes, for Unix sockets. An IPv4 address that was written as an IPv6 one is given as IPv4.
    """

    version: int
    size: int
    """How many bytes the header takes up. What follows is the client's."""

    is_local: bool = False
    """Whether the connection's real ends count, and there are no addresses: the balancer's own check (LOCAL), or a client of
    which it knows no address (UNKNOWN, UNSPEC)."""

    transport: Transport | None = None
    source: Any = None
    """The client's address."""
    destination: Any = None
    """The address that the client has connected to."""

    alpn: bytes | None = None
    authority: str | None = None
    """The host name that the client has asked for, by SNI mostly."""
    unique_id: bytes | None = None
    """What the balancer calls the connection. At most 128 bytes."""
    tls: ProxyTLS | None = None
    netns: str | None = None
    """The name of the network namespace."""
    aws_vpce_id: str | None = None
    azure_link_id: int | None = None
    gcp_psc_id: int | None = None
    has_checksum: bool = False
    """Whether a CRC32C was there. It was right then."""

    tlvs: tuple[tuple[int, bytes], ...] = ()
    """All of version 2's extensions, as type and value, in order."""


def parse(buffer: bytes | bytearray, *, versions: Collection[int] = (1, 2), max_size: int = 4096) -> ProxyHeader | None:
    """Return the header that a buffer begins with, or None if it may be the beginning of one.

    `max_size` is in bytes. Nothing is asked for that does not belong to a header: once it can be none, that is raised.

    Raises:
        ProxyHeaderError: there is none, or it is not to be accepted. Its `reason` says why.
    """
    for version, start in ((2, SIGNATURE_OF_V2), (1, START_OF_V1)):
        begun = buffer[: len(start)]
        if start.startswith(begun):
            if len(begun) < len(start):
                return None
            if version not in versions:
                raise ProxyHeaderError(
                    "version not allowed", f"a PROXY header of version {version}, which is not allowed here"
                )
            return _parse_binary(buffer, max_size) if version == 2 else _parse_line(buffer, max_size)
    raise ProxyHeaderError("bad signature", f"no PROXY header, but {bytes(buffer[:32])!r}")


def find_missing(buffer: bytes | bytearray) -> int:
    """Return how many bytes a header that is not whole has still to come, at least: to read no more takes none of what follows.

    `buffer` is something for which :func:`parse` has returned None.
    """
    size = len(buffer)
    if size < SHORTEST_LINE:
        return SHORTEST_LINE - size
    if buffer.startswith(SIGNATURE_OF_V2):
        length = int.from_bytes(buffer[14:16], "big") if size >= FIXED_PART.size else 0
        return FIXED_PART.size + length - size
    if buffer.startswith(b"PROXY UNKNOWN"):
        return 1 if buffer.endswith(b"\r") else 2
    # Every field that has not begun has a space and a character, and there is the line's end.
    return 1 if buffer.endswith(b"\r") else 2 * max(SPACES - buffer.count(b" "), 0) + 2


# Version 1


def _parse_line(buffer: bytes | bytearray, max_size: int) -> ProxyHeader | None:
    most = min(LONGEST_LINE, max_size)
    end = buffer.find(b"\n", 0, most)
    if end < 0:
        if len(buffer) >= most:
            raise ProxyHeaderError("too large", f"no end of the line in {_show(buffer[:most])}")
        return None
    line = bytes(buffer[: end + 1])
    if not line.endswith(b"\r\n") or line.find(b"\r") != end - 1:
        raise ProxyHeaderError("malformed", f"a line that does not end with CR and LF: {_show(line)}")
    kind, _, rest = line[len(START_OF_V1) : -2].partition(b" ")
    if kind == b"UNKNOWN":  # with anything behind it
        return ProxyHeader(version=1, size=len(line), is_local=True)
    if kind not in (b"TCP4", b"TCP6"):
        raise ProxyHeaderError("malformed", f"neither TCP4, TCP6 nor UNKNOWN: {_show(line)}")
    fields = rest.split(b" ")
    if len(fields) != 4:
        raise ProxyHeaderError("malformed", f"not two addresses and two ports: {_show(line)}")
    try:
        source = _address(fields[0], fields[2], (kind,))
        # nginx gives its own address as it is, of whatever family: with realip behind another proxy.
        destination = _address(fields[1], fields[3], (b"TCP4", b"TCP6"))
    except ValueError:
        hint = " (nginx sends this with realip, for a client of a Unix socket)" if b"unix:" in rest else ""
        raise ProxyHeaderError("malformed", f"an address or a port is none: {_show(line)}{hint}") from None
    return ProxyHeader(version=1, size=len(line), transport="tcp", source=source, destination=destination)


def _address(host: bytes, port: bytes, kinds: Collection[bytes]) -> Any:
    if not (port.isdigit() and len(port) <= 5 and int(port) < 2**16 and port == b"%d" % int(port)):
        raise ValueError(port)
    text = host.decode("ascii")
    for kind, family in ((b"TCP4", socket.AF_INET), (b"TCP6", socket.AF_INET6)):
        if kind in kinds:
            try:
                return _plain(family, socket.inet_pton(family, text), int(port))
            except OSError:
                pass
    raise ValueError(host)


def _plain(family: socket.AddressFamily, packed: bytes, port: int) -> Any:
    host = socket.inet_ntop(family, packed)
    return (host, port) if family == socket.AF_INET else unmapped((host, port, 0, 0))


def _show(line: bytes | bytearray) -> str:
    return ascii(bytes(line))[1:]


# Version 2


def _parse_binary(buffer: bytes | bytearray, max_size: int) -> ProxyHeader | None:
    if len(buffer) > 12 and buffer[12] not in (0x20 | LOCAL, 0x20 | PROXY):
        raise ProxyHeaderError("malformed", f"an unknown version or command: 0x{buffer[12]:02x}")
    if len(buffer) < FIXED_PART.size:
        return None
    _, version_and_command, family_and_transport, length = FIXED_PART.unpack_from(buffer)
    family, transport = family_and_transport >> 4, family_and_transport & 15
    is_local = version_and_command & 15 == LOCAL  # then the family is nothing to go by
    if not is_local and (family not in ADDRESS_PART or transport > 2):
        raise ProxyHeaderError("malformed", f"an unknown family or transport: 0x{family_and_transport:02x}")
    size = FIXED_PART.size + length
    if size > max_size:
        raise ProxyHeaderError("too large", f"a header of {size} bytes, of which {max_size} are allowed")
    is_local = is_local or (family, transport) not in TRANSPORTS
    if not is_local and length < ADDRESS_PART[family]:
        raise ProxyHeaderError("malformed", f"{length} bytes are too few for addresses of family {family}")
    if len(buffer) < size:
        return None
    header = bytes(buffer[:size])
    start = FIXED_PART.size + ADDRESS_PART.get(family, 0)
    try:
        if is_local:
            has_checksum = _check_local(header, start)
            return ProxyHeader(version=2, size=size, is_local=True, has_checksum=has_checksum)
        tlvs = parse_tlvs(header, start)
    except WrongChecksum as error:
        raise ProxyHeaderError("bad checksum", str(error)) from None
    except MalformedTLV as error:
        raise ProxyHeaderError("malformed", str(error)) from None
    source, destination = _addresses(header, family)
    return ProxyHeader(
        version=2,
        size=size,
        transport=TRANSPORTS[family, transport],
        source=source,
        destination=destination,
        **vars(tlvs),
    )


def _check_local(header: bytes, start: int) -> bool:
    """Check the checksum of a header that is skipped otherwise: its body may be anything. Return whether there is one."""
    try:
        return check_checksum(header, start)
    except MalformedTLV:
        return False


def _addresses(header: bytes, family: int) -> tuple[Any, Any]:
    if family == 3:
        source, destination = UNIX.unpack_from(header, FIXED_PART.size)
        return _unix_address(source), _unix_address(destination)
    layout, kind = (INET, socket.AF_INET) if family == 1 else (INET6, socket.AF_INET6)
    source, destination, source_port, destination_port = layout.unpack_from(header, FIXED_PART.size)
    return _plain(kind, source, source_port), _plain(kind, destination, destination_port)


def _unix_address(field: bytes) -> str | bytes:
    if field.startswith(b"\0"):  # a name in Linux's abstract namespace, or none
        return field.rstrip(b"\0") or ""
    return os.fsdecode(field.partition(b"\0")[0])
