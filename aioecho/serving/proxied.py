"""A connection that begins with a PROXY header: it is its balancer's until the header is read, and then its client's.

The rule: what has no acceptable header is closed before anything else is done for it, at DEBUG, as any client may be the
cause. A balancer that connects, says so, and closes looks whether the server is there: that is no failure of anything.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from aioecho.net.proxy_header import ProxyHeader, ProxyHeaderError
from aioecho.net.proxy_protocol import ProxyProtocol, addresses_of
from aioecho.runtime.logs import format_address
from aioecho.serving.base import BaseServer
from aioecho.serving.connection import Connection
from aioecho.serving.ends import PROXY_REASONS, Reason
from aioecho.streams.handshake import Handshake
from aioecho.streams.protocol import ReadCountingProtocol
from aioecho.streams.proxy import ProxiedWriter, read_header

__all__ = ["ProxiedConnection", "admit_client", "find_probe", "log_client", "log_no_header", "report_late_header"]

logger = logging.getLogger("aioecho.server")

# What a probe's end is for other connections: always, and if the peer has ended it before the handler did.
OF_LOSS, OF_ENDS = ("connection lost", "incomplete"), ("finished", "half_closed")


def log_client(client: Any, peer: Any) -> None:
    """Log, at DEBUG, for which client a balancer has connected."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s is the client of %s", format_address(client), format_address(peer))


def admit_client(server: BaseServer, header: ProxyHeader, client: Any, counted: Any) -> Reason | None:
    """Count a client by its host, if its network is allowed. Return the reason to disconnect it, or None.

    A balancer's own connection is not judged by the networks: that it is trusted is said elsewhere.
    """
    admission = server.admission
    if counted is not None:
        return admission.admit_host(counted)
    if header.is_local or admission.networks is None or admission.networks.allow(client):
        return None
    return "not allowed"


def log_no_header(peer: Any, error: object) -> None:
    """Log, at DEBUG, that a peer has no acceptable header."""
    logger.debug("no PROXY header from %s: %s", format_address(peer), error)


def report_late_header(peer: Any, seconds: float, count: int) -> None:
    """Log, at DEBUG, that a header has not come in time."""
    what = f"only {count} bytes of it came" if count else "nothing came"
    hint = (
        ""
        if count
        else " (a balancer that sends it with the client's first bytes waits for a client that waits for us)"
    )
    log_no_header(peer, f"{what} within Timeouts.proxy, {seconds:.4g} s{hint}")


def find_probe(reason: Reason, is_ended_by_peer: bool) -> Reason:
    """Return the reason of a connection on which no byte came behind the header, given the one that it has by itself."""
    return "probe" if reason in OF_LOSS or (is_ended_by_peer and reason in OF_ENDS) else reason


class ProxiedConnection(Connection):
    """A connection that is to begin with a PROXY header.

    `client_address` is the balancer's address until the header has come, and then the one that it names.
    """

    __slots__ = ("_ended_by_peer", "_has_header_since", "_proxy", "_scope", "counted_address")

    protocol_class = ReadCountingProtocol

    counted_address: Any
    _protocol: ReadCountingProtocol

    def __init__(
        self,
        server: BaseServer,
        sock: socket.socket,
        client_address: Any,
        RequestHandlerClass: Callable[..., Any],
        proxy: ProxyProtocol,
    ) -> None:
        self._proxy = proxy
        self._scope: asyncio.Timeout | None = None  # while the header is read
        self._ended_by_peer = False
        self._has_header_since = 0.0
        self.counted_address = None
        super().__init__(server, sock, client_address, RequestHandlerClass)

    # The header.

    def _prepare(self) -> Awaitable[None]:
        return self._prepare_behind_header()

    async def _prepare_behind_header(self) -> None:
        header: ProxyHeader | None = None
        try:
            header = await self._read_header()
        finally:
            if header is None:
                self.look_at_wire()
                self._protocol.transport.abort()
        if header is None:
            return
        self._has_header_since = self._loop.time()
        peer = self.client_address
        self.client_address, counted = addresses_of(header, peer)
        log_client(self.client_address, peer)
        reason = admit_client(self._server, header, self.client_address, counted)
        if reason is not None:
            self.reason = reason
            self.look_at_wire()
            self._protocol.transport.abort()
            return
        self.counted_address = counted
        protocol, ssl = self._protocol, self.get_tls()
        writer = ProxiedWriter(protocol.transport, protocol, protocol.reader, self._loop)
        writer.proxy = header
        verifying = self._verify((protocol.reader, writer)) if ssl is None else self._secure(ssl, writer)
        if verifying is not None:
            await verifying

    async def _read_header(self) -> ProxyHeader | None:
        protocol, seconds = self._protocol, self._timeouts().proxy
        if self._server.is_draining:
            self._loop.call_soon(self.drain)  # when it waits
        try:
            async with asyncio.timeout_at(None if seconds is None else self.since + seconds) as self._scope:
                return await read_header(protocol, self._proxy)
        except ProxyHeaderError as caught:
            self.reason = PROXY_REASONS[caught.reason]
            log_no_header(self.client_address, caught)
        except TimeoutError:
            self.reason = "proxy timeout"
            report_late_header(self.client_address, seconds or 0, protocol.bytes_in)
        except (OSError, EOFError):
            self.reason = "proxy malformed" if protocol.bytes_in else "probe"
            log_no_header(self.client_address, f"the connection ended after {protocol.bytes_in} bytes of it")
        finally:
            self._scope = None
        return None

    # At a stop.

    def drain(self) -> None:
        """Do as any connection does; one that waits for its header and has not begun it has as long as a fresh one."""
        scope = self._scope
        if scope is None:
            super().drain()
        elif not self._protocol.bytes_in:
            left = self._fresh() - (self._loop.time() - self.since)
            if left > 0:
                self._loop.call_later(left, self._end_silent_one)
            else:
                self._end_silent_one()

    def _fresh_from(self) -> float:
        return max(super()._fresh_from(), self._has_header_since)

    def _end_silent_one(self) -> None:
        if self._scope is not None and not self._protocol.bytes_in and not self._is_about_to_read():
            self._scope.reschedule(0)

    def is_in_message(self) -> bool:
        """Tell whether a message, a TLS handshake or a header is in progress: cancelling the handler cuts it."""
        return self._protocol.bytes_in > 0 if self._scope is not None else super().is_in_message()

    # At its end.

    def _note_failed_handshake(self, error: OSError) -> None:
        handshake = self._protocol.get_socket_protocol()
        has_come = handshake.count if isinstance(handshake, Handshake) else self._protocol.bytes_in
        if isinstance(error, ConnectionResetError | BrokenPipeError) and not has_come:
            self.reason = "probe"
            self.look_at_wire()
        else:
            super()._note_failed_handshake(error)

    def _close_if_done(self, end: BaseException | None) -> bool:
        self._ended_by_peer = self._protocol.peer_has_closed or self._protocol.lost_with is not None
        return super()._close_if_done(end)

    def _find_reason(self, error: BaseException) -> Reason:
        self._ended_by_peer = self._protocol.peer_has_closed or self._protocol.lost_with is not None
        return self._or_probe(super()._find_reason(error))

    def _or_probe(self, reason: Reason) -> Reason:
        return reason if self._protocol.bytes_in else find_probe(reason, self._ended_by_peer)

    def __call__(self, task: "asyncio.Task[None]") -> None:
        """Count how it has ended."""
        if self.request is not None:
            self.reason = self._or_probe(self.reason)
        super().__call__(task)
