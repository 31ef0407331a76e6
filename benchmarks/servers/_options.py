"""What every server is told, and what is alike in all of them so that none has an unfair setting."""

from __future__ import annotations

import argparse
import ssl
from dataclasses import dataclass

__all__ = ["BACKLOG", "HOST", "READ_BYTES", "Options", "read_options"]

HOST = "127.0.0.1"
BACKLOG = 1024  # connections waiting to be accepted
READ_BYTES = (
    65536  # the most that one read gives; uvloop's and asyncio's transports and Twisted read as much themselves
)


@dataclass(frozen=True)
class Options:
    """One server's command line; `delay_s` in seconds."""

    port: int
    mode: str
    delay_s: float
    loop: str
    tls: ssl.SSLContext | None
    workers: int
    threads: int
    reads: str
    timeouts_s: float | None


def read_options() -> Options:
    """Read the command line; exits with usage where it is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument(
        "--mode", choices=("echo", "lines", "udp", "example", "once", "frames", "count", "broadcast"), default="echo"
    )
    parser.add_argument("--delay", type=float, default=0.0, help="seconds to wait before each reply")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="uvloop")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=10_000, help="the most that a pool may have")
    parser.add_argument(
        "--reads",
        choices=("each", "readexactly", "batches"),
        default="each",
        help="where there are several ways to read records",
    )
    parser.add_argument(
        "--timeouts", type=float, help="seconds that peers may be silent, or take nothing, where it can be said"
    )
    parser.add_argument("--cert")
    parser.add_argument("--key")
    given = parser.parse_args()
    tls = None
    if given.cert:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(given.cert, given.key)
    return Options(
        given.port,
        given.mode,
        given.delay,
        given.loop,
        tls,
        given.workers,
        given.threads,
        given.reads,
        given.timeouts,
    )
