"""Sessions of a worker that is replaced: it keeps the live ones, and its successor passes it their datagrams.

Both processes have the same sockets, and the kernel gives each datagram to one process that reads. So one alone reads. A
successor asks its predecessor to stop, which answers with the peers of its sessions; only then the successor reads. What
these peers send it passes on, until their sessions end. A session sends from the shared socket, so its peer notices nothing.

The two talk over a pair of sockets that the supervisor has made: messages, of Python's marshal. A worker that is replaced
while its own predecessor has sessions passes that connection on to its successor.
"""

import asyncio
import contextlib
import errno
import marshal
import socket
from collections.abc import Iterable
from itertools import islice
from typing import Any, Protocol, Self

from aioecho.net.datagram_transport import DatagramTransport

__all__ = ["Handover", "Key"]

Key = tuple[str, bytes | None, Any, Any]
"""What is a session's in both processes: its socket's name, the address that was asked if that is one of several, its peer, and
the balancer that sends the peer's datagrams with PROXY headers, or None."""

# Seconds that a successor waits for its predecessor's answer. Without one it reads all the same: the loop there is held up.
TAKE_OVER_TIMEOUT = 2.0

# Seconds for a successor to be ready once it has asked. Else it has failed, and its predecessor reads again.
READY_TIMEOUT = 10.0

# Seconds for the other end to take a message in which peers are named. It does nothing else meanwhile.
SEND_TIMEOUT = 1.0

KEYS_AT_ONCE = 256
MESSAGES_PER_TURN = 64
MOST_TURNS = 64  # more than there is room for between the two
LONGEST = 2**17  # bytes of a message

# Of marshal, that all supported Pythons read and write alike.
VERSION = 2


class _Table(Protocol):
    """The sessions of one server."""

    def keys(self) -> Iterable[Key]:
        """Return what its live sessions have."""

    def has_socket(self, name: str) -> bool:
        """Tell whether a socket is one of its server's."""

    def feed(self, key: Key, data: bytes) -> bool:
        """Give a datagram to its peer's session, or return False if there is none."""

    def take_back(self, key: Key, data: bytes, transport: DatagramTransport | None) -> None:
        """Take a datagram of a peer whose session has ended elsewhere, and what replies to it, if that is known."""

    def note_no_room(self, key: Key) -> None:
        """Count a datagram that could not be passed on."""

    def stop_reading(self) -> None:
        """Leave what comes to the successor."""

    def read_on(self) -> None:
        """Read, as far as the server does."""

    def end_all(self) -> None:
        """Let all sessions end: no datagram reaches them any more."""


class _Link:
    """A connection to a predecessor, and the sessions that live there."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        # With what replies to the last datagram that was passed on, if any was.
        self.keys: dict[Key, DatagramTransport | None] = {}


class Handover:
    """Passes the sessions of one worker process on: from its predecessor, and to its successor.

    Args:
        predecessor: what is connected to the worker that this one replaces; None if it replaces none.
        successor: what is connected to the worker that replaces this one, once there is one.
    """

    def __init__(self, predecessor: socket.socket | None, successor: socket.socket) -> None:
        self._tables: list[_Table] = []
        self._links = [] if predecessor is None else [_Link(predecessor)]
        self._successor: socket.socket | None = successor
        self._waits = predecessor is not None
        self._has_begun = False
        self._timer: asyncio.TimerHandle | None = None
        self.has_left = False
        """Whether a successor reads, and passes on what comes for sessions here."""
        self.serves_newcomers = False
        """Whether peers get sessions also while the server stops: this worker was removed, others serve on, and the kernel
        deals peers out to it until its last session has ended, and its socket is closed."""

    def add(self, table: _Table) -> None:
        """Hand over the sessions of a server too, which is about to read."""
        self._tables.append(table)

    @property
    def is_others_turn(self) -> bool:
        """Whether nothing is to be read here: the predecessor still does, or the successor already."""
        return self._waits or self.has_left

    async def take_over(self) -> None:
        """Have the predecessor stop to read, learn of its sessions, and read."""
        self._has_begun = True
        assert self._successor is not None
        self._successor.setblocking(False)
        if self._tables and self._links:
            link = self._named = self._links[0]
            self._answered = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().add_reader(link.sock.fileno(), self._read_predecessor, link)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TAKE_OVER_TIMEOUT):
                    _send(link.sock, "stop")
                    await self._answered
        else:
            for link in self._links:
                link.sock.close()
            self._links = []
        self._waits = False
        if self._tables:
            asyncio.get_running_loop().add_reader(self._successor.fileno(), self._read_successor)
        for table in self._tables:
            table.read_on()

    def close(self, table: _Table) -> None:
        """Hand over the sessions of a server no more: it has closed its sockets."""
        if table not in self._tables or not self._has_begun:
            return
        self._tables.remove(table)
        if not self._tables:
            for link in list(self._links):
                if not self.has_left:
                    _send(link.sock, "closed")
                self._drop(link)
            if self.has_left:
                self._give_back_rest()
            self._drop_successor()

    def _give_back_rest(self) -> None:
        """Pass back what the successor has passed on and was not read yet. What comes from now on it serves itself."""
        if self._successor is not None:
            with contextlib.suppress(OSError):
                self._successor.shutdown(socket.SHUT_RD)
            for _ in range(MOST_TURNS):
                self._read_successor()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close what is connected to other processes, once the event loop runs no more."""
        for link in self._links:
            link.sock.close()
        if self._successor is not None:
            self._successor.close()

    # To and from the predecessor.

    def forward(self, key: Key, data: bytes, transport: DatagramTransport) -> bool:
        """Pass a datagram on to the worker in which its peer's session lives. Return False if there is none.

        `transport` replies to it, should the session have ended meanwhile.
        """
        for link in self._links:
            if key in link.keys:
                link.keys[key] = transport
                table = self._find_table(key)
                assert table is not None  # which asks
                try:
                    if not _send_while_open(link.sock, "data", key, data):
                        table.note_no_room(key)
                except ConnectionError:  # it has ended, which the loop is about to tell
                    self._read_predecessor(link)  # what it has passed back comes first
                    link.keys.pop(key, None)
                    table.take_back(key, data, transport)
                return True
        return False

    def _find_table(self, key: Key) -> _Table | None:
        return next((table for table in self._tables if table.has_socket(key[0])), None)

    def _read_predecessor(self, link: _Link) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                message, descriptors, _, _ = socket.recv_fds(link.sock, LONGEST, 1)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionResetError:  # it has closed over what it had not read; what it had sent comes after this
                continue
            except OSError:
                message, descriptors = b"", []
            if not message:
                self._drop(link)
                if not self._answered.done():
                    self._answered.set_result(None)
                return
            match marshal.loads(message):
                case ("peers", keys):
                    self._named.keys.update(dict.fromkeys(keys))
                case ("before",):  # then come the peers of its own predecessor, to which the descriptor leads
                    self._named = _Link(socket.socket(fileno=descriptors[0]))
                    self._links.append(self._named)
                    asyncio.get_running_loop().add_reader(
                        self._named.sock.fileno(), self._read_predecessor, self._named
                    )
                case ("stopped",):
                    if not self._answered.done():
                        self._answered.set_result(None)
                case ("ended", key):
                    link.keys.pop(key, None)
                case ("back", key, data):
                    transport = link.keys.pop(key, None)
                    table = self._find_table(key)
                    if table is not None:  # else its server has ended here before the program's others
                        table.take_back(key, data, transport)

    def _drop(self, link: _Link) -> None:
        self._links.remove(link)
        asyncio.get_running_loop().remove_reader(link.sock.fileno())
        link.sock.close()

    # To and from the successor.

    def note_end(self, key: Key) -> None:
        """Note that a session has ended: what its peer sends from now on is the successor's."""
        if self.has_left and self._successor is not None:
            _send(self._successor, "ended", key)

    def give_back(self, key: Key, data: bytes) -> bool:
        """Pass on what came for a session that was cancelled before it read it. Return False if nothing receives it."""
        return self.has_left and self._successor is not None and _send(self._successor, "back", key, data)

    def _read_successor(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            successor = self._successor
            if successor is None:
                return
            try:
                message = successor.recv(LONGEST)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionResetError:  # as from a predecessor
                continue
            except OSError:
                message = b""
            match marshal.loads(message) if message else ("gone",):
                case ("stop",):
                    self._leave(successor)
                case ("data", key, data):
                    found = self._find_table(key)
                    if found is None or not found.feed(key, data):
                        _send(successor, "back", key, data)
                case ("closed",):  # it has ended in good order, as all workers do: nothing else reads
                    self._drop_successor()
                    for table in self._tables:
                        table.read_on()
                case ("gone",):
                    self._drop_successor()
                    if self.has_left:
                        for table in self._tables:
                            table.end_all()

    def _leave(self, successor: socket.socket) -> None:
        self.has_left = True
        successor.settimeout(SEND_TIMEOUT)
        try:
            for table in self._tables:
                table.stop_reading()
                _send_peers(successor, table.keys())
            for link in self._links:
                asyncio.get_running_loop().remove_reader(link.sock.fileno())
                socket.send_fds(successor, [marshal.dumps(("before",), VERSION)], [link.sock.fileno()])
                _send_peers(successor, link.keys)
            successor.send(marshal.dumps(("stopped",), VERSION))
            successor.setblocking(False)
        except OSError:  # it is gone, or hangs
            self._return()
            return
        self._timer = asyncio.get_running_loop().call_later(READY_TIMEOUT, self._return)

    def retire(self) -> None:
        """Note that the successor is ready: it is not to fail any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for link in list(self._links) if self.has_left else ():
            self._drop(link)

    def _return(self) -> None:
        self._timer = None
        self.has_left = False
        if self._successor is not None:
            self._successor.setblocking(False)
        for link in self._links:
            asyncio.get_running_loop().add_reader(link.sock.fileno(), self._read_predecessor, link)
        for table in self._tables:
            table.read_on()

    def _drop_successor(self) -> None:
        successor, self._successor = self._successor, None
        if successor is not None:
            asyncio.get_running_loop().remove_reader(successor.fileno())
            successor.close()


def _send(sock: socket.socket, *message: Any) -> bool:
    """Send a message, or return False if there is no room, or no other end."""
    try:
        return _send_while_open(sock, *message)
    except ConnectionError:
        return False


def _send_while_open(sock: socket.socket, *message: Any) -> bool:
    """Send a message, or return False if there is no room. Raises ConnectionError if there is no other end."""
    try:
        sock.send(marshal.dumps(message, VERSION))
    except (BlockingIOError, InterruptedError):
        return False
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
            raise
        return False
    return True


def _send_peers(sock: socket.socket, keys: Iterable[Key]) -> None:
    """Send all of `keys`, waiting for room. Raises OSError if that takes too long."""
    left = iter(list(keys))
    while some := list(islice(left, KEYS_AT_ONCE)):
        sock.send(marshal.dumps(("peers", some), VERSION))
