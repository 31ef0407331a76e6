"""What the fixture `aioecho_server` of the pytest plugin is: it serves handlers in threads, up to the end of a test."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from aioecho.background import BackgroundServer, running
from aioecho.choice import are_for_datagrams
from aioecho.datagrams.server import DatagramServer
from aioecho.server import StreamServer
from aioecho.testing.servers import RecordingServer, check_lifespan, describe, is_for_datagrams, make_server, raise_all

__all__ = ["ServerFactory"]


class ServerFactory:
    """Serves every handler in a thread of its own, until :meth:`close`."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._servers: list[RecordingServer] = []
        self._failures: list[Exception] = []  # of shutdowns

    def __call__(
        self,
        RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any],
        *endpoints: str,
        loop: str = "auto",
        **options: Any,
    ) -> BackgroundServer:
        """Serve a handler, and return its server, which listens by then.

        Args:
            RequestHandlerClass, endpoints: as for :func:`aioecho.serve`. By default a free port of 127.0.0.1, TCP or, for a
                handler of datagrams, UDP.
            loop: as for :func:`aioecho.run_in_thread`.
            options: as for :func:`aioecho.testing.connect`.

        Raises: as :func:`aioecho.run_in_thread`.
        """
        is_mapping = isinstance(RequestHandlerClass, Mapping)
        if not endpoints and not is_mapping:
            endpoints = ("udp://127.0.0.1:0",) if is_for_datagrams(RequestHandlerClass) else ("tcp://127.0.0.1:0",)
        for_datagrams = not is_mapping and are_for_datagrams(*endpoints)
        options.setdefault("server_class", DatagramServer if for_datagrams else StreamServer)
        server = make_server(endpoints or None, RequestHandlerClass, recording=RecordingServer, **options)
        serving = running(BackgroundServer(server, loop))
        background = serving.__enter__()
        self._stack.callback(self._shut_down, serving)
        self._servers.append(server)
        return background

    def _shut_down(self, serving: contextlib.AbstractContextManager[BackgroundServer]) -> None:
        try:
            serving.__exit__(None, None, None)
        except Exception as error:
            self._failures.append(error)  # after what the handlers have raised, and the other servers are shut down too

    def close(self) -> list[BaseException]:
        """Shut all servers down, and return what their handlers have raised, and what the shutdowns have."""
        servers, self._servers = self._servers, []
        self._stack.close()
        errors = [error for server in servers for error in server._record.take_errors()]
        failures, self._failures = self._failures, []
        errors += failures
        for server in servers:
            try:
                check_lifespan(server)
            except RuntimeError as error:
                errors.append(error)
        return errors

    def fail(self, error: BaseException | None = None) -> None:
        """Shut all servers down, and raise what their handlers have raised; or note it with `error`, the test's own."""
        errors = self.close()
        if error is None:
            raise_all(errors)
        elif errors:
            error.add_note(describe(errors))
