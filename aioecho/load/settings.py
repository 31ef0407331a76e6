"""The settings of a load, and what its processes report: progress, and a tally at the end."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from math import inf

from aioecho.framing import Framing
from aioecho.load.messages import make_frames
from aioecho.load.script import Script
from aioecho.net.endpoints import (
    InheritedEndpoint,
    StdioEndpoint,
    SystemdEndpoint,
    TCPEndpoint,
    UDPEndpoint,
    UnixDatagramEndpoint,
    UnixEndpoint,
    parse_endpoint,
)

__all__ = ["ERROR_CLASSES", "NUMBER_BYTES", "LoadProgress", "LoadSettings", "Tally", "is_datagram", "parse_target"]

ERROR_CLASSES = ("connect", "reset", "closed_early", "timed_out", "wrong_bytes")

NUMBER_BYTES = 8  # that a datagram begins with, to tell which message a reply belongs to

_FORMS = "tcp://HOST:PORT, unix:PATH, udp://HOST:PORT or unixgram:PATH"
_STREAM_TIMEOUT_S, _DATAGRAM_TIMEOUT_S = 10.0, 2.0
_MOST_RATE = 1e9  # messages a second: one a nanosecond, in which the engine counts
_MOST_UDP_BYTES = 65_507  # RFC 768 over IPv4: 65,535 less both headers


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Say what to send where, and for how long.

    `endpoint`: `tcp://HOST:PORT` or `unix:PATH`, or for datagrams `udp://HOST:PORT` or `unixgram:PATH`; then a connection
    is a socket with an address of its own. `rate`: messages a second over all connections; None is closed loop.
    `lines`: each message is printable and ends in a newline, counted in `size_bytes`. `framing`, an object of
    aioecho.framing: each message is a frame of `size_bytes`, and a reply is one whole frame that is equal. `script`: what to
    send and what to expect, for a server that does not echo; `size_bytes` says nothing then, and with a framing every message
    and every reply is a frame. `churn`: a connection per message, its set-up counted in the latency. `timeout_s`: a connection
    that owes a reply and sends nothing for so long has failed, and a datagram without a reply for so long is lost; a run also
    waits so long at its end for the replies still owed. None is 10 seconds, and 2 for datagrams. `ca_file`: verify the server
    by this file instead of the system's certificates.

    Raises:
        ValueError: a value out of range or an endpoint that nothing can be sent to (caller).
    """

    endpoint: str
    connections: int = 10
    depth: int = 1
    rate: float | None = None
    churn: bool = False
    size_bytes: int = 64
    lines: bool = False
    framing: Framing | None = None
    script: Script | None = None
    duration_s: float = 10.0
    warmup_s: float = 1.0
    timeout_s: float | None = None
    processes: int = 1
    tls: bool = False
    ca_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("connections", "depth", "size_bytes", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.duration_s < inf:
            raise ValueError(f"duration_s must be above 0 seconds, and finite, not {self.duration_s}")
        if self.timeout_s is not None and not 0 < self.timeout_s < inf:
            raise ValueError(f"timeout_s must be above 0 seconds, and finite, not {self.timeout_s}")
        if not 0 <= self.warmup_s < inf:
            raise ValueError(f"warmup_s must not be below 0 seconds, and finite, not {self.warmup_s}")
        if self.rate is not None and not 0 < self.rate <= _MOST_RATE:
            raise ValueError(f"rate must be above 0 messages a second, to {_MOST_RATE:g}, not {self.rate}")
        if self.processes > self.connections:
            raise ValueError(f"processes ({self.processes}) must not exceed connections ({self.connections})")
        if self.churn and self.depth > 1:
            raise ValueError("churn sends one message per connection, so depth must be 1")
        where = parse_target(self.endpoint)
        if is_datagram(self.endpoint):
            most = _MOST_UDP_BYTES if isinstance(where, UDPEndpoint) else 2**30
            if not NUMBER_BYTES <= self.size_bytes <= most:
                raise ValueError(
                    f"size_bytes must be from {NUMBER_BYTES}, as each datagram has a number, to {most}, not {self.size_bytes}"
                )
            for name in ("churn", "lines", "framing", "tls", "script"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for streams: there is none at {self.endpoint}")
        if self.framing is not None:
            if self.lines:
                raise ValueError("lines and framing exclude one another: Lines() is a framing too")
            if self.script is None:
                make_frames(self.framing, self.size_bytes, 1)  # raises what is wrong with it
        if self.script is not None:
            self._check_script(self.script)

    def _check_script(self, script: Script) -> None:
        if self.lines:
            raise ValueError("lines and script exclude one another: the framing Lines() sends lines")
        if self.churn and len(script.exchanges) > 1:
            raise ValueError("churn makes one exchange a connection: put the others before a line repeat")
        for exchange in (*script.before, *script.exchanges):
            if self.framing is not None:
                if exchange.send:
                    self.framing.join(exchange.send)  # raises what is wrong with it
            elif exchange.expect.needs_framing:
                raise ValueError("a reply that is a frame needs a framing, such as Lines()")

    @property
    def message_bytes(self) -> int:
        """Return `size_bytes`, or the size of the longest message of a script."""
        if self.script is None:
            return self.size_bytes
        return max(len(exchange.send) for exchange in self.script.exchanges)

    @property
    def effective_timeout_s(self) -> float:
        """Return `timeout_s`, or its default for this kind of endpoint."""
        if self.timeout_s is not None:
            return self.timeout_s
        return _DATAGRAM_TIMEOUT_S if is_datagram(self.endpoint) else _STREAM_TIMEOUT_S


@dataclass(frozen=True)
class LoadProgress:
    """How far a run is, given to `load`'s `on_progress` about four times a second."""

    phase: str  # "connecting", "warming up", "measuring" or "draining"
    elapsed_s: float  # since the warm-up began, 0 while connecting
    total_s: float  # warm-up and duration
    replies: int  # since the connections were opened
    rate: float  # replies a second since the last report
    errors: int


@dataclass
class Tally:
    """What one process counted, as plain data that can cross to its parent."""

    counts: dict[int, int] = field(default_factory=dict)  # latency in us -> messages
    series: list[tuple[float, float, dict[int, int]]] = field(
        default_factory=list
    )  # from when, for how long (s), counts
    replies: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    measured_s: float = 0.0
    cpu_s: float = 0.0
    errors: list[int] = field(default_factory=lambda: [0] * len(ERROR_CLASSES))
    interrupted: bool = False
    problem: str | None = None
    late: int = 0  # datagrams
    duplicates: int = 0  # datagrams


def parse_target(text: str) -> TCPEndpoint | UnixEndpoint | UDPEndpoint | UnixDatagramEndpoint:
    """Return the endpoint that `text` names, if something can be sent there.

    Raises:
        ValueError: it names none, or one that only a server can use; the message says what was expected (caller).
    """
    where = parse_endpoint(text)
    if isinstance(where, InheritedEndpoint | StdioEndpoint | SystemdEndpoint) or (
        isinstance(where, TCPEndpoint | UDPEndpoint) and not where.port
    ):
        raise ValueError(f"no server can be reached at {text!r}: expected {_FORMS}, with the server's port")
    where.check_for_client()
    # Permissions are for a server to set.
    return type(where)(where.path) if isinstance(where, UnixEndpoint | UnixDatagramEndpoint) else where


def is_datagram(endpoint: str) -> bool:
    """Tell whether what is sent to this endpoint are datagrams."""
    return parse_target(endpoint).type == socket.SOCK_DGRAM
