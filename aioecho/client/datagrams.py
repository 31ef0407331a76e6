"""What a client talks through where there is no stream: a connected socket for datagrams."""

import asyncio
import socket
import time

from aioecho.client.connection import Connection, Match
from aioecho.client.opening import explain
from aioecho.exceptions import ConnectionClosed, ConnectionTimeout, EndpointError

__all__ = ["DatagramConnection"]

MOST_BYTES = 2**16
"""Bytes of a datagram that is received: no system sends more over UDP."""

ASK_TIMEOUT = 2.0
"""Seconds for the reply to a datagram where no timeout was given: it may have been lost."""


class DatagramConnection(Connection):
    """A socket that sends datagrams to one server, and receives its alone."""

    def __init__(self, endpoint: str, sock: socket.socket, timeout: float | None) -> None:
        super().__init__(endpoint, timeout)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None  # of the task that receives
        self._turn = asyncio.Lock()

    async def send(self, data: bytes) -> None:
        """Send a datagram: see :meth:`Connection.send`. Waits for room in the socket alone."""
        try:
            try:
                self._sock.send(data)
            except BlockingIOError:
                async with asyncio.timeout(self.timeout):
                    await self._loop.sock_sendall(self._sock, data)
        except OSError as error:
            raise self._explain(error, self.timeout, "did not take a datagram", "cannot send to") from error

    async def receive(self) -> bytes:
        """Return the next datagram: see :meth:`Connection.receive`."""
        return await self._receive(self.timeout)

    async def __anext__(self) -> bytes:
        return await self._receive(self.timeout)

    async def _receive(self, timeout: float | None) -> bytes:
        if self._waiting is not None:
            raise RuntimeError(f"another task receives from {self.endpoint} already")
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        return self._sock.recv(MOST_BYTES)
                    except BlockingIOError:
                        await self._wait()
        except OSError as error:
            raise self._explain(error, timeout, "sent nothing", "cannot receive from") from error

    async def _wait(self) -> None:
        """Wait until there is something to receive."""
        # Not by the loop's sock_recv(): one that waits would never learn that the socket is closed.
        waiting = self._waiting = self._loop.create_future()
        self._loop.add_reader(self._sock.fileno(), _wake, waiting)
        try:
            await waiting
        finally:
            if self._waiting is waiting:
                self._stop_waiting()

    def _stop_waiting(self) -> None:
        self._waiting = None
        self._loop.remove_reader(self._sock.fileno())

    async def ask(
        self, data: bytes, *, timeout: float | None = None, retries: int = 0, match: Match | None = None
    ) -> bytes:
        """Send a datagram and return the reply: see :meth:`Connection.ask`."""
        if timeout is None:
            timeout = ASK_TIMEOUT if self.timeout is None else self.timeout
        async with self._turn:
            if match is None:
                self._drop_what_came()
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
                self._sock.recv(MOST_BYTES)
            except BlockingIOError:
                return
            except OSError:
                if self._sock.fileno() < 0:
                    return

    def _explain(
        self, error: OSError, timeout: float | None, what: str, verb: str
    ) -> ConnectionClosed | ConnectionTimeout | EndpointError:
        """Return the error to raise in place of the system's."""
        if isinstance(error, ConnectionClosed):
            return error
        if isinstance(error, TimeoutError) and error.errno is None and timeout is not None:
            return ConnectionTimeout("timeout", timeout, f"{self.endpoint} {what} within {timeout:g} s")
        if self._sock.fileno() < 0:
            return self._explain_close()
        return EndpointError(f"{verb} {self.endpoint}: {explain(error)}", error.errno)

    def _explain_close(self) -> ConnectionClosed:
        return ConnectionClosed(f"the socket to {self.endpoint} was closed by this program")

    async def close(self) -> None:
        """Close the socket: see :meth:`Connection.close`. A task that receives meanwhile gets ConnectionClosed."""
        if self._waiting is not None:
            waiting = self._waiting
            self._stop_waiting()
            if not waiting.done():
                waiting.set_exception(self._explain_close())
        self._sock.close()


def _wake(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)
