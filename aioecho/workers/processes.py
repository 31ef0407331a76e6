"""Starting a worker process, and saying how it ended."""

import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from aioecho.net import systemd
from aioecho.workers.channel import Channel
from aioecho.workers.guard import MARK
from aioecho.workers.inherited import Inherited
from aioecho.workers.slots import WorkerProcess, WorkerSlot
from aioecho.workers.worker import SIGNALS

__all__ = ["describe_status", "start_worker"]

# Where a fresh interpreter finds this package.
FOLDER = str(Path(__file__).resolve().parents[2])


def start_worker(slot: WorkerSlot, inherited: Inherited, grace: float) -> WorkerProcess:
    """Start a process for a slot.

    Args:
        slot: what it serves on.
        inherited: what all workers have.
        grace: its server's, in seconds.

    Raises:
        OSError: the system can't.
    """
    numbers = [[bound.sock.fileno() for bound in group] for group in slot.sockets]
    ours, theirs = socket.socketpair()
    try:
        for_successor, to_successor = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        ours.close()
        theirs.close()
        raise
    cell = inherited.claim_cell()
    before = slot.worker.for_successor.fileno() if slot.worker is not None else -1
    program = (
        f"import sys; sys.path.insert(0, {FOLDER!r}); from aioecho.workers.worker import main; "
        f"main({theirs.fileno()}, {inherited.descriptors}, {cell}, {numbers}, float('{grace}'), {before},"
        f" {to_successor.fileno()})"
    )
    # As multiprocessing does. -P: what lies in the current folder is not to be taken for the standard library.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    command = [sys.executable, *flags, *([] if "-P" in flags else ["-P"]), "-c", program]
    environment = {name: value for name, value in os.environ.items() if name not in systemd.VARIABLES}
    environment[MARK] = str(theirs.fileno())
    # A signal to the whole group would kill a worker that has no handlers yet: it begins with all of them blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[
                *(theirs.fileno(), *inherited.descriptors, to_successor.fileno(), *itertools.chain(*numbers)),
                *([before] if before >= 0 else []),
            ],
        )
    except BaseException:
        ours.close()
        for_successor.close()
        inherited.release_cell(cell)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        to_successor.close()
    return WorkerProcess(slot, process, Channel(ours), for_successor, functools.partial(inherited.release_cell, cell))


def describe_status(status: int) -> str:
    """Return how a process ended, for the middle of a sentence."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-status}"
