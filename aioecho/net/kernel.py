"""What the kernel tells of a socket, what waits in it and how its peer is doing, and when it is to give a peer up."""

import contextlib
import fcntl
import select
import socket
import struct
import sys
import termios
from math import inf
from typing import Any, NamedTuple

__all__ = [
    "BYTES_ACKED",
    "BYTES_RECEIVED",
    "HELD",
    "LAST_ACK_RECV",
    "LAST_DATA_RECV",
    "LAST_DATA_SENT",
    "TCP_QUICKACK",
    "TICK",
    "Credentials",
    "accept_queue",
    "acknowledge_at_once",
    "datagram_memory",
    "has_hung_up",
    "has_peer_ended",
    "has_unread",
    "is_broken",
    "peer_credentials",
    "round_trip",
    "set_keepalive",
    "silence_of",
    "stop_receiving",
    "tcp_info",
    "unacknowledged",
    "unread",
    "wire_bytes",
]

# Where the kernel tells these in its struct tcp_info (linux/tcp.h), and how wide they are. The times are in milliseconds.
BYTES_ACKED, BYTES_RECEIVED, LAST_DATA_RECV, LAST_ACK_RECV = (120, "=Q"), (128, "=Q"), (52, "=I"), (56, "=I")
LAST_DATA_SENT = (44, "=I")

# The smoothed round trip, likewise, in microseconds.
ROUND_TRIP = (68, "=I")

# The state of a connection, and the one that it has after a reset or when it was given up (TCP_CLOSE in linux/tcp_states.h).
STATE, BROKEN = (0, "=B"), 7

# The states in which a peer's FIN has come, which counts as a byte received: TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT,
# TCP_LAST_ACK, TCP_CLOSING. In TCP_CLOSE it may have been a reset: then it is a byte less than it was.
PEER_HAS_ENDED = {6, BROKEN, 8, 9, 11}

# The states in which a peer may still send: TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2.
PEER_MAY_SEND = {1, 4, 5}

# Likewise: the state; bytes acknowledged and received; bytes that wait to be sent; bytes sent, and how many of them again.
WIRE = struct.Struct("=B119xQQ8xI52xQQ")

# Likewise: the milliseconds since data last came; bytes received.
SILENCE = struct.Struct("=52xI72xQ")

# Of a socket that listens: the clients that were not accepted yet, and how many find room.
ACCEPT_QUEUE = struct.Struct("=24xII")

# Probes of a silent peer that have to go unanswered for its connection to be lost.
PROBES = 3

# Seconds for which an acknowledgement may be delayed: 40 ms mostly.
HELD = 0.05

# Seconds. The kernel tells times no more exactly than its timer ticks.
TICK = 0.01

# The socket module does not have it before 3.12. It is Linux's.
TCP_QUICKACK = getattr(socket, "TCP_QUICKACK", 12)

# The socket module does not have it.
SO_MEMINFO = 55 if sys.platform == "linux" else None

# What SO_MEMINFO gives, of which the first is the bytes that wait to be read and the last the datagrams dropped so far.
MEMINFO = struct.Struct("@9I")

SO_PEERCRED: int | None = getattr(socket, "SO_PEERCRED", None)
UCRED = struct.Struct("@iII")


class Credentials(NamedTuple):
    """The process at the other end of a Unix socket, as it was when it connected."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: Any) -> Credentials | None:
    """Return the peer's credentials (SO_PEERCRED); None for a socket that is no Unix socket, and on other systems than Linux.

    Raises:
        OSError: the socket is closed.
    """
    if sock.family != socket.AF_UNIX or SO_PEERCRED is None:
        return None
    return Credentials(*UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_PEERCRED, UCRED.size)))


def unread(sock: socket.socket) -> int:
    """Return the bytes that have come and wait to be read; 0 if the socket is closed."""
    return _count(sock, termios.FIONREAD)


def has_unread(sock: socket.socket) -> bool:
    """Tell whether something waits to be read of a TCP socket, on Linux. Unlike unread() it keeps the interpreter's lock.

    So other threads do not run between it and the system call that follows. False of other sockets, and on other systems.
    """
    if SO_MEMINFO is None:
        return False
    try:
        return bool(MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))[0])
    except (OSError, struct.error):
        return False


def unacknowledged(sock: socket.socket) -> int:
    """Return the bytes that were sent and that the peer's kernel has not acknowledged; 0 if the socket is closed."""
    return _count(sock, termios.TIOCOUTQ)


def _count(sock: socket.socket, request: int) -> int:
    try:
        count: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), request, b"\0\0\0\0"))[0]
    except (OSError, ValueError):
        return 0
    return count


def acknowledge_at_once(sock: socket.socket) -> None:
    """Have the kernel acknowledge what comes as soon as it is read, and not 40 ms later, with a reply: there will be none.

    Until then a peer may hold small writes back (Nagle's algorithm). It is so until something is sent.
    """
    with contextlib.suppress(OSError, ValueError):  # no TCP, or closed
        sock.setsockopt(socket.IPPROTO_TCP, TCP_QUICKACK, 1)


def stop_receiving(sock: socket.socket) -> None:
    """Have the kernel refuse what the peer sends from now on. What waits to be read can still be read, on Linux.

    Where this side has sent its FIN before, Linux answers what still comes with a reset (tcp_rcv_state_process), so that the
    peer learns of it by its next write but one. Else it would take all that comes, and throw it away when the socket is closed.
    """
    with contextlib.suppress(OSError, ValueError):  # the connection broke, or it is closed
        sock.shutdown(socket.SHUT_RD)


def tcp_info(sock: socket.socket, field: tuple[int, str]) -> int | None:
    """Return a field of what is known of a TCP connection; None for other sockets, and on other systems."""
    if not sys.platform.startswith("linux"):
        return None
    start, layout = field
    end = start + struct.calcsize(layout)
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, end)
    except OSError:
        return None
    return int(struct.unpack_from(layout, info, start)[0]) if len(info) >= end else None


def silence_of(sock: socket.socket) -> float | None:
    """Return for how many seconds a TCP peer has sent nothing, infinity if it never has; None as for tcp_info()."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        milliseconds, received = SILENCE.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SILENCE.size))
    except (OSError, struct.error):
        return None
    return milliseconds / 1000 if received else inf


def wire_bytes(sock: socket.socket) -> tuple[int, int] | None:
    """Return how many bytes a TCP connection has received and sent, as far as the kernel has them; None as for tcp_info().

    What the kernel still has to send counts as sent, and what it has sent again counts once. It costs a microsecond.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, WIRE.size)
        state, acknowledged, received, waiting, sent, again = WIRE.unpack(info)
    except OSError:
        return None
    except struct.error:  # a kernel of before 4.19
        return None if len(info) < BYTES_RECEIVED[0] + 8 else struct.unpack_from("=QQ", info, BYTES_ACKED[0])[::-1]
    return received - (state in PEER_HAS_ENDED), sent - again + waiting if sent else acknowledged


def accept_queue(sock: socket.socket) -> tuple[int, int] | None:
    """Return how many clients wait in the queue of a TCP socket that listens, and how many may; None as for tcp_info()."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        length, limit = ACCEPT_QUEUE.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ACCEPT_QUEUE.size))
    except (OSError, struct.error):
        return None
    return length, limit


def round_trip(sock: socket.socket) -> float:
    """Return the smoothed round trip to a TCP peer, in seconds; 0 where that is not known."""
    return (tcp_info(sock, ROUND_TRIP) or 0) / 1e6


def is_broken(sock: socket.socket) -> bool | None:
    """Tell whether a TCP connection was reset or given up; None where that is not known: of a closed or another socket."""
    state = tcp_info(sock, STATE)
    return None if state is None else state == BROKEN


def has_peer_ended(sock: socket.socket) -> bool | None:
    """Tell whether a TCP peer has ended its stream; None where that is not known: of a closed or another socket."""
    state = tcp_info(sock, STATE)
    return None if state is None else state not in PEER_MAY_SEND


def has_hung_up(sock: socket.socket) -> bool:
    """Tell whether the peer of a Unix socket has closed it, and not only its own direction."""
    poll = select.poll()
    try:
        poll.register(sock, 0)  # POLLHUP comes unasked
    except ValueError:  # it is closed here
        return False
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def set_keepalive(sock: socket.socket, seconds: float, unacknowledged: float | None) -> None:
    """Have the kernel probe the peers of the TCP connections that are accepted from this listening socket.

    A connection is lost, with ETIMEDOUT, if its peer answers nothing for about `seconds`. So is one if its peer acknowledges
    nothing of what was sent, or keeps its window shut, for `unacknowledged` seconds; None leaves that to the system.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return
    part = max(1, round(seconds / (PROBES + 1)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, round(seconds) - PROBES * part)),
        ("TCP_KEEPINTVL", part),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", 0 if unacknowledged is None else min(round(unacknowledged * 1000), 2**31 - 1)),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def datagram_memory(sock: socket.socket) -> tuple[int, int]:
    """Return the bytes of memory that unread datagrams take up in a socket, or can, and how many it has dropped so far."""
    if SO_MEMINFO is not None:
        try:
            told = MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))
        except (OSError, struct.error):  # a kernel of before 4.12
            pass
        else:
            return told[0], told[-1]
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), 0
