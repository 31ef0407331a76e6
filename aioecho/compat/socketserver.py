"""The standard library's socketserver, with its threading servers on aioecho's engine.

``from aioecho.compat import socketserver`` in place of ``import socketserver`` is the whole port. Every public name is here,
and is the standard library's own object but for ThreadingMixIn and the servers made with it.

What these gain, in :meth:`~ThreadingMixIn.serve_forever`: threads are bounded and used again; at a stop, clients in the
queue are still accepted, handlers that wait between messages meet the end of the stream, and others have a grace to finish; a
reply is not lost to a reset when its client still sends; running out of descriptors stops nothing; TLS handshakes, by
`aioecho_options` or because the listening socket was wrapped, are done in the connection's thread, so that a silent client
delays no other. A handler class with ``one_way = True`` is a sink, as everywhere in aioecho.

What is left to the standard library, as it can't be the same thing on an event loop:

- servers without ThreadingMixIn: one request at a time, in the very thread that called serve_forever(), or in a process
  forked for it;
- handle_request(), of any server, which waits for one request; it is no part of serve_forever() here either;
- datagrams, of any server;
- a class with ThreadingMixIn that overrides process_request(), get_request() or fileno(), or is mixed into one that
  overrides serve_forever() or shutdown(): these are called, and the standard library serves, so threads are not bounded;
- a class whose listening socket was wrapped in TLS, if it overrides shutdown_request() or close_request(), which may keep
  a connection;
- serve_forever() in a thread that runs an event loop already, as a notebook's does.

What differs, on the engine:

- At most ``Limits.max_threads``, 200, requests are handled at a time; the next one waits, for `aioecho_options` to say
  otherwise. A thread serves one request after another, so that a threading.local outlives a request. They are daemon threads.
- A handler that is at work when the server stops is waited for in serve_forever(), for `grace` seconds at the most, and
  not in server_close() for ever. shutdown() waits for that: what handlers wait for is to be released before it is called.
  With `daemon_threads`, or without `block_on_close`, they are not waited for, as before; without either the program still
  waits for them at its exit. Clients that have no thread yet are then disconnected.
- Called by a handler, shutdown() returns at once.
- When the grace is over, a read in the middle of a message raises ConnectionAbortedError, which handle_error() gets.
- A connection that shutdown_request(), close_request() or process_request_thread() leaves open is the program's own from
  then on, as before; a stop neither waits for it nor ends it. Not so with TLS by `aioecho_options`: it is ended before.
- verify_request() is called before the TLS handshake, with the plain socket. One that raises costs its request and not the
  server. service_actions() is called every `poll_interval` seconds, and not after every request besides.
"""

import asyncio
import contextlib
import logging
import os
import socket
import socketserver as stdlib
import ssl
import sys
import threading
from collections.abc import Callable, Mapping
from socketserver import BaseRequestHandler as BaseRequestHandler
from socketserver import BaseServer as BaseServer
from socketserver import DatagramRequestHandler as DatagramRequestHandler
from socketserver import ForkingMixIn as ForkingMixIn
from socketserver import ForkingTCPServer as ForkingTCPServer
from socketserver import ForkingUDPServer as ForkingUDPServer
from socketserver import StreamRequestHandler as StreamRequestHandler
from socketserver import TCPServer as TCPServer
from socketserver import UDPServer as UDPServer
from socketserver import UnixDatagramServer as UnixDatagramServer
from socketserver import UnixStreamServer as UnixStreamServer
from typing import Any

from aioecho.blocking.sockets import RequestSocket
from aioecho.blocking.tls import end_tls
from aioecho.runtime.loops import loop_factory
from aioecho.runtime.threads import report_end_of_thread
from aioecho.server import StreamServer
from aioecho.serving.base import BaseServer as _AioechoServer
from aioecho.serving.handler_types import undo_partial

if sys.version_info >= (3, 12):
    from socketserver import ForkingUnixDatagramServer as ForkingUnixDatagramServer
    from socketserver import ForkingUnixStreamServer as ForkingUnixStreamServer

# Classes say that they are socketserver's, as the classes of CPython's _pydecimal say that they are decimal's: this module is
# to be put in the other's place, also in sys.modules.
__name__ = "socketserver"

# Type checkers do not look at it, but at `import ... as` above.
__all__ = list(stdlib.__all__)

logger = logging.getLogger("aioecho.compat.socketserver")


def __getattr__(name: str) -> Any:
    """Give what only the standard library's module has, as its `__version__`, which warns from 3.15 on."""
    return getattr(stdlib, name)


class _State:
    """What serve_forever() and shutdown() tell each other, across threads. Assigning and reading an attribute is atomic."""

    def __init__(self) -> None:
        self.has_ended = threading.Event()
        self.is_to_end = False
        self.wake: Callable[[], object] = lambda: None


class ThreadingMixIn(stdlib.ThreadingMixIn):
    """Handles each request in a thread, one of at most ``Limits.max_threads``, and calls the hooks as in the standard library.

    May be mixed into any server of the standard library's, such as http.server.HTTPServer; it comes first.
    """

    aioecho_options: Mapping[str, Any] = {}
    """For a subclass to set: the options of :class:`aioecho.BaseServer`, `limits`, `timeouts`, `ssl` and `grace`."""

    aioecho_server: _AioechoServer | None = None
    """The server underneath, with its `stats` and `connections`, from the beginning of serve_forever() on. None before, and
    where the standard library serves."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until shutdown(), or a signal raises KeyboardInterrupt or the like; then let the handlers finish."""
        reason = self._keeps_from_engine()
        if reason is not None:
            self._refuse_tls(reason)
            logger.debug("%s is served by the standard library: %s", type(self).__qualname__, reason)
            super().serve_forever(poll_interval)  # type: ignore[misc]
            return
        state = self._state()
        state.has_ended.clear()
        try:
            if asyncio._get_running_loop() is not None:  # of which there can't be two in a thread
                self._refuse_tls("an event loop runs in this thread")
                state.wake = super().shutdown  # type: ignore[misc]
                if state.is_to_end:  # since before there was a wake()
                    threading.Thread(target=state.wake).start()  # it waits until this has ended
                super().serve_forever(poll_interval)  # type: ignore[misc]
                return
            with asyncio.Runner(loop_factory=loop_factory("auto")) as runner:
                try:
                    runner.run(self._serve(state, poll_interval))
                except BaseException:
                    # Raised by a signal's handler, in the middle of the loop.
                    if self.aioecho_server is not None:
                        runner.run(self._end(self.aioecho_server))
                    raise
        finally:
            state.wake = lambda: None
            state.is_to_end = False
            # The engine's copy of the descriptor has made both non-blocking.
            if self._socket().fileno() >= 0:
                self._socket().settimeout(self._socket().gettimeout())
            state.has_ended.set()

    def _refuse_tls(self, reason: str) -> None:
        if self.aioecho_options.get("ssl") is not None:
            raise RuntimeError(
                f"{type(self).__qualname__} would be served without the TLS of its aioecho_options: by the standard library,"
                f" as {reason}"
            )

    def shutdown(self) -> None:
        """Let serve_forever() end, and wait until it has. In a thread that handles a request: do not wait."""
        if self._keeps_from_engine() is not None:
            super().shutdown()  # type: ignore[misc]
            return
        state = self._state()
        state.is_to_end = True
        state.wake()
        engine = self.aioecho_server
        if engine is None or not engine.owns_this_thread():
            state.has_ended.wait()

    def _state(self) -> _State:
        # Not in a constructor: it may never be called.
        state: _State = vars(self).setdefault("_aioecho_state", _State())
        return state

    def _socket(self) -> socket.socket:
        return self.socket  # type: ignore[attr-defined, no-any-return]

    def _keeps_from_engine(self) -> str | None:
        """Return why the standard library has to serve this, or None."""
        for name, stock in (
            ("process_request", stdlib.ThreadingMixIn),
            ("get_request", stdlib.TCPServer),
            ("fileno", stdlib.TCPServer),
        ):
            if getattr(type(self), name, None) is not getattr(stock, name) or name in vars(self):
                return f"its {name}() is not"
        for name in ("serve_forever", "shutdown"):
            # The class that this one is mixed into may have its own, which is not to be passed over.
            if getattr(getattr(super(), name), "__func__", None) is not getattr(stdlib.BaseServer, name):
                return f"the {name}() of what it is mixed into is not"
        sock = self._socket()
        if isinstance(sock, ssl.SSLSocket):
            for name in ("shutdown_request", "close_request"):
                if getattr(type(self), name, None) is not getattr(stdlib.TCPServer, name) or name in vars(self):
                    return f"its {name}() is not, and may keep a TLS connection, which is ended there before"
        if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            return "its socket is none for TCP or Unix streams"
        return None

    async def _serve(self, state: _State, poll_interval: float) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(stop.set)

        options = dict(self.aioecho_options)
        listening = self._socket()
        if isinstance(listening, ssl.SSLSocket):
            options.setdefault("ssl", listening.context)
        # A copy, as the server closes its own: serve_forever() may be called again.
        copy = socket.socket(listening.family, listening.type, listening.proto, fileno=os.dup(listening.fileno()))
        try:
            self.aioecho_server = engine = _Engine(self, copy, options)
        except BaseException:
            copy.close()
            raise
        try:
            await engine.start()
            state.wake = wake
            if state.is_to_end:  # since before there was a wake()
                return
            actions = self.service_actions  # type: ignore[attr-defined]
            if getattr(actions, "__func__", None) is stdlib.BaseServer.service_actions:
                await stop.wait()
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(poll_interval):
                        await stop.wait()
                self.service_actions()  # type: ignore[attr-defined]
        finally:
            await self._end(engine)
            copy.close()  # where it could not be started

    async def _end(self, engine: "_AioechoServer") -> None:
        assert isinstance(engine, _Engine)
        if self.block_on_close and not self.daemon_threads:
            await engine.shutdown()
        else:
            engine.leave()


class _Engine(StreamServer):
    """Accepts for a server of the standard library's shape, and calls that one's hooks."""

    _log_level = logging.DEBUG  # as silent as the standard library's, also in a program that serves a log

    def __init__(self, outer: Any, sock: socket.socket, options: dict[str, Any]) -> None:
        one_way = getattr(undo_partial(outer.RequestHandlerClass), "one_way", False)
        super().__init__(None, _OneWayRequest if one_way else _Request, sock=sock, **options)
        self.outer = outer

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Ask the outer server, whose own shutdown_request() ends a request that it does not want."""
        try:
            if self.outer.verify_request(request, client_address):
                return True
        except Exception:
            self.outer.handle_error(request, client_address)
        self.outer.shutdown_request(request)
        request.leave_open()
        return False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: a handler's error has been reported where it was raised."""

    def leave(self) -> None:
        """Stop, but leave the handlers at work to finish, without an event loop."""
        if not self.is_serving():
            return
        self.close()
        if self.handler_threads is not None:
            busy = self.handler_threads.busy
            for connection in self.connections:
                if connection not in busy:
                    connection.cancel()
            self.handler_threads.end()
            if busy and not self.outer.daemon_threads:
                # When the program exits it waits for this thread, and so for them.
                threading.Thread(target=self.handler_threads.join).start()


class _Request(stdlib.BaseRequestHandler):
    """What a thread calls for each connection."""

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        outer = server.outer
        if type(outer).process_request_thread is not stdlib.ThreadingMixIn.process_request_thread:
            _call_hook(outer.process_request_thread, request, client_address)
            _leave_open(request)
            return
        # The same, except that it tells the engine of the error, which counts it.
        try:
            outer.finish_request(request, client_address)
        except Exception:
            _call_hook(outer.handle_error, request, client_address)
            raise
        finally:
            if isinstance(request, ssl.SSLSocket):
                end_tls(request)
            _call_hook(outer.shutdown_request, request)
            _leave_open(request)


class _OneWayRequest(_Request):
    """The same where the handler class says that its clients only send."""

    one_way = True


def _leave_open(request: Any) -> None:
    """Let a connection be the program's that the hooks have not closed. One with TLS is ended by the engine."""
    if isinstance(request, RequestSocket):
        request.leave_open()


def _call_hook(hook: Callable[..., object], *arguments: Any) -> None:
    """Call it, and report what it raises: it would end a thread that was there for this request alone."""
    try:
        hook(*arguments)
    except Exception:
        report_end_of_thread()
        raise


class ThreadingTCPServer(ThreadingMixIn, TCPServer):
    """A TCP server that handles each connection in a thread."""


class ThreadingUDPServer(ThreadingMixIn, UDPServer):
    """A UDP server that handles each datagram in a thread."""


class ThreadingUnixStreamServer(ThreadingMixIn, UnixStreamServer):
    """A Unix stream server that handles each connection in a thread."""


class ThreadingUnixDatagramServer(ThreadingMixIn, UnixDatagramServer):
    """A Unix datagram server that handles each datagram in a thread."""
