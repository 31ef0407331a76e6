"""Loading a server that does not echo: a script says what to send, and what the replies have to be."""

from __future__ import annotations

import socket
import time
from typing import Any

from aioecho.framing import Framing
from aioecho.load.engine import CLOSED_EARLY, RESET, TIMED_OUT, WRONG_BYTES
from aioecho.load.messages import MAX_REPLY, repeat_start
from aioecho.load.replies import ReplyConnection, ReplyEngine
from aioecho.load.script import Exchange
from aioecho.load.settings import LoadSettings
from aioecho.load.streams import OPEN_PHASE, READABLE, WOULD_BLOCK, WRITABLE, Connection

__all__ = ["ExchangeEngine"]

_BEFORE_PHASE = OPEN_PHASE + 1


class _ScriptConnection(ReplyConnection):
    """A connection, and how far it is in what comes before the load."""

    __slots__ = ("held", "step", "unsaid")

    def __init__(self, sock: socket.socket, at: int, now: int, index: int) -> None:
        super().__init__(sock, at, now, index)
        self.held = 0  # bytes of the first message, which waits until all before it is done
        self.step = 0
        self.unsaid: bytes | None = None  # of this step; None: it has not begun


class ExchangeEngine(ReplyEngine):
    """The engine for `tcp://` and `unix:` with a script."""

    connections: dict[int, _ScriptConnection]  # type: ignore[assignment]

    def __init__(self, settings: LoadSettings, share: int, shares: int, control: Any = None) -> None:
        assert settings.script is not None
        self.exchanges = settings.script.exchanges
        self.framing: Framing | None = settings.framing and settings.framing.limited(MAX_REPLY)
        self.joined = [self._join(exchange) for exchange in self.exchanges]
        self.before = [(self._join(exchange), exchange) for exchange in settings.script.before]
        super().__init__(settings, share, shares, control)

    def _join(self, exchange: Exchange) -> bytes:
        return self.framing.join(exchange.send) if self.framing and exchange.send else exchange.send

    def _make_pool(self) -> tuple[bytes, int]:
        pool = b"".join(self.joined)
        return repeat_start(pool), len(pool)

    def _make_connection(self, sock: socket.socket, index: int) -> _ScriptConnection:
        return _ScriptConnection(sock, 0, time.perf_counter_ns(), 0)

    def _split(self, c: ReplyConnection, chunk: bytes) -> int:
        buffer, owed = c.buffer, len(c.due)
        buffer += chunk
        done = 0
        while done < owed and self._take(c, self.exchanges[c.to_read]):
            c.to_read = (c.to_read + 1) % len(self.exchanges)
            done += 1
        if done == owed and (c.frames or buffer):
            raise ValueError(f"the server sent more than was expected: {chunk[:40]!r}")
        return done

    def _take(self, c: ReplyConnection, exchange: Exchange) -> bool:
        """Take the reply of an exchange from the front of what has come. Raises ValueError if that is another."""
        buffer, framing = c.buffer, self.framing
        if framing is None:
            if not buffer:
                return False
            size = exchange.expect.find(buffer)
            if not size and len(buffer) > MAX_REPLY:
                raise ValueError(f"{len(buffer)} bytes came, and none end what matches {exchange.expect}")
            del buffer[:size]
            return size > 0
        if not c.frames:
            c.frames.extend(c.split(framing, MAX_REPLY))
        if not c.frames:
            return False
        frame = c.frames.popleft()
        if not exchange.expect.accepts(frame):
            raise ValueError(f"expected {exchange.expect}, got the frame {frame[:40]!r}")
        return True

    # What comes before the load, once on each connection.

    def _advance(self, c: Connection) -> None:
        assert isinstance(c, _ScriptConnection)
        if c.phase == _BEFORE_PHASE:
            self._go_on(c)
            return
        if self.before and not c.held:
            c.held, c.unsent = c.unsent, 0
        super()._advance(c)
        if self.before and c.phase == OPEN_PHASE:
            c.phase = _BEFORE_PHASE
            self._go_on(c)

    def _go_on(self, c: _ScriptConnection) -> None:
        """Send and receive what comes before the load, as far as it goes without waiting."""
        try:
            while c.step < len(self.before):
                joined, exchange = self.before[c.step]
                if c.unsaid is None:
                    c.unsaid = joined
                while c.unsaid:
                    c.unsaid = c.unsaid[c.send(c.unsaid) :]
                if not self._take(c, exchange):
                    chunk = c.recv(self.recv_bytes)
                    if not chunk:
                        self._fail(c, CLOSED_EARLY, f"the server closed before it had sent {exchange.expect}")
                        return
                    c.buffer += chunk
                    c.since = time.perf_counter_ns()
                    continue
                c.step += 1
                c.unsaid = None
            if c.frames or c.buffer:
                more = c.frames[0] if c.frames else bytes(c.buffer)
                raise ValueError(f"the server sent more than was expected: {more[:40]!r}")
        except WOULD_BLOCK:
            self._watch(c, READABLE | WRITABLE if c.unsaid else READABLE)
            return
        except OSError as error:
            self._fail(c, RESET, error)
            return
        except ValueError as error:
            self._fail(c, WRONG_BYTES, error)
            return
        c.phase = OPEN_PHASE
        c.unsent = c.held
        if self._flush(c) and c.watched:
            self._watch(c, c.watched)  # the reply may have come, which nothing more would tell

    def _fail_silent(self, now: int) -> None:
        for c in list(self.connections.values()):
            if c.due and now - c.since > self.timeout:
                if c.phase == _BEFORE_PHASE:
                    expected, sent = self.before[c.step][1].expect, self.before[c.step][0]
                else:
                    expected, sent = self.exchanges[c.to_read].expect, self.joined[c.to_read]
                what = f"got {bytes(c.buffer[:40])!r}" if c.buffer else "nothing came"
                if not c.buffer and self.framing is None and sent and not sent.endswith(b"\n"):
                    what += "; what was sent has no newline at its end"
                seconds = f"{self.settings.effective_timeout_s:g} s"
                self._fail(c, TIMED_OUT, f"expected {expected} within {seconds}, and {what}")
