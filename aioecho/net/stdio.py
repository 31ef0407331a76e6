"""The connection that a program is started with, on its standard streams, as by inetd (nowait), systemd (Accept=yes) or socat.

A socket on descriptor 0 is served as if it had been accepted. Pipes, files and terminals, which no event loop reads alike, are
copied to and from one half of a socket pair, in two threads.
"""

import contextlib
import errno
import os
import socket
import stat
import threading

from aioecho.exceptions import EndpointError

__all__ = ["take_standard_streams"]

CHUNK = 2**16


def take_standard_streams() -> socket.socket:
    """Return the connection on descriptors 0 and 1 as a socket. From then on what the program prints goes to stderr.

    If stderr is the connection too, as under inetd, it becomes /dev/null: a log record is no part of a reply.

    Raises:
        EndpointError: descriptor 0 is a socket, but no connection for a stream.
    """
    if stat.S_ISSOCK(os.fstat(0).st_mode):
        sock = socket.socket(fileno=os.dup(0))
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.close()
            message = "descriptor 0 is no connection of a stream: to serve on a bound socket use fd://0"
            raise EndpointError(f"cannot serve on stdio: {message}", errno.EINVAL)
    else:
        sock = _relayed(os.dup(0), os.dup(1))
    _keep_for_connection()
    sock.setblocking(False)
    return sock


def _keep_for_connection() -> None:
    """Put others in the place of the standard streams, so that nothing but the handler writes to the connection."""
    null = os.open(os.devnull, os.O_RDWR)
    connection = [os.fstat(number) for number in (0, 1)]
    if any(os.path.samestat(os.fstat(2), found) and not stat.S_ISCHR(found.st_mode) for found in connection):
        os.dup2(null, 2)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)


def _relayed(source: int, target: int) -> socket.socket:
    ours, theirs = socket.socketpair()
    threading.Thread(target=_copy_in, args=(source, theirs), name="aioecho-stdin", daemon=True).start()
    # Python waits for this one before it ends: so all that was written reaches the target.
    threading.Thread(target=_copy_out, args=(theirs, target), name="aioecho-stdout").start()
    return ours


def _copy_in(source: int, sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the connection is closed, or the source broke
        while data := os.read(source, CHUNK):
            sock.sendall(data)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


def _copy_out(sock: socket.socket, target: int) -> None:
    with contextlib.suppress(OSError), open(target, "wb", buffering=0) as file:
        while data := sock.recv(CHUNK):
            view = memoryview(data)
            while view:
                view = view[file.write(view) or 0 :]
    with contextlib.suppress(OSError):  # not closed: the other thread may be about to write to it
        sock.shutdown(socket.SHUT_RDWR)
