"""The paths of Unix sockets: what is at one, the numbers of its owners, and taking turns to bind there."""

import asyncio
import contextlib
import enum
import errno
import fcntl
import grp
import os
import pwd
import socket
import stat
import time
from collections.abc import AsyncIterator

from aioecho.exceptions import EndpointError
from aioecho.net.endpoints import PathEndpoint

__all__ = ["PathUse", "find_use", "folder_lock", "group_number", "remove_stale", "set_mode", "user_number"]

# Seconds that a start waits for others that start in the same folder, and between two looks. See folder_lock().
LOCK_TIMEOUT = 1.0
LOCK_INTERVAL = 0.001


class PathUse(enum.Enum):
    """What is at the path of an endpoint."""

    FREE = "nothing"
    STALE = "a socket on which no process listens"
    TAKEN = "a socket on which a process listens"


def user_number(name: str | None) -> int:
    """Return a user's number, or -1 for None, which chown() leaves as it is; OSError if no user is called so."""
    if name is None or name.isdecimal():
        return -1 if name is None else int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise OSError(errno.EINVAL, f"no user is called {name!r}") from None


def group_number(name: str | None) -> int:
    """Return a group's number, or -1 for None; OSError if no group is called so."""
    if name is None or name.isdecimal():
        return -1 if name is None else int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise OSError(errno.EINVAL, f"no group is called {name!r}") from None


def find_use(endpoint: PathEndpoint, *, unnoticed: bool = False) -> PathUse:
    """Return what is at the path of an endpoint.

    To see whether a process listens there, it connects, and closes at once. With `unnoticed` it does not: then a stream socket
    that is bound and does not listen counts as taken too.

    Raises:
        EndpointError: something that is no socket.
        OSError: the path is too long, or cannot be looked at.
    """
    path = endpoint.path
    with contextlib.suppress(FileNotFoundError):
        if endpoint.has_file and not stat.S_ISSOCK(os.lstat(path).st_mode):
            message = "a file that is not a socket is in the way; remove it or choose another path"
            raise EndpointError(f"cannot listen on {endpoint}: {message}", errno.EADDRINUSE)
    # With a socket for streams a datagram socket finds that it is there, EPROTOTYPE, and makes no connection.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if unnoticed else endpoint.type) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return PathUse.FREE
        except ConnectionRefusedError:
            return PathUse.STALE if endpoint.has_file else PathUse.FREE
        except OSError as error:
            # EAGAIN: its queue is full. EPROTOTYPE: it is of the other type. EPERM: a datagram socket that is connected to
            # another one. All are alive.
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE, errno.EPERM):
                raise
    return PathUse.TAKEN


def remove_stale(endpoint: PathEndpoint) -> None:
    """Remove the path of a socket on which no process listens; raise EndpointError if anything else is there."""
    match find_use(endpoint):
        case PathUse.STALE:
            os.unlink(endpoint.path)
        case PathUse.TAKEN:
            message = f"cannot listen on {endpoint}: another socket listens there already"
            raise EndpointError(message, errno.EADDRINUSE)


def set_mode(path: str, mode: int) -> None:
    """Set the permissions of a path. On Linux not of a file that a link there leads to: then raise OSError.

    A folder that is another user's may have one in the place of the socket that this process has just bound, as root.
    """
    if hasattr(os, "O_PATH"):
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            if stat.S_ISLNK(os.fstat(descriptor).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            os.chmod(f"/proc/self/fd/{descriptor}", mode)  # fchmod() refuses such a descriptor
            return
        except (FileNotFoundError, PermissionError):  # there is no /proc, as in a chroot(), or a profile forbids it
            pass
        finally:
            os.close(descriptor)
    os.chmod(path, mode)


@contextlib.asynccontextmanager
async def folder_lock(path: str) -> AsyncIterator[None]:
    """Hold a lock on the folder of `path`, so that two programs that start there take turns. It is held without awaiting.

    It is advisory and held for microseconds. Where it can't be had (no such folder, no right to read it, a long lock
    of another program) do without: it narrows a race that others leave open.
    """
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        # Polled, since flock() itself waits for ever or not at all, and any program may lock a folder such as /tmp.
        deadline = time.monotonic() + LOCK_TIMEOUT
        while not _try_lock(folder) and time.monotonic() < deadline:  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(LOCK_INTERVAL)
        yield
    finally:
        os.close(folder)  # which unlocks


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True
