"""What is asked: the scenarios, what varies along their axes, and how their loads are named in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["SCENARIOS", "Scenario", "name_cells"]


@dataclass(frozen=True)
class Scenario:
    """One question; `axis` names what varies along its cells, `measure` is the figure that heads its ratios.

    `cell`: how its cells are named in a sentence, where `{}` is the load, or several. `unit`: what is counted. `loads`:
    where cells differ in more than a number, what the load is, by its `x`.
    """

    name: str
    title: str
    cell: str
    question: str
    axis: str
    measure: str = "rate"  # "rate", "cpu", "memory" or "time"
    datagrams: bool = False
    unit: str = "message"
    loads: Mapping[int, str] = field(default_factory=dict)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "clients",
            "As fast as it goes",
            "as fast as it goes, {} client{s}",
            "Closed loop, 64-byte messages: each client sends as soon as its reply has come. How many a second?",
            "clients",
        ),
        Scenario(
            "rate",
            "At a fixed rate",
            "fixed rate at {} % of capacity",
            "Open loop, 100 clients, 64-byte messages: what does the same work cost, and how late are the replies?",
            "percent of capacity",
            "cpu",
        ),
        Scenario(
            "many",
            "At a fixed rate, many clients",
            "fixed rate, {} clients",
            "Open loop at half of capacity: what do clients cost when each says little?",
            "clients",
            "cpu",
        ),
        Scenario(
            "slow",
            "A slow handler",
            "slow handler, {} clients",
            "Closed loop, each request waits 100 ms: the case people reach for threads.",
            "clients",
        ),
        Scenario(
            "churn",
            "A connection per message",
            "a connection per message, {} at a time",
            "Closed loop, 16 at a time: how many clients can be taken in, served and let go?",
            "clients at a time",
        ),
        Scenario(
            "arrivals",
            "A connection per message, at a fixed rate",
            "a connection per message at {} % of capacity",
            "Open loop at this share of capacity: what does it cost to take a client in and let it go?",
            "percent of capacity",
            "cpu",
        ),
        Scenario(
            "sizes",
            "By message size",
            "messages of {} bytes at a fixed rate",
            "Open loop at half of capacity, 10 clients.",
            "bytes per message",
            "cpu",
        ),
        Scenario(
            "lines",
            "Lines, as fast as it goes",
            "lines as fast as it goes, {} in flight",
            "Closed loop, 100 clients, 64-byte lines: how many can be read one by one?",
            "lines in flight on each connection",
        ),
        Scenario(
            "lines-rate",
            "Lines, at a fixed rate",
            "lines at {} % of capacity",
            "Open loop, 100 clients, 64-byte lines: what does one cost?",
            "percent of capacity",
            "cpu",
        ),
        Scenario(
            "records",
            "Records",
            "records, {}",
            "One client sends records in large pieces: so many at once and then waits for as many replies, or all one way, "
            "and the server counts them. What does one record cost the server?",
            "load",
            "cpu",
            unit="record",
            loads={
                1: "64-byte lines, 16 in flight",
                2: "64-byte lines, 256 in flight",
                3: "100-byte lines, one way",
                4: "64-byte frames, 256 in flight",
            },
        ),
        Scenario(
            "server-first",
            "Connections that the server ends",
            "connections that the server ends, {} at a time",
            "So many clients come at once, again and again at a fixed pace. The handler reads one request, replies and "
            "returns, as the tutorials' own does. What does one connection cost?",
            "clients at a time",
            "cpu",
            unit="connection",
        ),
        Scenario(
            "client-first",
            "Connections that the client ends",
            "connections that the client ends, {} at a time",
            "So many clients come at once, again and again at a fixed pace. The handler echoes, and the client closes "
            "when it has its reply. What does one connection cost?",
            "clients at a time",
            "cpu",
            unit="connection",
        ),
        Scenario(
            "broadcast",
            "A broadcast",
            "a broadcast to {} receivers",
            "One client says 64 bytes, 50 times a second, and the server writes them to all receivers, waiting for none. "
            "What does one receiver cost?",
            "receivers",
            "cpu",
            unit="receiver",
        ),
        Scenario(
            "tls",
            "TLS, at a fixed rate",
            "TLS at a fixed rate, {} client{s}",
            "Open loop at half of capacity, 64-byte messages.",
            "clients",
            "cpu",
        ),
        Scenario(
            "tls-16k",
            "TLS, 16 KiB messages, at a fixed rate",
            "TLS, 16 KiB messages, {} client{s}",
            "Open loop at half of capacity, messages of 16 KiB.",
            "clients",
            "cpu",
        ),
        Scenario(
            "udp",
            "Datagrams, as fast as it goes",
            "datagrams as fast as it goes, {} client{s}",
            "UDP, closed loop, 64 bytes: how many datagrams a second are answered?",
            "clients",
            datagrams=True,
        ),
        Scenario(
            "udp-rate",
            "Datagrams, at a fixed rate",
            "datagrams at {} % of capacity",
            "UDP, open loop, 100 clients, 64 bytes: what does one cost?",
            "percent of capacity",
            "cpu",
            datagrams=True,
        ),
        Scenario(
            "example",
            "The example of the tutorials",
            "the tutorials' example, {} clients at once",
            "So many clients come within 0.6 s. A handler receives a line, makes it upper case, sleeps 2 s and sends it. "
            "How long until all are served?",
            "clients",
            "time",
        ),
        Scenario(
            "idle",
            "Idle clients",
            "{} idle connections",
            "What does a client cost that says nothing?",
            "connections",
            "memory",
        ),
    )
}


def name_cells(scenario: Scenario, xs: Sequence[int]) -> str:
    """Name one or more of a scenario's cells in a few words, as in `slow handler, 100 and 1,000 clients`."""
    loads = [scenario.loads.get(x) or f"{x:,}" for x in xs]
    if len(loads) > 1:
        last = loads.pop()
        loads = ["; ".join([*loads, last]) if scenario.loads else f"{', '.join(loads)} and {last}"]
    return scenario.cell.format(loads[0], s="" if tuple(xs) == (1,) else "s")
