"""Many clients at once, each with one request: how long until the last of them has its reply."""

from __future__ import annotations

import select
import socket
import time
from dataclasses import dataclass
from typing import Any

__all__ = ["Burst", "send_burst"]

_AT_A_TIME, _PAUSE_S = 64, 0.008  # 8,000 clients a second, which no server's backlog runs over at


@dataclass(frozen=True)
class Burst:
    """What came of it: `elapsed_s` from the first client's connecting to the last reply, `lost` clients without one."""

    elapsed_s: float
    lost: int
    problem: str | None


def send_burst(address: Any, clients: int, timeout_s: float) -> Burst:
    """Connect so many clients, each of which sends a line and waits for it in upper case and for the end."""
    poll = select.epoll()
    waiting: dict[int, tuple[socket.socket, bytes, list[bytes]]] = {}
    problem = None
    lost = 0
    start = time.perf_counter()
    end = start + timeout_s
    opened = 0
    try:
        while (opened < clients or waiting) and time.perf_counter() < end:
            for i in range(opened, min(clients, opened + _AT_A_TIME)):
                sock = socket.create_connection(address, timeout_s)
                sock.setblocking(False)
                line = b"hello from client %d\n" % i
                sock.send(line)
                waiting[sock.fileno()] = (sock, line.upper(), [])
                poll.register(sock, select.EPOLLIN)
                opened = i + 1
            for fd, _ in poll.poll(_PAUSE_S if opened < clients else 0.1):
                sock, expected, chunks = waiting[fd]
                try:
                    chunk = sock.recv(4096)
                except OSError as error:
                    chunk, problem = b"", problem or str(error)
                if chunk:
                    chunks.append(chunk)
                    continue
                if (got := b"".join(chunks)) != expected:
                    lost += 1
                    problem = problem or f"expected {expected!r}, got {got!r}"
                del waiting[fd]
                sock.close()
        elapsed_s = time.perf_counter() - start
        if waiting or opened < clients:
            lost += len(waiting) + clients - opened
            problem = problem or f"no reply within {timeout_s:g} s"
    except OSError as error:
        return Burst(time.perf_counter() - start, clients, str(error))
    finally:
        for sock, _, _ in waiting.values():
            sock.close()
        poll.close()
    return Burst(elapsed_s, lost, problem)
