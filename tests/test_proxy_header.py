"""PROXY headers: what is one, what it says, and that nothing else is taken for one, in however many pieces it comes."""

import ipaddress
import socket
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aioecho.exceptions import AioechoError
from aioecho.net.proxy_header import LONGEST_LINE, SIGNATURE_OF_V2, ProxyHeader, ProxyHeaderError, parse
from aioecho.net.proxy_tlvs import crc32c

SOME = settings(max_examples=200, deadline=None)

IPV4, IPV6 = b"\x11", b"\x21"


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def binary(
    body: bytes,
    family: bytes = IPV4,
    *,
    command: int = 1,
    version: int = 2,
    checksum: bool = False,
    length: int | None = None,
) -> bytes:
    """Return a header of version 2, with a checksum behind the body if that is wanted."""
    if checksum:
        body += tlv(3, bytes(4))
    start = SIGNATURE_OF_V2 + bytes([version << 4 | command]) + family
    header = start + struct.pack("!H", len(body) if length is None else length) + body
    return header[:-4] + struct.pack("!I", crc32c(header)) if checksum else header


def inet(source: str = "192.0.2.1", destination: str = "198.51.100.2", ports: tuple[int, int] = (40000, 443)) -> bytes:
    addresses = [ipaddress.ip_address(host).packed for host in (source, destination)]
    return b"".join(addresses) + struct.pack("!HH", *ports)


def parsed(header: bytes, **options: Any) -> ProxyHeader:
    found = parse(header, **options)
    assert found is not None
    assert found.size == len(header)
    return found


def reason_for(header: bytes, **options: Any) -> str:
    with pytest.raises(ProxyHeaderError) as caught:
        parse(header, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason


# Version 1


@pytest.mark.parametrize(
    ("line", "source", "destination"),
    [
        (b"TCP4 192.0.2.1 198.51.100.2 40000 443", ("192.0.2.1", 40000), ("198.51.100.2", 443)),
        (b"TCP4 0.0.0.0 0.0.0.0 0 0", ("0.0.0.0", 0), ("0.0.0.0", 0)),  # varnish, for a client of a Unix socket
        (b"TCP6 2001:DB8::1 ::1 1 65535", ("2001:db8::1", 1, 0, 0), ("::1", 65535, 0, 0)),
        (b"TCP6 ::ffff:192.0.2.1 ::ffff:c633:6402 1 2", ("192.0.2.1", 1), ("198.51.100.2", 2)),
        (b"TCP6 2001:db8::1 127.0.0.1 1 2", ("2001:db8::1", 1, 0, 0), ("127.0.0.1", 2)),  # nginx with realip
        (b"TCP4 192.0.2.1 ::1 1 2", ("192.0.2.1", 1), ("::1", 2, 0, 0)),
    ],
)
def test_a_line_names_the_client(line: bytes, source: Any, destination: Any) -> None:
    header = parsed(b"PROXY " + line + b"\r\n")
    assert (header.version, header.is_local, header.transport) == (1, False, "tcp")
    assert (header.source, header.destination) == (source, destination)


@pytest.mark.parametrize("rest", [b"", b" ", b"    ", b" ff:: ff:: 1 2", b" \xff\0 anything"])
def test_a_line_of_an_unknown_client_leaves_the_real_one(rest: bytes) -> None:
    header = parsed(b"PROXY UNKNOWN" + rest + b"\r\n")
    assert (header.is_local, header.source, header.destination, header.transport) == (True, None, None, None)


@pytest.mark.parametrize(
    "line",
    [
        b"TCP4 192.0.2.1 198.51.100.2 40000",
        b"TCP4 192.0.2.1 198.51.100.2 40000 443 ",
        b"TCP4 192.0.2.1 198.51.100.2 40000 443 1",
        b"TCP4  192.0.2.1 198.51.100.2 40000 443",
        b"TCP4 192.0.2.1 198.51.100.2 40000 65536",
        b"TCP4 192.0.2.1 198.51.100.2 040 443",
        b"TCP4 192.0.2.1 198.51.100.2 +40 443",
        b"TCP4 192.0.2.1 198.51.100.2 4_0 443",
        "TCP4 192.0.2.1 198.51.100.2 \u0664 443".encode(),
        b"TCP4 192.0.2.01 198.51.100.2 1 2",
        b"TCP4 192.0.2 198.51.100.2 1 2",
        b"TCP4 192.0.2.256 198.51.100.2 1 2",
        b"TCP4 \xff92.0.2.1 198.51.100.2 1 2",
        b"TCP4 2001:db8::1 198.51.100.2 1 2",
        b"TCP6 192.0.2.1 ::1 1 2",
        b"TCP6 fe80::1%eth0 ::1 1 2",
        b"TCP6 [::1] ::1 1 2",
        b"TCP4 a.example 198.51.100.2 1 2",
        b"UDP4 192.0.2.1 198.51.100.2 1 2",
        b"tcp4 192.0.2.1 198.51.100.2 1 2",
        b"UNKNOWNS",
        b"TCP4",
        b"",
        b"TCP4 192.0.2.1\t198.51.100.2 1 2",
        b"TCP4 192.0.2.1 198.51.100.2 1 2\r",
        b"UNKNOWN \r ",
    ],
)
def test_a_line_of_any_other_form_is_malformed(line: bytes) -> None:
    assert reason_for(b"PROXY " + line + b"\r\n") == "malformed"


def test_a_line_has_to_end_as_it_should() -> None:
    assert reason_for(b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2\n") == "malformed"
    assert reason_for(b"PROXY UNKNOWN".ljust(LONGEST_LINE) + b"\r\n") == "too large"
    assert parsed(b"PROXY UNKNOWN".ljust(LONGEST_LINE - 2) + b"\r\n").is_local
    assert parse(b"PROXY UNKNOWN".ljust(LONGEST_LINE - 1)) is None


def test_a_line_of_nginx_that_names_a_unix_client_says_what_it_is() -> None:
    with pytest.raises(
        ProxyHeaderError, match=r"'PROXY TCP4 unix: .* \(nginx sends this with realip, for a client of a"
    ):
        parse(b"PROXY TCP4 unix: 198.51.100.2 1 2\r\n")


# Version 2


@pytest.mark.parametrize(("family", "transport"), [(b"\x11", "tcp"), (b"\x12", "udp")])
def test_a_binary_header_names_an_ipv4_client(family: bytes, transport: str) -> None:
    header = parsed(binary(inet(), family))
    assert (header.version, header.is_local, header.transport) == (2, False, transport)
    assert (header.source, header.destination) == (("192.0.2.1", 40000), ("198.51.100.2", 443))


@pytest.mark.parametrize(("family", "transport"), [(b"\x21", "tcp"), (b"\x22", "udp")])
def test_a_binary_header_names_an_ipv6_client(family: bytes, transport: str) -> None:
    header = parsed(binary(inet("2001:db8::1", "::ffff:198.51.100.2"), family))
    assert (header.transport, header.source) == (transport, ("2001:db8::1", 40000, 0, 0))
    assert header.destination == ("198.51.100.2", 443)


@pytest.mark.parametrize(("family", "transport"), [(b"\x31", "unix"), (b"\x32", "unixgram")])
def test_a_binary_header_names_a_unix_client(family: bytes, transport: str) -> None:
    header = parsed(binary(b"/run/a".ljust(108, b"\0") + b"\0name".ljust(108, b"\0"), family))
    assert (header.transport, header.source, header.destination) == (transport, "/run/a", b"\0name")
    full = parsed(binary(b"x" * 108 + bytes(108), family))
    assert (full.source, full.destination) == ("x" * 108, "")


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize(
    ("family", "command", "body"),
    [
        (b"\0", 0, b""),
        (b"\0", 0, tlv(5, b"") + tlv(0x20, bytes(5))),  # HAProxy's checks, with options
        (b"\x11", 0, inet()),
        (b"\xff", 0, b""),
        (b"\0", 1, tlv(2, b"a.example")),
        (b"\x10", 1, inet()),
        (b"\x01", 1, b""),
    ],
)
def test_what_names_no_client_leaves_the_real_one(family: bytes, command: int, body: bytes, checksum: bool) -> None:
    header = parsed(binary(body, family, command=command, checksum=checksum))
    assert (header.is_local, header.source, header.tlvs) == (True, None, ())
    assert header.has_checksum is checksum
    if checksum:
        wrong = bytearray(binary(body, family, command=command, checksum=True))
        wrong[-1] ^= 1
        assert reason_for(bytes(wrong)) == "bad checksum"


def test_the_body_of_a_local_header_is_skipped_whatever_it_is() -> None:
    assert parsed(binary(b"\xffgarbage", b"\0", command=0)).is_local
    assert parsed(binary(b"gar", b"\x21", command=0)).is_local


def test_all_that_haproxy_and_the_clouds_can_send_is_given() -> None:
    tls = b"\x07" + bytes(4) + tlv(0x21, b"TLSv1.3") + tlv(0x22, b"c\xc3\xa9") + tlv(0x23, b"TLS_AES_128_GCM_SHA256")
    tls += (
        tlv(0x24, b"SHA256")
        + tlv(0x25, b"RSA2048")
        + tlv(0x26, b"X25519")
        + tlv(0x27, b"ecdsa")
        + tlv(0x28, b"\x30\x82")
    )
    extensions = [
        (0x01, b"\x02h2"),
        (0x02, b"a.example"),
        (0x04, bytes(7)),
        (0x04, b""),
        (0x05, b"\0\xff" * 64),
        (0x20, tls),
        (0x30, b"blue"),
        (0xEA, b"\x01vpce-08d2bf15fac5001c9"),
        (0xEE, b"\x01\xc1\x45\x21\x0a"),
        (0xE0, (2**63 + 5).to_bytes(8, "big")),
        (0xF9, b"anything"),
    ]
    body = b"".join(tlv(kind, value) for kind, value in extensions)
    header = parsed(binary(inet() + body, checksum=True))
    assert (header.alpn, header.authority, header.unique_id) == (b"\x02h2", "a.example", b"\0\xff" * 64)
    assert (header.netns, header.has_checksum) == ("blue", True)
    assert header.aws_vpce_id == "vpce-08d2bf15fac5001c9"
    assert (header.azure_link_id, header.gcp_psc_id) == (0x0A2145C1, 2**63 + 5)
    assert header.tlvs[:-1] == tuple(extensions)
    found = header.tls
    assert found is not None
    assert (found.is_tls, found.has_certificate, found.verify, found.is_verified) == (True, True, 0, True)
    assert (found.version, found.cipher, found.common_name) == ("TLSv1.3", "TLS_AES_128_GCM_SHA256", "cé")
    assert (found.signature_algorithm, found.key_algorithm) == ("SHA256", "RSA2048")
    assert (found.group, found.signature_scheme, found.certificate) == ("X25519", "ecdsa", b"\x30\x82")


@pytest.mark.parametrize(
    ("bits", "verify", "is_verified"),
    [(1, 0, False), (0, 0, False), (1, 1, False), (3, 0, True), (5, 0, True), (7, 0, True), (3, 18, False)],
)
def test_a_clients_name_is_told_only_if_the_balancer_has_verified_it(bits: int, verify: int, is_verified: bool) -> None:
    value = bytes([bits]) + struct.pack("!I", verify) + tlv(0x22, b"client") + tlv(0x28, b"der")
    tls = parsed(binary(inet() + tlv(0x20, value))).tls
    assert tls is not None
    assert tls.is_verified is is_verified
    assert (tls.common_name, tls.certificate) == (("client", b"der") if is_verified else (None, None))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\x01", "malformed"),
        (b"\x01\x00", "malformed"),
        (b"\x01\x00\x02x", "malformed"),
        (tlv(0x05, bytes(129)), "malformed"),
        (tlv(0x02, b"\xff"), "malformed"),
        (tlv(0x30, b"\xff"), "malformed"),
        (tlv(0x01, b"a") * 2, "malformed"),
        (tlv(0x20, bytes(4)), "malformed"),
        (tlv(0x20, bytes(5) + b"\x21\x00\x05x"), "malformed"),
        (tlv(0x20, bytes(5) + tlv(0x22, b"a") + tlv(0x22, b"b")), "malformed"),
        (tlv(0x03, bytes(3)), "malformed"),
        (tlv(0x03, bytes(4)) * 2, "malformed"),
        (tlv(0x03, bytes(4)), "bad checksum"),
    ],
)
def test_an_extension_that_has_not_its_form_is_refused(body: bytes, reason: str) -> None:
    assert reason_for(binary(inet() + body)) == reason


@pytest.mark.parametrize(
    "body", [tlv(0xEA, b"\x02x"), tlv(0xEE, b"\x01"), tlv(0xE0, b"x"), tlv(0xEA, b""), tlv(0xEA, b"\x01\xff")]
)
def test_an_extension_for_private_use_may_have_any_form(body: bytes) -> None:
    header = parsed(binary(inet() + body))
    assert (header.aws_vpce_id, header.azure_link_id, header.gcp_psc_id) == (None, None, None)
    assert len(header.tlvs) == 1


@pytest.mark.parametrize(
    "header",
    [
        binary(inet(), command=2),
        binary(inet(), version=1),
        binary(inet(), version=3),
        binary(inet(), b"\x41"),
        binary(inet(), b"\x13"),
        binary(inet()[:-1]),
        binary(inet(), IPV6),
        binary(bytes(215), b"\x31"),
    ],
)
def test_a_binary_header_of_any_other_form_is_malformed(header: bytes) -> None:
    assert reason_for(header) == "malformed"


def test_a_header_that_is_too_large_is_refused_before_it_has_come() -> None:
    header = binary(inet() + tlv(4, bytes(100)))
    assert parsed(header, max_size=len(header)).source == ("192.0.2.1", 40000)
    assert reason_for(header[:16], max_size=len(header) - 1) == "too large"
    assert reason_for(binary(b"", length=4081)) == "too large"
    assert parse(binary(b"", length=4080)) is None


def test_only_versions_that_are_allowed_are_taken() -> None:
    line, header = b"PROXY UNKNOWN\r\n", binary(inet())
    assert parsed(line, versions=(1,)).version == 1
    assert parsed(header, versions=(2,)).version == 2
    assert reason_for(line, versions=(2,)) == "version not allowed"
    assert reason_for(header, versions=(1,)) == "version not allowed"


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"P0", b"proxy ", b"\r\n\r\nX", b"\n", b" PROXY "]
)
def test_what_is_no_header_is_refused_at_its_first_wrong_byte(data: bytes) -> None:
    assert reason_for(data) == "bad signature"
    for end in range(len(data)):
        assert outcome_of(data[:end]) in (None, "bad signature")
    assert issubclass(ProxyHeaderError, AioechoError)


def test_the_checksum_is_that_of_rfc_3720() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"") == 0


# Whatever comes


ports = st.integers(0, 65535)
extensions = st.lists(st.tuples(st.integers(0x40, 0xDF) | st.just(4), st.binary(max_size=40)), max_size=5)


def addresses(family: int) -> Any:
    return st.ip_addresses(v=family).map(lambda address: address.packed)


@st.composite
def headers(draw: Any) -> tuple[bytes, Any]:
    """Return a valid header, and the client that it names."""
    version = draw(st.sampled_from([4, 6]))
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    source, destination = draw(addresses(version)), draw(addresses(version))
    source_port, destination_port = draw(ports), draw(ports)
    host = socket.inet_ntop(family, source)
    found = ipaddress.ip_address(host)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    if mapped is not None or version == 4:
        client: Any = (str(mapped or host), source_port)
    else:
        client = (host, source_port, 0, 0)
    if draw(st.booleans()):
        other = socket.inet_ntop(family, destination)
        return f"PROXY TCP{version} {host} {other} {source_port} {destination_port}\r\n".encode(), client
    body = source + destination + struct.pack("!HH", source_port, destination_port)
    body += b"".join(tlv(kind, value) for kind, value in draw(extensions))
    return binary(body, IPV4 if version == 4 else IPV6, checksum=draw(st.booleans())), client


@SOME
@given(headers(), st.binary(max_size=50))
@example((binary(inet("::ffff:1.2.3.4", "::1"), IPV6), ("1.2.3.4", 40000)), b"")
def test_a_header_is_whole_with_its_last_byte_and_ends_there(built: tuple[bytes, Any], rest: bytes) -> None:
    header, client = built
    for end in range(len(header)):
        assert parse(header[:end]) is None
    for buffer in (header, bytearray(header + rest)):
        found = parse(buffer)
        assert found is not None
        assert (found.size, found.source) == (len(header), client)


# What is drawn is changed in so many ways, which are drawn by one number: 10,000 of them in a second.
CHANGES = 50
numbers = st.integers(0, 2**32)


def changed(header: bytes, number: int) -> Iterator[bytes]:
    """Yield the header with one to three places changed, inserted or deleted."""
    random = Random(number)
    for _ in range(CHANGES):
        data = bytearray(header)
        for _ in range(random.randint(1, 3)):
            at = random.randint(0, len(data))
            new = random.choice([random.randbytes(1), random.randbytes(2), b" ", b"0", b".", b":", b"\r", b"\n", b"-"])
            how = random.choice(["change", "insert", "delete"])
            data[at : at + (0 if how == "insert" else len(new))] = b"" if how == "delete" else new
        yield bytes(data)


@SOME
@given(headers(), numbers)
def test_a_checksum_finds_a_header_that_was_changed(built: tuple[bytes, Any], number: int) -> None:
    header = binary(inet() + tlv(0x50, built[0]), checksum=True)
    for data in changed(header, number):
        found = outcome_of(data)
        # What is left: more is said to come, there is no checksum any more, or it was changed back.
        assert not isinstance(found, ProxyHeader) or not found.has_checksum or data.startswith(header)


def outcome_of(data: bytes) -> ProxyHeader | str | None:
    """Return what it is taken for, or the reason to refuse it."""
    try:
        return parse(data)
    except ProxyHeaderError as error:
        return error.reason


def is_valid_line(line: bytes) -> bool:
    """Return whether a line is one, as a grammar has it."""
    fields = line.split(b" ")
    if fields[1:2] == [b"UNKNOWN"]:
        return True
    try:
        kind, *hosts, first, second = (field.decode("ascii") for field in fields[1:])
        source, destination = map(ipaddress.ip_address, hosts)
        versions = {"TCP4": 4, "TCP6": 6}
        return (
            source.version == versions[kind]
            and all(port == str(int(port)) and 0 <= int(port) < 65536 for port in (first, second))
            and not any("%" in host for host in hosts)
            and bool(destination)
        )
    except (ValueError, KeyError):
        return False


@SOME
@given(headers(), numbers)
def test_what_was_changed_is_refused_or_is_a_header_by_its_grammar(built: tuple[bytes, Any], number: int) -> None:
    """Nothing else than ProxyHeaderError is raised, no byte is taken that is not there, and every line taken is one."""
    for data in changed(built[0], number):
        found = outcome_of(data)
        if isinstance(found, ProxyHeader):
            assert found.size <= len(data)
            line = data[: found.size]
            if found.version == 1:
                assert line.endswith(b"\r\n")
                assert len(line) <= LONGEST_LINE
                assert is_valid_line(line[:-2])
            else:
                assert line[13] in b"\x00\x10\x20\x30\x01\x02\x11\x12\x21\x22\x31\x32" or found.is_local
                assert found.size == 16 + int.from_bytes(line[14:16], "big")
        else:
            assert found in (None, "bad signature", "malformed", "too large", "bad checksum")


@SOME
@given(st.binary(max_size=64), numbers)
def test_no_bytes_raise_anything_else(drawn: bytes, number: int) -> None:
    for rest in (drawn, *changed(drawn, number)):
        for data in (rest, SIGNATURE_OF_V2 + rest):
            found = outcome_of(data)
            assert not isinstance(found, ProxyHeader) or found.size <= len(data)
