"""Certificates that are renewed again and again under load: no handshake fails, and old connections go on.

AIOECHO_RENEWALS is how often; 200 with -m soak, and a few in the suite. The event loop here is only the clients'.
"""

import asyncio
import os
import random
import signal
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from programs import Program, eventually, workers_of
from test_certificates import Authority

from aioecho.certificates import first_certificate

NAMES = ("localhost", "b.example")
CLIENTS = 6

PROGRAM = """
import logging
import sys
import aioecho

class Upper(aioecho.StreamRequestHandler):
    async def handle(self):
        async for line in self.reader:
            await self.send(line.upper())

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    names = {"b.example": aioecho.TLS("b.example.crt", "b.example.key")}
    tls = aioecho.TLS("localhost.crt", "localhost.key", names=names, poll=0.05)
    aioecho.run(Upper, f"fd://{sys.argv[1]}", workers=int(sys.argv[2]), loop=sys.argv[3], ssl=tls)
"""


async def gap() -> None:
    """Wait as a tool may between its steps: not at all, or for longer than the files have to be quiet."""
    await asyncio.sleep(random.choice([0, 0.01, 0.03, 0.15]))


async def by_rename(paths: list[Path], pair: tuple[bytes, bytes]) -> None:
    for path, content in zip(paths, pair, strict=True):
        beside = path.with_suffix(".new")
        beside.write_bytes(content)
        beside.rename(path)
        await gap()


async def by_symlink(paths: list[Path], pair: tuple[bytes, bytes]) -> None:
    """As certbot: new files beside, then each link is removed and made anew."""
    archived = []
    for path, content in zip(paths, pair, strict=True):
        archived.append(path.with_name(f"{path.name}.{random.getrandbits(64):x}"))
        archived[-1].write_bytes(content)
    for path, to in zip(paths, archived, strict=True):
        path.unlink()
        await gap()
        path.symlink_to(to)
        await gap()


async def in_halves(paths: list[Path], pair: tuple[bytes, bytes]) -> None:
    """As mkcert: each file is truncated and written where it is, here in two parts, and either may be the first."""
    steps = list(zip(paths, pair, strict=True))
    for path, content in random.choice([steps, steps[::-1]]):
        half = random.choice([0, len(content) // 2, len(content)])
        with path.open("wb") as file:
            file.write(content[:half])
            file.flush()
            await gap()
            file.write(content[half:])
        await gap()


class Load:
    """Clients that make one connection after another, and some that keep theirs."""

    def __init__(self, address: tuple[str, int], authority: Authority) -> None:
        self._address, self._context = address, authority.client
        self.outcomes: Counter[str] = Counter()
        self.seen: set[bytes] = set()  # certificates
        self._is_stopped = False

    async def ask(self, name: str, requests: int) -> None:
        """Handshake, and ask so many times, or until it is stopped if that is 0; then close."""
        reader, writer = await asyncio.open_connection(*self._address, ssl=self._context, server_hostname=name)
        self.outcomes["handshakes"] += 1
        self.seen.add(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
        asked = 0
        while asked < requests or not (requests or self._is_stopped):
            writer.write(b"hello\n")
            assert await reader.readline() == b"HELLO\n"
            asked += 1
            if not requests:
                self.outcomes["requests on old connections"] += 1
                await asyncio.sleep(0.02)
        writer.close()
        await writer.wait_closed()

    async def _repeat(self, requests: int) -> None:
        while not self._is_stopped:
            try:
                async with asyncio.timeout(600 if not requests else 30):
                    await self.ask(random.choice(NAMES), requests)
            except (OSError, AssertionError, EOFError, TimeoutError) as error:
                self.outcomes[f"failed: {error!r}"] += 1

    async def during(self, what: Callable[[], Awaitable[None]]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._repeat(0 if number < 2 else 1))
            try:
                await what()
            finally:
                self._is_stopped = True


async def renew(
    times: int, authority: Authority, how: Callable[..., Awaitable[None]], workers: int, loop: str
) -> Counter[str]:
    paths = {name: list(authority.write(authority.issue(name), name)) for name in NAMES}
    (authority.folder / "program.py").write_text(PROGRAM)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number = sock.fileno()
        command = (sys.executable, "program.py", str(number), str(workers), loop)
        with Program(*command, cwd=authority.folder, pass_fds=[number]) as program:
            eventually(lambda: "listening on" in program.stderr())
            load = Load(sock.getsockname(), authority)

            async def renew_all() -> None:
                for _ in range(times):
                    name = random.choice(NAMES)
                    pair = authority.issue(name)
                    served = ssl.PEM_cert_to_DER_cert(first_certificate(pair[0].decode()))
                    await how(paths[name], pair)
                    try:
                        async with asyncio.timeout(20):
                            while served not in load.seen:
                                await asyncio.sleep(0.01)
                    except TimeoutError:
                        pytest.fail(f"{name} is not served anew: {load.outcomes}, {program.stderr()}")
                    load.outcomes["renewals"] += 1

            await load.during(renew_all)
            assert await asyncio.to_thread(program.stop) == 0, program.stderr()
            assert "Traceback" not in program.stderr()
            assert "ERROR" not in program.stderr()
    print(how.__name__, workers, loop, dict(load.outcomes))  # shown with -rP
    return load.outcomes


WAYS = pytest.mark.parametrize("how", [by_rename, by_symlink, in_halves])
BOTH = pytest.mark.parametrize(("workers", "loop"), [(1, "asyncio"), (2, "uvloop")])


def check(outcomes: Counter[str], times: int) -> None:
    assert not [what for what in outcomes if what.startswith("failed")], outcomes
    assert outcomes["renewals"] == times
    assert outcomes["handshakes"] > times
    assert outcomes["requests on old connections"] > times


# All of both are soak's.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "workers", "loop"), [(by_rename, 2, "uvloop"), (by_symlink, 1, "asyncio"), (in_halves, 2, "uvloop")]
)
def test_renewals_under_load_cost_no_handshake(
    tmp_path: Path, how: Callable[..., Awaitable[None]], workers: int, loop: str
) -> None:
    times = int(os.environ.get("AIOECHO_RENEWALS", "5"))
    check(asyncio.run(renew(times, Authority(tmp_path), how, workers, loop)), times)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@WAYS
@BOTH
def test_two_hundred_renewals_under_load_cost_no_handshake(
    tmp_path: Path, how: Callable[..., Awaitable[None]], workers: int, loop: str
) -> None:
    times = int(os.environ.get("AIOECHO_RENEWALS", "200"))
    check(asyncio.run(renew(times, Authority(tmp_path), how, workers, loop)), times)


def test_a_worker_that_dies_while_a_renewal_is_half_written_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    asyncio.run(kill_in_a_half(Authority(tmp_path)))


async def kill_in_a_half(authority: Authority) -> None:
    for name in NAMES:
        cert, key = authority.write(authority.issue(name), name)
    (authority.folder / "program.py").write_text(PROGRAM)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number = sock.fileno()
        with Program(
            sys.executable, "program.py", str(number), "2", "uvloop", cwd=authority.folder, pass_fds=[number]
        ) as program:
            await asyncio.to_thread(eventually, lambda: "listening on" in program.stderr())
            load = Load(sock.getsockname(), authority)
            pair = authority.issue(NAMES[1])
            cert.write_bytes(pair[0])
            killed, other = workers_of(program)
            os.kill(killed, signal.SIGKILL)
            program.signal(signal.SIGHUP)
            await asyncio.to_thread(eventually, lambda: program.stderr().count("the private key is not") >= 3)
            await load.ask(NAMES[1], 3)
            key.write_bytes(pair[1])
            await asyncio.to_thread(eventually, lambda: len(workers_of(program)) == 2)
            while ssl.PEM_cert_to_DER_cert(first_certificate(pair[0].decode())) not in load.seen:
                await load.ask(NAMES[1], 3)
            assert other in workers_of(program)
            assert await asyncio.to_thread(program.stop) == 0, program.stderr()
            assert "Traceback" not in program.stderr()
