"""The control socket: a Unix socket on which a program that serves is looked into, and told what to do.

A client sends a line and gets lines of JSON; the last one has "ok". Then the connection is closed, so that it is no matter
which program speaks: `nc -U`, `socat`, or ``python -m aioecho ctl``. After the line `interactive` it stays open.

It is a server of aioecho's own kind with limits of its own, so that no client of it can hold up what else the process does.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
from typing import Any, Self

from aioecho.config import Limits, Timeouts
from aioecho.net.endpoints import UnixEndpoint, parse_endpoint
from aioecho.ops.control_commands import Backend, Commands
from aioecho.ops.control_request import ControlError, parse_request
from aioecho.ops.rate import Rate
from aioecho.server import StreamServer
from aioecho.serving.base import BaseServer
from aioecho.serving.handlers import StreamRequestHandler

__all__ = ["ControlServer", "parse_control"]

logger = logging.getLogger("aioecho.control")

# Clients at a time. One too many is told so, and closed. So many more that others wait in the kernel's queue.
MOST_CLIENTS, MOST_REFUSED, BACKLOG = 16, 8, 128

# The longest line of a client, in bytes.
MOST_BYTES = 2**16

# Seconds for a client to send its line, and to take a part of an answer.
REQUEST_TIMEOUT = 10.0
SEND_TIMEOUT = 10.0

# Commands a second of all clients together, and how many may come at once.
RATE, BURST = 100.0, 20

# Bytes of an answer that are made in one turn of the event loop.
AT_ONCE = 2**14

WHAT_TO_DO = (
    "this is a control socket, which speaks no HTTP: send a line such as `status`, or use python -m aioecho ctl"
)


def parse_control(text: str) -> UnixEndpoint:
    """Return the endpoint of a control socket; ValueError if it is none. Without a mode only its user may open it."""
    endpoint = parse_endpoint(text)
    if not isinstance(endpoint, UnixEndpoint):
        raise ValueError(f"a control socket is a Unix socket, unix:PATH or unix:PATH?mode=660, not {text!r}")
    if endpoint.proxy is not None:
        raise ValueError(f"no balancer stands in front of a control socket: {text!r} must not ask for PROXY headers")
    if endpoint.tls is not None:
        raise ValueError(f"a control socket speaks no TLS, as it is a file of this machine: take tls= out of {text!r}")
    return dataclasses.replace(endpoint, mode=0o600) if endpoint.mode is None else endpoint


class ControlServer:
    """Listens on the control socket of a program, as long as ``async with`` lasts.

    Args:
        where: what :func:`parse_control` returns.
        backend: what carries the commands out.
    """

    def __init__(self, where: UnixEndpoint, backend: Backend) -> None:
        self._where = where
        self._server = _Server(where, backend)

    async def __aenter__(self) -> Self:
        """Listen; EndpointError if that can't be done. Clients wait until :meth:`start`."""
        self._server.pause()
        await self._server.start()
        return self

    async def start(self) -> None:
        """Serve clients."""
        self._server.resume()
        logger.info("control socket at %s", self._where)

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it, and the connections with its clients: what they have not read of an answer is lost."""
        for connection in self._server.connections:
            connection.cancel()
            await asyncio.wait([connection.task])  # for it not to be one that a drain has cut off
        await self._server.shutdown()


class _Server(StreamServer):
    _log_level = logging.DEBUG

    def __init__(self, where: UnixEndpoint, backend: Backend) -> None:
        super().__init__(
            str(where),
            functools.partial(_Handler, Commands(backend), Rate(RATE, BURST), _Clients()),
            limits=Limits(
                max_connections=MOST_CLIENTS + MOST_REFUSED,
                backlog=BACKLOG,
                max_buffer=MOST_BYTES,
                max_frame=MOST_BYTES,
            ),
            # An answer may take long after the client has ended its direction, as `trace` does. One that is interactive may
            # think for long, also in the middle of a line.
            timeouts=Timeouts(idle=None, message=None, half_closed=None, write=SEND_TIMEOUT),
            grace=0.0,
        )


class _Clients:
    """How many clients are served. Of many that come at once the first ones are: the server may have accepted all by then."""

    count = 0


class _Handler(StreamRequestHandler):
    def __init__(
        self,
        commands: Commands,
        rate: Rate,
        clients: _Clients,
        request: Any,
        client_address: Any,
        server: BaseServer,
    ) -> None:
        super().__init__(request, client_address, server)
        self._commands = commands
        self._rate = rate
        self._clients = clients

    async def handle(self) -> None:
        """Answer a line, or all lines if the first one says so."""
        is_interactive = False
        self._clients.count += 1
        try:
            if self._clients.count > MOST_CLIENTS:
                raise ControlError(f"{MOST_CLIENTS} clients are connected: try again")
            while line := await self._read_line(None if is_interactive else REQUEST_TIMEOUT):
                if line == b"interactive":
                    is_interactive = True
                    continue
                await self._rate.wait_for_turn()
                await self._answer(line)
                if not is_interactive:
                    break
        except ControlError as error:
            await self.send(_line({"ok": False, "error": str(error)}))
        finally:
            self._clients.count -= 1

    async def _read_line(self, seconds: float | None) -> bytes:
        """Return the next line that is not blank, without its newline; b"" at the end."""
        try:
            async with asyncio.timeout(seconds):
                while line := await self.reader.readline():  # at the end without a newline too
                    if line.strip():
                        return line.strip()
        except ValueError:
            raise ControlError(f"a line may have {MOST_BYTES} bytes") from None
        except TimeoutError:
            raise ControlError(f"no whole line came in {REQUEST_TIMEOUT:g} s") from None
        return b""

    async def _answer(self, line: bytes) -> None:
        if line.startswith((b"GET ", b"HEAD ", b"POST ")):
            raise ControlError(WHAT_TO_DO)
        try:
            command, values = parse_request(line)
            waiting = bytearray()
            async with contextlib.aclosing(self._commands.answer(command, values)) as lines:
                async for found in lines:
                    waiting += found.encode() if isinstance(found, str) else _line(found)
                    if len(waiting) >= AT_ONCE or command == "trace" or "ok" in found:
                        await self.send(bytes(waiting))
                        waiting.clear()
                        await asyncio.sleep(0)
        except ControlError as error:
            await self.send(_line({"ok": False, "error": str(error)}))


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
