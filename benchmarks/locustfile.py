"""Load any echo endpoint from several machines with locust, an existing distributed load generator.

    locust -f benchmarks/locustfile.py --master --headless -u 100 -r 100 -t 30s --host tcp://HOST:PORT --expect-workers 2
    locust -f benchmarks/locustfile.py --worker --master-host MASTER      (on each machine that loads, once a processor)

Each user keeps one connection, sends 64 bytes (`ECHO_SIZE_BYTES`), and compares what comes back.

locust rounds every response time to a millisecond, and to ten of them above a hundred, which would make an echo's 0 ms.
So this file reports MICROSECONDS where locust says milliseconds: read its "ms" as us. Above 100 us they are rounded to
10 us. It is a closed loop, and a generator of gevent's speed: for latencies use `python -m aioecho load`.
"""

from __future__ import annotations

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call, untyped-decorator, unused-ignore"
import os
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from locust import User, task

__all__ = ["EchoUser"]

SIZE_BYTES = int(os.environ.get("ECHO_SIZE_BYTES", "64"))


class EchoUser(User):
    """One client of an echo server at `host`, which is `tcp://HOST:PORT`; a lost connection is a failure and replaced."""

    sock: socket.socket | None = None
    sent = 0

    def on_stop(self) -> None:
        """Close the connection."""
        if self.sock is not None:
            self.sock.close()

    @task
    def echo(self) -> None:
        """Send one message and read its reply."""
        self.sent += 1
        message = f"{id(self)}.{self.sent}.".encode().ljust(SIZE_BYTES, b"x")[:SIZE_BYTES]
        received, error = b"", None
        start = time.perf_counter()
        try:
            if self.sock is None:
                address = urlsplit(self.host or "")
                self.sock = socket.create_connection((address.hostname, address.port), 10)
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                start = time.perf_counter()
            self.sock.sendall(message)
            while len(received) < SIZE_BYTES:
                chunk = self.sock.recv(SIZE_BYTES - len(received))
                if not chunk:
                    raise ConnectionError("closed early")
                received += chunk
            if received != message:
                raise ConnectionError("wrong bytes")
        except OSError as problem:
            error = problem
            if self.sock is not None:
                self.sock.close()
            self.sock = None
            time.sleep(0.1)  # gevent's, which lets others run: no spinning where no server listens
        self._report((time.perf_counter() - start) * 1e6, len(received), error)

    def _report(self, microseconds: float, length: int, error: Any) -> None:
        self.environment.events.request.fire(
            request_type="echo",
            name=f"{SIZE_BYTES} bytes (us)",
            response_time=microseconds,
            response_length=length,
            exception=error,
            context={},
        )
