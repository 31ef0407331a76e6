"""A proxy that makes a network bad on purpose, between any client and any server for streams."""

import asyncio
import socket
from dataclasses import fields, replace
from typing import Any, Literal, Self

from aioecho import client
from aioecho.exceptions import EndpointError
from aioecho.net.acceptor import Acceptor
from aioecho.net.binding import bind_endpoint
from aioecho.net.bound import BoundSocket
from aioecho.net.endpoints import TCPEndpoint, UnixEndpoint, parse_endpoint
from aioecho.streams.protocol import StreamProtocol
from aioecho.streams.writer import StreamWriter
from aioecho.testing.pipes import Faults, Link, Way, reset

__all__ = ["Direction", "FaultyProxy"]

Direction = Literal["both", "to_server", "to_client"]
"""Which bytes: what the client sends, what the server sends, or both."""

# Clients that wait to be accepted.
BACKLOG = 100


class FaultyProxy:
    """Stands between clients and a server, and forwards their bytes with faults: ``async with FaultyProxy(endpoint) as proxy``.

    Clients connect to `proxy.endpoint`, or `proxy.address`. It may serve any number of connections, and knows nothing of what
    they say. The end of a stream is passed on behind its bytes, and so is a reset, with the same faults. With TCP a reset is a
    RST. A Unix socket knows none: there it is a close, with an error only where bytes of the peer were not read.

    Faults may be changed at any time, and hold for live connections from the next piece on. What is random is drawn from
    `seed`, the number of the connection and the direction, and so the same in the next run: the boundaries of slices to the
    byte, jitter by the order of chunks.

    Args:
        endpoint: where the server is, as tcp://HOST:PORT or unix:PATH. It is connected to for each client. If it
            cannot be, the client is reset.
        listen: where clients connect, as tcp://HOST:PORT or unix:PATH. By default a free port of the loopback interface.
        seed: for what is random.
        latency, jitter, rate, slices, reset_after: faults of both directions; see :class:`Faults`, with their units.

    Raises:
        ValueError: an argument makes no sense.
        EndpointError: when the ``async with`` begins: `listen` can't be listened on.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        listen: str = "tcp://127.0.0.1:0",
        seed: int = 0,
        latency: float = 0.0,
        jitter: float = 0.0,
        rate: float | None = None,
        slices: int | tuple[int, int] | None = None,
        reset_after: int | None = None,
    ) -> None:
        for text in (endpoint, listen):
            if not isinstance(parse_endpoint(text), TCPEndpoint | UnixEndpoint):
                raise ValueError(f"a FaultyProxy is for tcp://HOST:PORT and unix:PATH, not {text}")
        self._server_endpoint = endpoint
        self._listen = parse_endpoint(listen)
        self._seed = seed
        faults = Faults(latency=latency, jitter=jitter, rate=rate, slices=slices, reset_after=reset_after)
        self._ways = {"to_server": Way(faults), "to_client": Way(faults)}
        self._acceptors: list[Acceptor] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[Link] = set()
        self._opening: set[asyncio.Task[None]] = set()  # of clients that have no link yet
        self._accepted = 0

    # What it is.

    @property
    def address(self) -> Any:
        """Where clients connect, as getsockname() has it: a `(host, port)`, or a path."""
        return self._bound.sock.getsockname()

    @property
    def endpoint(self) -> str:
        """Where clients connect, as an endpoint string."""
        return self._bound.name

    @property
    def _bound(self) -> BoundSocket:
        if not self._acceptors:
            raise RuntimeError("the proxy listens inside its `async with` only")
        return self._acceptors[0].bound

    @property
    def connections(self) -> int:
        """How many connections there are now."""
        return len(self._links)

    @property
    def accepted(self) -> int:
        """How many connections there were."""
        return self._accepted

    @property
    def to_server(self) -> Faults:
        """The faults of what clients send. May be set."""
        return self._ways["to_server"].faults

    @to_server.setter
    def to_server(self, faults: Faults) -> None:
        self._ways["to_server"].faults = faults

    @property
    def to_client(self) -> Faults:
        """The faults of what the server sends. May be set."""
        return self._ways["to_client"].faults

    @to_client.setter
    def to_client(self, faults: Faults) -> None:
        self._ways["to_client"].faults = faults

    # What may be done to connections.

    def set_faults(self, direction: Direction = "both", **faults: Any) -> None:
        """Change some faults, and keep the others: ``proxy.set_faults("to_client", latency=0.2)``.

        Raises:
            TypeError: there is no such fault.
            ValueError: the direction or a value makes no sense.
        """
        if unknown := faults.keys() - {field.name for field in fields(Faults)}:
            raise TypeError(f"there is no fault {unknown.pop()}: see aioecho.testing.Faults")
        for name in _directions(direction):
            way = self._ways[name]
            way.faults = replace(way.faults, **faults)

    def partition(self, direction: Direction = "both") -> None:
        """Let nothing through, neither bytes nor an end, until :meth:`heal`. Nothing is lost, and no connection ends."""
        for name in _directions(direction):
            self._ways[name].gate.clear()

    def heal(self, direction: Direction = "both") -> None:
        """End a partition: what has waited goes on its way."""
        for name in _directions(direction):
            self._ways[name].gate.set()

    def reset(self) -> None:
        """Reset every connection, on both sides, now."""
        for link in tuple(self._links):
            link.reset()
        for task in self._opening:
            task.cancel()

    def half_close(self, direction: Direction) -> None:
        """End one direction of every connection, behind what is on its way: what its sender sends later is dropped.

        "to_server" is the end that a client makes by shutdown(SHUT_WR): the server can still reply.
        """
        for name in _directions(direction):
            for link in self._links:
                link.pipes[name].end()

    # Its life.

    async def __aenter__(self) -> Self:
        bound = await bind_endpoint(self._listen, backlog=BACKLOG)
        self._acceptors = [
            Acceptor(each, on_accept=self._accept, has_room=lambda: True, on_error=lambda error: None) for each in bound
        ]
        for acceptor in self._acceptors:
            acceptor.resume()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        acceptors, self._acceptors = self._acceptors, []
        for acceptor in acceptors:
            acceptor.close(backlog=BACKLOG, keep_backlog=True)
        self.reset()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, sock: socket.socket, address: Any) -> None:
        self._accepted += 1
        accepted = [sock]
        task = asyncio.get_running_loop().create_task(self._serve(accepted, self._accepted))
        for tasks in (self._tasks, self._opening):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        task.add_done_callback(lambda _: _close_all(accepted))  # a task that is cancelled before it begins does not

    async def _serve(self, accepted: list[socket.socket], number: int) -> None:
        """Serve a client. Its socket is removed from `accepted` once this runs."""
        loop = asyncio.get_running_loop()
        sock = accepted.pop()
        try:
            _, protocol = await loop.connect_accepted_socket(lambda: StreamProtocol(loop, is_server_side=False), sock)
        except BaseException:
            sock.close()
            raise
        clients = protocol.reader, StreamWriter(protocol.transport, protocol, protocol.reader, loop)
        try:
            await self._ways["to_server"].gate.wait()
            servers = await client.open_connection(self._server_endpoint, timeout=None)
        except BaseException as error:
            reset(clients[1])
            await protocol.wait_lost()
            if isinstance(error, EndpointError):
                return
            raise
        task = asyncio.current_task()
        assert task is not None
        self._opening.discard(task)
        link = Link(self._ways, f"{self._seed} {number}", clients, servers)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)


def _close_all(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _directions(direction: str) -> tuple[str, ...]:
    if direction not in ("both", "to_server", "to_client"):
        raise ValueError(f'the direction is "to_server", "to_client" or "both", not {direction!r}')
    return ("to_server", "to_client") if direction == "both" else (direction,)
