"""The classes that a handler of streams is made from, and what all handlers have in common."""

from abc import ABC, abstractmethod
from collections.abc import Coroutine, Hashable
from time import monotonic
from typing import Any, ClassVar, Literal

from aioecho.config import Timeouts
from aioecho.framing import Framing
from aioecho.net.kernel import Credentials, peer_credentials
from aioecho.serving.base import BaseServer
from aioecho.serving.tasks import Tasks
from aioecho.streams.ending import Unbroken
from aioecho.streams.frames import Frames, read_frames, read_one_frame
from aioecho.streams.reader import StreamReader
from aioecho.streams.writer import StreamWriter

__all__ = ["BaseRequestHandler", "OwnTasks", "StreamRequestHandler", "no_framing"]


class _State:
    """A handler's `state` is its server's, unless it has set its own."""

    def __get__(self, handler: Any, kind: type) -> Any:
        return self if handler is None else handler.server.state


class OwnTasks:
    """A handler's `tasks`. No property: a handler may have an attribute of its own of this name."""

    def __get__(self, handler: Any, kind: type) -> Any:
        if handler is None:
            return self
        connection = handler._find_connection()
        if connection is None:
            raise RuntimeError(
                "tasks end with a server's connection or session: this one has ended, or no server has made it"
            )
        return connection.get_tasks()


class BaseRequestHandler(ABC):
    """One object for each request, as in socketserver; its methods are coroutines and run in the request's own task.

    To be overridden: :meth:`handle`, and where needed :meth:`setup` and :meth:`finish`. The constructor only stores its
    arguments: an override does no more than that, and takes `(request, client_address, server)`.
    """

    serves: ClassVar[Literal["streams", "datagrams", "sessions", "batches"] | None] = None
    """What the endpoints have to be for: "streams", "datagrams" with a handler for each, or datagrams with a handler for each
    peer, "sessions", or for all that have come, "batches". None: anything."""

    timeouts: Timeouts | None = None
    """What to wait for, and how long, in place of the server's `timeouts`. Of the class or the object; `handshake`, `session`
    and `send` are the class's."""

    state = _State()
    """What the server's `lifespan` has yielded, its `state`: a database, a cache. A handler may set its own."""

    label: str | None = None
    """What its connection is called where it is listed: see :attr:`LiveConnection.label`."""

    def __init__(self, request: Any, client_address: Any, server: BaseServer) -> None:
        self.request = request
        self.client_address = client_address
        self.server = server

    async def setup(self) -> None:
        """Prepare; called before :meth:`handle`. If it raises, neither :meth:`handle` nor :meth:`finish` is called."""

    @abstractmethod
    async def handle(self) -> None:
        """Serve the request. When it returns the connection is closed, in good order: with what has been written by then.

        So it waits itself for other tasks that are still to write.
        """

    async def finish(self) -> None:
        """Clean up; called after :meth:`handle`, also when that raised or was cancelled."""


class StreamRequestHandler(BaseRequestHandler):
    """One object for each connection. `request` is `(reader, writer)`.

    `client_address` is `(host, port)` for IPv4, `(host, port, flowinfo, scope_id)` for IPv6, and a path, mostly "", for
    Unix sockets.

    A test may make one itself, with any streams that behave as asyncio's: ``Upper((reader, writer), ("127.0.0.1", 1), None)``.
    Then :meth:`join` and :meth:`leave` do nothing, and :meth:`closed` needs an aioecho.StreamReader. aioecho.testing has more.
    """

    serves = "streams"

    one_way: ClassVar[bool] = False
    """Whether peers only send, and wait for no reply, as to a sink of logs or metrics. A server that stops then tells a
    peer first that it will read no more, and reads on for Timeouts.linger: what is on its way is not lost."""

    cancel_on_lost: ClassVar[bool] = True
    """Whether the handler is cancelled when its connection breaks (is reset, or given up by the kernel) while it waits for
    something else than its stream: at once if no message is in progress, else after Timeouts.lost. One that a read, drain() or
    :meth:`closed` tells of the end is only cancelled after Timeouts.lost. The reason is then "connection lost"."""

    framing: Framing | None = None
    """How :attr:`frames` and :meth:`send_frame` cut the stream into frames: an object of aioecho.framing, of the class."""

    tasks: Tasks = OwnTasks()  # type: ignore[assignment]
    """Tasks beside :meth:`handle`: ``self.tasks.create_task(coroutine)``. They end with the connection: when handle() has
    ended they are cancelled, and :meth:`finish` is called when they have ended, or after a second. What one raises cancels
    handle(), and is reported as an error of the handler's. RuntimeError once the connection is at its end."""

    request: tuple[StreamReader, StreamWriter]
    reader: StreamReader
    writer: StreamWriter

    def __init__(self, request: tuple[Any, Any], client_address: Any, server: Any) -> None:
        # Not through super(): there is an object for every connection, and this is half the time.
        self.request = request
        self.client_address = client_address
        self.server = server
        self.reader, self.writer = request

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Write `data` and wait until the peer keeps up: ``writer.write(data)`` and ``await writer.drain()``.

        Raises:
            ConnectionResetError: the connection is gone.
            OSError: the connection broke.
            ConnectionTimeout: the peer took nothing for the time of Timeouts.write.
        """
        # The two calls written out, as far as there is nothing to wait for: either would cost as much as all of this.
        try:
            protocol = self.writer.protocol
        except AttributeError:  # a writer that no server has made, as in a test
            self.writer.write(data)
            await self.writer.drain()
            return
        collected = protocol.collected
        if collected is not None:
            protocol.unanswered = False
            collected.room -= collected.write(data)
            if collected.room >= 0 and monotonic() <= collected.flush_at:
                return
            protocol.flush()
        elif protocol.needs_slow_path:
            self.writer.write(data)
            if protocol.collected is not None:  # the first of several: drain() would have nothing to wait for
                return
        else:
            protocol.unanswered = False
            protocol.transport.write(data)
        if protocol.needs_slow_path or protocol.transport.is_closing():
            del data  # asyncio's transport on 3.11 has a copy: not to hold both while the peer takes nothing
            await self.writer.drain()

    def join(self, group: Hashable) -> None:
        """Get what ``server.broadcast(data, to=group)`` sends, from now on, or once setup() is done. The group may be new.

        The connection's end leaves all groups.
        """
        connection = self._find_connection()
        if connection is not None:
            self.server.audience.join(connection, group)

    def leave(self, group: Hashable) -> None:
        """Get no more of what is sent to a group. It may be one that the handler is not in."""
        connection = self._find_connection()
        if connection is not None:
            self.server.audience.leave(connection, group)

    def _find_connection(self) -> Any:
        """Return the server's connection; None if it has ended, or if no server has made the streams."""
        protocol = getattr(self.writer, "protocol", None)
        return None if protocol is None else protocol.driver

    async def draining(self) -> None:
        """Say goodbye: called when the server begins to stop, in a task of its own, beside :meth:`handle`.

        For what the peer is to be told, by ``self.send()``. The connection stays open until it has returned, but for no more
        than a second after the end of handle(); :meth:`finish` comes then. Not called where handle() is called after the stop
        has begun. To be overridden.
        """

    async def closed(self) -> None:
        """Wait until no more can be expected of the peer: it has ended its stream, the connection broke, or the server stops.

        To be raced with what the handler waits for otherwise, as a queue's get(). Reads nothing: what had come before can
        still be read, and then ``self.reader.end`` tells which end it was. The peer's end is not noticed while so much that was
        not read is buffered that the transport is paused.
        """
        if not isinstance(self.reader, StreamReader):
            raise TypeError("closed() needs an aioecho.StreamReader: asyncio's tells of its end by a read alone")
        await self.reader.wait_end()

    def unbroken(self) -> Unbroken:
        """Return what keeps a stop off an exchange in steps: ``async with self.unbroken(): ...``.

        A server that stops does not end the stream while the handler is in such a block, until the grace is over. Without
        one, a handler that has answered all that it has read meets the end of its stream at the next read.
        """
        return Unbroken(getattr(self.reader, "hold", _hold_nothing))

    @property
    def frames(self) -> Frames:
        """What ``async for frame in self.frames`` goes through: the frames of the stream, as :attr:`framing` has it.

        See :meth:`StreamReader.frames` for what it raises. Raises TypeError if the class has no framing.
        """
        if self.framing is None:
            raise no_framing(self)
        if not isinstance(self.reader, StreamReader):  # asyncio's, as in a test
            return read_frames(self.reader, self.framing)
        return self.reader.frames(self.framing)

    def read_frame(self) -> Coroutine[Any, Any, bytes]:
        """Return the next frame, as :attr:`framing` has it: ``await self.read_frame()``. For protocols that go on in steps.

        Raises, beside what :attr:`frames` does:
            IncompleteReadError: the stream has ended; between two frames its `partial` is b"".
        """
        if self.framing is None:
            raise no_framing(self)
        if not isinstance(self.reader, StreamReader):  # asyncio's, as in a test
            return read_one_frame(self.reader, self.framing)
        return self.reader.readframe(self.framing)

    def send_frame(self, frame: bytes) -> Coroutine[Any, Any, None]:
        """Send one frame: ``await self.send_frame(frame)`` is :meth:`send` of what :attr:`framing` makes of it.

        Raises, beside what :meth:`send` does:
            ValueError: the framing has no way to write this frame.
            TypeError: the class has no framing, or the frame is a str.
        """
        if self.framing is None:
            raise no_framing(self)
        try:
            return self.send(self.framing.join(frame))
        except TypeError:
            if isinstance(frame, str):
                raise TypeError("a frame is bytes, not str: encode it") from None
            raise

    @property
    def credentials(self) -> Credentials | None:
        """The process id, user id and group id of the peer, as the kernel noted them when it connected.

        None if this is no Unix socket, and on other systems than Linux. Raises OSError if the connection is closed.
        """
        sock = self.writer.get_extra_info("socket")
        return None if sock is None else peer_credentials(sock)


def _hold_nothing(count: int) -> None:
    """Hold no stop off: the stream is none of a server's."""


def no_framing(handler: BaseRequestHandler) -> TypeError:
    """Return the error for the class of a handler that has no `framing`."""
    return TypeError(f"{type(handler).__qualname__} has no framing: set the class attribute, as `framing = Lines()`")
