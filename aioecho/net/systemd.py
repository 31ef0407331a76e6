"""What systemd hands to a service, and what a service tells it: sockets, readiness, the watchdog.

The protocols are defined in sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3). Without systemd all of it does
nothing: every function looks at the environment first.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Sequence

__all__ = [
    "Watchdog",
    "listen_fds",
    "notify",
    "notify_ready",
    "notify_reloading",
    "notify_stopping",
]

logger = logging.getLogger("aioecho.systemd")

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

VARIABLES = (
    *("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID"),
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"),
)
"""The environment that is meant for the process that systemd has started, and not for its children."""

# Seconds that a message may wait for room in systemd's queue, so that a manager that hangs does not take us with it.
SEND_TIMEOUT = 1.0

# What stands for "for ever" in a message, in seconds: a year.
LONG = 365 * 24 * 3600.0


def listen_fds() -> list[tuple[str, int]]:
    """Return the sockets that systemd has passed, as (name, descriptor): none if they are meant for another process.

    One without a name is called "unknown", as sd_listen_fds_with_names() has it.
    """
    if not _is_for_us("LISTEN_PID"):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    if not count.isdecimal():
        return []
    descriptors = range(FIRST_FD, FIRST_FD + int(count))
    text = os.environ.get("LISTEN_FDNAMES")
    names = text.split(":") if text is not None else []
    names += ["unknown"] * (len(descriptors) - len(names))
    return list(zip(names, descriptors, strict=False))


def notify(*assignments: str) -> bool:
    """Tell systemd, in one message, as ``notify("READY=1")``; return whether the message got through.

    Never raises: a message that does not get through is logged.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(SEND_TIMEOUT)
            sock.connect(address)
            sock.send("\n".join(assignments).encode())
    except OSError as error:
        logger.warning("cannot tell systemd %s: %s", assignments[0], error)
        return False
    return True


def notify_ready(names: Sequence[str], workers: int | None = None) -> None:
    """Tell systemd that the service listens on the endpoints `names`: at the start, and after a reload.

    `workers` is how many processes serve, None where this one does.
    """
    where = "".join(char if char.isprintable() else "?" for char in ", ".join(names))  # a path may have a newline
    count = "" if workers is None else f"{workers} worker{'s' if workers != 1 else ''} "
    notify("READY=1", f"STATUS={count}listening on {where}")


def notify_reloading(what: str) -> None:
    """Tell systemd that a reload begins, and what it does; notify_ready() ends it.

    Type=notify-reload wants the time in the same message.
    """
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notify("RELOADING=1", f"MONOTONIC_USEC={now}", f"STATUS={what}")


def notify_stopping(seconds: float) -> None:
    """Tell systemd that a drain begins, which may take so many seconds: it is to wait as long, whatever TimeoutStopSec is."""
    notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(min(seconds, LONG) * 1e6)}", "STATUS=draining")


def _watchdog_seconds() -> float | None:
    """Return how long systemd waits for a WATCHDOG=1 before it ends the service; None if it does not, or not for us."""
    text = os.environ.get("WATCHDOG_USEC", "")
    if not text.isdecimal() or int(text) == 0 or ("WATCHDOG_PID" in os.environ and not _is_for_us("WATCHDOG_PID")):
        return None
    return int(text) / 1e6


class Watchdog:
    """Feeds systemd's watchdog from the running event loop, twice as often as it has to: one that hangs does not.

    Does nothing if systemd has set no watchdog: then `seconds`, for which it waits, is None.
    """

    def __init__(self) -> None:
        self.seconds = _watchdog_seconds()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Feed it from now on."""
        if self.seconds is not None:
            self._feed(self.seconds / 2)

    def _feed(self, every: float) -> None:
        notify("WATCHDOG=1")
        self._timer = asyncio.get_running_loop().call_later(every, self._feed, every)

    def stop(self) -> None:
        """Feed it no more."""
        if self._timer is not None:
            self._timer.cancel()


def _is_for_us(variable: str) -> bool:
    return os.environ.get(variable, "") == str(os.getpid())
