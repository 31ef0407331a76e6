"""A blocking handler's connection that begins with a PROXY header, which is read in the event loop: no thread waits for it.

No more is read of the socket than belongs to the header, as what follows is the handler's, or TLS's.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Any

from aioecho.blocking.streams import ThreadedConnection
from aioecho.net.kernel import BYTES_RECEIVED, has_peer_ended, tcp_info
from aioecho.net.proxy_header import ProxyHeader, ProxyHeaderError, find_missing
from aioecho.net.proxy_protocol import ProxyProtocol, addresses_of
from aioecho.runtime.threads import ThreadPool
from aioecho.serving.base import BaseServer
from aioecho.serving.ends import PROXY_REASONS, Reason
from aioecho.serving.proxied import admit_client, find_probe, log_client, log_no_header, report_late_header

__all__ = ["ProxiedThreadedConnection"]

# What a handshake meets when its peer has closed or reset the connection. An end is OpenSSL's one in order, as tls.py has it.
ENDS = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class ProxiedThreadedConnection(ThreadedConnection):
    """A connection with a blocking handler that is to begin with a PROXY header.

    `client_address` is the balancer's address until the header has come, and then the one that it names. The header is the
    attribute `proxy` of the socket that the handler has.
    """

    __slots__ = ("_header", "_is_reading_header", "_proxy", "_received", "_timeout", "_timer", "counted_address")

    counted_address: Any

    def __init__(
        self,
        server: BaseServer,
        pool: ThreadPool,
        sock: socket.socket,
        client_address: Any,
        RequestHandlerClass: Callable[..., Any],
        proxy: ProxyProtocol,
    ) -> None:
        self._proxy = proxy
        self._header: ProxyHeader | None = None
        self._received = bytearray()
        self._is_reading_header = True
        self._timer: asyncio.TimerHandle | None = None
        self.counted_address = None
        super().__init__(server, pool, sock, client_address, RequestHandlerClass)
        self._timeout = self.request.gettimeout()

    # In the loop: the header.

    def begin(self) -> None:
        """Read the header, and then have the connection verified and run in a thread."""
        seconds = self._server.timeouts.proxy
        try:
            self.request.settimeout(0)
            self._loop.add_reader(self.request.fileno(), self._read_header)
        except (OSError, MemoryError) as error:  # epoll has no room
            self.reason = "handshake"
            self._server.report_not_begun(self.client_address, "PROXY header", error)
            self._end_header()
            return
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, self._time_out, seconds)

    def _read_header(self) -> None:
        received, header = self._received, None
        try:
            while header is None:
                data = socket.socket.recv(self.request, find_missing(received))
                if not data:
                    raise EOFError
                received += data
                header = self._proxy.parse(received)
        except (BlockingIOError, InterruptedError):
            return
        except ProxyHeaderError as error:
            log_no_header(self.client_address, error)
            self._reject(PROXY_REASONS[error.reason])
        except (OSError, EOFError):
            log_no_header(self.client_address, f"the connection ended after {len(received)} bytes of it")
            self._reject("proxy malformed" if received else "probe")
        else:
            self._begin_behind(header)

    def _begin_behind(self, header: ProxyHeader) -> None:
        self._stop_reading()
        self._header = self.request.proxy = header
        peer = self.client_address
        self.client_address, counted = addresses_of(header, peer)
        log_client(self.client_address, peer)
        reason = admit_client(self._server, header, self.client_address, counted)
        if reason is not None:
            self._reject(reason)
            return
        self.counted_address = counted
        self._received.clear()
        self.request.settimeout(self._timeout)
        super().begin()
        if self._server.is_draining:
            self.drain()

    def _time_out(self, seconds: float) -> None:
        report_late_header(self.client_address, seconds, len(self._received))
        self._reject("proxy timeout")

    def _reject(self, reason: Reason) -> None:
        self.reason = reason
        self._end_header()

    def _end_header(self) -> None:
        """Close, as there is no header."""
        self._stop_reading()
        self._is_reading_header = False
        self._has_returned = True
        self._left = self.request.take()
        self._close()

    def _stop_reading(self) -> None:
        self._is_reading_header = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_reader(self.request.fileno())

    # At a stop.

    def drain(self) -> None:
        """Do as any connection does; one that has not begun its header has as long as a fresh one."""
        if not self._is_reading_header:
            super().drain()
        elif not self._received:
            left = self._get_fresh_time() - (self._loop.time() - self.since)
            self._loop.call_later(max(left, 0), self._end_silent_one)

    def _end_silent_one(self) -> None:
        if self._is_reading_header and not self._received:
            self._read_header()
        if self._is_reading_header and not self._received:
            self._reject("proxy timeout")

    def cancel(self) -> None:
        """End both directions, or do without the handler if it has not begun."""
        if self._is_reading_header:
            self._is_cancelled = True
            self._reject("cancelled")
        else:
            super().cancel()

    def is_in_message(self) -> bool:
        """Tell whether a header or a message is in progress."""
        return bool(self._received) if self._is_reading_header else super().is_in_message()

    # In its thread.

    def _serve(self) -> None:
        super()._serve()
        if self.reason == "handshake" and isinstance(self._handshake_error, ENDS) and self._has_only_header(self._kept):
            self.reason, self._handshake_error = "probe", None

    def _has_only_header(self, sock: socket.socket | None) -> bool:
        """Tell whether nothing has come behind the header; True where the system does not tell."""
        received = None if sock is None else tcp_info(sock, BYTES_RECEIVED)
        assert self._header is not None
        return received is None or received <= self._header.size + 1  # the end of the stream counts as a byte

    def _call_handler(self, request: Any) -> None:
        request.proxy = self._header
        super()._call_handler(request)
        if self.reason == "finished":
            self.reason = self._find_probe("finished")

    def _find_reason(self, error: BaseException) -> Reason:
        return self._find_probe(super()._find_reason(error))

    def _find_probe(self, reason: Reason) -> Reason:
        stream: Any = self._handlers_socket
        if getattr(stream, "bytes_in", 1):
            return reason
        return find_probe(reason, has_peer_ended(self.get_socket()) is not False)
