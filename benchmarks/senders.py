"""Clients that cost little themselves: streams of records in large pieces, and connections in small crowds.

One thread and blocking sockets. A piece is built once, sent by one call, and its replies are compared as a whole, so that
the server has far more to do than its client, and the figure is the server's processor time for each record.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["AT_A_TIME", "CROWDS_PER_SECOND", "SENDERS", "Sent", "connect", "make_record", "send"]

_PIECE_BYTES = 262_144  # what one call sends, one way
_TIMEOUT_S = 10

AT_A_TIME = 16
"""The number of connections that come together."""

CROWDS_PER_SECOND = 60
"""The number of crowds of connections in a second, or fewer where the server is slower: all servers get the same load."""


@dataclass(frozen=True)
class Sent:
    """What was sent and answered within `elapsed_s`, and the processor time that the client used for it itself.

    `count`: records, or connections. `problem` says which reply was wrong or missing, None where all were right.
    """

    count: int
    elapsed_s: float
    own_cpu_s: float
    problem: str | None


@dataclass(frozen=True)
class Sender:
    """A way to load a server. `mode`: what the server must do, as its `--mode` says."""

    mode: str
    send: Callable[[tuple[str, int], int, int, float], int]


def make_record(mode: str, size_bytes: int) -> bytes:
    """Make one record of so many bytes in all: a line, or a frame of 4 bytes of length and what follows them."""
    if mode == "frames":
        return struct.pack(">I", size_bytes - 4) + b"y" * (size_bytes - 4)
    return b"x" * (size_bytes - 1) + b"\n"


def send(name: str, address: tuple[str, int], in_flight: int, size_bytes: int, duration_s: float) -> Sent:
    """Load a server for `duration_s` seconds by the sender of that name; the last piece may end later.

    Raises:
        KeyError: there is no such sender (caller).
    """
    sender = SENDERS[name]
    start, cpu = time.perf_counter(), time.thread_time()
    problem = None
    count = 0
    try:
        count = sender.send(address, in_flight, size_bytes, duration_s)
    except OSError as error:
        problem = str(error) or type(error).__name__
    return Sent(count, time.perf_counter() - start, time.thread_time() - cpu, problem)


def connect(address: tuple[str, int]) -> socket.socket:
    """Connect a blocking socket that gives up a call after 10 seconds.

    Raises:
        OSError: it could not be connected (system).
    """
    sock = socket.socket()
    # The kernel's timeouts: Python's own would make each call two.
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _TIMEOUT_S, 0))
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def _pipeline(mode: str) -> Callable[[tuple[str, int], int, int, float], int]:
    """Send `in_flight` records at once, wait for as many replies, and so on, on one connection."""

    def run(address: tuple[str, int], in_flight: int, size_bytes: int, duration_s: float) -> int:
        piece = make_record(mode, size_bytes) * in_flight
        replies = bytearray(len(piece))
        view = memoryview(replies)
        pieces = 0
        end = time.perf_counter() + duration_s
        with connect(address) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while time.perf_counter() < end:
                sock.sendall(piece)
                _fill(sock, view)
                if replies != piece:
                    raise OSError("a reply differs from its record")
                pieces += 1
            sock.shutdown(socket.SHUT_WR)
            if sock.recv(1):
                raise OSError("more replies than records")
        return pieces * in_flight

    return run


def _fill(sock: socket.socket, view: memoryview) -> None:
    got = 0
    while got < len(view):
        size = sock.recv_into(view[got:])
        if not size:
            raise OSError("the server closed early")
        got += size


def _send_one_way(address: tuple[str, int], in_flight: int, size_bytes: int, duration_s: float) -> int:
    """Send lines without a stop; at the end the server says how many have come."""
    per_piece = _PIECE_BYTES // size_bytes
    piece = make_record("lines", size_bytes) * per_piece
    sent = 0
    end = time.perf_counter() + duration_s
    with connect(address) as sock:
        while time.perf_counter() < end:
            sock.sendall(piece)
            sent += per_piece
        sock.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: sock.recv(100), b""))
    if said != b"%d\n" % sent:
        raise OSError(f"{sent} lines were sent, and the server says {said!r}")
    return sent


def _crowds(*, server_ends: bool) -> Callable[[tuple[str, int], int, int, float], int]:
    """Open some connections, send a request on each, read each reply, close them, and so on at a fixed pace.

    With `server_ends` a reply is in upper case, and the server ends the connection; otherwise it echoes.
    """

    def run(address: tuple[str, int], at_a_time: int, size_bytes: int, duration_s: float) -> int:
        count = 0
        start = time.perf_counter()
        crowds = 0
        while (now := time.perf_counter()) - start < duration_s:
            if (early_s := start + crowds / CROWDS_PER_SECOND - now) > 0:
                time.sleep(early_s)
            crowds += 1
            socks: list[socket.socket] = []
            try:
                requests = [(b"request %d " % (count + i)).ljust(size_bytes, b"x") for i in range(at_a_time)]
                for request in requests:
                    socks.append(connect(address))
                    socks[-1].sendall(request)
                for sock, request in zip(socks, requests, strict=True):
                    expected = request.upper() if server_ends else request
                    reply = sock.recv(2 * size_bytes)
                    while reply and (server_ends or len(reply) < len(expected)):
                        chunk = sock.recv(2 * size_bytes)
                        if not chunk:
                            break
                        reply += chunk
                    if reply != expected:
                        raise OSError(f"expected {expected!r}, got {reply!r}")
            finally:
                for sock in socks:
                    sock.close()
            count += at_a_time
        return count

    return run


SENDERS = {
    "lines": Sender("lines", _pipeline("lines")),
    "frames": Sender("frames", _pipeline("frames")),
    "one-way": Sender("count", _send_one_way),
    "server-first": Sender("once", _crowds(server_ends=True)),
    "client-first": Sender("echo", _crowds(server_ends=False)),
}
