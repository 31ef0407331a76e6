"""What a client talks through where there is no stream: a connected socket for datagrams."""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from aioecho.client.connection import Connection, Match
from aioecho.client.opening import DatagramAddress, connect_datagrams, explain
from aioecho.exceptions import ConnectionClosed, ConnectionTimeout, EndpointError

__all__ = ["DatagramConnection"]

UDP_BYTES = 2**16
"""Bytes of a datagram that is received: no system sends more over UDP."""

UNIX_BYTES = 2**18
"""The same of a Unix socket. Linux sends as much as the sender's buffer holds, which has 208 KiB by default."""

ASK_TIMEOUT = 2.0
"""Seconds for the reply to a datagram where no timeout was given: it may have been lost."""

IN_A_ROW = 64
"""Datagrams that are received without a wait before the loop runs: a server may send faster than this program reads."""


SENT_AGAIN = 64
"""Datagrams, the last ones, that are sent to the next address of a host, once no server is at the one before."""


class DatagramConnection(Connection):
    """A socket that sends datagrams to one server, and receives its alone.

    Where the server's host has several addresses, the next is used when the system says that no server is at the one before, as
    long as no datagram has come.
    """

    def __init__(
        self, endpoint: str, sock: socket.socket, further: list[DatagramAddress], timeout: float | None
    ) -> None:
        super().__init__(endpoint, timeout)
        loop = asyncio.get_running_loop()
        self._sock = sock
        self._further = further
        self._unanswered: deque[bytes] = deque(maxlen=SENT_AGAIN)  # while there are further addresses
        self._most = UNIX_BYTES if sock.family == socket.AF_UNIX else UDP_BYTES
        self._input = _Watch(sock, loop, loop.add_reader, loop.remove_reader)
        self._room = _Watch(sock, loop, loop.add_writer, loop.remove_writer)
        self._is_receiving = False
        self._in_a_row = 0
        self._sending = asyncio.Lock()  # a loop watches a socket for one task
        self._turn = asyncio.Lock()

    async def send(self, data: bytes) -> None:
        """Send a datagram: see :meth:`Connection.send`. Waits for room in the socket alone."""
        try:
            try:
                self._send_now(data)
            except BlockingIOError:
                async with asyncio.timeout(self.timeout), self._sending:
                    await self._send_with_room(data)
        except ConnectionClosed:  # by close()
            raise
        except OSError as error:
            raise self._explain(error, self.timeout, "did not take a datagram", "cannot send to") from error

    async def _send_with_room(self, data: bytes) -> None:
        while True:
            try:
                self._send_now(data)
                return
            except BlockingIOError:
                await self._room.wait()

    def _send_now(self, data: bytes) -> None:
        while True:
            try:
                self._sock.send(data)
                break
            except ConnectionRefusedError:  # what the system says of an earlier one
                if not self._go_to_next_address():
                    raise
        if self._further:
            self._unanswered.append(bytes(data))

    def _go_to_next_address(self) -> bool:
        """Send what had no reply to the next address, or return False if there is none."""
        if not self._further:
            return False
        try:
            sock, self._further = connect_datagrams(self._further)
        except OSError:
            self._further = []
            return False
        for watch in (self._input, self._room):
            watch.move(sock)
        self._sock.close()
        self._sock = sock
        for data in self._unanswered:
            with suppress(OSError):
                sock.send(data)
        if not self._further:
            self._unanswered.clear()
        return True

    async def receive(self) -> bytes:
        """Return the next datagram: see :meth:`Connection.receive`."""
        return await self._receive(self.timeout)

    async def __anext__(self) -> bytes:
        return await self._receive(self.timeout)

    async def _receive(self, timeout: float | None) -> bytes:
        self._check_not_receiving()
        self._is_receiving = True
        try:
            async with asyncio.timeout(timeout):
                if self._in_a_row >= IN_A_ROW:
                    self._in_a_row = 0
                    await asyncio.sleep(0)
                while True:
                    try:
                        data = self._sock.recv(self._most)
                    except BlockingIOError:
                        self._in_a_row = 0
                        await self._input.wait()
                    except ConnectionRefusedError:
                        if not self._go_to_next_address():
                            raise
                    else:
                        self._in_a_row += 1
                        if self._further:  # the server is there
                            self._further = []
                            self._unanswered.clear()
                        return data
        except ConnectionClosed:  # by close()
            raise
        except OSError as error:
            raise self._explain(error, timeout, "sent nothing", "cannot receive from") from error
        finally:
            self._is_receiving = False

    def _check_not_receiving(self) -> None:
        if self._is_receiving:
            raise RuntimeError(f"another task receives from {self.endpoint} already")

    async def ask(
        self, data: bytes, *, timeout: float | None = None, retries: int = 0, match: Match | None = None
    ) -> bytes:
        """Send a datagram and return the reply: see :meth:`Connection.ask`."""
        if timeout is None:
            timeout = ASK_TIMEOUT if self.timeout is None else self.timeout
        async with self._turn:
            self._check_not_receiving()  # before the request is sent: the other task would get the reply
            if match is None:
                self._drop_what_came()
                self._unanswered.clear()
            for attempt in range(retries + 1):
                end = time.monotonic() + timeout
                try:
                    await self.send(data)
                    while (left := end - time.monotonic()) > 0:
                        reply = await self._receive(left)
                        if match is None or match(reply):
                            return reply
                except ConnectionTimeout:
                    pass
                except EndpointError:  # no server is there now
                    if attempt == retries:
                        raise
                    await asyncio.sleep(end - time.monotonic())
        times = f", asked {retries + 1} times" if retries else ""
        raise ConnectionTimeout("timeout", timeout, f"{self.endpoint} sent no reply within {timeout:g} s{times}")

    def _drop_what_came(self) -> None:
        """Drop datagrams that have come, such as late replies; and errors, which are of earlier datagrams."""
        end = time.monotonic() + 0.01  # a server may send faster than this reads
        while time.monotonic() < end:
            try:
                self._sock.recv(self._most)
            except BlockingIOError:
                return
            except OSError:
                if self._sock.fileno() < 0:
                    return

    def _explain(
        self, error: OSError, timeout: float | None, what: str, verb: str
    ) -> ConnectionClosed | ConnectionTimeout | EndpointError:
        """Return the error to raise in place of the system's."""
        if isinstance(error, TimeoutError) and error.errno is None and timeout is not None:
            return ConnectionTimeout("timeout", timeout, f"{self.endpoint} {what} within {timeout:g} s")
        if self._sock.fileno() < 0:
            return self._explain_close()
        return EndpointError(f"{verb} {self.endpoint}: {explain(error)}", error.errno)

    def _explain_close(self) -> ConnectionClosed:
        return ConnectionClosed(f"the socket to {self.endpoint} was closed by this program")

    async def close(self) -> None:
        """Close the socket: see :meth:`Connection.close`. A task that sends or receives meanwhile gets ConnectionClosed."""
        for watch in (self._input, self._room):
            watch.break_off(self._explain_close())
        self._sock.close()


class _Watch:
    """Waits for one task until a socket has input, or room, as `add` and `remove` of the loop tell; or until break_off()."""

    # Not by the loop's sock_recv() and sock_sendall(): one that waits would never learn that the socket is closed.

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        add: Callable[..., object],
        remove: Callable[[int], object],
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._add = add
        self._remove = remove
        self._waiting: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait. Wakes without a reason are possible. Raises what break_off() was given."""
        waiting = self._waiting = self._loop.create_future()
        try:
            self._add(self._sock.fileno(), _wake, waiting)
            await waiting
        finally:
            if self._waiting is waiting:
                self._stop()

    def break_off(self, error: Exception) -> None:
        """Have the task that waits, if one does, raise `error`. The socket is not closed yet."""
        if (waiting := self._waiting) is not None:
            self._stop()
            if not waiting.done():
                waiting.set_exception(error)

    def move(self, sock: socket.socket) -> None:
        """Watch another socket from now on; the one before is not closed yet. A task that waits wakes."""
        if (waiting := self._waiting) is not None:
            self._stop()
            _wake(waiting)
        self._sock = sock

    def _stop(self) -> None:
        self._waiting = None
        self._remove(self._sock.fileno())


def _wake(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)
