"""What can be measured of a server, as Prometheus has it: the families of metrics, their values, and their text.

The values are plain numbers by names, so that they can be added up over processes and sent as JSON.
docs/pages/metrics.md has the same table.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["FAMILIES", "OPENMETRICS", "TEXT", "Family", "Histogram", "Metrics", "Values", "format_metrics"]

TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""The Content-Type of Prometheus' text format. Prometheus 3 marks a target down that sends none."""

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
"""The Content-Type of OpenMetrics' text format."""

Values = dict[str, dict[str, float]]
"""Numbers by the name of the family, and by the values of its labels, joined by :data:`SEPARATOR`. In place of a histogram's
buckets stand the counts of each bucket alone, by its index, and the sum, as "sum", behind the labels."""

# No label's value has it: an endpoint with a control character in its path is shown with an escape.
SEPARATOR = "\x1f"

# Seconds: upper bounds of buckets.
DURATIONS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)
DELAYS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Family:
    """A family of metrics: its name (a counter's without ``_total``), its kind, what it tells, and the names of its labels."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    bounds: tuple[float, ...] = ()
    is_least: bool = False
    """Whether the least of several values is meant, and not their sum."""


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("aioecho_build", "info", "The version of aioecho and of Python.", ("version", "python")),
        Family("aioecho_connections_active", "gauge", "Connections that have not ended yet."),
        Family("aioecho_connections", "counter", "Connections accepted, also the ones that were refused then."),
        Family(
            "aioecho_connections_ended", "counter", "Connections that had a handler, and have ended.",
            ("outcome", "reason"),
        ),
        Family("aioecho_connections_refused", "counter", "Connections that got no handler.", ("reason",)),
        Family(
            "aioecho_published_dropped", "counter",
            "Messages of publish() that did not reach another worker, as too much waited for it.",
        ),
        Family("aioecho_accept_errors", "counter", "Times that accept() failed."),
        Family(
            "aioecho_connection_duration_seconds", "histogram",
            "From accept() to the end of a connection that had a handler.", unit="seconds", bounds=DURATIONS,
        ),
        Family(
            "aioecho_tls_handshake_seconds", "histogram", "TLS handshakes that succeeded.",
            unit="seconds", bounds=DELAYS,
        ),
        Family("aioecho_tls_handshake_failures", "counter", "TLS handshakes that failed."),
        Family(
            "aioecho_tls_certificate_end_timestamp_seconds", "gauge",
            "When the first of the certificates expires, since 1970.", unit="seconds", is_least=True,
        ),
        Family(
            "aioecho_wire_received_bytes", "counter",
            "Bytes received by connections, with TLS and the PROXY header.", unit="bytes",
        ),
        Family(
            "aioecho_wire_sent_bytes", "counter", "Bytes sent by connections, with TLS.", unit="bytes",
        ),
        Family(
            "aioecho_unsent_bytes", "gauge", "Bytes that handlers have written and the kernel has not taken.",
            unit="bytes",
        ),
        Family("aioecho_buffered_bytes", "gauge", "Bytes that count for Limits.max_memory.", unit="bytes"),
        Family(
            "aioecho_loop_lag_seconds", "histogram", "How late a timer of the event loop is, looked at twice a second.",
            unit="seconds", bounds=DELAYS,
        ),
        Family(
            "aioecho_accept_queue_length", "gauge", "Clients in the kernel's queue that were not accepted yet.",
            ("endpoint",),
        ),
        Family("aioecho_accept_queue_limit", "gauge", "How many find room in that queue.", ("endpoint",)),
        Family("aioecho_datagrams_received", "counter", "Datagrams read from sockets."),
        Family("aioecho_datagrams_handled", "counter", "Datagrams given to a handler."),
        Family("aioecho_datagrams_queued", "gauge", "Datagrams that wait for a handler."),
        Family("aioecho_datagrams_dropped", "counter", "Datagrams read that no handler got.", ("reason",)),
        Family("aioecho_datagrams_dropped_by_kernel", "counter", "Datagrams that found no room in a socket."),
        Family("aioecho_datagram_receive_errors", "counter", "Times that reading a datagram failed."),
        Family("aioecho_datagram_replies_dropped", "counter", "Replies for which the socket had no room."),
        Family("aioecho_datagram_reply_errors", "counter", "Replies that the system would not send."),
        Family("aioecho_datagram_handlers_active", "gauge", "Handlers of datagrams, or sessions, that run."),
        Family("aioecho_datagram_handlers", "counter", "Handlers of datagrams, or sessions, that began."),
        Family(
            "aioecho_datagram_handlers_ended", "counter", "Handlers of datagrams, or sessions, that have ended.",
            ("outcome", "reason"),
        ),
        Family("aioecho_draining", "gauge", "1 while the server stops."),
        Family("aioecho_paused", "gauge", "1 while the server accepts no clients, by pause()."),
        Family("aioecho_workers", "gauge", "Worker processes that accept."),
        Family("aioecho_worker_starts", "counter", "Worker processes started.", ("cause",)),
    )
}  # fmt: skip
"""All families by name, in the order of the text."""

LEAST = {family.name for family in FAMILIES.values() if family.is_least}


class Histogram:
    """Counts of seconds in buckets, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def note(self, seconds: float) -> None:
        """Count a time."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds


class Metrics:
    """The metrics of a server as they stood when :meth:`aioecho.BaseServer.metrics` was called.

    `values` has the numbers: for each family, by the values of its labels. :meth:`text` is what Prometheus reads.
    """

    def __init__(self, values: Values | None = None) -> None:
        self.values: Values = {} if values is None else values

    def add(self, family: str, value: float, *labels: str) -> None:
        """Add to one value; labels in the order of the family's."""
        self._add(family, SEPARATOR.join(map(_printable, labels)), value)

    def _add(self, family: str, key: str, value: float) -> None:
        values = self.values.setdefault(family, {})
        known = values.get(key)
        values[key] = value if known is None else min(known, value) if family in LEAST else known + value

    def add_histogram(self, family: str, histogram: Histogram) -> None:
        """Add what a histogram has counted."""
        for index, count in enumerate(histogram.counts):
            self.add(family, count, str(index))
        self.add(family, histogram.sum, "sum")

    def add_values(self, values: Values, *, only_counted: bool = False) -> None:
        """Add other values to these; with `only_counted` no gauges, which mean nothing once their process has ended."""
        for name, by_labels in values.items():
            if name not in FAMILIES or (only_counted and FAMILIES[name].kind in ("gauge", "info")):
                continue
            self.values.setdefault(name, {})
            for key, value in by_labels.items():
                self._add(name, key, value)

    def get(self, family: str, *labels: str) -> float:
        """Return one value, 0 if nothing was counted. Of a histogram's family it is how many times were counted."""
        values = self.values.get(family, {})
        if family in FAMILIES and FAMILIES[family].kind == "histogram":
            return sum(value for key, value in values.items() if not key.endswith("sum"))
        return values.get(SEPARATOR.join(map(_printable, labels)), 0)

    def text(self, *, openmetrics: bool = False) -> str:
        """Return Prometheus' text format (:data:`TEXT`), or OpenMetrics' (:data:`OPENMETRICS`)."""
        return format_metrics([("", self)], openmetrics=openmetrics)


def format_metrics(parts: Iterable[tuple[str, Metrics]], *, openmetrics: bool = False) -> str:
    """Return the text of the metrics of several processes: the number of the slot, for the label ``worker``, and the metrics.

    An empty number gives no label.
    """
    given = list(parts)
    lines: list[str] = []
    for family in FAMILIES.values():
        if not any(family.name in metrics.values for _, metrics in given):
            continue
        # OpenMetrics names the family, and the older format the samples.
        name = family.name if openmetrics else family.name + SUFFIXES.get(family.kind, "")
        kind = "gauge" if family.kind == "info" and not openmetrics else family.kind
        lines.append(f"# HELP {name} {family.help}")
        lines.append(f"# TYPE {name} {kind}")
        if openmetrics and family.unit:
            lines.append(f"# UNIT {name} {family.unit}")
        for worker, metrics in given:
            values = metrics.values.get(family.name)
            if values is not None:
                fixed = [("worker", worker)] if worker else []
                lines += _histogram(family, values, fixed) if family.bounds else _plain(family, values, fixed)
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


SUFFIXES = {"counter": "_total", "info": "_info"}


def _plain(family: Family, values: Mapping[str, float], fixed: list[tuple[str, str]]) -> Iterator[str]:
    name = family.name + SUFFIXES.get(family.kind, "")
    for key, value in values.items():
        labels = zip(family.labels, key.split(SEPARATOR), strict=False)
        yield f"{name}{_labels([*fixed, *labels])} {value!r}"


def _histogram(family: Family, values: Mapping[str, float], fixed: list[tuple[str, str]]) -> Iterator[str]:
    count = 0.0
    for index, bound in enumerate((*family.bounds, float("inf"))):
        count += values.get(str(index), 0)
        upper = "+Inf" if index == len(family.bounds) else repr(bound)
        yield f"{family.name}_bucket{_labels([*fixed, ('le', upper)])} {int(count)}"
    yield f"{family.name}_sum{_labels(fixed)} {float(values.get('sum', 0))!r}"
    yield f"{family.name}_count{_labels(fixed)} {int(count)}"


def _labels(labels: Sequence[tuple[str, str]]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _printable(value: str) -> str:
    """Return a text that can be sent as UTF-8, and has no control characters."""
    if value.isprintable():
        return value
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in value)
