"""The shell command `doctor`: whether the kernel's limits are enough for a number of connections, and what mends them."""

import contextlib
import dataclasses
import math
import resource
from collections.abc import Iterator
from pathlib import Path

import click

from aioecho.config import Limits
from aioecho.workers.processors import count_processors

__all__ = ["Finding", "doctor_command", "examine"]

ROOT = Path("/")

# Descriptors of a worker besides its connections; and by how much a worker may have more connections than its share.
OTHER_DESCRIPTORS, UNEVEN = 64, 1 / 16

# Files of the other programs of a machine.
OTHER_FILES = 10_000

# Clients that may come at once, before the first of them is accepted.
BURST = 4096

# Bytes of an idle connection, of process and kernel, rounded up: 3.6 to 6 KiB and 5.2 KiB were measured. And of a worker.
CONNECTION_BYTES, WORKER_BYTES = 12 * 1024, 40 * 2**20

# Bytes that the kernel should queue for a socket of datagrams.
DATAGRAM_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `is_note`: it matters in some cases only, and so is no failure."""

    name: str
    needed: int
    found: int
    remedy: str
    is_note: bool = False

    @property
    def is_enough(self) -> bool:
        """Whether there is as much as is needed."""
        return self.found >= self.needed


@click.command("doctor", short_help="Check what the kernel needs for many connections.")
@click.option("--connections", type=click.IntRange(1), default=10_000, show_default=True, help="To be held at once.")
@click.option("--workers", type=click.IntRange(1), help="Worker processes; by default one for every processor.")
@click.option("--udp", is_flag=True, help="Also check the buffers for datagrams.")
def doctor_command(connections: int, workers: int | None, udp: bool) -> None:
    """Check the limits of this shell and of the kernel, and print the command that raises each limit that is too low.

    \b
        python -m aioecho doctor --connections 250000 --workers 14

    Nothing is changed. A limit that matters in some cases only is a "note". The exit status is 0 if all limits are high
    enough but for notes, 1 if not.
    """
    workers = workers or count_processors()
    findings = list(examine(connections, workers, udp=udp, root=ROOT, files=resource.getrlimit(resource.RLIMIT_NOFILE)))
    click.echo(f"{connections:,} connections over {workers:,} worker{'s' * (workers > 1)}")
    for finding in findings:
        status = "ok" if finding.is_enough else "note" if finding.is_note else "too low"
        click.echo(f"{status:7}  {finding.name:33}  {finding.found:>15,} of {finding.needed:,}")
        if not finding.is_enough:
            for line in finding.remedy.splitlines():
                click.echo(f"         {line}")
    if any(not finding.is_enough and not finding.is_note for finding in findings):
        raise SystemExit(1)


def examine(connections: int, workers: int, *, udp: bool, root: Path, files: tuple[int, int]) -> Iterator[Finding]:
    """Yield what was looked at, for so many connections over all workers.

    Args:
        connections, workers: how many are wanted.
        udp: look at the buffers for datagrams too.
        root: the folder with ``proc``. What is not there is not looked at: this is no Linux, or the module is not loaded.
        files: the soft and the hard limit of the descriptors of a process.
    """
    sysctl = _Sysctl(root / "proc/sys")
    share = math.ceil(connections / workers)
    descriptors = math.ceil(share * (1 + UNEVEN)) + OTHER_DESCRIPTORS
    soft, hard = (2**63 - 1 if limit == resource.RLIM_INFINITY else limit for limit in files)
    enough = math.ceil(connections / max(1, (hard - OTHER_DESCRIPTORS) / (1 + UNEVEN)))
    yield Finding("descriptors of a worker", descriptors, soft, f"ulimit -n {descriptors}")
    yield Finding(
        "descriptors of a worker, at most",
        descriptors,
        hard,
        f"prlimit --pid $$ --nofile={descriptors}   # as root\n"
        f"LimitNOFILE={descriptors}   # in the systemd unit\n"
        f"--workers {enough + 1}   # or so many workers",
    )
    yield from sysctl.look("fs.nr_open", descriptors)
    yield from sysctl.look("fs.file-max", connections + OTHER_FILES)
    backlog = max(min(Limits().backlog, BURST), min(connections, BURST))
    yield from sysctl.look("net.core.somaxconn", backlog)
    yield from sysctl.look("net.ipv4.tcp_max_syn_backlog", backlog)
    yield from sysctl.look("net.netfilter.nf_conntrack_max", connections + connections // 10 + 1000)
    # With 250,000 clients on this machine, keepalive probes that were due at once did not fit into this queue, and connections
    # were lost.
    yield from sysctl.look("net.core.netdev_max_backlog", max(1000, connections // 10), is_note=True)
    yield from _look_at_ports(sysctl, connections)
    yield from _look_at_memory(sysctl, root, connections, workers)
    if udp:
        yield from sysctl.look("net.core.rmem_max", DATAGRAM_BYTES)
        yield from sysctl.look("net.core.wmem_max", DATAGRAM_BYTES)


def _look_at_ports(sysctl: "_Sysctl", connections: int) -> Iterator[Finding]:
    ports = sysctl.read("net.ipv4.ip_local_port_range")
    if len(ports) == 2:
        remedy = (
            "clients of one address: of a balancer, or a load on this machine\n"
            'sysctl -w net.ipv4.ip_local_port_range="1024 65535"'
        )
        yield Finding("ports of one client address", connections, ports[1] - ports[0] + 1, remedy, is_note=True)


def _look_at_memory(sysctl: "_Sysctl", root: Path, connections: int, workers: int) -> Iterator[Finding]:
    pages = sysctl.read("net.ipv4.tcp_mem")
    if len(pages) == 3:
        raised = [max(have, connections * times // 4) for have, times in zip(pages, (3, 4, 6), strict=True)]
        remedy = f'sysctl -w net.ipv4.tcp_mem="{" ".join(map(str, raised))}"'
        yield Finding("net.ipv4.tcp_mem, 2nd, in pages", connections, pages[1], remedy)
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = (root / "proc/meminfo").read_text()
        free = int(text.partition("MemAvailable:")[2].split()[0]) * 1024
        fixed = workers * WORKER_BYTES
        fit = max(0, (free - fixed) // CONNECTION_BYTES)
        yield Finding(
            "memory, MiB",
            (connections * CONNECTION_BYTES + fixed) // 2**20,
            free // 2**20,
            f"there is memory for {fit:,} connections: end other programs, or add memory",
        )


class _Sysctl:
    """Reads the kernel's parameters, by their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> list[int]:
        """Return the numbers of a parameter; none if there is no such parameter."""
        try:
            return [int(word) for word in (self._folder / name.replace(".", "/")).read_text().split()]
        except (OSError, ValueError):
            return []

    def look(self, name: str, needed: int, *, is_note: bool = False) -> Iterator[Finding]:
        """Yield whether a parameter of one number is high enough, if there is that parameter."""
        found = self.read(name)
        if len(found) == 1:
            yield Finding(name, needed, found[0], f"sysctl -w {name}={needed}", is_note)
