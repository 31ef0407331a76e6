"""The sessions of a server: which one gets a datagram, when one begins, and which ones end because their peers are silent."""

import asyncio
from collections.abc import Hashable
from typing import Any

from aioecho.datagrams.serving import DatagramServing
from aioecho.datagrams.sessions import Datagrams, Session
from aioecho.net.datagram_socket import DatagramTransport

__all__ = ["SessionTable"]

# A session is found silent so many times in a row before it ends: at most this part of the timeout too late.
SWEEPS = 8


class SessionTable:
    """The live sessions of `server`, by the address that was asked and the peer's."""

    def __init__(self, server: DatagramServing) -> None:
        self._server = server
        self._sessions: dict[Hashable, Session] = {}
        self._sweeps = 0
        self._timer: asyncio.TimerHandle | None = None  # for the next sweep
        self.is_closed = False
        """Whether datagrams of peers that have no session are dropped, as the server stops."""

    def receive(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        """Give a datagram to its peer's session, begin one for it, or drop it."""
        server = self._server
        if len(data) > server.limits.max_datagram:
            server.drop("truncated", client_address)
            return
        key = (transport.key, client_address)
        session = self._sessions.get(key)
        if session is not None:
            server.live_stats.received += 1
            session.last_heard = self._sweeps
            session.feed(data)
        elif self.is_closed:
            server.drop("stopped", client_address)
        elif len(self._sessions) < server.limits.max_sessions:
            server.live_stats.received += 1
            self._begin(key, client_address, transport, Datagrams(server, data))
        else:
            server.drop("too many sessions", client_address)

    def _begin(self, key: Hashable, client_address: Any, transport: DatagramTransport, datagrams: Datagrams) -> None:
        self._sessions[key] = session = Session(self._server, key, client_address, transport, datagrams)
        session.last_heard = self._sweeps
        self._server.register_connection(session)
        if self._server.is_draining:
            session.drain()
        if self._timer is None:
            self._sweep_later()

    def __len__(self) -> int:
        return len(self._sessions)

    def replace(self, ended: Session) -> None:
        """Forget a session that has ended; what its peer has sent since goes to a new one."""
        ended.finish()
        del self._sessions[ended.key]
        if ended.successor is not None:
            self._begin(ended.key, ended.client_address, ended.request[1], ended.successor)

    def stop(self) -> None:
        """End no more sessions for their silence."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep_later(self) -> None:
        timeout = self._server.handler_timeouts.session
        if timeout is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout / SWEEPS, self._sweep)

    def _sweep(self) -> None:
        """End the sessions whose peers are silent."""
        self._timer = None
        self._sweeps += 1
        for session in self._sessions.values():
            if self._sweeps - session.last_heard > SWEEPS and not session.is_over:
                session.expire()
        if self._sessions:
            self._sweep_later()
