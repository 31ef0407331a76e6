"""What a load is told, and what it tells: settings in, progress and one process's tally out."""

from __future__ import annotations

from dataclasses import dataclass, field

from .endpoints import InheritedEndpoint, TCPEndpoint, UnixEndpoint, parse_endpoint

__all__ = ["ERROR_CLASSES", "LoadProgress", "LoadSettings", "Tally", "parse_target"]

ERROR_CLASSES = ("connect", "reset", "closed_early", "timed_out", "wrong_bytes")

FORMS = "tcp://HOST:PORT or unix:PATH"


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Say what to send where, and for how long.

    `endpoint`: `tcp://HOST:PORT` or `unix:PATH`. `rate`: messages a second over all connections; None is closed loop.
    `lines`: each message is printable and ends in a newline, counted in `size_bytes`. `churn`: a connection per message,
    its set-up counted in the latency. `timeout_s`: a connection that owes a reply and sends nothing for so long has
    failed; a run also waits so long at its end for the replies still owed. `ca_file`: verify the server by this file
    instead of the system's certificates.

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
    duration_s: float = 10.0
    warmup_s: float = 1.0
    timeout_s: float = 10.0
    processes: int = 1
    tls: bool = False
    ca_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("connections", "depth", "size_bytes", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("duration_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, not {getattr(self, name)}")
        if self.warmup_s < 0:
            raise ValueError(f"warmup_s must not be below 0 seconds, not {self.warmup_s}")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be above 0 messages a second, not {self.rate}")
        if self.processes > self.connections:
            raise ValueError(f"processes ({self.processes}) must not exceed connections ({self.connections})")
        if self.churn and self.depth > 1:
            raise ValueError("churn sends one message per connection, so depth must be 1")
        parse_target(self.endpoint)

    @property
    def patience_s(self) -> float:
        """What `timeout_s` comes to."""
        return self.timeout_s


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


def parse_target(text: str) -> TCPEndpoint | UnixEndpoint:
    """Return the endpoint that `text` names, if something can be sent there.

    Raises:
        ValueError: it names none, or one that only a server can use; the message says what was expected (caller).
    """
    where = parse_endpoint(text)
    if isinstance(where, InheritedEndpoint) or (isinstance(where, TCPEndpoint) and not where.port):
        raise ValueError(f"nobody can be reached at {text!r}: expected {FORMS}, with the server's port")
    return where
