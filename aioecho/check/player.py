"""Plays conversations with a handler: a server in this process, and one client of it, over TCP on the loopback interface."""

import asyncio
import contextlib
import fcntl
import socket
import struct
import sys
import termios
import threading
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from aioecho.check.loop import HandlerStuck, QuietLoop, interrupt
from aioecho.config import Limits, Timeouts
from aioecho.server import TCPServer
from aioecho.serving.handler_types import is_blocking

__all__ = ["Outcome", "Player", "Session"]

PATIENCE = 3.0
"""Seconds that a handler may take to end once its client has."""

SETTLE = 0.25
"""Seconds after which what the server has not done counts as not to be expected."""

STOP = 0.1
"""Seconds of grace for what is left of a handler at the end of a conversation."""

MOST_KEPT = 2**20
"""Bytes of the replies that are kept. Of what comes beyond only the number counts."""

LIMITS = Limits(max_frame=2**20, max_write_buffer=2**20)
TIMEOUTS = Timeouts(lost=1.0, linger=0.1)


@dataclass
class Outcome:
    """How a conversation went."""

    replies: bytes = b""
    """What the handler has sent, but for what went beyond MOST_KEPT bytes."""

    has_ended: bool = False
    """Whether the handler ended by itself, within PATIENCE seconds after its client."""

    is_endless: bool = False
    """Whether more than MOST_KEPT bytes were sent."""

    was_stuck: bool = False
    """Whether the handler ran for seconds without waiting for anything."""

    errors: list[str] = field(default_factory=list)
    """What the handler has raised that is a mistake of its own: the exceptions as text."""

    before_stop: bytes = b""
    """The replies that had come when the server began to stop, where it did."""

    reasons: Collection[str] = ()
    """Why its connections ended."""

    @property
    def facts(self) -> tuple[object, ...]:
        """What has to be the same when the same is said again."""
        return self.replies, self.has_ended, self.was_stuck, sorted(set(self.errors))


class _Server(TCPServer):
    """Notes what handlers raise, and the socket of its client."""

    def __init__(self, handler: Callable[..., Any], outcome: Outcome, **options: Any) -> None:
        super().__init__(("127.0.0.1", 0), handler, **options)
        self.outcome = outcome
        self.client_socket: Any = None

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Note the socket, and serve the client."""
        self.client_socket = request[1].get_extra_info("socket") if isinstance(request, tuple) else request
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what the handler has raised, if that is a mistake of its own."""
        error = sys.exception()
        if isinstance(error, HandlerStuck):
            self.outcome.was_stuck = True
        elif error is not None and not self.is_peers_fault(error):
            self.outcome.errors.append(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


class Session:
    """A server, and a client of it that is connected. The methods are what the client does."""

    def __init__(self, server: _Server, loop: QuietLoop, outcome: Outcome, pace: float, is_blocking: bool) -> None:
        self.server, self.outcome = server, outcome
        self._loop, self._pace, self._is_blocking = loop, pace, is_blocking
        self._sock = self._new_socket()
        self._sent = self._received = 0
        self._replies = bytearray()
        self._reading: asyncio.Task[None] | None = None

    @staticmethod
    def _new_socket() -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        return sock

    async def connect(self, *, reads: bool = True, buffer: int | None = None) -> None:
        """Connect, and wait until the server has nothing more to do. `buffer` bytes are the kernel's in either direction."""
        if self._sock.fileno() < 0:  # it has connected before
            self._sock, self._sent, self._received = self._new_socket(), 0, 0
        if buffer is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._loop.sock_connect(self._sock, self.server.server_address)
        if reads:
            self._reading = asyncio.create_task(self._read())
        await self.settle()
        if buffer is not None and self.server.client_socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self.server.client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)

    @property
    def is_over(self) -> bool:
        """Whether the server has ended the stream, or broken the connection."""
        return self._reading is not None and self._reading.done()

    async def _read(self) -> None:
        with contextlib.suppress(OSError):  # a reset: the end too
            while data := await self._loop.sock_recv(self._sock, 2**18):
                self._received += len(data)
                self._replies += data[: MOST_KEPT - len(self._replies)]

    async def send(self, *pieces: bytes) -> None:
        """Send some pieces. The server reads every piece by itself, and does what it can, before the next one comes."""
        for piece in pieces:
            if self.is_over:
                return
            try:
                await asyncio.wait_for(self._loop.sock_sendall(self._sock, piece), PATIENCE)
            except TimeoutError:
                return  # a part of it is on its way: what came behind that would be another record
            except OSError:
                pass  # the server has closed: it does not want this
            self._sent += len(piece)
            await self.settle()

    def send_now(self, data: bytes | memoryview) -> int:
        """Send what the kernel takes at once; return how many bytes that were. Raises OSError if the server has closed."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    async def settle(self) -> None:
        """Wait until the server has read all that was sent, has done what it can, and its replies are here."""
        # One that sends without end never settles.
        seconds = SETTLE if self._received < MOST_KEPT else 0.01
        deadline = self._loop.time() + seconds
        while self._loop.time() < deadline:
            if await self._loop.quiet(seconds) and self._has_arrived():
                break
            await asyncio.sleep(0.001)  # the kernel, or a handler's thread, is not done: neither tells when it is
        if self._pace:
            before, deadline = -1, self._loop.time() + SETTLE  # one that sends by a timer may never be silent
            while before != self._received < MOST_KEPT and not self.is_over and self._loop.time() < deadline:
                before = self._received
                await asyncio.sleep(self._pace)

    def _has_arrived(self) -> bool:
        if self.is_over:
            return True
        connection = next(iter(self.server.connections), None)
        if connection is None:
            return not self.server.stats.active and self.server.stats.accepted > 0
        counts = connection.bytes()
        if counts.received is not None and counts.received < self._sent:
            return False
        if self._is_blocking and self._unread():
            return False
        return counts.sent is None or self._reading is None or counts.sent - counts.unsent <= self._received

    def _unread(self) -> int:
        """Return how many bytes the kernel holds that a blocking handler has not read."""
        try:
            found = fcntl.ioctl(self.server.client_socket.fileno(), termios.FIONREAD, b"\0" * 4)
        except (OSError, ValueError):  # it is closed
            return 0
        return int(struct.unpack("i", found)[0])

    async def is_quiet(self) -> bool:
        """Tell whether the server waits for something: its client, a timer, a thread."""
        return await self._loop.quiet(0.01)

    def end(self) -> None:
        """End the client's direction of the stream."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Break the connection."""
        self._stop_reading()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def close(self) -> None:
        """Close the client's socket."""
        self._stop_reading()
        self._sock.close()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    async def wait_end(self, patience: float) -> bool:
        """Wait until the server has ended the stream; return whether it was within so many seconds."""
        if self._reading is None:
            return True
        return bool((await asyncio.wait({self._reading}, timeout=patience))[0])

    async def wait_handler(self, patience: float) -> bool:
        """Wait until no connection is left on the server; return whether it was within so many seconds."""
        deadline = self._loop.time() + patience
        while self.server.stats.active:
            if self._loop.time() > deadline:
                return False
            await asyncio.sleep(0.002)  # no event tells of it
        return True

    def take_replies(self) -> bytes:
        """Return the replies so far."""
        return bytes(self._replies)


Steps = Callable[[Session], Awaitable[None]]


class Player:
    """Plays conversations with one handler class, one after another, in a loop of its own.

    `pace` is how many seconds without a byte from the server count as the end of what it says; 0: as soon as it waits.
    """

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.handler = handler
        self.pace = 0.0
        self.patience = PATIENCE
        self._loop: QuietLoop | None = None
        self._runner = asyncio.Runner(loop_factory=self._make_loop)
        self._cache: dict[object, Outcome] = {}

    def _make_loop(self) -> QuietLoop:
        self._loop = QuietLoop()
        # What handlers' own tasks raise would be noise if it were printed.
        self._loop.set_exception_handler(lambda loop, context: None)
        return self._loop

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._runner.close()

    def play(self, *pieces: bytes, ends_at_once: bool = False, is_cached: bool = True) -> Outcome:
        """Say these pieces, and end the stream; with `ends_at_once` the end comes together with the last piece."""
        key = pieces, ends_at_once
        if not is_cached or key not in self._cache:
            self._cache[key] = self.run(lambda session: self._say(session, pieces, ends_at_once))
        return self._cache[key]

    async def _say(self, session: Session, pieces: Sequence[bytes], ends_at_once: bool) -> None:
        await session.connect()
        if ends_at_once:
            await session.send(*pieces[:-1])
            with contextlib.suppress(OSError):
                left = pieces[-1][session.send_now(pieces[-1]) :]
                if left:  # it is more than the kernel takes at once
                    await session.send(left)
        else:
            await session.send(*pieces)
        session.end()
        session.outcome.has_ended = await session.wait_end(self.patience)

    def run(self, steps: Steps, **options: Any) -> Outcome:
        """Start a server, run what a client does, and stop it; return how it went. `options` are the server's."""
        outcome = Outcome()
        loop = self._runner.get_loop()
        assert isinstance(loop, QuietLoop)
        loop.was_stuck = False
        with loop.watched():
            try:
                self._runner.run(self._run(steps, outcome, options))
            except BaseException as error:
                if not loop.was_stuck or isinstance(error, KeyboardInterrupt):
                    raise
                self._runner = asyncio.Runner(loop_factory=self._make_loop)  # what is left of the other spins on
        outcome.was_stuck = outcome.was_stuck or loop.was_stuck
        return outcome

    async def _run(self, steps: Steps, outcome: Outcome, options: dict[str, Any]) -> None:
        assert self._loop is not None
        options = {"limits": LIMITS, "timeouts": TIMEOUTS, "grace": STOP, **options}
        threads = set(threading.enumerate())
        server = _Server(self.handler, outcome, **options)
        session = Session(server, self._loop, outcome, self.pace, is_blocking(self.handler))
        async with server:
            try:
                await steps(session)
            finally:
                outcome.replies = session.take_replies()
                outcome.is_endless = len(outcome.replies) == MOST_KEPT
                session.close()
                outcome.reasons = tuple(server.stats.reasons)
        outcome.reasons = tuple(server.stats.reasons)
        await self._end_tasks()
        for thread in set(threading.enumerate()) - threads:
            if thread.name.startswith("aioecho-") and thread.ident is not None:
                interrupt(thread.ident)  # a blocking handler that was left behind: it may spin

    async def _end_tasks(self) -> None:
        """Cancel what the handler's own tasks are: the next conversation begins with none."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP)
