"""Taking the measures of a server: its stats, what it measures besides, and what the kernel tells of its sockets."""

import asyncio
from typing import Any

from aioecho.metrics import Metrics
from aioecho.net.kernel import accept_queue
from aioecho.serving.ends import OUTCOMES
from aioecho.serving.measures import Measures
from aioecho.stats import DatagramStats, Stats

__all__ = ["add_accept_queue", "begin_measuring", "measure", "measure_in_turns", "tell_measures"]

# Connections that are looked at in one turn of the loop: about a millisecond.
LOOKS_PER_TURN = 400

# The reasons of datagrams' handlers that no connection has.
OF_DATAGRAMS = {"datagram_handler"}

# A server here is a BaseServer, whose module imports this one. The parts of a service are measured apart, and added up.


def begin_measuring(server: Any) -> None:
    """Measure from now on what is not measured without being asked for."""
    for part in _parts(server):
        if part.measures is None:
            part.measures = Measures()
            if part.event_loop is not None and not part.is_draining:
                part.measures.start(part.event_loop)


def measure(server: Any) -> Metrics:
    """Return what can be measured of a server now, and begin to measure what is not yet."""
    begin_measuring(server)
    for part in _parts(server):
        part.measures.unsent = _look_at(list(part.connections))
    return tell_measures(server)


async def measure_in_turns(server: Any) -> Metrics:
    """Do what measure() does, without holding up the loop for long where connections are many."""
    begin_measuring(server)
    for part in _parts(server):
        connections, unsent = list(part.connections), 0
        for start in range(0, len(connections), LOOKS_PER_TURN):
            unsent += _look_at(connections[start : start + LOOKS_PER_TURN])
            await asyncio.sleep(0)
        part.measures.unsent = unsent
    return tell_measures(server)


def add_accept_queue(metrics: Metrics, name: str, sock: Any) -> None:
    """Add the queue of the socket of an endpoint, where the kernel tells of it."""
    queue = accept_queue(sock)
    if queue is not None:
        metrics.add("aioecho_accept_queue_length", queue[0], name)
        metrics.add("aioecho_accept_queue_limit", queue[1], name)


def _parts(server: Any) -> list[Any]:
    return list(getattr(server, "parts", ())) or [server]


def _look_at(connections: list[Any]) -> int:
    """Count the bytes of connections; return how many are unsent. Handlers of datagrams have none."""
    return sum(connection.look_at_wire() for connection in connections if hasattr(connection, "look_at_wire"))


def tell_measures(server: Any) -> Metrics:
    """Return what is known of a server that is measured, without looking at its connections."""
    metrics = Metrics()
    for part in _parts(server):
        stats = part.stats
        if isinstance(stats, DatagramStats):
            _add_datagrams(metrics, stats)
        else:
            _add_streams(metrics, stats, part.measures)
            metrics.add("aioecho_buffered_bytes", part.admission.memory.held)
        metrics.add_histogram("aioecho_loop_lag_seconds", part.measures.lags)
        if part._renewal is not None and part._renewal.loaded is not None:
            metrics.add("aioecho_tls_certificate_end_timestamp_seconds", part._renewal.loaded.not_after)
        for name, listener in zip(part._names, part._listeners, strict=False):
            add_accept_queue(metrics, name, listener.sock)
    metrics.add("aioecho_draining", int(server.is_draining))
    metrics.add("aioecho_paused", int(server.is_paused))
    return metrics


def _add_streams(metrics: Metrics, stats: Stats, measures: Measures) -> None:
    metrics.add("aioecho_connections_active", stats.active)
    metrics.add("aioecho_connections", stats.accepted)
    for reason, outcome in OUTCOMES.items():
        # All of them, also at 0: Prometheus takes the first value that it sees for the one to count from.
        if outcome == "rejected":
            metrics.add("aioecho_connections_refused", stats.reasons[reason], reason)
        elif reason not in OF_DATAGRAMS:
            metrics.add("aioecho_connections_ended", stats.reasons[reason], outcome, reason)
    metrics.add("aioecho_published_dropped", stats.unpublished)
    metrics.add("aioecho_accept_errors", stats.accept_errors)
    metrics.add_histogram("aioecho_connection_duration_seconds", measures.durations)
    metrics.add_histogram("aioecho_tls_handshake_seconds", measures.handshakes)
    metrics.add("aioecho_tls_handshake_failures", measures.failed_handshakes)
    metrics.add("aioecho_wire_received_bytes", measures.received)
    metrics.add("aioecho_wire_sent_bytes", measures.sent)
    metrics.add("aioecho_unsent_bytes", measures.unsent)


def _add_datagrams(metrics: Metrics, stats: DatagramStats) -> None:
    metrics.add("aioecho_datagrams_received", stats.received)
    metrics.add("aioecho_datagrams_handled", stats.handled)
    metrics.add("aioecho_datagrams_queued", stats.queued)
    for reason, count in stats.drops.items():
        metrics.add("aioecho_datagrams_dropped", count, reason)
    metrics.add("aioecho_datagrams_dropped_by_kernel", stats.kernel_drops)
    metrics.add("aioecho_datagram_receive_errors", stats.receive_errors)
    metrics.add("aioecho_datagram_replies_dropped", stats.send_drops)
    metrics.add("aioecho_datagram_reply_errors", stats.send_errors)
    metrics.add("aioecho_datagram_handlers_active", stats.active)
    metrics.add("aioecho_datagram_handlers", stats.accepted)
    for reason, count in stats.reasons.items():
        metrics.add("aioecho_datagram_handlers_ended", count, OUTCOMES[reason], reason)
