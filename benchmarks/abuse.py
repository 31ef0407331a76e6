"""Bad peers: what each kind costs a server, how long the server has it, and what it does to the clients beside it.

As a program, ``python -m benchmarks.abuse KIND PORT SECONDS``, it is the bad peers themselves: a process of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .catalog import by_name, find_missing
from .processes import HOST, ServerProcess, choose_processors, start_module

__all__ = ["KINDS", "NAME", "QUESTION", "SERVERS", "make_table", "run_abuse", "write_table"]

NAME = "abuse"
QUESTION = (
    "Bad peers. What do they cost, how long do they stay, and how late are the replies of the clients beside them?"
)

SERVERS = ("aioecho", "aioecho-asyncio", "streams", "streams-asyncio", "threading")

# How many of a kind act at a time.
AT_A_TIME = 20

# Seconds: aioecho's timeouts idle, message and write, which are 600, 60 and 60 by default; and for how long the peers act.
TIMEOUTS = 2.0
SECONDS = 6.0

# What the healthy clients do: messages a second, over so many connections.
RATE, HEALTHY = 500, 10


class Peers:
    """So many bad peers of a kind, each in a thread. `gone_s` is how long the server had the ones that it ended."""

    def __init__(self, port: int, seconds: float) -> None:
        self.address = (HOST, port)
        self.end = time.monotonic() + seconds
        self.count = 0
        self.gone_s: list[float] = []

    def run(self, act: Callable[[Peers], None]) -> None:
        """Act until the time is over."""

        def again_and_again() -> None:
            while time.monotonic() < self.end:
                self.count += 1
                with contextlib.suppress(OSError):
                    act(self)

        threads = [threading.Thread(target=again_and_again) for _ in range(AT_A_TIME)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def connect(self) -> socket.socket:
        """Return a connected socket whose reads and writes wait a fifth of a second at the most."""
        sock = socket.create_connection(self.address, 5)
        sock.settimeout(0.2)
        return sock

    def persist(self, step: Callable[[socket.socket], object]) -> None:
        """Do `step` again and again until the server ends the connection, or the time is over."""
        began = time.monotonic()
        with self.connect() as sock:
            try:
                while time.monotonic() < self.end:
                    with contextlib.suppress(TimeoutError):
                        if step(sock) == b"":
                            break
                else:
                    return
            except OSError:
                pass
        self.gone_s.append(time.monotonic() - began)


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _is_silent(peers: Peers) -> None:
    peers.persist(lambda sock: sock.recv(1))


def _drips(peers: Peers) -> None:
    def step(sock: socket.socket) -> bytes:
        sock.sendall(b"x")
        return sock.recv(1)

    peers.persist(step)


def _never_reads(peers: Peers) -> None:
    # Of lines that are longer, as the kernel's buffers hold megabytes: a server is to come to the end of them soon.
    lines = (b"x" * 1000 + b"\n") * 60
    peers.persist(lambda sock: sock.send(lines))


def _sends_long_lines(peers: Peers) -> None:
    with peers.connect() as sock:
        sock.sendall(b"x" * 100_000)
        sock.recv(1)


def _resets(peers: Peers) -> None:
    sock = peers.connect()
    with contextlib.suppress(OSError):
        sock.sendall(b"a line\n" * 1000)
        sock.recv(1)
    _reset(sock)


def _comes_and_goes(peers: Peers) -> None:
    _reset(peers.connect())


KINDS: dict[str, tuple[str, Callable[[Peers], None] | None]] = {
    "none": ("no bad peer", None),
    "silent": ("is silent", _is_silent),
    "drips": ("sends a byte now and then", _drips),
    "never-reads": ("sends, and never reads", _never_reads),
    "long-lines": ("sends lines of 100 kB", _sends_long_lines),
    "resets": ("resets in mid-reply", _resets),
    "comes-and-goes": ("connects and resets", _comes_and_goes),
}


def run_abuse(
    report: Callable[[str], object], servers: tuple[str, ...] = (), seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """Measure every kind of bad peer on every server; call `report` with what is about to be measured."""
    allowed, processors = os.sched_getaffinity(0), choose_processors()
    samples = []
    try:
        if processors is not None:
            os.sched_setaffinity(0, {processors[1]})
        for kind in KINDS:
            for name in SERVERS:
                if (servers and name not in servers) or find_missing(by_name(name)):
                    continue
                report(f"{KINDS[kind][0]}, {by_name(name).label}")
                samples.append(_measure(kind, name, seconds, {processors[0]} if processors is not None else None))
    finally:
        os.sched_setaffinity(0, allowed)
    return samples


def _measure(kind: str, name: str, seconds: float, processors: set[int] | None) -> dict[str, Any]:
    from aioecho.load import LoadSettings, load

    arguments = ("--mode", "lines", "--timeouts", str(TIMEOUTS))
    with ServerProcess(by_name(name), arguments, processors) as process, contextlib.ExitStack() as stack:
        process.settle()
        lines, memory = _lines(process), process.memory_kib()
        bad = None
        if KINDS[kind][1] is not None:
            bad = start_module("benchmarks.abuse", kind, str(process.port), str(seconds), stdout=subprocess.PIPE)
            stack.enter_context(bad)
            stack.callback(bad.kill)  # at an interruption; else it has ended
        result = load(
            LoadSettings(
                endpoint=f"tcp://{HOST}:{process.port}",
                connections=HEALTHY,
                rate=RATE,
                lines=True,
                duration_s=seconds - 1,
                warmup_s=0.5,
            )
        )
        if result.interrupted:
            raise KeyboardInterrupt
        grown = process.memory_kib() - memory
        told: dict[str, Any] = {"count": 0, "gone_s": []}
        if bad is not None:
            said = bad.communicate()[0]
            if not said:
                raise OSError(f"the process of bad peers has failed, exit status {bad.returncode}")
            told = json.loads(said)
        return {
            "kind": kind,
            "server": name,
            "log_lines_per_s": round((_lines(process) - lines) / seconds, 1),
            "grown_kib": grown,
            "gone_s": round(max(told["gone_s"]), 1) if told["gone_s"] else None,
            "peers": told["count"],
            "p99_us": result.as_dict()["p99_us"],
            "errors": result.as_dict()["errors"],
        }


def _lines(process: ServerProcess) -> int:
    """Return how many lines the server has written, to stdout and stderr."""
    size = os.fstat(process.words.fileno()).st_size
    return os.pread(process.words.fileno(), size, 0).count(b"\n")


def make_table(samples: list[dict[str, Any]], seconds: float = SECONDS) -> str:
    """Return the samples as a table in Markdown."""
    persistent = {"silent", "drips", "never-reads"}
    rows = [
        "| bad peers | server | lines of log a second | memory grows by, MiB | ends them after, s | p99 beside them, ms |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for sample in samples:
        gone = (
            ""
            if sample["kind"] not in persistent
            else "never"
            if sample["gone_s"] is None
            else f"{sample['gone_s']:.1f}"
        )
        p99 = "all lost" if sample["p99_us"] is None else f"{sample['p99_us'] / 1000:.1f}"
        lost = f", {sample['errors']} lost" if sample["errors"] else ""
        rows.append(
            f"| {KINDS[sample['kind']][0]} | {by_name(sample['server']).label} | {sample['log_lines_per_s']:,.1f}"
            f" | {sample['grown_kib'] / 1024:.1f} | {gone} | {p99}{lost} |"
        )
    return "\n".join(rows) + "\n"


def main(kind: str, port: str, seconds: str) -> None:
    """Be the bad peers, and print as JSON what became of them."""
    peers = Peers(int(port), float(seconds))
    act = KINDS[kind][1]
    assert act is not None
    peers.run(act)
    print(json.dumps({"count": peers.count, "gone_s": peers.gone_s}))


def write_table(path: Path, command: str, samples: list[dict[str, Any]]) -> str:
    """Write the table with its command to a file, and return the table."""
    table = make_table(samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"`{command}`\n\n{table}")
    return table


if __name__ == "__main__":
    main(*sys.argv[1:])
