"""The channel between the supervisor and a worker: a socket pair that carries lines of JSON."""

import asyncio
import json
import socket
from typing import Any

__all__ = ["MOST_UNSENT", "Channel"]

MOST_UNSENT = 2**26
"""Bytes that wait at most until the other side reads. A message that does not fit is lost."""

# Bytes that are read in one turn of the event loop, and above which drain() waits.
AT_ONCE = 2**18
ENOUGH_UNSENT = 2**18


class Channel:
    """Messages over one socket of a pair: a message is a name with values. No side ever waits for the other.

    What the socket has no room for is kept, and sent as the other side reads, once :meth:`attach` was called. Before that
    it is sent together with the next message.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.has_ended = False
        self._incomplete: list[bytes] = []
        self._unsent = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._room: asyncio.Event | None = None  # made by the first that waits for it
        sock.setblocking(False)

    @property
    def unsent(self) -> int:
        """How many bytes wait until the other side reads."""
        return len(self._unsent)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send in this loop what the socket has no room for yet."""
        self._loop = loop
        if self._unsent:
            loop.add_writer(self.sock.fileno(), self._flush)

    def send(self, name: str, **values: Any) -> bool:
        """Send a message. Return False if it is lost: the other side is gone, or :data:`MOST_UNSENT` bytes wait for it."""
        data = json.dumps({"": name, **values}, separators=(",", ":")).encode() + b"\n"
        if self.sock.fileno() < 0 or len(self._unsent) + len(data) > MOST_UNSENT:
            return False
        was_waiting = bool(self._unsent)
        self._unsent += data
        if was_waiting and self._loop is not None:
            return True
        return self._send_unsent()

    async def drain(self, most: int = ENOUGH_UNSENT) -> None:
        """Wait until no more than `most` bytes are unsent, or the other side is gone. Call it after :meth:`attach`."""
        if self._room is None:
            self._room = asyncio.Event()
        while len(self._unsent) > most:
            self._room.clear()
            await self._room.wait()

    def _flush(self) -> None:
        self._send_unsent()
        self._wake()

    def _send_unsent(self) -> bool:
        is_sent = True
        try:
            while self._unsent:
                with memoryview(self._unsent) as view:
                    count = self.sock.send(view[:AT_ONCE])
                del self._unsent[:count]
        except BlockingIOError:
            if self._loop is not None:
                self._loop.add_writer(self.sock.fileno(), self._flush)
            return True
        except OSError:
            self._unsent.clear()
            is_sent = False
        if self._loop is not None:
            self._loop.remove_writer(self.sock.fileno())
        return is_sent

    def _wake(self) -> None:
        if self._room is not None:
            self._room.set()

    def close(self) -> None:
        """Close the socket. What is unsent is lost."""
        if self._loop is not None and self.sock.fileno() >= 0:
            self._loop.remove_writer(self.sock.fileno())
        self._unsent.clear()
        self._wake()
        self.sock.close()

    def receive(self, *, is_last: bool = False) -> list[dict[str, Any]]:
        """Return messages that have come, the name under "". `has_ended` tells whether they were the last.

        No more than a quarter of a MiB is read, so that much to read holds up nothing else; the event loop calls again for
        the rest. With `is_last`, for a side that has ended, all is read.
        """
        read = 0
        chunks: list[bytes] = []
        while read < AT_ONCE or is_last:
            try:
                data = self.sock.recv(2**16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.has_ended = True
                break
            read += len(data)
            chunks.append(data)
        if not chunks:
            return []
        received = b"".join(chunks)
        head, newline, rest = received.rpartition(b"\n")
        if not newline:
            self._incomplete.append(received)
            return []
        lines = b"".join((*self._incomplete, head)).split(b"\n")
        self._incomplete = [rest] if rest else []
        return [json.loads(line) for line in lines]
