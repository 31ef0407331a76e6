"""The classes that a handler of datagrams is made from: of one, of a peer's, of all that have come."""

import logging
from collections.abc import Awaitable, Coroutine, Iterator
from functools import partial
from itertools import chain, repeat
from time import monotonic
from typing import Any, Protocol

from aioecho.exceptions import FrameTooLong, FramingError
from aioecho.framing import Framing
from aioecho.net.datagram_transport import DatagramTransport
from aioecho.runtime.logs import format_address
from aioecho.serving.base import BaseServer
from aioecho.serving.handlers import BaseRequestHandler, OwnTasks, no_framing
from aioecho.serving.tasks import Tasks
from aioecho.streams.ending import Unbroken

__all__ = ["DatagramBatchHandler", "DatagramRequestHandler", "DatagramSessionHandler"]

logger = logging.getLogger("aioecho.datagram")


class Datagrams(Protocol):
    """What one peer sends, in order: see :class:`DatagramSessionHandler`. The datagram server makes it."""

    last_active: float

    def hold(self, count: int) -> None:
        """Count the blocks in which a drain does not end them."""

    def __aiter__(self) -> "Datagrams":
        """Return itself."""

    def __anext__(self) -> Coroutine[Any, Any, bytes]:
        """Return the peer's next datagram."""


class DatagramRequestHandler(BaseRequestHandler):
    """One object for each datagram. `request` is `(data, transport)`, and `data` the datagram's bytes, maybe none.

    `client_address` is `(host, port)` for IPv4, `(host, port, flowinfo, scope_id)` for IPv6, and for Unix sockets a path,
    bytes that start with NUL, or None, to which nothing can be sent. A sender can put any address there: a datagram proves
    nothing about its sender, so a reply that is larger than its request makes a weapon of the server.

    Handlers run side by side and end in any order. A handler that waits does not delay the others; one that never waits costs
    no task of its own, though :func:`asyncio.current_task` is a task as in any coroutine.
    """

    serves = "datagrams"

    framing: Framing | None = None
    """How :attr:`frames` cuts a datagram into frames, for senders that put several into one: an object of aioecho.framing."""

    request: tuple[bytes, DatagramTransport]
    data: bytes

    def __init__(self, request: tuple[bytes, DatagramTransport], client_address: Any, server: BaseServer) -> None:
        # Not through super(): there is an object for every datagram, and the call is a tenth of what it costs.
        self.request = request
        self.client_address = client_address
        self.server = server
        self.data = request[0]

    @property
    def frames(self) -> Iterator[bytes]:
        """What ``for frame in self.frames`` goes through: the frames of the datagram, as :attr:`framing` has it.

        The last line may lack its newline, and what `Delimited` splits its separator. Raises FramingError where any other
        framing's last frame is not whole, and as the framing does. Raises TypeError if the class has no framing.
        """
        if self.framing is None:
            raise no_framing(self)
        return self.framing.split_datagram(self.data)

    def reply(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """Send a datagram to the peer, from the address that it asked; return what can be awaited.

        It is sent at once. Should the socket have no room, ``await self.reply(data)`` waits until it has, for at most
        ``Timeouts.send``, and ``self.reply(data)`` alone drops the datagram. Both are counted; see
        :meth:`DatagramTransport.sendto`.

        Raises:
            OSError: EMSGSIZE: it is too large to be sent at all.
        """
        return self.request[1].sendto(data, self.client_address)


class DatagramSessionHandler(BaseRequestHandler):
    """One object for each peer that sends datagrams. `request` is `(datagrams, transport)`.

    ``async for data in self.datagrams`` gives what the peer sends, in the order of its coming. It ends when the peer has
    been silent for ``Timeouts.session``, and when the server stops. A session begins with a peer's first datagram, and ends
    when :meth:`handle` returns; if the peer sends again, another one begins. `client_address` is as in
    :class:`DatagramRequestHandler`; all Unix sockets without a name are one peer.
    """

    serves = "sessions"

    tasks: Tasks = OwnTasks()  # type: ignore[assignment]
    """Tasks beside :meth:`handle`, which end with the session: see :attr:`StreamRequestHandler.tasks`."""

    request: tuple[Datagrams, DatagramTransport]
    datagrams: Datagrams

    def __init__(self, request: tuple[Datagrams, DatagramTransport], client_address: Any, server: BaseServer) -> None:
        super().__init__(request, client_address, server)
        self.datagrams = request[0]

    def _find_connection(self) -> Any:
        """Return the server's session; None if it has ended, or if no server has made the datagrams."""
        return getattr(self.datagrams, "session", None)

    def unbroken(self) -> Unbroken:
        """Return what keeps a stop off an exchange in steps: ``async with self.unbroken(): ...``.

        A server that stops does not end the datagrams while the handler is in such a block, until the grace is over. Without
        one, they end as soon as no datagram has come or gone for a second.
        """
        return Unbroken(self.datagrams.hold)

    def reply(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """Send a datagram to the peer; see :meth:`DatagramRequestHandler.reply`."""
        self.datagrams.last_active = monotonic()
        return self.request[1].sendto(data, self.client_address)


class DatagramBatchHandler(BaseRequestHandler):
    """One object for all the datagrams that have come, for senders that expect no reply and never pause: logs, metrics.

    `request` is `(datagrams, transport)`, and `datagrams` a list of `(data, client_address)` in the order of their coming, at
    least one. ``self.client_address`` is None. A server has one such handler at a time. What comes meanwhile waits for the
    next, ``Limits.max_queue`` datagrams at the most, of which more are dropped: so the slower the handler, the larger the
    batch, and nothing is handled out of order.

    ``Timeouts.datagram_handler`` is for the whole batch, and so is the hook `verify_request`, which gets None as the address.
    """

    serves = "batches"

    framing: Framing | None = None
    """How :attr:`frames` cuts each datagram into frames: an object of aioecho.framing."""

    request: tuple[list[tuple[bytes, Any]], DatagramTransport]
    datagrams: list[tuple[bytes, Any]]

    def __init__(
        self, request: tuple[list[tuple[bytes, Any]], DatagramTransport], client_address: Any, server: BaseServer
    ) -> None:
        super().__init__(request, client_address, server)
        self.datagrams = request[0]

    @property
    def frames(self) -> Iterator[tuple[bytes, Any]]:
        """What ``for frame, client_address in self.frames`` goes through: see :attr:`DatagramRequestHandler.frames`.

        What is no whole frame, or too long, is left out, with the rest of its datagram: the other datagrams are not its
        sender's. A record at DEBUG tells of it.
        """
        if self.framing is None:
            raise no_framing(self)
        # No generator: a line of Python for every frame would cost as much again as to split it off.
        return chain.from_iterable(map(partial(self._split, self.framing), self.datagrams))

    def _split(self, framing: Framing, datagram: tuple[bytes, Any]) -> Iterator[tuple[bytes, Any]]:
        data, client_address = datagram
        frames: list[bytes] = []
        try:
            frames.extend(framing.split_datagram(data))  # keeps what came before an error
        except (FramingError, FrameTooLong) as error:
            logger.debug("left out the rest of a datagram from %s: %s", format_address(client_address), error)
        return zip(frames, repeat(client_address), strict=False)

    def reply(self, data: bytes | bytearray | memoryview, client_address: Any) -> Awaitable[None]:
        """Send a datagram to one of the senders; see :meth:`DatagramRequestHandler.reply`."""
        return self.request[1].sendto(data, client_address)
