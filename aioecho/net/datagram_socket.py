"""One datagram socket of a server: reading it, replying from the address that was asked, and what the kernel dropped.

The socket is read in a callback of the loop's, and not by the loop's own transport, which tells neither to which address a
datagram was sent nor whether it was cut, and queues what can't be sent without end. It is also cheaper. An echo of 64 bytes
for 64 clients, uvloop 0.23 on Python 3.11, in processor time of a bare DatagramProtocol: recvfrom() in a callback 0.86,
recvmsg() with room for ancillary data 0.92. So recvmsg() is for sockets that are bound to every address alone.
"""

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from typing import Any, Protocol

from aioecho.config import Limits
from aioecho.net.bound import BoundSocket
from aioecho.net.datagram_transport import DatagramSource, DatagramTransport
from aioecho.net.kernel import datagram_memory
from aioecho.net.pktinfo import ROOM_FOR_PKTINFO, Ancillary, address_of, enable_pktinfo, source_from
from aioecho.net.room import SendRoom, connected_probe, is_writable
from aioecho.net.watch import OUT_OF_RESOURCES, ReadWatch, as_os_error
from aioecho.runtime.addresses import is_dual_stack, to_mapped, unmapped
from aioecho.runtime.logs import BoundedLog, format_address
from aioecho.stats import DatagramStats

__all__ = ["DatagramSocket", "logger"]

logger = logging.getLogger("aioecho.datagram_socket")

# More in one turn of the loop would make handlers that wait for something else wait longer. A turn that finds as many as it
# looked for looks for twice as many the next time: a lone datagram costs one read.
READS_PER_TURN = 64

# A read in vain costs a sixth of an echo. So after turns that found one datagram and no second, so many in a row look for one.
MOST_LONE_TURNS = 15

# Bytes that a datagram takes up in the kernel at the least, however short it is.
LEAST_TAKEN = 512

# More than wait in any Unix socket: net.unix.max_dgram_qlen is 10, or 512 with systemd. Their memory is their senders'.
QUEUED_BY_UNIX = 4096

# A host has few addresses, but all of 127.0.0.0/8 is one's own.
ADDRESSES_KEPT = 1024

# What the system says where it will not let a UDP socket send to an address: the program's mistake, or its firewall's rule. Of
# a Unix socket they are its peer's doing: the mode of its path, or that it is connected to another one.
FORBIDDEN = {
    errno.EACCES: "it is a broadcast address: add ?broadcast to the endpoint",
    errno.EPERM: "a firewall of this machine does not let it pass",
}

# What it says of a Unix socket that is closed.
GONE = {errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET}


class Dispatching(Protocol):
    """Gives datagrams to handlers, and reads them for that."""

    def serve(self, datagrams: Iterator[tuple[bytes, Any]], source: DatagramSource) -> OSError | MemoryError | None:
        """Go through ``(data, client_address)`` of `datagrams`, which reads with every step, while the source `is_reading`.

        Return what reading has raised.
        """

    def count_all(self) -> None:
        """Note that the source reads no more, or reads other datagrams."""


class DatagramSocket:
    """Reads for a server: calls `on_datagram(data, client_address, transport)` for each datagram, in the order in which they
    arrive, and `on_turn_end()` after the datagrams of one turn of the loop. `on_gone(self, address)` says that a Unix socket
    to which something was sent is closed. `log` is for warnings, at a bounded rate. With `reads_all` a turn looks for all that
    have come, up to its bound, and not for as many as the last ones found.

    With a `dispatcher`, that reads itself what comes in a turn: it costs less than a call for every datagram.

    Does not know what becomes of one. A datagram is read up to ``limits.max_datagram`` bytes, and one more, which tells
    that it was longer. All methods may be called in any state, and more than once.
    """

    def __init__(
        self,
        bound: BoundSocket,
        *,
        on_datagram: Callable[[bytes, Any, DatagramTransport], object],
        on_turn_end: Callable[[], object],
        on_gone: Callable[["DatagramSocket", Any], object],
        log: BoundedLog,
        stats: DatagramStats,
        limits: Limits,
        send_timeout: float | None,
        reads_all: bool = False,
        dispatcher: Dispatching | None = None,
    ) -> None:
        self.bound = bound
        self.sock = sock = bound.sock
        self.stats = stats
        self._on_datagram = on_datagram
        self._on_turn_end, self._on_gone = on_turn_end, on_gone
        self._send_timeout = send_timeout
        self._loop = asyncio.get_running_loop()
        self._watch = ReadWatch(sock, self._push if dispatcher is None else self._on_readable)
        self._dispatcher = dispatcher
        if dispatcher is not None:
            self._serve = dispatcher.serve
        self._plan: Iterator[int] = repeat(READS_PER_TURN if reads_all else 2)  # how many to look for in the next turns
        self._adapts = not reads_all
        self._lone_turns = self.longest = 0
        self.is_reading = self._is_closed = False
        self._log = log
        self._send_log = BoundedLog(logger, logging.DEBUG)
        # What all that were sent at once are awaited by: of what costs nothing to await, the cheapest.
        self.sent: asyncio.Future[None] = self._loop.create_future()
        self.sent.set_result(None)
        self._room = SendRoom(self._loop, sock.fileno())
        self._is_dual_stack = is_dual_stack(sock)
        send = self._send_mapped if self._is_dual_stack else sock.sendto
        self._transport = self.transport = DatagramTransport(self, send, self, unmapped(sock.getsockname()))
        self._transports: dict[Any, DatagramTransport] = {}  # by the address that was asked
        self._receive: Callable[[int], tuple[bytes, Any]]
        self.has_one_transport = not (_is_bound_to_all(sock) and enable_pktinfo(sock))
        if not self.has_one_transport:
            self._receive = self._receive_message
        else:
            self._receive = self._receive_mapped if self._is_dual_stack else sock.recvfrom
        self.set_limits(limits)
        self._kernel_drops = datagram_memory(sock)[1]  # by the start

    def set_timeouts(self) -> None:
        """Do nothing: no timeout is the socket's own."""

    def set_limits(self, limits: Limits) -> None:
        """Apply `max_datagram` and `receive_buffer` from now on."""
        self._size = limits.max_datagram + 1
        self._datagrams = map(self._receive, repeat(self._size))
        if limits.receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, limits.receive_buffer)

    @property
    def receive_buffer(self) -> int:
        """The bytes that the kernel keeps of datagrams, as ``limits.receive_buffer`` counts them."""
        size = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        return size // 2 if sys.platform == "linux" else size  # socket(7): the kernel doubles what it is asked for

    # Reading.

    def resume(self) -> None:
        """Read from now on."""
        if not self._is_closed:
            try:
                self._watch.start()
            except OSError as error:
                self._retry_later(error)
            else:
                self.is_reading = True

    def pause(self) -> None:
        """Leave what comes to the kernel until resume(); also the rest of what is just being read."""
        self.is_reading = False
        if self._dispatcher is not None:
            self._dispatcher.count_all()
        self._watch.stop()

    def stop(self, *, keep_backlog: bool = False) -> None:
        """Read what has come by now, and then no more. It can still send.

        With `keep_backlog` read no more at once: other processes read the same socket.
        """
        if self._is_closed or self._loop.is_closed():
            return
        self.pause()
        if keep_backlog:
            return
        self.is_reading = True
        # Never more than now take up its memory: a peer that never stops sending does not put the end off.
        is_unix = self.sock.family == socket.AF_UNIX
        try:
            self._read(QUEUED_BY_UNIX if is_unix else datagram_memory(self.sock)[0] // LEAST_TAKEN + 1)
        finally:
            self._on_turn_end()
        self.pause()

    def close(self) -> None:
        """Stop, and close the socket. A handler that waits to send is told that it is closed."""
        if not self._is_closed:
            if not self._loop.is_closed():
                self.pause()
                self._room.wake_all()
            self.stats.kernel_drops += self.new_kernel_drops()
            self._is_closed = True
            self.bound.close()

    def _on_readable(self) -> None:
        """Have the dispatcher read."""
        most = next(self._plan)
        self.longest = self._size - 1  # for this turn: other limits hold from the next one on
        error = self._serve(islice(self._datagrams, most), self)
        if error is not None:
            self._may_read_on(error)
            self._adapt(most, False)
        elif most > 1:
            self._adapt(most, True)

    def _push(self) -> None:
        most = next(self._plan)
        try:
            has_found_all = self._read(most)
        finally:
            self._on_turn_end()
        if most > 1 or not has_found_all:
            self._adapt(most, has_found_all)

    def _adapt(self, most: int, has_found_all: bool) -> None:
        """Plan how many datagrams to look for in the next turns, after one that looked for `most`."""
        if not self._adapts:
            return
        if has_found_all:
            self._plan = repeat(min(2 * most, READS_PER_TURN))
            self._lone_turns = 0
        elif most > 2:
            self._plan = repeat(most // 2)
        else:
            self._lone_turns = min(2 * self._lone_turns + 1, MOST_LONE_TURNS)
            self._plan = chain(repeat(1, self._lone_turns), repeat(2))

    def _read(self, most: int) -> bool:
        """Read at most so many datagrams, and pass them on; return whether there were as many."""
        on_datagram, receive = self._on_datagram, self._receive
        for _ in range(most):
            try:
                data, address = receive(self._size)
            except (OSError, MemoryError) as error:
                if self._may_read_on(error):
                    continue
                return False
            on_datagram(data, address, self.transport)
            if not self.is_reading:
                return False
        return True

    def _receive_message(self, size: int) -> tuple[bytes, Any]:
        """Receive a datagram, and note to which address it was sent."""
        data, ancillary, _, address = self.sock.recvmsg(size, ROOM_FOR_PKTINFO)
        try:
            self.transport = self._transports[ancillary[0][2]]
        except LookupError:
            self.transport = self._transport_for(ancillary)
        return data, unmapped(address) if self._is_dual_stack else address

    def _receive_mapped(self, size: int) -> tuple[bytes, Any]:
        data, address = self.sock.recvfrom(size)
        return data, unmapped(address)

    def _may_read_on(self, caught: OSError | MemoryError) -> bool:
        """Count and report what reading has raised; return whether there may be more to read."""
        if self._is_closed or isinstance(caught, BlockingIOError | InterruptedError):
            return False
        error = as_os_error(caught)
        if error.errno in OUT_OF_RESOURCES:
            self._retry_later(error)
            return False
        # What an ICMP message told of a datagram that was sent before: it is not about the next one.
        self.stats.receive_errors += 1
        self._log.report("an error was waiting on %s: %s", self.bound.name, error)
        self._watch_again()
        return True

    def _watch_again(self) -> None:
        # An error that waits in a socket, which takes one that is connected, makes libuv stop watching it (1.48).
        if self._watch.is_on:
            self.pause()
            self.resume()

    def _retry_later(self, error: OSError) -> None:
        self.stats.receive_errors += 1
        self.is_reading = False
        self._watch.retry_later(self.resume)
        self._log.report("cannot read from %s for now: %s", self.bound.name, error)

    def _transport_for(self, ancillary: Ancillary) -> DatagramTransport:
        """Return what sends from the address that a datagram was sent to."""
        for level, kind, data in ancillary:
            transport = self._transports.get(data)
            if transport is not None:
                return transport
            source = source_from(level, kind, data)
            if source is not None:
                if len(self._transports) >= ADDRESSES_KEPT:
                    self._transports.clear()
                local_address = unmapped(address_of(source, self.sock.getsockname()[1]))
                transport = DatagramTransport(
                    self, self._sender_from(source), (self.bound.name, source[0][2]), local_address
                )
                self._transports[data] = transport
                return transport
        return self._transport

    def transport_from(self, asked: bytes | None) -> DatagramTransport:
        """Return what sends from the address `asked`, the second part of a transport's `key`, or from the socket's own."""
        of_key = (transport for transport in self._transports.values() if transport.key == (self.bound.name, asked))
        return next(of_key, self._transport)

    def _sender_from(self, source: Ancillary) -> Callable[[Any, Any], object]:
        send_message = self.sock.sendmsg

        def send(data: Any, address: Any) -> None:
            send_message((data,), source, 0, address)

        def send_mapped(data: Any, address: Any) -> None:
            send_message((data,), source, 0, to_mapped(address))

        return send_mapped if self._is_dual_stack else send

    def _send_mapped(self, data: Any, address: Any) -> None:
        self.sock.sendto(data, to_mapped(address))

    # Counting.

    def new_kernel_drops(self) -> int:
        """Return how many datagrams the kernel has dropped, as the socket had no room, that `stats` does not count yet.

        Asked of the socket and not taken from SO_RXQ_OVFL: that count comes along with a datagram, and so never tells of
        the drops after the last one. It is the same counter.
        """
        return 0 if self._is_closed else (datagram_memory(self.sock)[1] - self._kernel_drops) % 2**32

    def count_unsendable(self, error: OSError, address: Any) -> None:
        """Count a datagram that the system would not send; raise the error if it is the sender's fault."""
        if error.errno == errno.EMSGSIZE:
            raise error
        if error.errno in OUT_OF_RESOURCES:
            self.stats.send_drops += 1
        else:
            self.stats.send_errors += 1
            if _is_connected(self.sock):  # so it may be the one that was waiting
                self._watch_again()
            if self.sock.family == socket.AF_UNIX:
                if error.errno in GONE:
                    self._on_gone(self, address)
            elif error.errno in FORBIDDEN:
                self._log.report(
                    "the system forbids to send to %s from %s: %s (%s)",
                    format_address(address),
                    self.bound.name,
                    error.strerror,
                    FORBIDDEN[error.errno],
                )
                return
        self._send_log.report("cannot send to %s from %s: %s", format_address(address), self.bound.name, error)

    # Sending when there was no room.

    async def send_later(self, send: Callable[[Any, Any], object], data: bytes, address: Any) -> None:
        """Send when there is room, or drop and count it when there is none in time."""
        try:
            async with asyncio.timeout(self._send_timeout):
                while not self._is_closed:
                    await self._wait_for_room(address)
                    try:
                        send(data, address)
                        return
                    except (BlockingIOError, InterruptedError):
                        pass
            self.stats.send_drops += 1
        except TimeoutError:
            self.stats.send_drops += 1
        except OSError as error:
            self.count_unsendable(error, address)
        except asyncio.CancelledError:
            self.stats.send_drops += 1
            raise

    async def _wait_for_room(self, address: Any) -> None:
        if self.sock.family != socket.AF_UNIX or not is_writable(self.sock):
            await self._room.wait()
            return
        with connected_probe(address) as probe:
            await SendRoom(self._loop, probe.fileno()).wait()


def _is_bound_to_all(sock: socket.socket) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[0] in ("0.0.0.0", "::")


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
