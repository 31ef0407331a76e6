"""What the kernel needs for many connections: whether it has that, and the command that mends it."""

import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import invoke

from aioecho.cli import doctor
from aioecho.cli.doctor import Finding, examine

ENOUGH = {
    "sys/fs/nr_open": "1048576",
    "sys/fs/file-max": "2000000",
    "sys/net/core/somaxconn": "4096",
    "sys/net/core/rmem_max": "8388608",
    "sys/net/core/wmem_max": "8388608",
    "sys/net/core/netdev_max_backlog": "100000",
    "sys/net/ipv4/tcp_max_syn_backlog": "4096",
    "sys/net/ipv4/ip_local_port_range": "1024\t65535",
    "sys/net/ipv4/tcp_mem": "187901\t383869\t575802",
    "sys/net/netfilter/nf_conntrack_max": "524288",
    "meminfo": "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in ENOUGH.items():
        path = tmp_path / "proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def look(root: Path, connections: int = 50_000, files: tuple[int, int] = (20_000, 20_000)) -> list[Finding]:
    """Return what is too low, notes included."""
    findings = list(examine(connections, 4, udp=True, root=root, files=files))
    assert len(findings) == 13
    return [finding for finding in findings if not finding.is_enough]


def test_nothing_is_too_low_where_there_is_enough(root: Path) -> None:
    assert look(root) == []


@pytest.mark.parametrize(
    ("file", "text", "name", "remedy"),
    [
        ("sys/fs/nr_open", "1024", "fs.nr_open", "sysctl -w fs.nr_open=13346"),
        ("sys/fs/file-max", "50000", "fs.file-max", "sysctl -w fs.file-max=60000"),
        ("sys/net/core/somaxconn", "128", "net.core.somaxconn", "sysctl -w net.core.somaxconn=4096"),
        ("sys/net/core/rmem_max", "212992", "net.core.rmem_max", "sysctl -w net.core.rmem_max=4194304"),
        ("sys/net/core/wmem_max", "212992", "net.core.wmem_max", "sysctl -w net.core.wmem_max=4194304"),
        (
            "sys/net/core/netdev_max_backlog",
            "1000",
            "net.core.netdev_max_backlog",
            "sysctl -w net.core.netdev_max_backlog=5000",
        ),
        (
            "sys/net/ipv4/tcp_max_syn_backlog",
            "2048",
            "net.ipv4.tcp_max_syn_backlog",
            "sysctl -w net.ipv4.tcp_max_syn_backlog=4096",
        ),
        (
            "sys/net/ipv4/ip_local_port_range",
            "32768 60999",
            "ports of one client address",
            'sysctl -w net.ipv4.ip_local_port_range="1024 65535"',
        ),
        (
            "sys/net/ipv4/tcp_mem",
            "10000 20000 30000",
            "net.ipv4.tcp_mem, 2nd, in pages",
            'sysctl -w net.ipv4.tcp_mem="37500 50000 75000"',
        ),
        (
            "sys/net/netfilter/nf_conntrack_max",
            "50000",
            "net.netfilter.nf_conntrack_max",
            "sysctl -w net.netfilter.nf_conntrack_max=56000",
        ),
        ("meminfo", "MemAvailable: 512000 kB", "memory, MiB", "there is memory for 29,013 connections"),
    ],
)
def test_what_is_too_low_has_a_command_that_mends_it(root: Path, file: str, text: str, name: str, remedy: str) -> None:
    (root / "proc" / file).write_text(text)
    [finding] = look(root)
    assert finding.name == name
    assert remedy in finding.remedy
    assert finding.is_note == (name in ("net.core.netdev_max_backlog", "ports of one client address"))


def test_descriptors_are_counted_for_one_worker(root: Path) -> None:
    assert [finding.remedy for finding in look(root, files=(1024, 20_000))] == ["ulimit -n 13346"]
    soft, hard = look(root, files=(4096, 4096))
    assert (soft.name, hard.name) == ("descriptors of a worker", "descriptors of a worker, at most")
    assert "LimitNOFILE=13346" in hard.remedy
    assert "--workers 15 " in hard.remedy
    unlimited = resource.RLIM_INFINITY
    assert look(root, files=(unlimited, unlimited)) == []


def test_what_the_system_does_not_tell_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list(examine(1000, 1, udp=True, root=tmp_path, files=(20_000, 20_000)))) == 2
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda number: (20_000, 20_000))
    status, output, _ = invoke("doctor", "--connections", "1000")
    assert status == 0
    assert output.endswith(b"there is no /proc/sys: nothing of the kernel was looked at\n")


@pytest.mark.parametrize(
    ("file", "text", "name", "why"),
    [
        ("sys/net/core/somaxconn", None, "net.core.somaxconn", "it can't be read: Is a directory"),
        ("sys/net/core/somaxconn", "", "net.core.somaxconn", "it has not 1 number: ''"),
        ("sys/fs/file-max", "\udcff", "fs.file-max", "it has not 1 number: '\\udcff'"),
        ("sys/net/ipv4/ip_local_port_range", "1024", "ports of one client address", "it has not 2 numbers: '1024'"),
        ("sys/net/ipv4/tcp_mem", "a b c", "net.ipv4.tcp_mem, 2nd, in pages", "it has not 3 numbers: 'a b c'"),
        (
            "sys/net/ipv4/tcp_mem",
            "away",
            "net.ipv4.tcp_mem, 2nd, in pages",
            "it is not to be seen here, as in a container",
        ),
        ("meminfo", "MemFree: 1000 kB", "memory, MiB", "/proc/meminfo has no MemAvailable"),
        ("meminfo", None, "memory, MiB", "it can't be read: Is a directory"),
    ],
)
def test_what_cannot_be_read_is_unknown(root: Path, file: str, text: str | None, name: str, why: str) -> None:
    path = root / "proc" / file
    path.unlink()
    if text is None:
        path.mkdir()  # root may read every file
    elif text != "away":
        path.write_text(text, errors="surrogateescape")
    [finding] = look(root)
    assert (finding.name, finding.found, finding.status) == (name, None, "unknown")
    assert finding.remedy.startswith(why)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_what_the_container_may_take(root: Path, version: int) -> None:
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/\n" if version == 2 else "4:memory:/\n")
    mount = "cgroup2 cgroup rw" if version == 2 else "cgroup cgroup rw,memory"
    (root / "proc/self/mountinfo").write_text(f"1 2 0:1 / /sys/fs/cgroup rw - {mount}\n")
    names = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    most, used, idle = names
    (folder / most).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (folder / used).write_text(f"{200 * 2**20}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{idle} {88 * 2**20}\n")
    assert look(root) == []
    (folder / most).write_text(f"{612 * 2**20}\n")
    [finding] = look(root)
    assert (finding.name, finding.found) == ("memory, MiB", 500)
    assert finding.remedy == "there is memory for 29,013 connections: raise the limit of this container or unit"


def test_doctor_says_how_parameters_are_set_and_that_unknown_ones_are_no_failure(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ROOT", root)
    monkeypatch.setattr(resource, "getrlimit", lambda number: (20_000, resource.RLIM_INFINITY))
    command = ("doctor", "--connections", "50000", "--workers", "4")
    (root / "proc/sys/net/ipv4/tcp_mem").unlink()
    status, output, errors = invoke(*command)
    assert (status, errors) == (0, "")
    assert b"unknown  net.ipv4.tcp_mem, 2nd, in pages                  ? of 50,000\n" in output
    assert b"unlimited of 13,346\n" in output
    assert b"`sysctl`" not in output
    (root / "proc/sys/net/core/somaxconn").write_text("128")
    assert invoke(*command)[1].endswith(
        b"`sysctl` needs root, and sets until the next boot; /etc/sysctl.d is for good\n"
    )
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    last = invoke(*command)[1].decode().splitlines()[-2:]
    assert last[0].startswith("/proc/sys is read-only here, as in a container")
    assert max(map(len, last)) <= 80


def test_doctor_fails_if_something_is_too_low(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROOT", root)
    monkeypatch.setattr(resource, "getrlimit", lambda number: (20_000, 20_000))
    (root / "proc/sys/net/ipv4/ip_local_port_range").write_text("32768 60999")
    command = ("doctor", "--connections", "50000", "--workers", "4", "--udp")
    status, output, errors = invoke(*command)
    assert (status, errors) == (0, "")
    assert b"note     ports of one client address" in output
    (root / "proc/sys/net/core/somaxconn").write_text("128")
    status, output, errors = invoke(*command)
    assert (status, errors) == (1, "")
    lines = output.decode().splitlines()
    assert lines[0] == "50,000 connections over 4 workers"
    at = next(number for number, line in enumerate(lines) if line.startswith("too low"))
    assert "net.core.somaxconn" in lines[at]
    assert lines[at + 1].strip() == "sysctl -w net.core.somaxconn=4096"
    assert max(map(len, lines)) <= 80
