"""TLS over a connection: the loop's own, made to end as a plain connection ends.

Both loops' TLS (asyncio's sslproto in 3.11 to 3.13, uvloop's in 0.23) lets a connection end in ways in which replies are
lost. It begins to shut down as soon as its peer says that it will send no more (close_notify, as of Go's CloseWrite), or
closes its direction of the TCP connection; what is written from then on is thrown away. And it closes the transport under
it while it holds back data of its own, which was too much for that transport's buffer: asyncio's never sends them in 3.12
and 3.13, and keeps the loop busy with errors instead (cpython#115514, mended in later releases of both).

So a :class:`Link` stands between the socket's transport and the loop's TLS. It tells the stream's protocol of the end, and
the loop's TLS only when this side has closed too; and it never lets the loop's TLS hold anything back: what waits to be
sent waits in the socket's transport alone, which tells the stream's protocol when that is too much.

The rule of this module: it uses what protocols and transports offer each other, and nothing that is private to a loop.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol, cast

__all__ = ["FOR_EVER", "Link", "start_tls"]

# Seconds, for timers of the loop's TLS that can't be switched off.
FOR_EVER = 1e6

# Whether the TLS that is being made is this module's: asyncio's may meet the end before anything else can tell.
_is_ours: ContextVar[bool] = ContextVar("_is_ours", default=False)


class Stream(Protocol):
    """The stream's protocol, as a :class:`Link` sees it."""

    def pause_writing(self) -> None:
        """Let drain() wait."""

    def resume_writing(self) -> None:
        """Let drain() return."""

    def eof_received(self) -> object:
        """End the stream."""


_read = ssl.SSLObject.read  # for every message, and super() costs more


class _TLSObject(ssl.SSLObject):
    # To others that use the same context, and are not linked, it behaves as any SSLObject.

    _hides_end: bool
    _has_ended = False
    _peer_sends_no_more = False
    _tell_end: Callable[[], object] | None = None

    def __new__(cls, *args: Any, **options: Any) -> "_TLSObject":
        made = super().__new__(cls)
        made._hides_end = _is_ours.get()
        return made

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        # At b"" the loops would shut down. So to them it looks as if nothing had come.
        data = _read(self, len, buffer)
        if data or not self._hides_end:
            return data
        if not self._has_ended:
            self._has_ended = True
            if self._tell_end is not None:
                self._tell_end()
        raise ssl.SSLWantReadError

    def unwrap(self) -> None:
        # asyncio calls this while its peer may still be sending. To unwrap over unread data is an error, and for that it
        # throws away what is unsent. uvloop reads first, as is done here.
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while self.read(2**16):
                pass
        try:
            super().unwrap()
        except ssl.SSLWantReadError:  # it waits for the peer to say that it closes too
            if not self._peer_sends_no_more:
                raise

    def tell_end(self, tell: Callable[[], object]) -> None:
        """Call `tell` at the peer's close_notify, or now if that has come already."""
        self._hides_end, self._tell_end = True, tell
        if self._has_ended:
            tell()


class Link(asyncio.BufferedProtocol):
    """Connects the socket's transport with the loop's TLS, and both with the stream's protocol."""

    __slots__ = ("_loop", "_object", "_stream", "_tls", "_transport", "buffer_updated", "get_buffer")

    # The loop's TLS's own: they cost a read no call more.
    get_buffer: Callable[[int], bytearray]  # type: ignore[assignment]
    buffer_updated: Callable[[int], None]  # type: ignore[assignment]

    def __init__(self, loop: asyncio.AbstractEventLoop, tls: Any, stream: Stream) -> None:
        self._loop = loop
        self._tls = tls
        self._stream = stream
        self._object: _TLSObject | None = None  # there is one once the handshake is done
        self._transport: asyncio.Transport | None = None
        self.get_buffer, self.buffer_updated = tls.get_buffer, tls.buffer_updated

    def take(self, transport: asyncio.Transport) -> None:
        """Begin to look after the end, of what is now the TLS transport."""
        made = transport.get_extra_info("ssl_object")
        if isinstance(made, _TLSObject):
            self._transport, self._object = transport, made
            made.tell_end(self._end_soon)

    def _end_soon(self) -> None:
        # What was read before it is passed on in this turn.
        self._loop.call_soon(self._end)

    def _end(self) -> None:
        self._stream.eof_received()

    def pause_writing(self) -> None:
        """Tell the stream; the loop's TLS goes on to pass on all that it has."""
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        """Tell the stream."""
        self._stream.resume_writing()

    def eof_received(self) -> Any:
        """Tell the stream; the loop's TLS if it has to do with it: in the handshake, and once this side has closed."""
        tls_object, transport = self._object, self._transport
        if tls_object is None or transport is None:
            return self._tls.eof_received()
        tls_object._peer_sends_no_more = True
        if transport.is_closing():
            return self._tls.eof_received()
        self._stream.eof_received()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the loop's TLS, which tells the stream."""
        tls = self._tls
        if self._object is not None:
            self._object._tell_end = None
        # Else all of them would be a cycle, for the garbage collector to undo.
        self._tls = self._object = self._transport = None
        del self.get_buffer, self.buffer_updated
        tls.connection_lost(exc)


async def start_tls(
    loop: asyncio.AbstractEventLoop,
    transport: asyncio.Transport,
    stream: asyncio.Protocol,
    context: ssl.SSLContext,
    received: bytes,
    take: Callable[[asyncio.Transport], object],
    **options: Any,
) -> asyncio.Transport:
    """Return a TLS transport over `transport`, of which `stream` has `received` bytes that belong to the handshake.

    `take` is called with it before any data comes. The `options` are those of loop.start_tls().

    Raises:
        ssl.SSLError, ConnectionError: the handshake failed.
    """
    link: Link | None = None

    async def start() -> asyncio.Transport:
        _is_ours.set(True)  # in this task's own context
        made = await loop.start_tls(transport, stream, _with_own_objects(context), **options)
        assert made is not None
        if link is not None:
            link.take(made)
        take(made)
        return made

    def connect() -> None:
        nonlocal link
        tls = transport.get_protocol()
        if tls is not None and tls is not stream:  # it is, if all was cancelled or lost before it began
            link = Link(loop, tls, cast(Stream, stream))
            transport.set_protocol(link)
            if received:
                loop.call_soon(_feed, link, received)

    # A task of the plain kind, whatever the loop's factory: its first step has to come in the loop's next turn. In it the
    # loop asks for a call of connection_made(), before which the link is there.
    starting = asyncio.Task(start(), loop=loop)
    loop.call_soon(connect)
    return await starting


def _with_own_objects(context: ssl.SSLContext) -> ssl.SSLContext:
    if getattr(context, "sslobject_class", None) is ssl.SSLObject:
        context.sslobject_class = _TLSObject
    return context


def _feed(link: Link, data: bytes) -> None:
    """Hand `data` to the TLS protocol that has just been connected, before the socket is read again."""
    while data and link._tls is not None:
        view = memoryview(link.get_buffer(len(data)))
        size = min(len(view), len(data))
        view[:size] = data[:size]
        link.buffer_updated(size)
        data = data[size:]
