"""From endpoint strings and addresses to sockets that listen, and every way in which that can fail."""

import asyncio
import errno
import os
import pwd
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import open_descriptors
from helpers import HAS_IPV6, needs_ipv6

import aioecho
from aioecho import client
from aioecho.echo import DatagramEcho, Echo
from aioecho.net.binding import bind_endpoint
from aioecho.net.endpoints import (
    InheritedEndpoint,
    StdioEndpoint,
    TCPEndpoint,
    UDPEndpoint,
    UnixEndpoint,
    parse_endpoint,
)
from aioecho.net.paths import set_mode


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the current one, so that paths of sockets in it are short wherever it is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


async def answers(*address: object, family: int = socket.AF_INET) -> bool:
    """Tell whether an echo server is at an address."""
    if family == socket.AF_UNIX:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address[0])  # type: ignore[arg-type]  # not by uvloop, which knows no abstract names
        reader, writer = await asyncio.open_unix_connection(sock=sock)
    else:
        reader, writer = await asyncio.open_connection(*address[:2], family=family)  # type: ignore[misc]
    writer.write(b"ping")
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer == b"ping"


async def error_of(server: aioecho.BaseServer) -> aioecho.EndpointError:
    """Start a server that can't be, and return why; nothing may be open afterwards that was not before."""
    before = open_descriptors().keys()
    with pytest.raises(aioecho.EndpointError) as caught:
        await server.start()
    assert not {n: what for n, what in open_descriptors().items() if n not in before and "socket" in what}
    assert not server.is_serving()
    assert not server.sockets
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, aioecho.AioechoError)
    await server.shutdown()
    return caught.value


# Strings


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://127.0.0.1:9999", TCPEndpoint("127.0.0.1", 9999)),
        ("tcp://example.org:0", TCPEndpoint("example.org", 0)),
        ("tcp://localhost:65535/", TCPEndpoint("localhost", 65535)),
        ("tcp://[::1]:7000", TCPEndpoint("::1", 7000)),
        ("tcp://[fe80::1%eth0]:7", TCPEndpoint("fe80::1%eth0", 7)),
        ("tcp://*:80", TCPEndpoint("", 80)),
        ("tcp://:80", TCPEndpoint("", 80)),
        ("unix:/run/app.sock", UnixEndpoint("/run/app.sock")),
        ("unix:///run/app.sock", UnixEndpoint("/run/app.sock")),
        ("unix:app.sock", UnixEndpoint("app.sock")),
        ("unix:/run/app.sock?mode=660", UnixEndpoint("/run/app.sock", 0o660)),
        ("unix:/run/app.sock?mode=0600", UnixEndpoint("/run/app.sock", 0o600)),
        ("unix:/run/app.sock?mode=000", UnixEndpoint("/run/app.sock", 0)),
        ("unix:/run/app.sock?mode=660&owner=www&group=33", UnixEndpoint("/run/app.sock", 0o660, "www", "33")),
        ("udp://*:9?broadcast&reuse_port=1", UDPEndpoint("", 9, broadcast=True, reuse_port=True)),
        ("udp://239.1.2.3:9?interface=eth0", UDPEndpoint("239.1.2.3", 9, interface="eth0")),
        ("stdio:", StdioEndpoint()),
        ("unix:@app", UnixEndpoint("\0app")),
        ("fd://3", InheritedEndpoint(3)),
    ],
)
def test_an_endpoint_string_names_an_endpoint(text: str, endpoint: object) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        *("tcp://127.0.0.1:9999", "tcp://[::1]:7000", "tcp://*:80", "unix:/run/app.sock", "unix:@app", "fd://3"),
        *("tcp://[fe80::1%lo]:7", "udp://*:9?broadcast&reuse_port", "udp://[ff02::1%lo]:9?interface=lo", "stdio:"),
        *("unix:/run/app.sock?mode=660&owner=www&group=33", "unixgram:x?mode=006", "systemd:web"),
    ],
)
def test_an_endpoint_shows_as_the_string_it_came_from(text: str) -> None:
    assert str(parse_endpoint(text)) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected tcp://HOST:PORT"),
        ("9999", "expected tcp://HOST:PORT"),
        ("tcp:localhost:9999", "expected tcp://HOST:PORT"),
        ("tcp://localhost", "expected tcp://HOST:PORT"),
        ("tcp://localhost:", "expected tcp://HOST:PORT"),
        ("tcp://localhost:-1", "expected tcp://HOST:PORT"),
        ("tcp://localhost:http", "expected tcp://HOST:PORT"),
        ("tcp://localhost:٣", "expected tcp://HOST:PORT"),
        ("tcp://::1:9999", "expected tcp://HOST:PORT"),
        ("tcp://localhost:9999/path", "expected tcp://HOST:PORT"),
        ("tcp://localhost:65536", "a port is at most 65535"),
        ("tcp://localhost:" + "9" * 5000, "a port is at most 65535"),
        ("fd://99999999999999999999", "a descriptor is at most 2147483647"),
        ("fd://" + "9" * 5000, "a descriptor is at most 2147483647"),
        ("unix:/run/app.sock?owner=4294967295", "the number of a user or a group is at most 4294967294"),
        ("unix:/run/app.sock?group=" + "9" * 5000, "the number of a user or a group is at most 4294967294"),
        ("tcp://[]:9999", "brackets are for an IPv6 address"),
        ("tcp://[*]:9999", "brackets are for an IPv6 address"),
        ("tcp://[localhost]:9999", "brackets are for an IPv6 address"),
        ("tcp://[127.0.0.1]:9999", "brackets are for an IPv6 address"),
        ("unix:", "unix:PATH"),
        ("unix:?mode=660", "unix:PATH"),
        ("unix:/run/app.sock?mode=rw", "octal, such as mode=660"),
        ("unix:/run/app.sock?mode=888", "octal, such as mode=660"),
        ("unix:/run/app.sock?mode=", "octal, such as mode=660"),
        ("unix:/run/app.sock?user=me", "octal, such as mode=660"),
        ("unix:@app?mode=660", "no mode"),
        ("unix:@app?owner=me", "no owner"),
        ("unix:/run/app.sock?group=", "octal, such as mode=660"),
        ("udp://127.0.0.1:9?interface=lo", "interface= is for the address of a multicast group"),
        ("udp://127.0.0.1:9?broadcast=maybe", "after ? comes broadcast, reuse_port, or interface="),
        ("udp://127.0.0.1:9?mode=660", "after ? comes broadcast, reuse_port, or interface="),
        ("tcp://127.0.0.1:9?reuse_port", "tcp:// takes no options"),
        ("unix:@", "there is no name behind @"),
        ("unixgram:@", "there is no name behind @"),
        ("fd://", "fd://N"),
        ("fd://-1", "fd://N"),
        ("fd://stdin", "fd://N"),
        ("http://localhost:80", "expected tcp://HOST:PORT"),
        (":7000", "write 127.0.0.1:7000, or *:7000 to listen on all addresses"),
        ("7000", "write 127.0.0.1:7000, or *:7000"),
        ("tcp:7000", "write 127.0.0.1:7000, or *:7000"),
        ("localhost", "expected tcp://HOST:PORT"),
        ("localhost:65536", "a port is at most 65535"),
        ("[localhost]:7000", "brackets are for an IPv6 address"),
        ("./app.sock", "write unix:./app.sock"),
        ("/run/app.sock", "write unix:/run/app.sock"),
        ("TCP://localhost:80", "expected tcp://HOST:PORT"),
    ],
)
def test_a_bad_endpoint_string_is_refused_with_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match="bad endpoint") as caught:
        parse_endpoint(text)
    assert repr(text) in str(caught.value)
    assert complaint in str(caught.value)
    with pytest.raises(ValueError, match="bad endpoint"):
        aioecho.serve(Echo, text)


@pytest.mark.parametrize("text", ["127.0.0.1:7000", "localhost:0", "[::1]:7000", "*:7000"])
def test_an_address_without_a_scheme_is_for_tcp(text: str) -> None:
    assert parse_endpoint(text) == parse_endpoint(f"tcp://{text}")


@pytest.mark.parametrize("thing", [None, 9999, b"tcp://localhost:9999", ("localhost", 9999)])
def test_an_endpoint_that_is_no_string_is_a_type_error(thing: object) -> None:
    with pytest.raises(TypeError, match="an endpoint is a string"):
        parse_endpoint(thing)  # type: ignore[arg-type]


# TCP


async def test_a_server_listens_on_ipv4() -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server:
        host, port = server.server_address
        assert host == "127.0.0.1"
        assert port != 0
        assert server.names == (f"tcp://127.0.0.1:{port}",)
        assert await answers(host, port)


@needs_ipv6
async def test_a_server_listens_on_ipv6_and_leaves_ipv4_alone() -> None:
    async with aioecho.serve(Echo, "tcp://[::1]:0") as server:
        host, port = server.server_address[:2]
        assert server.names == (f"tcp://[::1]:{port}",)
        assert await answers(host, port, family=socket.AF_INET6)
    async with aioecho.serve(Echo, "tcp://[::]:0") as server:
        port = server.server_address[1]
        assert await answers("::1", port, family=socket.AF_INET6)
        with pytest.raises(ConnectionRefusedError):
            await answers("127.0.0.1", port)


@needs_ipv6
@pytest.mark.parametrize("name", ["*", ""])
async def test_all_addresses_share_one_port(name: str) -> None:
    async with aioecho.serve(Echo, f"tcp://{name}:0") as server:
        port = server.server_address[1]
        assert {sock.family for sock in server.sockets} == {socket.AF_INET, socket.AF_INET6}
        assert server.names == (f"tcp://*:{port}",)
        assert await answers("127.0.0.1", port)
        assert await answers("::1", port, family=socket.AF_INET6)


@needs_ipv6
async def test_port_0_is_chosen_once_for_both_families_however_often() -> None:
    servers = [aioecho.TCPServer(("", 0), Echo) for _ in range(100)]
    try:
        for server in servers:
            await server.start()
        ports = [[sock.getsockname()[1] for sock in server.sockets] for server in servers]
        assert all(len(pair) == 2 and pair[0] == pair[1] for pair in ports)
        assert len({pair[0] for pair in ports}) == len(servers)
    finally:
        for server in servers:
            await server.shutdown()


@needs_ipv6
async def test_port_0_is_chosen_again_if_the_choice_is_taken_in_the_other_family(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        taken = other.getsockname()[1]
        addresses = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0, 0, 0))]
        chosen: list[int] = []
        bind = socket.socket.bind

        async def resolve(endpoint: object) -> object:
            return addresses

        class Socket(socket.socket):
            def bind(self, address: object) -> None:
                if self.family == socket.AF_INET and not chosen:
                    address = ("127.0.0.1", taken)
                bind(self, address)  # type: ignore[arg-type]
                chosen.append(self.getsockname()[1])

        monkeypatch.setattr("aioecho.net.binding.resolve", resolve)
        monkeypatch.setattr("aioecho.net.binding.socket.socket", Socket)
        async with aioecho.serve(Echo, "tcp://both.example:0") as server:
            assert chosen[0] == taken
            assert [sock.getsockname()[1] for sock in server.sockets] == chosen[-2:]
            assert chosen[-1] == chosen[-2] != taken
            assert server.names == (f"tcp://both.example:{chosen[-1]}",)


@needs_ipv6
@pytest.mark.parametrize("error", [errno.EMFILE, errno.EAFNOSUPPORT])
async def test_only_a_family_that_the_kernel_lacks_is_done_without(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Not one for which there was no descriptor left: the server would be deaf to half of its clients."""

    class Socket(socket.socket):
        def __init__(self, family: int = -1, *args: int, **options: int) -> None:
            if family == socket.AF_INET6:
                raise OSError(error, os.strerror(error))
            super().__init__(family, *args, **options)

    server = aioecho.TCPServer(("", 0), Echo)
    with monkeypatch.context() as patch:
        patch.setattr("aioecho.net.binding.socket.socket", Socket)
        if error == errno.EAFNOSUPPORT:
            await server.start()
            assert [sock.family for sock in server.sockets] == [socket.AF_INET]
        else:
            assert str(await error_of(server)) == "cannot listen on tcp://*:0: Too many open files"
    await server.shutdown()


async def test_a_name_is_listened_on_at_all_its_addresses() -> None:
    found = await asyncio.get_running_loop().getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    async with aioecho.serve(Echo, "tcp://localhost:0") as server:
        ports = {sock.getsockname()[1] for sock in server.sockets}
        assert len(ports) == 1
        assert {sock.family for sock in server.sockets} <= {family for family, *_ in found}
        assert await answers("localhost", ports.pop(), family=server.sockets[0].family)


async def test_several_endpoints_make_one_server(folder: Path) -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0", "unix:app.sock", "tcp://127.0.0.1:0") as server:
        assert len(server.names) == 3
        assert server.names[1] == "unix:app.sock"
        for sock in server.sockets:
            path_or_address = sock.getsockname()
            address = path_or_address if isinstance(path_or_address, tuple) else (path_or_address,)
            assert await answers(*address, family=sock.family)
        assert server.stats.accepted == 3


async def test_a_port_that_is_taken_is_named(taken: int) -> None:
    error = await error_of(aioecho.TCPServer(("127.0.0.1", taken), Echo))
    assert str(error) == f"cannot listen on tcp://127.0.0.1:{taken}: Address already in use"
    assert error.errno == errno.EADDRINUSE


@needs_ipv6
async def test_a_port_that_is_taken_in_one_family_is_taken(taken: int) -> None:
    error = await error_of(aioecho.TCPServer(("", taken), Echo))
    assert str(error) == f"cannot listen on tcp://*:{taken}: Address already in use"


async def test_a_port_of_a_server_that_has_ended_is_free_at_once() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        address = server.server_address
        assert await answers(*address)
    async with aioecho.TCPServer(address, Echo):
        assert await answers(*address)


async def test_an_address_that_is_not_this_machines_is_refused() -> None:
    error = await error_of(aioecho.serve(Echo, "tcp://192.0.2.1:0"))  # RFC 5737: nobody's
    assert str(error) == "cannot listen on tcp://192.0.2.1:0: Cannot assign requested address"
    assert error.errno == errno.EADDRNOTAVAIL


async def test_a_privileged_port_is_refused() -> None:
    try:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 1))
    except PermissionError:
        error = await error_of(aioecho.TCPServer(("127.0.0.1", 1), Echo))
        assert str(error) == "cannot listen on tcp://127.0.0.1:1: Permission denied"
        assert error.errno == errno.EACCES
    else:
        pytest.skip("whoever runs this may use every port")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64 + ".invalid"])
async def test_a_host_that_does_not_resolve_is_named(host: str) -> None:
    error = await error_of(aioecho.serve(Echo, f"tcp://{host}:0"))
    assert str(error).startswith(f"cannot resolve the host of tcp://{host}:0: ")


async def test_nothing_is_open_after_the_second_of_two_endpoints_fails(folder: Path, taken: int) -> None:
    await error_of(aioecho.serve(Echo, "tcp://127.0.0.1:0", f"tcp://127.0.0.1:{taken}"))
    await error_of(aioecho.serve(Echo, "unix:app.sock", f"tcp://127.0.0.1:{taken}"))
    assert not os.path.exists("app.sock")


async def test_a_server_that_failed_to_start_can_be_shut_down_and_not_started_again(taken: int) -> None:
    server = aioecho.TCPServer(("127.0.0.1", taken), Echo)
    await error_of(server)
    with pytest.raises(RuntimeError, match="once"):
        await server.start()


# Unix


async def test_a_unix_server_makes_its_path_and_removes_it(folder: Path) -> None:
    async with aioecho.UnixStreamServer("app.sock", Echo) as server:
        assert server.server_address == "app.sock"
        assert server.names == ("unix:app.sock",)
        assert await answers("app.sock", family=socket.AF_UNIX)
    assert not os.path.exists("app.sock")


async def test_a_unix_server_takes_bytes_and_path_objects(folder: Path) -> None:
    for path in (b"app.sock", Path("app.sock")):
        async with aioecho.UnixStreamServer(path, Echo) as server:
            assert server.server_address == "app.sock"


async def test_the_path_is_removed_from_another_current_folder_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    async with aioecho.UnixStreamServer("app.sock", Echo):
        monkeypatch.chdir(folder / "elsewhere")
    assert not (folder / "app.sock").exists()


async def test_an_abstract_name_has_no_file(folder: Path) -> None:
    name = f"@aioecho-test-{os.getpid()}"
    async with aioecho.serve(Echo, f"unix:{name}") as server:
        assert server.names == (f"unix:{name}",)
        assert await answers("\0" + name[1:], family=socket.AF_UNIX)
        assert os.listdir() == []
        error = await error_of(aioecho.serve(Echo, f"unix:{name}"))
        assert str(error) == f"cannot listen on unix:{name}: Address already in use"


async def test_a_stale_path_is_taken_over(folder: Path) -> None:
    make_stale("app.sock")
    async with aioecho.UnixStreamServer("app.sock", Echo):
        assert await answers("app.sock", family=socket.AF_UNIX)
    assert not os.path.exists("app.sock")


async def test_a_path_that_somebody_listens_on_is_refused(folder: Path) -> None:
    async with aioecho.UnixStreamServer("app.sock", Echo):
        error = await error_of(aioecho.UnixStreamServer("app.sock", Echo))
        assert str(error) == "cannot listen on unix:app.sock: another socket listens there already"
        assert error.errno == errno.EADDRINUSE
        assert await answers("app.sock", family=socket.AF_UNIX)


async def test_a_path_that_somebody_listens_on_with_a_full_queue_is_refused(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind("app.sock")
        busy.listen(0)
        clients = []
        try:
            while True:
                client = socket.socket(socket.AF_UNIX)
                clients.append(client)
                client.setblocking(False)
                client.connect("app.sock")
        except BlockingIOError:
            error = await error_of(aioecho.UnixStreamServer("app.sock", Echo))
            assert "another socket listens there already" in str(error)
            assert os.path.exists("app.sock")
        finally:
            for client in clients:
                client.close()


async def test_a_path_of_a_live_datagram_socket_is_refused(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind("app.sock")
        error = await error_of(aioecho.UnixStreamServer("app.sock", Echo))
        assert "another socket listens there already" in str(error)


async def test_a_file_in_the_way_is_refused_and_kept(folder: Path) -> None:
    Path("app.sock").write_text("precious")
    error = await error_of(aioecho.UnixStreamServer("app.sock", Echo))
    assert str(error) == (
        "cannot listen on unix:app.sock: a file that is not a socket is in the way; remove it or choose another path"
    )
    assert error.errno == errno.EADDRINUSE
    assert Path("app.sock").read_text() == "precious"
    os.mkdir("folder")
    error = await error_of(aioecho.UnixStreamServer("folder", Echo))
    assert "is in the way" in str(error)
    os.symlink("app.sock", "link")
    error = await error_of(aioecho.UnixStreamServer("link", Echo))
    assert "is in the way" in str(error)


async def test_a_path_in_no_folder_is_refused(folder: Path) -> None:
    error = await error_of(aioecho.UnixStreamServer("missing/app.sock", Echo))
    assert str(error) == "cannot listen on unix:missing/app.sock: No such file or directory"
    assert error.errno == errno.ENOENT


async def test_a_path_that_is_too_long_is_refused(folder: Path) -> None:
    path = "x" * 120
    error = await error_of(aioecho.UnixStreamServer(path, Echo))
    assert str(error) == f"cannot listen on unix:{path}: AF_UNIX path too long"


async def test_a_path_with_a_nul_is_refused(folder: Path) -> None:
    error = await error_of(aioecho.UnixStreamServer("app\0sock", Echo))
    assert str(error) == "cannot listen on unix:app\0sock: a path has no NUL in it"


@pytest.mark.parametrize("given", ["as an argument", "in the endpoint"])
async def test_the_mode_is_set_before_anybody_can_connect(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    modes_at_listen = []
    listen = socket.socket.listen

    class Socket(socket.socket):
        def listen(self, backlog: int = 0, /) -> None:
            modes_at_listen.append(stat.S_IMODE(os.stat("app.sock").st_mode))
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
                client.connect("app.sock")
            listen(self, backlog)

    with monkeypatch.context() as patch:
        patch.setattr("aioecho.net.binding.socket.socket", Socket)
        if given == "as an argument":
            server: aioecho.BaseServer = aioecho.UnixStreamServer("app.sock", Echo, mode=0o640)
        else:
            server = aioecho.serve(Echo, "unix:app.sock?mode=640")
        await server.start()
    assert modes_at_listen == [0o640]
    assert server.names == ("unix:app.sock",)
    await server.shutdown()


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="only Linux can")
def test_a_mode_is_not_set_through_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch(0o600)
    link.symlink_to(file)
    with pytest.raises(OSError, match="symbolic links"):
        set_mode(str(link), 0o666)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    set_mode(str(file), 0o640)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


async def test_without_a_mode_the_umask_decides(folder: Path) -> None:
    previous = os.umask(0o077)
    try:
        async with aioecho.UnixStreamServer("app.sock", Echo):
            assert stat.S_IMODE(os.stat("app.sock").st_mode) == 0o700
    finally:
        os.umask(previous)


async def test_a_path_that_somebody_else_has_replaced_is_left_alone(folder: Path) -> None:
    async with aioecho.UnixStreamServer("app.sock", Echo):
        os.rename("app.sock", "moved.sock")
        Path("app.sock").write_text("another's")
    assert Path("app.sock").read_text() == "another's"
    os.remove("app.sock")
    async with aioecho.UnixStreamServer("app.sock", Echo):
        os.remove("app.sock")
        async with aioecho.UnixStreamServer("app.sock", Echo) as second:
            identity = os.stat("app.sock").st_ino
            assert second.is_serving()
            assert identity
    assert not os.path.exists("app.sock")


async def test_the_first_of_two_servers_leaves_the_path_of_the_second(folder: Path) -> None:
    first = aioecho.UnixStreamServer("app.sock", Echo)
    await first.start()
    os.remove("app.sock")
    async with aioecho.UnixStreamServer("app.sock", Echo):
        await first.shutdown()
        assert await answers("app.sock", family=socket.AF_UNIX)


async def test_a_path_that_somebody_has_removed_does_not_matter_at_the_end(folder: Path) -> None:
    async with aioecho.UnixStreamServer("app.sock", Echo):
        os.remove("app.sock")


def test_of_starters_that_race_for_a_stale_path_exactly_one_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starters = 8
    unlink = os.unlink

    def unlink_late(path: str) -> None:
        time.sleep(0.02)  # the gap that the others must not get into, made wide
        unlink(path)

    start_together = threading.Barrier(starters)
    end_together = threading.Barrier(starters)
    outcomes: list[str] = []

    async def race() -> None:
        server = aioecho.UnixStreamServer("app.sock", Echo)
        start_together.wait()
        try:
            await server.start()
            outcomes.append("won")
        except aioecho.EndpointError as error:
            outcomes.append(str(error))
        end_together.wait()
        await server.shutdown()

    monkeypatch.setattr("aioecho.net.binding.os.unlink", unlink_late)
    make_stale("app.sock")
    threads = [threading.Thread(target=lambda: asyncio.run(race())) for _ in range(starters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lost = ["cannot listen on unix:app.sock: another socket listens there already"] * (starters - 1)
    assert sorted(outcomes) == sorted([*lost, "won"])
    assert not os.path.exists("app.sock")


async def test_a_lock_that_somebody_keeps_on_the_folder_does_not_stop_a_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr("aioecho.net.paths.LOCK_TIMEOUT", 0.02)
    kept = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(kept, fcntl.LOCK_SH)
        async with aioecho.UnixStreamServer("app.sock", Echo):
            assert await answers("app.sock", family=socket.AF_UNIX)
    finally:
        os.close(kept)


async def test_a_start_that_is_cancelled_while_it_waits_for_the_folder_leaves_nothing(folder: Path) -> None:
    import fcntl

    kept = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(kept, fcntl.LOCK_EX)
        starting = asyncio.create_task(bind_endpoint(UnixEndpoint("app.sock"), backlog=1))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not os.path.exists("app.sock")
    finally:
        os.close(kept)


# Sockets that somebody else has bound


async def test_an_inherited_descriptor_is_served_on_and_closed() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()
    descriptor = sock.detach()
    async with aioecho.serve(Echo, f"fd://{descriptor}") as server:
        assert server.names == (f"tcp://127.0.0.1:{address[1]}",)
        assert await answers(*address)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


async def test_a_bound_socket_is_listened_on_and_served_on() -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    async with aioecho.BaseServer(None, Echo, sock=sock) as server:
        assert server.sockets == (sock,)
        assert await answers(*sock.getsockname())
    assert sock.fileno() == -1


async def test_a_socket_is_served_on_besides_an_address() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo, sock=sock) as server:
        assert len(server.sockets) == 2
        for each in server.sockets:
            assert await answers(*each.getsockname())


async def test_the_path_of_a_given_socket_is_never_removed(folder: Path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("app.sock")
    async with aioecho.BaseServer(None, Echo, sock=sock) as server:
        assert server.names == ("unix:app.sock",)
        assert await answers("app.sock", family=socket.AF_UNIX)
    assert os.path.exists("app.sock")


async def test_a_given_socket_of_an_abstract_name_is_named() -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0aioecho-given-{os.getpid()}")
    async with aioecho.BaseServer(None, Echo, sock=sock) as server:
        assert server.names == (f"unix:@aioecho-given-{os.getpid()}",)


async def test_a_descriptor_that_is_not_open_is_refused() -> None:
    error = await error_of(aioecho.serve(Echo, "fd://987654"))
    assert str(error) == "cannot listen on fd://987654: Bad file descriptor"
    assert error.errno == errno.EBADF


async def test_a_descriptor_that_is_no_socket_is_refused_and_stays_open(folder: Path) -> None:
    with open("file", "wb") as file:
        error = await error_of(aioecho.serve(Echo, f"fd://{file.fileno()}"))
        assert str(error) == f"cannot listen on fd://{file.fileno()}: Socket operation on non-socket"
        os.fstat(file.fileno())


@pytest.mark.parametrize("given", ["descriptor", "object"])
async def test_a_datagram_socket_is_refused_and_left_as_it_was(given: str) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        number = sock.fileno()
        if given == "descriptor":
            error = await error_of(aioecho.serve(Echo, f"fd://{number}"))
        else:
            error = await error_of(aioecho.BaseServer(None, Echo, sock=sock))
        assert str(error) == f"cannot listen on fd://{number}: it is not a TCP or Unix stream socket"
        assert os.get_blocking(number)
        assert sock.gettimeout() is None
        assert sock.getsockname()[1]


@pytest.mark.parametrize("given", ["descriptor", "object"])
async def test_a_connected_socket_is_refused_and_left_as_it_was(given: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if given == "descriptor":
            error = await error_of(aioecho.serve(Echo, f"fd://{ours.fileno()}"))
        else:
            error = await error_of(aioecho.BaseServer(None, Echo, sock=ours))
        assert str(error) == f"cannot listen on fd://{ours.fileno()}: Invalid argument"
        assert os.get_blocking(ours.fileno())
        theirs.send(b"still there")
        assert ours.recv(100) == b"still there"


# The error type


def test_an_endpoint_error_keeps_the_systems_number() -> None:
    error = aioecho.EndpointError("cannot listen on tcp://*:1: Permission denied", errno.EACCES)
    assert str(error) == "cannot listen on tcp://*:1: Permission denied"
    assert error.errno == errno.EACCES
    assert aioecho.EndpointError("cannot").errno is None


async def test_the_cause_is_the_systems_error(taken: int) -> None:
    error = await error_of(aioecho.TCPServer(("127.0.0.1", taken), Echo))
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.EADDRINUSE


# Options


async def test_a_datagram_server_may_be_bound_beside_another_with_reuse_port() -> None:
    async with aioecho.serve(DatagramEcho, "udp://127.0.0.1:0?reuse_port") as one:
        name = one.names[0]
        async with aioecho.serve(DatagramEcho, f"{name}?reuse_port") as two:
            assert two.server_address == one.server_address
        with pytest.raises(aioecho.EndpointError, match="in use"):
            await aioecho.serve(DatagramEcho, name).start()


@pytest.mark.parametrize("option", ["?broadcast", ""])
async def test_a_handler_sends_to_broadcast_addresses_if_it_may(option: str) -> None:
    class Announces(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            await self.request[1].sendto(b"here", ("127.255.255.255", int(self.data)))
            await self.reply(b"sent")

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hears,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks,
    ):
        hears.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        hears.bind(("127.255.255.255", 0))
        for sock in (hears, asks):
            sock.settimeout(10)
        async with aioecho.serve(Announces, f"udp://127.0.0.1:0{option}") as server:
            asks.sendto(b"%d" % hears.getsockname()[1], server.server_address)
            assert await asyncio.to_thread(asks.recv, 10) == b"sent"
            assert server.stats.send_errors == (0 if option else 1)  # type: ignore[attr-defined]
            if option:
                assert hears.recv(10) == b"here"


@pytest.mark.parametrize("interface", ["lo", "127.0.0.1"])
async def test_a_multicast_group_is_joined_on_an_interface(interface: str) -> None:
    endpoint = f"udp://239.1.2.3:0?interface={interface}"
    async with aioecho.serve(DatagramEcho, endpoint) as server:
        port = server.server_address[1]
        assert server.names == (f"udp://239.1.2.3:{port}",)
        # Another program may be in the group too; each gets a copy.
        async with aioecho.serve(DatagramEcho, endpoint.replace(":0", f":{port}")) as other:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(10)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
                sock.sendto(b"all", ("239.1.2.3", port))
                for _ in range(2):
                    data, address = await asyncio.to_thread(sock.recvfrom, 10)
                    assert (data, address) == (b"all", ("127.0.0.1", port))
            assert (server.stats.accepted, other.stats.accepted) == (1, 1)


async def test_an_interface_that_is_not_there_is_named() -> None:
    error = await error_of(aioecho.serve(DatagramEcho, "udp://239.1.2.3:0?interface=nix9"))
    assert str(error).endswith("?interface=nix9: no network interface is called 'nix9'")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("scheme", ["unix", "unixgram"])
async def test_the_path_is_given_an_owner_and_a_group(folder: Path, scheme: str) -> None:
    handler = Echo if scheme == "unix" else DatagramEcho
    async with aioecho.serve(handler, f"{scheme}:app.sock?mode=660&owner=nobody&group=12") as server:
        found = os.stat("app.sock")
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (pwd.getpwnam("nobody").pw_uid, 12, 0o660)
        assert server.names == (f"{scheme}:app.sock",)


@pytest.mark.parametrize("option", ["owner", "group"])
async def test_an_owner_that_does_not_exist_is_named(folder: Path, option: str) -> None:
    error = await error_of(aioecho.serve(Echo, f"unix:app.sock?{option}=no-such-name"))
    what = "user" if option == "owner" else "group"
    assert str(error).endswith(f": no {what} is called 'no-such-name'")
    assert os.listdir() == []


def link_local() -> str | None:
    """Return a link-local address of this machine, with its interface."""
    if HAS_IPV6:
        for line in Path("/proc/net/if_inet6").read_text("ascii").splitlines():
            digits, _, _, scope, _, interface = line.split()
            if scope == "20":
                return f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))}%{interface}"
    return None


@pytest.mark.skipif(link_local() is None, reason="this machine has no link-local address")
async def test_a_link_local_address_is_named_so_that_it_can_be_used() -> None:
    async with aioecho.serve(Echo, f"tcp://[{link_local()}]:0") as server:
        name = server.names[0]
        assert name == f"tcp://[{link_local()}]:{server.server_address[1]}"
        reader, writer = await client.open_connection(name)
        writer.write(b"hello")
        writer.write_eof()
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()


@pytest.mark.skipif(link_local() is None, reason="this machine has no link-local address, and so no route to groups")
async def test_a_multicast_group_of_ipv6_is_joined_on_an_interface() -> None:
    interface = (link_local() or "").partition("%")[2]
    async with aioecho.serve(DatagramEcho, f"udp://[ff15::1234]:0?interface={interface}") as server:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex(interface))
            sock.sendto(b"all", ("ff15::1234", server.server_address[1]))
            assert await asyncio.to_thread(sock.recv, 10) == b"all"
