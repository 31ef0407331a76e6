"""The shell command `doctor`: whether the kernel's limits are enough for a number of connections, and what mends them."""

import contextlib
import dataclasses
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import click

from aioecho.config import Limits
from aioecho.workers.control_groups import memory_left
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

# What the kernel says for no limit is close to 2**63, and different from case to case.
UNLIMITED = 2**62

# Bytes that the kernel should queue for a socket of datagrams.
DATAGRAM_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `is_note`: it matters in some cases only, and so is no failure.

    `found` is None if it could not be read, and `remedy` says why then.
    """

    name: str
    needed: int
    found: int | None
    remedy: str
    is_note: bool = False

    @property
    def is_enough(self) -> bool:
        """Whether there is as much as is needed. False if that is unknown."""
        return self.found is not None and self.found >= self.needed

    @property
    def status(self) -> str:
        """In a word or two."""
        return "unknown" if self.found is None else "ok" if self.is_enough else "note" if self.is_note else "too low"


@click.command("doctor", short_help="Check what the kernel needs for many connections.")
@click.option("--connections", type=click.IntRange(1), default=10_000, show_default=True, help="To be held at once.")
@click.option("--workers", type=click.IntRange(1), help="Worker processes; by default one for every processor.")
@click.option("--udp", is_flag=True, help="Also check the buffers for datagrams.")
def doctor_command(connections: int, workers: int | None, udp: bool) -> None:
    """Check the limits of this shell and of the kernel, and print the command that raises each limit that is too low.

    \b
        python -m aioecho doctor --connections 250000 --workers 14

    Nothing is changed. A limit that matters in some cases only is a "note", and one that can't be read is "unknown". The
    exit status is 1 if a limit is "too low", else 0.
    """
    workers = workers or count_processors()
    findings = list(examine(connections, workers, udp=udp, root=ROOT, files=resource.getrlimit(resource.RLIMIT_NOFILE)))
    click.echo(f"{connections:,} connections over {workers:,} worker{'s' * (workers > 1)}")
    for finding in findings:
        found = "?" if finding.found is None else "unlimited" if finding.found >= UNLIMITED else f"{finding.found:,}"
        click.echo(f"{finding.status:7}  {finding.name:33}  {found:>15} of {finding.needed:,}")
        if not finding.is_enough:
            for line in finding.remedy.splitlines():
                click.echo(f"         {line}")
    if not (ROOT / "proc/sys").exists():
        click.echo("there is no /proc/sys: nothing of the kernel was looked at")
    if any(not finding.is_enough and "sysctl -w" in finding.remedy for finding in findings):
        click.echo(_how_to_set(ROOT))
    if any(finding.status == "too low" for finding in findings):
        raise SystemExit(1)


def examine(connections: int, workers: int, *, udp: bool, root: Path, files: tuple[int, int]) -> Iterator[Finding]:
    """Yield what was looked at, for so many connections over all workers.

    Args:
        connections, workers: how many are wanted.
        udp: look at the buffers for datagrams too.
        root: the folder with ``proc``. What is not there is not looked at if this is no Linux, or the module is not loaded.
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
    remedy = (
        "clients of one address: of a balancer, or a load on this machine\n"
        'sysctl -w net.ipv4.ip_local_port_range="1024 65535"'
    )
    for ports, why in sysctl.read("net.ipv4.ip_local_port_range", 2):
        found = ports[1] - ports[0] + 1 if ports else None
        yield Finding("ports of one client address", connections, found, why or remedy, is_note=True)


def _look_at_memory(sysctl: "_Sysctl", root: Path, connections: int, workers: int) -> Iterator[Finding]:
    for pages, why in sysctl.read("net.ipv4.tcp_mem", 3):
        raised = [max(have, connections * times // 4) for have, times in zip(pages, (3, 4, 6), strict=False)]
        remedy = f'sysctl -w net.ipv4.tcp_mem="{" ".join(map(str, raised))}"'
        yield Finding("net.ipv4.tcp_mem, 2nd, in pages", connections, pages[1] if pages else None, why or remedy)
    fixed = workers * WORKER_BYTES
    needed = (connections * CONNECTION_BYTES + fixed) // 2**20
    try:
        text = (root / "proc/meminfo").read_text()
        free = int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except FileNotFoundError:
        return
    except (OSError, ValueError, IndexError) as error:
        yield Finding("memory, MiB", needed, None, _why(error, "/proc/meminfo has no MemAvailable"))
        return
    allowed = memory_left(root)
    mend = "end other programs, or add memory" if free <= allowed else "raise the limit of this container or unit"
    free = int(min(free, allowed))
    fit = max(0, (free - fixed) // CONNECTION_BYTES)
    yield Finding("memory, MiB", needed, free // 2**20, f"there is memory for {fit:,} connections: {mend}")


def _why(error: Exception, odd: str) -> str:
    """Say why something could not be read: the system's error, or that what was read is `odd`."""
    return f"it can't be read: {error.strerror}" if isinstance(error, OSError) else odd


def _how_to_set(root: Path) -> str:
    """Say where and how to run the commands for the kernel's parameters."""
    is_read_only = 0
    with contextlib.suppress(OSError):
        is_read_only = os.statvfs(root / "proc/sys").f_flag & os.ST_RDONLY
    if is_read_only:
        return (
            "/proc/sys is read-only here, as in a container: run `sysctl` on the host as\n"
            "root, or start the container with --sysctl NAME=VALUE where that is possible"
        )
    return "`sysctl` needs root, and sets until the next boot; /etc/sysctl.d is for good"


class _Sysctl:
    """Reads the kernel's parameters, by their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, count: int = 1) -> Iterator[tuple[list[int], str]]:
        """Yield the numbers of a parameter that has so many, or none and why they are unknown.

        Yield nothing where the parameter does not matter, as there is no such thing.
        """
        text = ""
        try:
            text = os.fsdecode((self._folder / name.replace(".", "/")).read_bytes())
            numbers = [int(word) for word in text.split()]
            if len(numbers) != count:
                raise ValueError
        except FileNotFoundError:
            # This is no Linux, or the module is not loaded. Else it is of the host's network alone.
            if self._folder.exists() and not name.startswith("net.netfilter."):
                yield [], "it is not to be seen here, as in a container: look on the host"
        except (OSError, ValueError) as error:
            yield [], _why(error, f"it has not {count} number{'s' * (count > 1)}: {text.strip()[:40]!r}")
        else:
            yield numbers, ""

    def look(self, name: str, needed: int, *, is_note: bool = False) -> Iterator[Finding]:
        """Yield whether a parameter of one number is high enough, if there is that parameter."""
        for numbers, why in self.read(name):
            found = numbers[0] if numbers else None
            yield Finding(name, needed, found, why or f"sysctl -w {name}={needed}", is_note)
