"""The servers that are compared, as data: how to start each, what it can take, how it looks in a picture."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata

__all__ = [
    "BASELINE",
    "CANDIDATE",
    "CANDIDATES",
    "RIVALS",
    "SERVERS",
    "STANDS_IN",
    "Server",
    "by_name",
    "find_missing",
    "get_version",
]

BASELINE = "threading"  # what every ratio is against
CANDIDATE = "aioecho"  # the pictures and the summary show its ratios
# What the candidate is compared with, in words and in a table. The bare protocol of records splits whole chunks.
RIVALS = (BASELINE, "forking", "streams", "protocol")
STANDS_IN = {"batch": "protocol"}
# The sentences are about these.
CANDIDATES = (
    CANDIDATE,
    "aioecho-batches",
    "aioecho-readexactly",
    "aioecho-workers",
    "aioecho-blocking",
    "aioecho-blocking-10",
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """One server: `module` under `benchmarks.servers` with `arguments`, and the module that it needs (`requires`).

    `datagram_label`: what it is called where it serves UDP, empty where it can't. `example`: it has the example of the
    scenario of that name, and `broadcast` likewise. `only_records`: it does nothing but the scenario `records`.
    `max_clients`: how many connections it serves at a time; more would wait for ever. `threads`: its threads or
    processes come and go, so what ended ones used counts too.
    `why_limited` explains `max_clients` to readers of the report.
    """

    name: str
    label: str
    module: str
    arguments: tuple[str, ...] = ()
    requires: str = ""
    peer: bool = False
    max_clients: int = 1_000_000
    why_limited: str = ""
    lines: bool = True
    tls: bool = False
    datagram_label: str = ""
    example: bool = False
    broadcast: bool = False
    only_records: bool = False
    threads: bool = False
    colour: str = "#777777"
    marker: str = "o"
    dash: str = "-"


SERVERS = (
    Server(
        name="aioecho",
        label="aioecho (uvloop)",
        module="aioecho_handlers",
        requires="aioecho",
        tls=True,
        datagram_label="aioecho (uvloop)",
        example=True,
        broadcast=True,
        colour="#0072b2",
    ),
    Server(
        name="aioecho-asyncio",
        label="aioecho (asyncio's loop)",
        module="aioecho_handlers",
        arguments=("--loop", "asyncio"),
        requires="aioecho",
        tls=True,
        broadcast=True,
        colour="#56b4e9",
        marker="s",
        dash="--",
    ),
    Server(
        name="aioecho-workers",
        label="aioecho (2 workers)",
        module="aioecho_handlers",
        arguments=("--workers", "2"),
        requires="aioecho.workers.supervisor",
        colour="#0072b2",
        marker="h",
        dash="-.",
    ),
    Server(
        name="aioecho-blocking",
        label="aioecho (blocking handler)",
        module="aioecho_blocking",
        requires="aioecho.blocking.streams",
        example=True,
        threads=True,
        colour="#0072b2",
        marker="*",
        dash=":",
    ),
    Server(
        name="aioecho-blocking-10",
        label="aioecho (blocking handler, 10 threads)",
        module="aioecho_blocking",
        arguments=("--threads", "10"),
        requires="aioecho.blocking.streams",
        example=True,
        threads=True,
        colour="#0072b2",
        marker="p",
        dash=":",
    ),
    Server(
        name="aioecho-batches",
        label="aioecho (batches, uvloop)",
        module="aioecho_handlers",
        arguments=("--reads", "batches"),
        requires="aioecho.framing",
        only_records=True,
        colour="#0072b2",
        marker="<",
    ),
    Server(
        name="aioecho-batches-asyncio",
        label="aioecho (batches, asyncio's loop)",
        module="aioecho_handlers",
        arguments=("--reads", "batches", "--loop", "asyncio"),
        requires="aioecho.framing",
        only_records=True,
        colour="#56b4e9",
        marker="<",
    ),
    Server(
        name="aioecho-readexactly",
        label="aioecho (readexactly, uvloop)",
        module="aioecho_handlers",
        arguments=("--reads", "readexactly"),
        requires="aioecho.framing",
        only_records=True,
        colour="#0072b2",
        marker=">",
    ),
    Server(
        name="aioecho-readexactly-asyncio",
        label="aioecho (readexactly, asyncio's loop)",
        module="aioecho_handlers",
        arguments=("--reads", "readexactly", "--loop", "asyncio"),
        requires="aioecho.framing",
        only_records=True,
        colour="#56b4e9",
        marker=">",
    ),
    Server(
        name="threading",
        label="ThreadingTCPServer",
        module="socketserver_classes",
        arguments=("--server", "ThreadingTCPServer"),
        tls=True,
        datagram_label="ThreadingUDPServer",
        example=True,
        threads=True,
        broadcast=True,
        colour="#d55e00",
        marker="D",
    ),
    Server(
        name="forking",
        label="ForkingTCPServer",
        module="socketserver_classes",
        arguments=("--server", "ForkingTCPServer"),
        tls=True,
        datagram_label="ForkingUDPServer",
        example=True,
        threads=True,
        max_clients=100,
        why_limited="a process for each client",
        colour="#e69f00",
        marker="v",
        dash="--",
    ),
    Server(
        name="tcpserver",
        label="TCPServer",
        module="socketserver_classes",
        arguments=("--server", "TCPServer"),
        max_clients=1,
        why_limited="one client at a time",
        colour="#cc79a7",
        marker="x",
    ),
    Server(
        name="streams",
        label="asyncio streams (uvloop)",
        module="asyncio_streams",
        requires="uvloop",
        tls=True,
        example=True,
        broadcast=True,
        colour="#009e73",
        marker="^",
    ),
    Server(
        name="streams-asyncio",
        label="asyncio streams (asyncio's loop)",
        module="asyncio_streams",
        arguments=("--loop", "asyncio"),
        requires="uvloop",
        tls=True,
        example=True,
        broadcast=True,
        colour="#009e73",
        marker="P",
        dash=":",
    ),
    Server(
        name="protocol",
        label="bare Protocol (uvloop)",
        module="asyncio_protocol",
        requires="uvloop",
        tls=True,
        datagram_label="bare DatagramProtocol (uvloop)",
        example=True,
        broadcast=True,
        colour="#222222",
        marker=".",
        dash=":",
    ),
    Server(
        name="batch",
        label="batch Protocol (uvloop)",
        module="asyncio_batch",
        requires="uvloop",
        only_records=True,
        colour="#222222",
        marker="+",
    ),
    Server(name="trio", label="trio", module="trio_streams", requires="trio", peer=True, lines=False),
    Server(name="anyio", label="AnyIO (uvloop)", module="anyio_streams", requires="anyio", peer=True),
    Server(name="gevent", label="gevent", module="gevent_server", requires="gevent", peer=True),
    Server(name="twisted", label="Twisted", module="twisted_protocol", requires="twisted", peer=True),
    Server(name="tornado", label="Tornado", module="tornado_server", requires="tornado", peer=True),
    Server(
        name="easynetwork", label="EasyNetwork (uvloop)", module="easynetwork_server", requires="easynetwork", peer=True
    ),
)


def by_name(name: str) -> Server:
    """Find a server.

    Raises:
        KeyError: there is none of that name (caller).
    """
    for server in SERVERS:
        if server.name == name:
            return server
    raise KeyError(name)


def find_missing(server: Server) -> str:
    """Name the module that the server needs and this interpreter lacks; empty where nothing is missing."""
    try:
        found = not server.requires or importlib.util.find_spec(server.requires) is not None
    except ModuleNotFoundError:  # not even its package
        found = False
    return "" if found else server.requires


def get_version(distribution: str) -> str | None:
    """Tell the installed version of a distribution, None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
