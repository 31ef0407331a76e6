"""Servers for tests: they remember handlers and what these raised, and serve without a port where that is possible."""

import asyncio
import contextlib
import functools
import inspect
import itertools
import logging
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from aioecho.datagrams.server import UDPServer
from aioecho.framing import Framing
from aioecho.net.bound import BoundSocket
from aioecho.net.bound_options import note_options
from aioecho.net.endpoints import Endpoint, TCPEndpoint
from aioecho.server import StreamListener, StreamServer, TCPServer
from aioecho.serving.base import BaseServer
from aioecho.serving.ends import Reason
from aioecho.serving.handler_types import is_blocking, serves_datagrams, undo_partial
from aioecho.serving.listening import ListeningSocket

__all__ = [
    "GRACE",
    "Address",
    "Pairs",
    "PortlessServer",
    "Record",
    "RecordingServer",
    "check_lifespan",
    "check_no_address",
    "check_portless",
    "describe",
    "find_framing",
    "is_for_datagrams",
    "make_server",
    "raise_all",
    "raising",
]

GRACE = 1.0
"""Seconds that handlers have to end when a test is over."""

Address = tuple[str, int]


class _Recorded(functools.partial[Any]):
    """A handler class that also tells of the handlers that are made of it."""

    note: Callable[[Any, Any], None]

    def __call__(self, /, *arguments: Any, **options: Any) -> Any:
        handler = super().__call__(*arguments, **options)
        self.note(arguments[1], handler)
        return handler


class Record:
    """What a test wants to know of a server.

    `handlers` has the last handler of every client address. `errors` has what handlers raised by mistake, with the client's
    address: not what the peer or the network has caused, as :meth:`BaseServer.is_peers_fault` tells.
    """

    def __init__(self) -> None:
        self.handlers: dict[Any, Any] = {}
        self.errors: list[tuple[Any, BaseException]] = []
        self.when_made: Callable[[Any], object] | None = None

    def note_handler(self, client_address: Any, handler: Any) -> None:
        """Keep a handler that was made. Called in the thread of a blocking handler, at its end."""
        self.handlers[client_address] = handler
        if self.when_made is not None:
            self.when_made(client_address)

    def take_errors(self, client_address: Any = None) -> list[BaseException]:
        """Return what the handlers of a client, or of all clients, have raised, and forget it."""
        taken = [(address, error) for address, error in self.errors if client_address in (None, address)]
        for each in taken:
            self.errors.remove(each)
        return [error for _, error in taken]


class RecordingServer(BaseServer):
    """The part of a server that keeps a :class:`Record`, as `_record`.

    A server class of the user's is mixed in, so it has no other names of its own.
    """

    def __init__(self, server_address: Any, RequestHandlerClass: Any, **options: Any) -> None:
        super().__init__(server_address, RequestHandlerClass, **options)
        self._record = Record()
        if not isinstance(self.RequestHandlerClass, Mapping):
            self.RequestHandlerClass = recorded = _Recorded(self.RequestHandlerClass)
            recorded.note = self._record.note_handler
            plain = undo_partial(recorded)
            vars(recorded)["__qualname__"] = getattr(plain, "__qualname__", "connection")  # the name of its tasks

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note the exception that is being handled, unless it is the peer's doing, and report it as any server does."""
        error = sys.exception()
        if error is not None and not self.is_peers_fault(error):
            self._record.errors.append((client_address, error))
        super().handle_error(request, client_address)


class Pairs(StreamListener):
    """In place of a listening socket: accepts sockets that are connected already, as far as the limits allow."""

    def __init__(self, server: "PortlessServer", bound: BoundSocket) -> None:
        super().__init__(server, bound, None)
        self._portless = server
        self._accept = self._accepted if bound.proxy is None else self._accepted_from_balancer
        self._has_header = bound.proxy is not None
        self._backlog: deque[tuple[socket.socket, Address]] = deque()
        self._begun: dict[Any, asyncio.Future[None]] = {}  # of each client: whether its handler was made
        self._ended: dict[Any, asyncio.Future[None]] = {}  # and whether its connection has ended
        self._is_stopped = False
        self.resume, self.pause = self._accept_backlog, self._do_nothing

    async def connect(self, client_address: Address | None = None) -> tuple[socket.socket, Address]:
        """Return the socket of a new client, non-blocking, and the address that its handler sees.

        Where nothing has to come of the client first, its handler has been made by then.

        Raises:
            ConnectionRefusedError: the server was shut down.
        """
        address = client_address or self._choose_address()
        if self._is_stopped:
            raise ConnectionRefusedError("the server has been shut down, and accepts no client")
        if address in self._begun:
            raise ValueError(f"another client of this server has the address {address!r}")
        loop = asyncio.get_running_loop()
        self._begun[address], self._ended[address] = loop.create_future(), loop.create_future()
        servers, clients = socket.socketpair()
        servers.setblocking(False)
        clients.setblocking(False)
        self._backlog.append((servers, address))
        self.resume()
        try:
            if self._begins_at_once(address):
                await self._begun[address]
        except BaseException:
            clients.close()
            raise
        return clients, address

    def _choose_address(self) -> Address:
        # Another client may have been given one of these by the test.
        ports = itertools.count(len(self._begun) + 1)
        return next(("127.0.0.1", port) for port in ports if ("127.0.0.1", port) not in self._begun)

    def _begins_at_once(self, client_address: Address) -> bool:
        """Tell whether the handler is made, or the client refused, without anything that comes of the client or the test."""
        server = self._portless
        return (
            server.ssl is None
            and not self._has_header
            and not inspect.iscoroutinefunction(server.verify_request)
            and not is_blocking(server.RequestHandlerClass)
            and any(connection.client_address == client_address for connection in server.connections)
        )

    async def wait_ended(self, client_address: Address, seconds: float) -> None:
        """Wait until a client's connection has ended, for at most so long."""
        await asyncio.wait({self._ended[client_address]}, timeout=seconds)

    def note_made(self, client_address: Any) -> None:
        """Note that a client has its handler."""
        if not is_blocking(self._portless.RequestHandlerClass):  # that is made in a thread, and never awaited
            self._settle(self._begun, client_address)

    def note_end(self, client_address: Any) -> None:
        """Note that a client's connection has ended."""
        self._settle(self._begun, client_address)
        self._settle(self._ended, client_address)

    def _settle(self, futures: dict[Any, "asyncio.Future[None]"], client_address: Any) -> None:
        future = futures.get(client_address)
        if future is not None and not future.done():
            future.set_result(None)

    def _accept_backlog(self) -> None:
        while self._backlog and self._portless.admission.has_room():
            self._accept(*self._backlog.popleft())

    def _do_nothing(self) -> None:
        pass

    def stop(self, *, keep_backlog: bool) -> None:
        """Accept the clients that wait, unless `keep_backlog`, and no more."""
        self._is_stopped = True
        while self._backlog:
            sock, client_address = self._backlog.popleft()
            if keep_backlog:
                sock.close()
            else:
                self._accept(sock, client_address)
        self.sock.close()

    def set_limits(self, limits: Any) -> None:
        """Do nothing: there is no backlog of the kernel's."""


class PortlessServer(RecordingServer, StreamServer):
    """A server for streams without a port: ``_pairs.connect()`` makes its clients."""

    _log_level = logging.DEBUG
    _pairs: Pairs

    def __init__(self, server_address: Any, RequestHandlerClass: Any, **options: Any) -> None:
        super().__init__(server_address, RequestHandlerClass, **options)
        self.endpoints = []  # nothing is bound

    def _parse_address(self, address: Any) -> list[Endpoint]:
        return [TCPEndpoint("127.0.0.1", 0)]

    def _make_listeners(self, bound: list[BoundSocket], handler_classes: list[Any]) -> Sequence[ListeningSocket]:
        # A socket that is never bound: it takes no port.
        own = BoundSocket(socket.socket(socket.AF_INET, socket.SOCK_STREAM), "testing")
        note_options([own], TCPEndpoint("127.0.0.1", 0), self._proxy)
        self._pairs = Pairs(self, own)
        self._record.when_made = self._pairs.note_made
        return [self._pairs]

    def reject(self, sock: socket.socket, client_address: Any, reason: Reason, endpoint: str = "") -> None:
        """Close a client's socket at once, count it, and note it."""
        super().reject(sock, client_address, reason, endpoint)
        self._pairs.note_end(client_address)

    def unregister_connection(self, connection: Any) -> None:
        """Count the end of a connection, and note it."""
        super().unregister_connection(connection)
        self._pairs.note_end(connection.client_address)


def is_for_datagrams(RequestHandlerClass: Any) -> bool:
    """Tell whether a handler class is for datagrams, aioecho's or socketserver's; one that says nothing is for streams."""
    plain = undo_partial(RequestHandlerClass)
    if is_blocking(plain):
        return issubclass(plain, sys.modules["socketserver"].DatagramRequestHandler)
    return bool(serves_datagrams(plain))


def make_server(
    server_address: Any,
    RequestHandlerClass: Any,
    *,
    recording: type[RecordingServer] | None = None,
    server_class: type[BaseServer] | None = None,
    state: Any = None,
    grace: float = GRACE,
    **options: Any,
) -> Any:
    """Return a server for a test, which is not started: a `server_class`, by default the one for the handler class.

    Without `recording` it has a port where it is for datagrams, and none where it is for streams.
    """
    for_datagrams = is_for_datagrams(RequestHandlerClass)
    if recording is None:
        recording = RecordingServer if for_datagrams else PortlessServer
    base = server_class or (UDPServer if for_datagrams else TCPServer)
    if not (isinstance(base, type) and issubclass(base, BaseServer)):
        raise TypeError(f"server_class must be a class of aioecho's servers, or a subclass of one, not {base!r}")
    names = {"__module__": __name__, "__doc__": base.__doc__}
    server: Any = type(base.__name__, (recording, base), names)(
        server_address, RequestHandlerClass, grace=grace, **options
    )
    server.state = state
    return server


def check_portless(server: BaseServer, options: Mapping[str, Any]) -> PortlessServer:
    """Return a server that is to have one more client. Raises TypeError if it cannot, or if there are options for it."""
    if not isinstance(server, PortlessServer):
        raise TypeError("give a handler class, or the server of another client for streams, as client.server")
    if options:
        raise TypeError(f"a server that runs takes no option, as {next(iter(options))}")
    return server


def check_no_address(client_address: Address | None) -> None:
    """Raise TypeError if there is an address for a client of a handler for datagrams."""
    if client_address is not None:
        raise TypeError("client_address is for streams: a datagram's is that of the client's socket")


def check_lifespan(server: BaseServer) -> None:
    """Raise RuntimeError if the lifespan of a server that was shut down raised, or ended by itself."""
    if server.has_failed():
        raise RuntimeError("the lifespan raised, or ended too early: the log has its traceback")


def find_framing(server: BaseServer) -> Framing:
    """Return the framing of a server's handler class. Raises TypeError if it has none."""
    plain = undo_partial(server.RequestHandlerClass)
    framing = getattr(plain, "framing", None)
    if framing is None:
        raise TypeError(f"{getattr(plain, '__qualname__', plain)} has no framing: set its class attribute")
    found: Framing = framing
    return found


@contextlib.contextmanager
def raising(server: RecordingServer, raise_errors: bool, client_address: Address | None = None) -> Iterator[None]:
    """Raise at the end what handlers have raised: the exception itself, or a group of several.

    If something else is raised, note it there. With `client_address` it is what the handler of that client has raised.
    """
    try:
        yield
    except BaseException as error:
        if raise_errors and (errors := server._record.take_errors(client_address)):
            error.add_note(describe(errors))
        raise
    errors = server._record.take_errors(client_address)
    if raise_errors:
        raise_all(errors)


def describe(errors: Sequence[BaseException]) -> str:
    """Return the note with which another exception tells of what handlers raised."""
    shown = "".join("".join(traceback.format_exception(error)) for error in errors)
    return f"The handler raised:\n{shown.rstrip()}"


def raise_all(errors: Sequence[BaseException]) -> None:
    """Raise what handlers raised: the exception itself, or a group of several. Do nothing if there is none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise BaseExceptionGroup("several handlers raised", errors)
