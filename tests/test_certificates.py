"""TLS from files that are renewed while the server serves."""

import asyncio
import contextlib
import logging
import pickle
import signal
import socket
import ssl
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from conftest import settle
from helpers import ANYWHERE, close
from programs import Program

import aioecho
from aioecho.certificates import Loaded, validity
from aioecho.echo import Upper


class Authority:
    """Issues certificates, and writes them as a renewal tool does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._authority = trustme.CA()
        self.client = ssl.create_default_context()
        self._authority.configure_trust(self.client)
        self._authority.cert_pem.write_to_path(folder / "ca.pem")

    def issue(self, *names: str, until: datetime | None = None) -> tuple[bytes, bytes]:
        """Return a certificate and its key."""
        issued = self._authority.issue_cert(*(names or ("localhost",)), not_after=until)
        return b"".join(part.bytes() for part in issued.cert_chain_pems), issued.private_key_pem.bytes()

    def write(self, pair: tuple[bytes, bytes], name: str = "server") -> tuple[Path, Path]:
        """Write a certificate and a key by renaming, and return their paths."""
        paths = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        for path, content in zip(paths, pair, strict=True):
            beside = path.with_suffix(".new")
            beside.write_bytes(content)
            beside.rename(path)
        return paths


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def served(server: aioecho.BaseServer, context: ssl.SSLContext, name: str = "localhost") -> dict[str, Any]:
    """Ask a server, and return what getpeercert() tells of its certificate."""
    reader, writer = await asyncio.open_connection(*server.server_address, ssl=context, server_hostname=name)
    try:
        writer.write(b"hello\n")
        assert await reader.readline() == b"HELLO\n"
        certificate: dict[str, Any] = writer.get_extra_info("peercert")
        return certificate
    finally:
        await close(writer)


def in_days(days: int) -> datetime:
    return (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)


async def test_a_renewed_certificate_is_served_to_new_connections_and_old_ones_go_on(authority: Authority) -> None:
    cert, key = authority.write(authority.issue())
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=aioecho.TLS(cert, key)) as server:
        reader, writer = await asyncio.open_connection(
            *server.server_address, ssl=authority.client, server_hostname="localhost"
        )
        first = await served(server, authority.client)
        authority.write(authority.issue())
        server.reload_tls()
        assert (await served(server, authority.client))["serialNumber"] != first["serialNumber"]
        writer.write(b"old\n")
        assert await reader.readline() == b"OLD\n"
        await close(writer)


@pytest.mark.parametrize("what", ["key of another", "no certificate", "gone", "expired", "cut off", "key cut off"])
async def test_what_cannot_be_used_is_refused_in_one_line_and_costs_no_handshake(
    authority: Authority, what: str
) -> None:
    cert, key = authority.write(authority.issue())
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=aioecho.TLS(cert, key)) as server:
        before = await served(server, authority.client)
        match what:
            case "key of another":
                key.write_bytes(authority.issue()[1])
            case "no certificate":
                cert.write_text("hello")
            case "gone":
                cert.unlink()
            case "cut off" | "key cut off":  # a tool that writes in place is at it
                file = cert if what == "cut off" else key
                file.write_bytes(file.read_bytes()[:150])
            case "expired":
                authority.write(authority.issue(until=in_days(-1)))
        with pytest.raises(aioecho.CertificateError) as raised:
            server.reload_tls()
        assert str(cert) in str(raised.value)
        assert "\n" not in str(raised.value)
        assert ("is cut off or damaged" in str(raised.value)) is ("cut off" in what)
        assert await served(server, authority.client) == before


@pytest.mark.parametrize("how", ["rename", "symlink", "halves"])
async def test_changed_files_are_found_and_renewals_in_halves_cost_no_handshake(authority: Authority, how: str) -> None:
    cert, key = authority.write(authority.issue())
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=aioecho.TLS(cert, key, poll=0.02)) as server:
        serial = (await served(server, authority.client))["serialNumber"]
        for _ in range(3):
            pair = authority.issue()
            if how == "rename":
                authority.write(pair)
            elif how == "symlink":
                paths = authority.write(pair, f"archive{serial}")
                for link, path in zip((cert, key), paths, strict=True):
                    link.unlink()
                    link.symlink_to(path)
            else:
                cert.write_bytes(pair[0])
                for _ in range(5):
                    assert (await served(server, authority.client))["serialNumber"] == serial
                key.write_bytes(pair[1])
            async with asyncio.timeout(10):
                while (new := (await served(server, authority.client))["serialNumber"]) == serial:
                    await asyncio.sleep(0.001)
            serial = new
        assert server.stats.rejected == 0


async def test_what_could_not_be_used_is_tried_again_and_told_once(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = authority.write(authority.issue())
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=aioecho.TLS(cert, key, poll=0.02)) as server:
        tries = 0
        mistake = Loaded.mistake

        def is_not_valid_yet(loaded: Loaded) -> str | None:
            nonlocal tries
            tries += 1
            return "the certificate is not valid before noon" if tries < 3 else mistake(loaded)

        first = await served(server, authority.client)
        monkeypatch.setattr(Loaded, "mistake", is_not_valid_yet)
        authority.write(authority.issue())
        async with asyncio.timeout(10):  # the files do not change any more
            while (await served(server, authority.client))["serialNumber"] == first["serialNumber"]:
                await asyncio.sleep(0.001)
        assert tries == 3
        told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "aioecho.tls"]
        assert len(told) == 1
        assert "not valid before noon" in told[0]


async def test_a_certificate_that_expires_soon_or_has_expired_is_served_with_a_warning(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    for days, expected in ((-1, "expired on"), (10, "expires on"), (30, None)):
        cert, key = authority.write(authority.issue(until=in_days(days)))
        caplog.clear()
        async with aioecho.TCPServer(ANYWHERE, Upper, ssl=aioecho.TLS(cert, key)) as server:
            unchecked = ssl.create_default_context()
            unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
            await served(server, unchecked)
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "aioecho.tls"]
        assert len(warnings) == (expected is not None)
        assert expected is None or expected in warnings[0]


async def test_names_have_certificates_of_their_own(authority: Authority) -> None:
    cert, key = authority.write(authority.issue("localhost"))
    b_cert, b_key = authority.write(authority.issue("b.example"), "b")
    c_cert, c_key = authority.write(authority.issue("*.c.example"), "c")
    tls = aioecho.TLS(
        cert, key, names={"b.example": aioecho.TLS(b_cert, b_key), "*.c.example": aioecho.TLS(c_cert, c_key)}
    )
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=tls) as server:
        for name in ("localhost", "b.example", "www.c.example"):
            certificate = await served(server, authority.client, name)
            assert name.partition(".")[2] in certificate["subjectAltName"][0][1]
        old = await served(server, authority.client, "b.example")
        authority.write(authority.issue("b.example"), "b")
        server.reload_tls()
        assert await served(server, authority.client, "b.example") != old


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"names": {"b.example": aioecho.TLS("b.pem", min_version="TLSv1.3")}}, "min_version"),
        ({"names": {"b.example": aioecho.TLS("b.pem", alpn=("x",))}}, "alpn"),
        ({"min_version": "TLSv1.1"}, "TLSv1.1"),
        ({"alpn": "h2"}, "'h2'"),
        ({"crl": "crl.pem"}, "client_ca"),
        ({"client_cert": "maybe"}, "maybe"),
        ({"poll": 0}, "poll"),
        ({"poll": float("inf")}, "poll"),  # no event loop has a timer for that
        *(
            ({"names": {name: aioecho.TLS("b.pem")}}, "as clients ask")
            for name in ("b\u00fccher.example", "", "b.", "b.*")
        ),
        ({"key": b"server.key"}, "key must be the name of a file"),
        ({"min_version": ["TLSv1.3"]}, "min_version"),
        ({"alpn": ("",)}, "alpn"),
        ({"alpn": (b"h2",)}, "alpn"),
        ({"num_tickets": -1}, "num_tickets"),
        ({"num_tickets": "2"}, "num_tickets"),
        ({"ciphers": 3}, "ciphers"),
        ({"names": ["b.example"]}, "names must be a mapping"),
        ({"names": {"b.example": "b.pem"}}, "TLS for each name"),
        ({"password": 5}, "password"),
    ],
)
def test_what_makes_no_sense_is_named_when_it_is_written(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        aioecho.TLS("server.pem", **arguments)


async def test_clients_are_asked_for_a_certificate_of_an_authority(authority: Authority, tls: SimpleNamespace) -> None:
    cert, key = authority.write(authority.issue())
    settings = aioecho.TLS(cert, key, client_ca=tls.files.ca, min_version="TLSv1.3", ciphers="HIGH", alpn=("upper",))
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=settings) as server:
        with contextlib.suppress(OSError):
            await served(server, authority.client)
        await settle(lambda: server.stats.rejected)
        authority.client.load_cert_chain(tls.files.client)
        authority.client.set_alpn_protocols(["upper"])
        await served(server, authority.client)


async def test_a_handler_sees_the_name_and_the_protocol_that_its_client_asks_for(authority: Authority) -> None:
    class Tell(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            asked = self.writer.get_extra_info("server_name"), self.writer.get_extra_info("alpn_protocol")
            await self.send(repr(asked).encode() + b"\n")

    cert, key = authority.write(authority.issue())
    async with aioecho.TCPServer(ANYWHERE, Tell, ssl=aioecho.TLS(cert, key, alpn=("tell", "other"))) as server:
        authority.client.set_alpn_protocols(["other"])
        reader, writer = await asyncio.open_connection(
            *server.server_address, ssl=authority.client, server_hostname="localhost"
        )
        assert await reader.readline() == b"('localhost', 'other')\n"
        await close(writer)


async def test_a_context_cannot_be_reloaded(tls: SimpleNamespace) -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=tls.server) as server:
        with pytest.raises(RuntimeError, match=r"aioecho\.TLS"):
            server.reload_tls()


async def test_a_service_of_both_kinds_reloads_for_its_streams(authority: Authority) -> None:
    cert, key = authority.write(authority.issue())

    class Packet(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            await self.reply(self.data)

    settings = aioecho.TLS(cert, key)
    async with aioecho.serve({Upper: "tcp://127.0.0.1:0", Packet: "udp://127.0.0.1:0"}, ssl=settings) as server:
        first = await served(server, authority.client)
        authority.write(authority.issue())
        server.reload_tls()
        assert (await served(server, authority.client))["serialNumber"] != first["serialNumber"]


async def test_a_server_does_not_start_without_its_certificate(tmp_path: Path) -> None:
    server = aioecho.TCPServer(ANYWHERE, Upper, ssl=aioecho.TLS(tmp_path / "none.pem"))
    with pytest.raises(aioecho.CertificateError, match="No such file"):
        await server.start()
    assert not server.is_serving()


def test_settings_can_be_pickled_and_do_not_show_the_password(tmp_path: Path) -> None:
    settings = aioecho.TLS(tmp_path / "a.pem", password="secret", names={"b": aioecho.TLS("b.pem")})
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert "secret" not in repr(settings)


def test_the_time_of_validity_is_what_openssl_says(authority: Authority) -> None:
    for until in (in_days(30), datetime(2051, 3, 4, 5, 6, 7, tzinfo=UTC)):
        pem = authority.issue(until=until)[0]
        start, end = validity(
            ssl.PEM_cert_to_DER_cert(pem.decode().partition("-----END")[0] + "-----END CERTIFICATE-----\n")
        )
        assert end == until.timestamp()
        assert start < datetime.now(UTC).timestamp()
        with pytest.raises(ValueError, match="cut off"):
            validity(
                ssl.PEM_cert_to_DER_cert(pem.decode().partition("-----END")[0] + "-----END CERTIFICATE-----\n")[:-9]
            )


# In a program, with and without workers

PROGRAM = """
import sys
import aioecho

class Upper(aioecho.StreamRequestHandler):
    async def handle(self):
        async for line in self.reader:
            await self.send(line.upper())

if __name__ == "__main__":
    tls = aioecho.TLS("server.crt", "server.key", poll=None)
    aioecho.run(Upper, f"fd://{sys.argv[1]}", workers=int(sys.argv[2]), ssl=tls)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_loads_the_files_of_a_program_anew(authority: Authority, tmp_path: Path, workers: int) -> None:
    authority.write(authority.issue())
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number, address = sock.fileno(), sock.getsockname()
        with Program(
            sys.executable, "program.py", str(number), str(workers), cwd=tmp_path, pass_fds=[number]
        ) as program:

            def serial() -> str:
                with (
                    socket.create_connection(address, timeout=30) as plain,
                    authority.client.wrap_socket(plain, server_hostname="localhost") as secured,
                ):
                    secured.sendall(b"x\n")
                    assert secured.recv(10) == b"X\n"
                    certificate = secured.getpeercert()
                    assert certificate is not None
                    return str(certificate["serialNumber"])

            first = serial()
            authority.write(authority.issue())
            program.signal(signal.SIGHUP)
            deadline = time.monotonic() + 30
            while serial() == first:
                assert time.monotonic() < deadline, program.stderr()
            assert program.stop() == 0


def test_a_program_whose_certificate_cannot_be_loaded_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        for workers in ("1", "2"):
            arguments = ("program.py", str(sock.fileno()), workers)
            with Program(sys.executable, *arguments, cwd=tmp_path, pass_fds=[sock.fileno()]) as program:
                code, _, errors = program.end()
                assert (code, errors) == (
                    1,
                    "aioecho: cannot use server.crt with server.key: No such file or directory\n",
                )


# The function's error ended the poll for ever, with a traceback, and the next good certificate was not loaded.
async def test_the_poll_goes_on_after_the_password_could_not_be_had(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = authority.issue(), authority.issue()
    cert, key = authority.write(old)
    has_password = True

    def password() -> str:
        if not has_password:
            raise FileNotFoundError("password.txt")
        return "secret"

    tls = aioecho.TLS(cert, key, password=password, poll=0.02)
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=tls) as server:
        before = await served(server, authority.client)
        has_password = False
        authority.write(new)
        await settle(lambda: "the function for its password raised FileNotFoundError" in caplog.text)
        has_password = True
        for _ in range(100):
            if await served(server, authority.client) != before:
                break
            await asyncio.sleep(0.05)
        assert await served(server, authority.client) != before
    assert "Traceback" not in caplog.text


# "'ascii' codec can't decode byte 0xc3", and "there is no certificate (PEM) in it", of files that OpenSSL loads.
@pytest.mark.parametrize("how", ["remark", "trusted"])
async def test_a_certificate_is_served_that_openssl_loads(authority: Authority, how: str) -> None:
    certificate, key = authority.issue()
    if how == "remark":
        certificate = "# für den Empfang\n".encode() + certificate
    else:
        certificate = certificate.replace(b" CERTIFICATE-----", b" X509 CERTIFICATE-----")
    tls = aioecho.TLS(*authority.write((certificate, key)))
    async with aioecho.TCPServer(ANYWHERE, Upper, ssl=tls) as server:
        assert (await served(server, authority.client))["notAfter"]


# With the certificate of the authority in its place OpenSSL refuses all clients, as it knows of no list.
async def test_a_file_without_a_revocation_list_is_no_crl(authority: Authority) -> None:
    authority_file = authority.folder / "ca.pem"
    tls = aioecho.TLS(*authority.write(authority.issue()), client_ca=authority_file, crl=authority_file)
    with pytest.raises(aioecho.CertificateError, match=r"ca\.pem: there is no revocation list"):
        await aioecho.TCPServer(ANYWHERE, Upper, ssl=tls).start()
