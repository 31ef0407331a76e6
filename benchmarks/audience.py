"""Receivers of a broadcast: many connections held open, to which a server writes what one more client says."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Self

from .senders import Sent, connect

__all__ = ["MESSAGES_PER_SECOND", "Audience"]

MESSAGES_PER_SECOND = 50
"""A fixed pace, at which the receivers read a message only when the next one is due: a server that writes wakes no client."""


class Audience:
    """A context manager that connects so many receivers, and waits until the server has greeted them with a byte.

    Raises:
        OSError: the server accepts no more, or does not greet (system).
    """

    def __init__(self, address: tuple[str, int], receivers: int) -> None:
        self.address = address
        self.receivers = receivers
        self.said = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.sockets = [stack.enter_context(connect(self.address)) for _ in range(self.receivers)]
            for sock in self.sockets:
                if sock.recv(1) != b".":
                    raise OSError("a receiver was not greeted")
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stack.close()

    def hear(self, size_bytes: int, duration_s: float) -> Sent:
        """Have one of the receivers say lines for `duration_s` seconds, and compare what all of them get.

        The speaker is one of the receivers. The count is that of messages times receivers.
        """
        start, cpu = time.perf_counter(), time.thread_time()
        messages, problem = 0, None
        try:
            while problem is None and messages < max(1, duration_s * MESSAGES_PER_SECOND):
                line = (b"message %d " % self.said).ljust(size_bytes - 1, b"x") + b"\n"
                self.sockets[0].sendall(line)
                self.said += 1
                messages += 1
                time.sleep(max(0.0, start + messages / MESSAGES_PER_SECOND - time.perf_counter()))
                for sock in self.sockets:
                    heard = sock.recv(2 * size_bytes)
                    while 0 < len(heard) < size_bytes and (more := sock.recv(2 * size_bytes)):
                        heard += more
                    if heard != line:
                        problem = f"expected {line!r}, got {heard!r}"
                        break
        except OSError as error:
            problem = str(error) or type(error).__name__
        elapsed_s = time.perf_counter() - start
        return Sent(messages * self.receivers, elapsed_s, time.thread_time() - cpu, problem)
