"""The sessions of a server: which one gets a datagram, when one begins, and which ones end because their peers are silent."""

import asyncio
from collections.abc import Hashable, Iterable, Iterator
from time import monotonic
from typing import Any

from aioecho.datagrams.handover import Key
from aioecho.datagrams.places import Places
from aioecho.datagrams.serving import DatagramServing
from aioecho.datagrams.sessions import Datagrams, Session
from aioecho.net.datagram_socket import DatagramSocket
from aioecho.net.datagram_transport import DatagramSource, DatagramTransport
from aioecho.net.proxy_datagrams import ProxiedTransport
from aioecho.serving.admission import host_of

__all__ = ["SessionTable"]

# A session is found silent so many times in a row before it ends: at most this part of the timeout too late.
SWEEPS = 8

# Seconds: `accept_rate` lets as many sessions begin at once. A peer that comes faster is dropped, as nothing could wait for it.
BURST = 1.0


class Newcomer:
    """A peer that waits for the place of a session of another host, which has more than its share."""

    __slots__ = ("client_address", "datagrams", "key", "last_heard", "transport")

    is_over = True  # nothing is to end it for its silence

    def __init__(self, key: Hashable, client_address: Any, transport: DatagramTransport, datagrams: Datagrams) -> None:
        self.key, self.client_address, self.transport, self.datagrams = key, client_address, transport, datagrams
        self.last_heard = 0

    def feed(self, data: bytes) -> None:
        """Keep a datagram for the session."""
        self.datagrams.feed(data, monotonic())


class SessionTable:
    """The live sessions of `server`, by the address that was asked and the peer's.

    When all places are taken, a host that has the most of them yields one to a newcomer of a host with at least two fewer: the
    session that has been quiet for longest ends. So no host keeps another one out.
    """

    def __init__(self, server: DatagramServing) -> None:
        self._server = server
        self._sessions: dict[Hashable, Session | Newcomer] = {}
        self._places: Places[Session | Newcomer] = Places()
        self._next = 0.0  # when accept_rate allows the next session
        self._sweeps = 0
        self._timer: asyncio.TimerHandle | None = None  # for the next sweep
        self.sockets: dict[str, DatagramSocket] = {}
        """What is read, by name."""
        self.is_closed = False
        """Whether datagrams of peers that have no session are dropped, as the server stops."""

    def serve(self, datagrams: Iterator[tuple[bytes, Any]], source: DatagramSource) -> OSError | MemoryError | None:
        """Give every datagram that `datagrams` reads from `source` to its peer's session, begin one for it, or drop it.

        Return what reading has raised.
        """
        find, longest, counts = self._sessions.get, source.longest, self._server.live_stats
        now = monotonic()  # for all that come in this turn
        while True:
            try:
                data, client_address = next(datagrams)
            except StopIteration:
                return None
            except (OSError, MemoryError) as error:
                return error
            transport = source.transport
            session = find((transport.key, client_address))
            if len(data) > longest:
                self._server.drop("truncated", client_address)
            elif session is None:
                self.receive(data, client_address, transport)
            else:
                counts.received += 1
                session.last_heard = self._sweeps
                if session.is_over:
                    session.feed(data)
                else:
                    session.datagrams.feed(data, now)
            if not source.is_reading:
                return None

    def count_all(self) -> None:
        """Do nothing: a session counts every datagram."""

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
            return
        handover = server.handover
        if handover is not None and handover.forward(_key_of(transport, client_address), data, transport):
            return
        reason = "stopped" if self.is_closed else self._find_reason_to_drop(client_address)
        if reason is not None:
            server.drop(reason, client_address)
            return
        limits = server.limits
        most = min(limits.max_sessions, limits.max_connections or limits.max_sessions)
        if len(self._places) < most:
            yielding = None
        elif (yielding := self._find_yielding(host_of(client_address))) is None:
            server.drop("too many sessions", client_address)
            return
        server.live_stats.received += 1
        if limits.accept_rate is not None:
            self._next = max(self._next, asyncio.get_running_loop().time() - BURST) + 1 / limits.accept_rate
        datagrams = Datagrams(server, data)
        if yielding is None:
            self._begin(key, client_address, transport, datagrams)
        else:
            self._begin_after(yielding, Newcomer(key, client_address, transport, datagrams))

    def _find_reason_to_drop(self, client_address: Any) -> str | None:
        """Return which limit keeps a peer from a session, of the limits that are off by default."""
        limits = self._server.limits
        if limits.max_per_host is not None:
            host = host_of(client_address)
            if host is not None and self._places.count_of(host) >= limits.max_per_host:
                return "per host"
        if limits.accept_rate is not None and asyncio.get_running_loop().time() < self._next:
            return "accept rate"
        return None

    def _find_yielding(self, host: str | None) -> Session | None:
        """Return the session that is to end for a newcomer of `host`: one that waits for its peer, if there is any."""
        found = [each for each in self._places.find_yielding(host) if isinstance(each, Session) and not each.is_over]
        return min(found, key=lambda each: (not each.datagrams.is_quiet(), each.datagrams.last_active), default=None)

    def _begin_after(self, yielding: Session, newcomer: Newcomer) -> None:
        self._places.remove(host_of(yielding.client_address), yielding)
        self._places.add(host_of(newcomer.client_address), newcomer)
        self._sessions[newcomer.key] = newcomer
        newcomer.last_heard = self._sweeps
        yielding.newcomer = newcomer
        yielding.expire()

    def _begin(self, key: Hashable, client_address: Any, transport: DatagramTransport, datagrams: Datagrams) -> None:
        self._sessions[key] = session = Session(self._server, key, client_address, transport, datagrams)
        self._places.add(host_of(client_address), session)
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
        self._places.remove(host_of(ended.client_address), ended)
        newcomer, successor = ended.newcomer, ended.successor
        handover = self._server.handover
        key = _key_of(ended.request[1], ended.client_address)
        if self._server.is_grace_over:  # nothing begins any more
            self._pass_on(key, ended.datagrams)
            if successor is not None:
                self._pass_on(key, successor)
                successor = None
            if newcomer is not None:
                self._pass_on(_key_of(newcomer.transport, newcomer.client_address), newcomer.datagrams)
                del self._sessions[newcomer.key]
                self._places.remove(host_of(newcomer.client_address), newcomer)
                newcomer = None
        if handover is not None and successor is None:
            handover.note_end(key)
        if newcomer is not None:
            self._places.remove(host_of(newcomer.client_address), newcomer)
            self._begin(newcomer.key, newcomer.client_address, newcomer.transport, newcomer.datagrams)
        elif successor is not None:
            self._begin(ended.key, ended.client_address, ended.request[1], successor)

    def _pass_on(self, key: Key, datagrams: Datagrams) -> None:
        """Have the worker's successor serve what no handler here has read when the grace is over, or drop it."""
        handover = self._server.handover
        if handover is not None and handover.has_left:
            for data in datagrams.take_unread():
                if not handover.give_back(key, data):
                    self._server.drop("stopped", key[2])
        datagrams.drop("stopped")

    def end_gone(self, sock: DatagramSocket, client_address: Any) -> None:
        """End the session of a Unix peer that has closed its socket."""
        session = self._sessions.get((sock, client_address))
        if isinstance(session, Session) and not session.is_over:
            session.expire()

    # What its handover asks of it.

    def keys(self) -> Iterable[Key]:
        """Return what the sessions have in any process."""
        sessions = [each for each in self._sessions.values() if isinstance(each, Session)]
        return [_key_of(each.request[1], each.client_address) for each in sessions]

    def has_socket(self, name: str) -> bool:
        """Tell whether a socket is one of its server's."""
        return name in self.sockets

    def feed(self, key: Key, data: bytes) -> bool:
        """Give a datagram to its peer's session, or return False if there is none."""
        name, asked, client_address, balancer = key
        inner: Hashable = self.sockets[name] if asked is None else (name, asked)
        session = self._sessions.get((inner if balancer is None else (inner, balancer), client_address))
        if session is None:
            return False
        self._server.live_stats.received += 1
        session.last_heard = self._sweeps
        session.feed(data)
        return True

    def take_back(self, key: Key, data: bytes, transport: DatagramTransport | None) -> None:
        """Begin a session with a datagram of a peer whose session has ended in another process, or drop it.

        `transport` replies to it. Where that is not known, as another worker has passed the datagram on, it is the socket's; a
        balancer's headers are not known then.
        """
        name, asked, client_address, balancer = key
        if self.feed(key, data):  # of several that come back at once the first begins the session
            return
        if transport is None and balancer is not None:
            self._server.drop("session ended", client_address)
        else:
            self.receive(data, client_address, transport or self.sockets[name].transport_from(asked))

    def note_no_room(self, key: Key) -> None:
        """Count a datagram that could not be passed on to the worker with its session."""
        self._server.drop("session queue full", key[2])

    def stop_reading(self) -> None:
        """Leave what comes to the worker's successor."""
        self._server.stop_reading()

    def read_on(self) -> None:
        """Read, as far as the server does."""
        self._server.read_on()

    def end_all(self) -> None:
        """Let all sessions end: no datagram reaches them any more."""
        for session in list(self._sessions.values()):
            if isinstance(session, Session) and not session.is_over:
                session.datagrams.end()

    def stop(self) -> None:
        """End no more sessions for their silence."""
        if self._server.handover is not None:
            self._server.handover.close(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep_later(self) -> None:
        timeout = self._server.handler_timeouts.session
        if timeout is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout / SWEEPS, self._sweep)

    def _sweep(self) -> None:
        """End the sessions of silent peers."""
        self._timer = None
        self._sweeps += 1
        for session in self._sessions.values():
            if not session.is_over and self._sweeps - session.last_heard > SWEEPS:
                assert isinstance(session, Session)
                session.expire()
        if self._sessions:
            self._sweep_later()


def _key_of(transport: DatagramTransport, client_address: Any) -> Key:
    key: Any = transport.key
    balancer = None
    if isinstance(transport, ProxiedTransport):
        key, balancer = key
    name, asked = (key.bound.name, None) if isinstance(key, DatagramSocket) else key
    return name, asked, client_address, balancer
