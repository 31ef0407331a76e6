"""The extensions of a PROXY header of version 2, behind the addresses: every one has a type, a length and a value."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MalformedTLV", "ProxyTLS", "Tlvs", "WrongChecksum", "check_checksum", "crc32c", "parse_tlvs"]

ALPN, AUTHORITY, CRC32C, NOOP, UNIQUE_ID, SSL, NETNS = 0x01, 0x02, 0x03, 0x04, 0x05, 0x20, 0x30
SSL_VERSION, SSL_CN, SSL_CIPHER, SSL_SIG_ALG, SSL_KEY_ALG = 0x21, 0x22, 0x23, 0x24, 0x25
SSL_GROUP, SSL_SIG_SCHEME, SSL_CLIENT_CERT = 0x26, 0x27, 0x28
GCP, AWS, AZURE = 0xE0, 0xEA, 0xEE

# What must not be there twice: two answers to one question are none.
ONCE = {ALPN, AUTHORITY, CRC32C, UNIQUE_ID, SSL, NETNS}

LONGEST_UNIQUE_ID = 128

# Bits of what a balancer says of a client's TLS.
IS_TLS, CERT_CONN, CERT_SESS = 0x01, 0x02, 0x04

# Castagnoli's polynomial, reversed.
POLYNOMIAL = 0x82F63B78


class MalformedTLV(ValueError):
    """An extension has not the form that its type has, or reaches over the end of the header."""


class WrongChecksum(ValueError):
    """The CRC32C is not that of the header."""


@dataclass(frozen=True, kw_only=True)
class ProxyTLS:
    """What a balancer says of its client's TLS."""

    is_tls: bool
    """Whether the client has connected over TLS."""
    has_certificate: bool
    """Whether the client has shown a certificate, in this connection or in the one that it resumes."""
    verify: int
    """What the check of the certificate has given, 0 for good. Meaningless without one: balancers differ."""
    version: str | None = None
    """Such as "TLSv1.3"."""
    cipher: str | None = None
    common_name: str | None = None
    """The name in the client's certificate. None unless the balancer has verified it."""
    signature_algorithm: str | None = None
    key_algorithm: str | None = None
    group: str | None = None
    signature_scheme: str | None = None
    certificate: bytes | None = None
    """The client's certificate, in DER. None unless the balancer has verified it."""

    @property
    def is_verified(self) -> bool:
        """Whether the client has shown a certificate that the balancer found good."""
        return self.has_certificate and self.verify == 0


@dataclass(frozen=True, kw_only=True)
class Tlvs:
    """The extensions of a header. They have the names of :class:`~aioecho.net.proxy_header.ProxyHeader`."""

    alpn: bytes | None
    authority: str | None
    unique_id: bytes | None
    tls: ProxyTLS | None
    netns: str | None
    aws_vpce_id: str | None
    azure_link_id: int | None
    gcp_psc_id: int | None
    has_checksum: bool
    tlvs: tuple[tuple[int, bytes], ...]


def parse_tlvs(header: bytes, start: int) -> Tlvs:
    """Return the extensions of a header, which begin at `start`, and check its checksum if there is one.

    Raises:
        MalformedTLV: an extension has not the form that it should have.
        WrongChecksum: the header was changed on its way.
    """
    has_checksum = check_checksum(header, start)
    found = [(kind, value) for kind, value, _ in _split(header, start)]
    first: dict[int, bytes] = {}
    for kind, value in found:
        if kind in ONCE and kind in first:
            raise MalformedTLV(f"two extensions of type 0x{kind:02x}")
        first.setdefault(kind, value)
    unique_id = first.get(UNIQUE_ID)
    if unique_id is not None and len(unique_id) > LONGEST_UNIQUE_ID:
        raise MalformedTLV(f"a unique id of {len(unique_id)} bytes, of which {LONGEST_UNIQUE_ID} are allowed")
    return Tlvs(
        alpn=first.get(ALPN),
        authority=_text(first.get(AUTHORITY), "the authority"),
        unique_id=unique_id,
        tls=_parse_tls(first[SSL]) if SSL in first else None,
        netns=_text(first.get(NETNS), "the network namespace"),
        aws_vpce_id=_aws_vpce_id(first.get(AWS, b"")),
        azure_link_id=_azure_link_id(first.get(AZURE, b"")),
        gcp_psc_id=int.from_bytes(first[GCP], "big") if len(first.get(GCP, b"")) == 8 else None,
        has_checksum=has_checksum,
        tlvs=tuple(found),
    )


def _split(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes, int]]:
    """Yield the type, the value, and where the value begins, of each extension."""
    while start < len(data):
        if start + 3 > len(data):
            raise MalformedTLV("an extension that ends within its type and length")
        length = int.from_bytes(data[start + 1 : start + 3], "big")
        value = data[start + 3 : start + 3 + length]
        if len(value) < length:
            raise MalformedTLV(f"an extension of {length} bytes, where {len(value)} are left")
        yield data[start], value, start + 3
        start += 3 + length


def _text(value: bytes | None, what: str) -> str | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedTLV(f"{what} is no UTF-8: {value!r}") from None


def _parse_tls(value: bytes) -> ProxyTLS:
    if len(value) < 5:
        raise MalformedTLV(f"{len(value)} bytes of TLS, which has 5 at least")
    bits, verify = value[0], int.from_bytes(value[1:5], "big")
    parts: dict[int, bytes] = {}
    for kind, inner, _ in _split(value, 5):
        if kind in parts:
            raise MalformedTLV(f"two extensions of type 0x{kind:02x} within that of TLS")
        parts[kind] = inner
    has_certificate = bool(bits & (CERT_CONN | CERT_SESS))
    is_verified = has_certificate and verify == 0
    common_name = _text(parts.get(SSL_CN), "the client's name")
    return ProxyTLS(
        is_tls=bool(bits & IS_TLS),
        has_certificate=has_certificate,
        verify=verify,
        version=_text(parts.get(SSL_VERSION), "the version of TLS"),
        cipher=_text(parts.get(SSL_CIPHER), "the cipher"),
        common_name=common_name if is_verified else None,
        signature_algorithm=_text(parts.get(SSL_SIG_ALG), "the signature algorithm"),
        key_algorithm=_text(parts.get(SSL_KEY_ALG), "the key algorithm"),
        group=_text(parts.get(SSL_GROUP), "the group"),
        signature_scheme=_text(parts.get(SSL_SIG_SCHEME), "the signature scheme"),
        certificate=parts.get(SSL_CLIENT_CERT) if is_verified else None,
    )


# The types of vendors are from a range for private use: what has not their form is another vendor's, and no mistake.


def _aws_vpce_id(value: bytes) -> str | None:
    return value[1:].decode("ascii") if value[:1] == b"\1" and value.isascii() else None


def _azure_link_id(value: bytes) -> int | None:
    return int.from_bytes(value[1:], "little") if value[:1] == b"\1" and len(value) == 5 else None


# The checksum


def check_checksum(header: bytes, start: int) -> bool:
    """Check the checksum of a header, with extensions from `start` on; return whether there is one.

    Raises:
        MalformedTLV: an extension reaches over the end, or the checksum is there twice or not of 4 bytes.
        WrongChecksum: it is wrong.
    """
    found = [(value, at) for kind, value, at in _split(header, start) if kind == CRC32C]
    if not found:
        return False
    [(value, at), *others] = found
    if others or len(value) != 4:
        raise MalformedTLV("two checksums, or one that has not 4 bytes")
    wanted = int.from_bytes(value, "big")
    if crc32c(header[:at] + bytes(4) + header[at + 4 :]) != wanted:
        raise WrongChecksum(f"the header's checksum is not 0x{wanted:08x}")
    return True


@functools.cache
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ POLYNOMIAL * (byte & 1)
        table.append(byte)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of some bytes. It is for short ones: a kilobyte takes 0.1 ms."""
    crc, table = 0xFFFFFFFF, _table()
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
