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
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from aioecho.config import Limits
from aioecho.net.bound import BoundSocket
from aioecho.net.kernel import datagram_memory
from aioecho.net.pktinfo import ROOM_FOR_PKTINFO, Ancillary, address_of, enable_pktinfo, source_from
from aioecho.net.room import SendRoom, connected_probe, is_writable
from aioecho.net.watch import OUT_OF_RESOURCES, ReadWatch, as_os_error
from aioecho.runtime.addresses import is_dual_stack, to_mapped, unmapped
from aioecho.runtime.logs import BoundedLog, format_address
from aioecho.stats import DatagramStats

__all__ = ["DatagramSocket", "DatagramTransport", "logger"]

logger = logging.getLogger("aioecho.datagram_socket")

# More in one turn of the loop would make handlers that wait for something else wait longer. A turn that finds as many as it
# looked for looks for twice as many the next time: a lone datagram costs one read.
READS_PER_TURN = 64

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

Buffer = bytes | bytearray | memoryview


class DatagramTransport:
    """Sends from one local address of a server: the second part of a datagram handler's `request`.

    Where the server is bound to every address there is one per address that peers have asked.
    """

    __slots__ = ("_socket", "key", "local_address", "send_now")

    def __init__(
        self, sock: "DatagramSocket", send: Callable[[Any, Any], object], key: object, local_address: Any
    ) -> None:
        self._socket = sock
        self.send_now = send
        """Called with data and an address: send, or raise BlockingIOError where the socket has no room. Counts nothing."""
        self.key = key
        self.local_address = local_address
        """What it sends from, in the form of a handler's `client_address`."""

    def sendto(self, data: Buffer, addr: Any) -> Awaitable[None]:
        """Send a datagram to `addr`, at once if the socket has room. Otherwise what is returned decides:

        awaited, it sends as soon as there is room, at the latest after ``Timeouts.send`` seconds; not awaited, the datagram
        is dropped. Whatever is dropped is counted in ``stats.send_drops``. A datagram that the system will not send, as its
        peer is unreachable or nowhere, is dropped too, and counted in ``stats.send_errors``: peers lie about where they are.
        A WARNING says if the system forbids it, as it does to send to a broadcast address without the endpoint's option.

        Raises:
            OSError: EMSGSIZE: the datagram is too large to be sent at all, the caller's fault.
        """
        send = self.send_now  # not called as a method is, which costs more
        try:
            send(data, addr)
        except (BlockingIOError, InterruptedError):
            return _Unsent(self, data, addr)
        except OSError as error:
            self._socket.count_unsendable(error, addr)
        except TypeError:
            if addr is not None:
                raise
            # A Unix socket without a name, as a client has that does not expect a reply.
            self._socket.count_unsendable(OSError(errno.EDESTADDRREQ, "the peer has no address"), addr)
        return self._socket.sent

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return "socket" or "sockname" of what it sends through, as asyncio's transports do."""
        if name == "socket":
            return self._socket.sock
        if name == "sockname":
            return self._socket.sock.getsockname()
        return default


class _Unsent(Awaitable[None]):
    """A datagram for which the socket had no room: it is sent if the handler awaits that, and else dropped."""

    __slots__ = ("_address", "_data", "_is_awaited", "_transport")

    def __init__(self, transport: DatagramTransport, data: Buffer, address: Any) -> None:
        self._transport = transport
        self._data = bytes(data)  # the caller may change what is its own
        self._address = address
        self._is_awaited = False

    def __await__(self) -> Generator[Any, Any, None]:
        self._is_awaited = True
        transport = self._transport
        return transport._socket.send_later(transport.send_now, self._data, self._address).__await__()

    def __del__(self) -> None:
        if not self._is_awaited:
            self._transport._socket.stats.send_drops += 1


class DatagramSocket:
    """Reads for a server: calls `on_datagram(data, client_address, transport)` for each datagram, in the order in which they
    arrive, and `on_turn_end()` after the datagrams of one turn of the loop. `on_gone(self, address)` says that a Unix socket
    to which something was sent is closed. `log` is for warnings, at a bounded rate. With `reads_all` a turn looks for all that
    have come, up to its bound, and not for as many as the last ones found.

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
    ) -> None:
        self.bound = bound
        self.sock = sock = bound.sock
        self.stats = stats
        self._on_datagram = on_datagram
        self._on_turn_end, self._on_gone = on_turn_end, on_gone
        self._send_timeout = send_timeout
        self._loop = asyncio.get_running_loop()
        self._watch = ReadWatch(sock, self._on_readable)
        self._reads = self._least_reads = READS_PER_TURN if reads_all else 1
        self._reads_on = self._is_closed = False
        self._log = log
        self._send_log = BoundedLog(logger, logging.DEBUG)
        # What all that were sent at once are awaited by: of what costs nothing to await, the cheapest.
        self.sent: asyncio.Future[None] = self._loop.create_future()
        self.sent.set_result(None)
        self._room = SendRoom(self._loop, sock.fileno())
        self._is_dual_stack = is_dual_stack(sock)
        send = self._send_mapped if self._is_dual_stack else sock.sendto
        self._transport = DatagramTransport(self, send, self, unmapped(sock.getsockname()))
        self._transports: dict[Any, DatagramTransport] = {}  # by the address that was asked
        self._asks_for_address = _is_bound_to_all(sock) and enable_pktinfo(sock)
        self.set_limits(limits)
        self._kernel_drops = datagram_memory(sock)[1]  # by the start

    def set_timeouts(self) -> None:
        """Do nothing: no timeout is the socket's own."""

    def set_limits(self, limits: Limits) -> None:
        """Apply `max_datagram` and `receive_buffer` from now on."""
        self._size = limits.max_datagram + 1
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
                self._reads_on = True

    def pause(self) -> None:
        """Leave what comes to the kernel until resume(); also the rest of what is just being read."""
        self._reads_on = False
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
        self._reads_on = True
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
        try:
            found_all = self._read(self._reads)
        finally:
            self._on_turn_end()
        self._reads = min(2 * self._reads, READS_PER_TURN) if found_all else max(self._least_reads, self._reads // 2)

    def _read(self, most: int) -> bool:
        """Read at most so many datagrams; return whether there were as many."""
        on_datagram, transport = self._on_datagram, self._transport
        receive, receive_message, asks = self.sock.recvfrom, self.sock.recvmsg, self._asks_for_address
        is_dual_stack = self._is_dual_stack
        for _ in range(most):
            try:
                if asks:
                    data, ancillary, _, address = receive_message(self._size, ROOM_FOR_PKTINFO)
                    transport = self._transport_for(ancillary)
                else:
                    data, address = receive(self._size)
            except (BlockingIOError, InterruptedError):
                return False
            except (OSError, MemoryError) as caught:
                if self._is_closed:
                    return False
                error = as_os_error(caught)
                if error.errno in OUT_OF_RESOURCES:
                    self._retry_later(error)
                    return False
                # What an ICMP message told of a datagram that was sent before: it is not about the next one.
                self.stats.receive_errors += 1
                self._log.report("an error was waiting on %s: %s", self.bound.name, error)
                self._watch_again()
                continue
            if is_dual_stack:
                address = unmapped(address)
            on_datagram(data, address, transport)
            if not self._reads_on:
                return False
        return True

    def _watch_again(self) -> None:
        # An error that waits in a socket, which takes one that is connected, makes libuv stop watching it (1.48).
        if self._watch.is_on:
            self.pause()
            self.resume()

    def _retry_later(self, error: OSError) -> None:
        self.stats.receive_errors += 1
        self._reads_on = False
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
