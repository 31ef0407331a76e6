"""The stream that a handler writes: asyncio's with the same behaviour to the letter."""

import asyncio
import socket
import ssl as ssl_module
import sys
from collections.abc import Iterable
from time import monotonic

from aioecho.streams.handshake import start_tls
from aioecho.streams.handshake_limit import TermsOfConnection
from aioecho.streams.news import Buffer
from aioecho.streams.protocol import ReadCountingProtocol, StreamProtocol
from aioecho.streams.reader import StreamReader
from aioecho.streams.tls import FOR_EVER

__all__ = ["StreamWriter"]

# asyncio's transports forgot their high-water mark in writelines(), so that drain() never waited (CVE-2024-12254). This can
# go with the last Python that has it.
WRITELINES_NEVER_PAUSES = (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2)


class StreamWriter(asyncio.StreamWriter):
    """asyncio's StreamWriter. Made by the server."""

    __slots__ = ("_loop", "_protocol", "_reader", "_transport", "protocol")  # not in the dictionary: see StreamReader's

    _transport: asyncio.Transport
    _protocol: StreamProtocol  # what asyncio's own methods look for
    protocol: StreamProtocol
    """The same, for what sends without a call of :meth:`write`."""

    _reader: StreamReader | None
    _loop: asyncio.AbstractEventLoop
    _has_ended = False
    _shares_transport = False  # what is written to the transport directly is not to overtake what was written here

    def __init__(
        self,
        transport: asyncio.Transport,
        protocol: StreamProtocol,
        reader: StreamReader | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        # Not super().__init__(): it makes a future that nothing uses, for every connection.
        self._transport = transport
        self.protocol = self._protocol = protocol
        self._reader = reader
        self._loop = loop

    def write(self, data: Buffer) -> None:
        """Send `data` as soon as the peer takes it; does not wait: :meth:`drain` does.

        A server's stream is cut off if more than Limits.max_write_buffer waits to be sent already.
        """
        protocol = self.protocol
        collected = protocol.collected
        if collected is not None:  # most records come here
            protocol.unanswered = False
            collected.room -= collected.write(data)
            if collected.room < 0 or monotonic() > collected.flush_at:
                protocol.flush()
        elif not protocol.needs_slow_path:
            if protocol.unanswered:
                protocol.unanswered = False
            elif protocol.is_write_lost():  # of several in a row the loops would log every one
                return
            self._transport.write(data)
        elif self._has_ended:  # after shut() the transport does not know
            raise RuntimeError("Cannot call write() after write_eof()")  # as asyncio's
        elif self._shares_transport:
            protocol.write_through(data)
        else:
            protocol.write(data)

    @property
    def transport(self) -> asyncio.Transport:
        """The transport; what was written has been handed to it, and from now on what is written is at once."""
        protocol = self.protocol
        protocol.flush()
        self._shares_transport = True
        protocol.share_transport()
        return self._transport

    def writelines(self, data: Iterable[Buffer]) -> None:
        """Send all of `data`, in order."""
        if WRITELINES_NEVER_PAUSES or self.protocol.needs_slow_path or self.protocol.is_write_lost():
            self.write(b"".join(data))
        else:
            self.protocol.unanswered = False
            self._transport.writelines(data)

    def close(self) -> None:
        """Close the connection when all that was written is sent. A read that waits gets the end of the stream."""
        transport, reader = self._transport, self._reader
        self.protocol.flush()
        if not transport.is_closing():  # one of asyncio's for TLS that is closed twice can't be aborted any more
            if self.protocol.is_tls:
                self.protocol.mark_due()  # it waits until its peer closes too, which has its time
                if reader is not None:
                    if reader._paused:
                        transport.resume_reading()  # or asyncio's would not see that its peer closes too
                    reader.feed_eof()  # without TLS the loop tells it in its next turn
            transport.close()

    def write_eof(self) -> None:
        """End this direction when all that was written is sent. Does nothing on a connection that is lost."""
        self.protocol.flush()
        self._has_ended = self._transport.can_write_eof()  # TLS raises, and goes on
        if not self.protocol.is_lost:  # uvloop's transport would raise RuntimeError
            try:
                self._transport.write_eof()
            except OSError:  # asyncio's: the peer has reset the connection, and the loop does not know yet
                if self._reader is None or self._reader._paused:
                    self._transport.abort()  # else it will learn that, and with what it broke, when it reads

    def shut(self, sock: socket.socket) -> bool:
        """Do what write_eof() does, where nothing waits to be sent, and drop what comes. Return False if that is impossible.

        A transport would take a turn of the loop, and a system call more. `sock` is the connection's. Other code that has the
        transport, and writes to it, is to meet the end there: a write to the socket would abort the connection.
        """
        if self._shares_transport:
            return False
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # the peer has reset the connection, which the loop will tell
            return False
        self.protocol.discard()
        self._has_ended = self.protocol.needs_slow_path = True  # discard() may have found nothing to look at
        return True

    async def drain(self) -> None:
        """Wait, once more than the high-water mark waits to be sent, until it is no more than the low-water mark.

        Raises:
            ConnectionResetError: the connection is gone.
            OSError: what the reader would raise.
        """
        reader, protocol, transport = self._reader, self.protocol, self._transport
        if protocol.collected is not None or not (protocol.needs_slow_path or transport.is_closing()):
            return
        if reader is not None and reader._exception is not None:
            raise reader._exception
        if reader is not None and reader._overdue is not None:
            reader.raise_overdue()
        if transport.is_closing():
            # Give connection_lost() a turn to run, else a loop of write() and drain() would never learn of it.
            await asyncio.sleep(0)
        if protocol.paused_since is not None or protocol.is_lost:
            await protocol._drain_helper()

    async def start_tls(
        self,
        sslcontext: ssl_module.SSLContext,
        *,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        """Go over to TLS on this connection, on the side that this program has in it (server or client).

        What the reader had buffered is taken for the beginning of the handshake. So a client may send its hello right
        behind the command that asks for TLS, and no third party can slip plain text in between the two (CVE-2011-0411).

        The timeouts are in seconds. If they are None, a server's Timeouts.handshake holds for the handshake, else 60, and
        Timeouts.linger for the shutdown, else 30.

        Raises:
            ssl.SSLError, ConnectionError: the handshake failed. The connection is closed.
        """
        protocol, reader, transport = self.protocol, self._reader, self._transport
        driver = protocol.driver  # a server's connection
        protocol.flush()
        await self.drain()
        unanswered = protocol.unanswered
        received = reader._take(len(reader._buffer)) if reader is not None else b""
        protocol.unanswered = unanswered  # what was taken is no message
        if isinstance(protocol, ReadCountingProtocol):
            protocol.bytes_in -= len(received)
        protocol.is_breathing = False
        transport.pause_reading()  # what comes now is TLS's; uvloop would read on before it gets to start that
        try:
            if reader is not None and reader._eof:  # nothing would tell the handshake
                raise ConnectionResetError("the peer has closed the connection before the TLS handshake")
            self._transport = await start_tls(
                self._loop,
                transport,
                protocol,
                sslcontext,
                received,
                protocol.replace_transport,
                server_side=protocol.is_server_side,
                server_hostname=server_hostname,
                ssl_handshake_timeout=ssl_handshake_timeout,
                terms=driver.handshake_terms() if isinstance(driver, TermsOfConnection) else None,
                # By itself it would count, on the server's side, while a large reply is still being sent.
                ssl_shutdown_timeout=ssl_shutdown_timeout or (FOR_EVER if protocol.is_server_side else None),
            )
        except BaseException as error:
            # The transport that is aborted tells the handshake, and not the stream's protocol.
            transport.abort()
            if reader is not None and isinstance(error, OSError):
                reader.set_exception(error)  # now: the server asks whether this is the peer's doing
            self._loop.call_soon(protocol.connection_lost, error if isinstance(error, Exception) else None)
            raise
