"""What is measured: the cells that a quick and a full run consist of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .catalog import SERVERS, by_name
from .scenarios import SCENARIOS
from .senders import AT_A_TIME, SENDERS

__all__ = ["PEER_ROUNDS", "Cell", "Plan", "make_plan"]

PEER_ROUNDS = 3
"""The most turns that a peer takes at a cell."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One load on several servers, which take turns. `x` is where it stands on its scenario's axis.

    `pinned`: server and generator each keep to a processor of their own; otherwise the server may use all of them.
    `fraction`: open loop at this share of what the slowest of the servers carries in closed loop, or of what the
    generator can send at fixed times if that is less. `sender`: a client of `senders` loads it, with `depth` in flight, and
    not the load generator. `rounds`: how many turns every server takes at most; fewer where turns hardly differ.
    """

    scenario: str
    x: int
    servers: tuple[str, ...]
    pinned: bool = True
    clients: int = 100
    size_bytes: int = 64
    depth: int = 1
    lines: bool = False
    delay_s: float = 0.0
    churn: bool = False
    tls: bool = False
    fraction: float | None = None
    idle: bool = False
    example: bool = False
    sender: str = ""
    broadcast: bool = False
    rounds: int = 1_000

    @property
    def datagrams(self) -> bool:
        """Whether it is about datagrams."""
        return SCENARIOS[self.scenario].datagrams

    @property
    def mode(self) -> str:
        """What the servers must do, as their `--mode` says."""
        if self.sender:
            return SENDERS[self.sender].mode
        if self.broadcast:
            return "broadcast"
        return "example" if self.example else "udp" if self.datagrams else "lines" if self.lines else "echo"

    @property
    def key(self) -> str:
        """Identify the cell in the data."""
        return f"{'pinned' if self.pinned else 'free'}/{self.scenario}/{self.x}"

    @property
    def launch(self) -> tuple[object, ...]:
        """What the servers must be started with; cells alike in it share the processes. Idle ones need fresh ones."""
        return (self.pinned, self.mode, self.delay_s, self.tls, self.key if self.idle or self.example else "")


@dataclass(frozen=True)
class Plan:
    """A run: its cells in order, how often each is repeated, and for how long a load is measured, in seconds."""

    name: str
    cells: tuple[Cell, ...]
    repeats: int
    duration_s: float
    warmup_s: float

    def count_rounds(self, cell: Cell, server: str) -> int:
        """Count the turns that a server takes at a cell. Peers take few: nothing is claimed of them to the percent."""
        return min(self.repeats, cell.rounds, PEER_ROUNDS if by_name(server).peer else self.repeats)

    def count_turns(self) -> int:
        """Count the turns of all servers at all cells."""
        return sum(self.count_rounds(cell, server) for cell in self.cells for server in cell.servers)

    @property
    def sending_s(self) -> float:
        """How long a sender's load is measured, in seconds: less, for it counts hundreds of thousands of records."""
        return self.duration_s / 2

    @property
    def total_s(self) -> float:
        """Estimate how long all of it takes, in seconds."""
        turns = sum(
            self.count_rounds(cell, server) * self.cost_s(cell, server)
            for cell in self.cells
            for server in cell.servers
        )
        # Before turns at a share of capacity each server takes one that finds the capacity; and processes have to start.
        found = {
            (c.launch, c.servers, c.clients, c.size_bytes, c.churn): c for c in self.cells if c.fraction is not None
        }
        calibration = sum(self.cost_s(cell, server) for cell in found.values() for server in cell.servers)
        return turns + calibration + 1.5 * len({cell.launch for cell in self.cells})

    def cost_s(self, cell: Cell, server: str) -> float:
        """Estimate how long one server's one turn at a cell takes, in seconds."""
        if cell.idle:
            return 1.0 + cell.clients / 2500
        if cell.example:
            return 0.3 + cell.clients / 4000 + cell.delay_s * (5 if server == "aioecho-blocking-10" else 1)
        if cell.broadcast:
            return self.duration_s + self.warmup_s + 0.3 + cell.clients / 5000
        if cell.sender:
            return self.sending_s + self.warmup_s + 0.15
        return self.duration_s + self.warmup_s + 0.1 + cell.clients / 5000 + 7 * cell.delay_s


_SPECIAL = ("aioecho-workers", "aioecho-blocking", "aioecho-blocking-10")  # asked only where they have something to say
_CORE = tuple(
    server.name for server in SERVERS if not (server.peer or server.only_records) and server.name not in _SPECIAL
)
_PEERS = tuple(server.name for server in SERVERS if server.peer)
_ALL = ("aioecho", "aioecho-blocking", *_CORE[1:], *_PEERS)
_FEW = ("aioecho", "threading", "forking", "streams", "protocol")
_MAIN = ("aioecho", "aioecho-asyncio", "threading", "forking", "streams", "streams-asyncio", "protocol")
# A process for every connection carries so few of them that half of it would be no load for the others. It is compared at
# `churn`, `server-first` and `client-first`.
_ARRIVING = tuple(name for name in _MAIN if name != "forking")
_WAITING = ("aioecho", "aioecho-blocking", "threading", "forking", "streams", "protocol")
_EXAMPLE = ("aioecho", "aioecho-blocking", "aioecho-blocking-10", "threading", "forking", "streams", "protocol")
_WORKERS = ("aioecho", "aioecho-workers", "threading", "forking", "streams", "protocol")
_RECORDS = ("aioecho", "aioecho-asyncio", "threading", "forking", "streams", "streams-asyncio", "batch")
_CONNECTIONS = _MAIN
_BROADCAST = _ARRIVING  # processes share no list of clients
_UDP = ("aioecho", "threading", "forking", "protocol")
_UDP_RATE = ("aioecho", "threading", "protocol")  # as for _ARRIVING
_STEADY = 3  # rounds, where turns hardly differ: waits of a given time, and memory


def make_plan(name: str, scenarios: Iterable[str] = (), servers: Iterable[str] = ()) -> Plan:
    """Make the plan `quick` or `full`, narrowed to some scenarios or servers where any are named."""
    cells = _quick_cells() if name == "quick" else _full_cells()
    wanted, chosen = set(scenarios) or set(SCENARIOS), set(servers) or {server.name for server in SERVERS}
    limits = {server.name: server for server in SERVERS}
    kept = []
    for cell in cells:
        able = tuple(
            server
            for server in cell.servers
            if server in chosen
            and (cell.churn or cell.clients <= limits[server].max_clients)
            and (limits[server].lines or not cell.lines)
            and (limits[server].tls or not cell.tls)
            and (limits[server].datagram_label or not cell.datagrams)
            and (limits[server].example or not cell.example)
            and (limits[server].broadcast or not cell.broadcast)
            and (cell.scenario == "records" or not limits[server].only_records)
        )
        if cell.scenario in wanted and able:
            kept.append(Cell(**{**cell.__dict__, "servers": able}))
    # Cells that share processes come one after another, in the order in which their first one was named.
    order = {cell.launch: i for i, cell in reversed(list(enumerate(kept)))}
    kept.sort(key=lambda cell: order[cell.launch])
    return Plan(name, tuple(kept), 5, *((0.3, 0.1) if name == "quick" else (0.8, 0.25)))


def _records(number: int, servers: tuple[str, ...]) -> Cell:
    """Make a cell of the scenario `records` by its number among the scenario's loads."""
    sender, depth, size = {
        1: ("lines", 16, 64),
        2: ("lines", 256, 64),
        3: ("one-way", 0, 100),
        4: ("frames", 256, 64),
    }[number]
    return Cell(scenario="records", x=number, clients=1, sender=sender, depth=depth, size_bytes=size, servers=servers)


def _connections(scenario: str, servers: tuple[str, ...]) -> Cell:
    return Cell(scenario=scenario, x=AT_A_TIME, clients=AT_A_TIME, depth=AT_A_TIME, sender=scenario, servers=servers)


def _broadcast(servers: tuple[str, ...]) -> Cell:
    return Cell(scenario="broadcast", x=1000, clients=1000, broadcast=True, servers=servers)


def _quick_cells() -> list[Cell]:
    few = ("aioecho", "threading", "streams", "protocol")
    return [
        *(Cell(scenario="clients", x=n, clients=n, servers=_FEW if n == 100 else few) for n in (1, 100, 1000)),
        Cell(scenario="rate", x=50, fraction=0.5, servers=few),
        Cell(scenario="arrivals", x=50, fraction=0.5, clients=50, churn=True, servers=few),
        Cell(scenario="sizes", x=65_536, fraction=0.5, clients=10, size_bytes=65_536, servers=few[:3]),
        _records(2, ("aioecho", "threading", "streams", "batch")),
        _records(3, ("aioecho-batches", "aioecho", "threading", "batch")),
        _connections("server-first", few),
        _broadcast(few),
        Cell(scenario="tls", x=1, clients=1, tls=True, fraction=0.5, servers=("aioecho", "threading")),
        *(
            Cell(scenario="slow", x=n, clients=n, delay_s=0.1, rounds=_STEADY, servers=("aioecho", "threading"))
            for n in (100, 1000)
        ),
        Cell(scenario="udp-rate", x=50, fraction=0.5, servers=_UDP_RATE),
        Cell(scenario="idle", x=1000, clients=1000, idle=True, rounds=_STEADY, servers=("aioecho", "threading")),
        Cell(
            scenario="clients",
            x=100,
            clients=100,
            pinned=False,
            servers=("aioecho", "aioecho-workers", "threading", "streams"),
        ),
    ]


def _full_cells() -> list[Cell]:
    return [
        *(
            Cell(scenario="clients", x=n, clients=n, servers=_ALL if n == 100 else _CORE)
            for n in (1, 10, 100, 1000, 5000)
        ),
        *(Cell(scenario="rate", x=percent, fraction=percent / 100, servers=_MAIN) for percent in (25, 50, 75)),
        *(Cell(scenario="many", x=n, clients=n, fraction=0.5, servers=_FEW) for n in (1000, 5000)),
        Cell(scenario="churn", x=16, clients=16, churn=True, servers=_CORE + _PEERS),
        Cell(scenario="arrivals", x=50, fraction=0.5, clients=50, churn=True, servers=_ARRIVING),
        *(
            Cell(scenario="sizes", x=size, fraction=0.5, clients=10, size_bytes=size, servers=_FEW)
            for size in (64, 16_384, 131_072, 1_048_576)
        ),
        Cell(scenario="lines", x=16, depth=16, lines=True, servers=(*_MAIN, *_PEERS)),
        Cell(scenario="lines-rate", x=50, fraction=0.5, lines=True, servers=_MAIN),
        *(
            Cell(scenario="slow", x=n, clients=n, delay_s=0.1, rounds=_STEADY if n <= 1000 else 5, servers=_WAITING)
            for n in (10, 100, 1000, 5000)
        ),
        *(Cell(scenario="udp", x=n, clients=n, servers=_UDP) for n in (1, 10, 100)),
        Cell(scenario="udp-rate", x=50, fraction=0.5, servers=_UDP_RATE),
        *(
            Cell(scenario="example", x=n, clients=n, delay_s=2.0, example=True, rounds=_STEADY, servers=servers)
            for n, servers in ((50, _EXAMPLE), (5000, _WAITING))
        ),
        *(_records(number, _RECORDS) for number in (1, 2)),
        _records(3, ("aioecho-batches", "aioecho-batches-asyncio", *_RECORDS)),
        _records(4, ("aioecho-readexactly", "aioecho-readexactly-asyncio", *_RECORDS)),
        *(_connections(scenario, _CONNECTIONS) for scenario in ("server-first", "client-first")),
        _broadcast(_BROADCAST),
        *(
            Cell(scenario=scenario, x=n, clients=n, size_bytes=size, tls=True, fraction=0.5, servers=_MAIN)
            for scenario, size in (("tls", 64), ("tls-16k", 16_384))
            for n in (1, 64)
        ),
        *(
            Cell(
                scenario="idle",
                x=n,
                clients=n,
                idle=True,
                rounds=_STEADY,
                servers=_MAIN + _PEERS if n == 1000 else _MAIN,
            )
            for n in (100, 1000, 5000)
        ),
        *(Cell(scenario="clients", x=n, clients=n, pinned=False, servers=_WORKERS) for n in (1, 100, 1000)),
        Cell(scenario="churn", x=16, clients=16, churn=True, pinned=False, servers=_WORKERS),
        Cell(scenario="rate", x=50, fraction=0.5, pinned=False, servers=_FEW),
        Cell(scenario="arrivals", x=50, fraction=0.5, clients=50, churn=True, pinned=False, servers=_ARRIVING),
        Cell(scenario="slow", x=1000, clients=1000, delay_s=0.1, pinned=False, servers=_WAITING),
    ]
