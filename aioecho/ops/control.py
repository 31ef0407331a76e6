"""The control socket: a Unix socket on which a program that serves is looked into, and told what to do.

A client sends a line and gets lines of JSON; the last one has "ok". Then the connection is closed, so that it is no matter
which program speaks: `nc -U`, `socat`, or ``python -m aioecho ctl``. After the line `interactive` it stays open.
"""

import asyncio
import contextlib
import json
import logging
from typing import Any, Self

from aioecho.net.binding import bind_endpoint
from aioecho.net.bound import BoundSocket
from aioecho.net.endpoints import UnixEndpoint, parse_endpoint
from aioecho.ops.control_commands import Backend, Commands
from aioecho.ops.control_request import ControlError, parse_request

__all__ = ["ControlServer", "parse_control"]

logger = logging.getLogger("aioecho.control")

# Clients at a time. One too many is told so, and closed.
MOST_CLIENTS = 16

# The longest line of a client, in bytes.
MOST_BYTES = 2**16

# Seconds for a client to send its line, and to take a part of an answer.
REQUEST_TIMEOUT = 10.0
SEND_TIMEOUT = 10.0

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
    return UnixEndpoint(endpoint.path, 0o600) if endpoint.mode is None else endpoint


class ControlServer:
    """Listens on the control socket of a program.

    Args:
        where: what :func:`parse_control` returns.
        backend: what carries the commands out.
    """

    def __init__(self, where: UnixEndpoint, backend: Backend) -> None:
        self._where = where
        self._commands = Commands(backend)
        self._bound: list[BoundSocket] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        """Listen; EndpointError if that can't be done. Clients wait until :meth:`start`."""
        self._bound = await bind_endpoint(self._where, backlog=MOST_CLIENTS)
        return self

    async def start(self) -> None:
        """Serve clients."""
        self._server = await asyncio.start_unix_server(self._serve, sock=self._bound[0].sock.dup(), limit=MOST_BYTES)
        logger.info("control socket at %s", self._where)

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it, and end the connections with its clients."""
        if self._server is not None:
            self._server.close()
        for bound in self._bound:
            bound.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if len(self._tasks) > MOST_CLIENTS:
                writer.write(_line({"ok": False, "error": f"{MOST_CLIENTS} clients are connected: try again"}))
            else:
                await self._converse(reader, writer)
        except (OSError, TimeoutError):
            writer.transport.abort()
        except Exception:
            logger.exception("the control socket failed")
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(SEND_TIMEOUT):
                    await writer.wait_closed()
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_interactive, is_first = False, True
        while is_first or is_interactive:
            try:
                async with asyncio.timeout(None if is_interactive else REQUEST_TIMEOUT):
                    line = await reader.readline()  # at the end without a newline too
            except ValueError:
                writer.write(_line({"ok": False, "error": f"a line may have {MOST_BYTES} bytes"}))
                return
            except TimeoutError:
                writer.write(_line({"ok": False, "error": f"no whole line came in {REQUEST_TIMEOUT:g} s"}))
                return
            if not line:
                return
            if line.strip() == b"interactive":
                is_interactive = True
                continue
            if not line.strip():
                continue
            is_first = False
            if line.startswith((b"GET ", b"HEAD ", b"POST ")):
                writer.write(_line({"ok": False, "error": WHAT_TO_DO}))
                return
            await self._answer(line, writer)

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            command, values = parse_request(line)
            waiting = bytearray()
            async with contextlib.aclosing(self._commands.answer(command, values)) as lines:
                async for found in lines:
                    waiting += found.encode() if isinstance(found, str) else _line(found)
                    if len(waiting) >= AT_ONCE or command == "trace" or "ok" in found:
                        writer.write(bytes(waiting))
                        waiting.clear()
                        async with asyncio.timeout(SEND_TIMEOUT):
                            await writer.drain()
                        await asyncio.sleep(0)
                        if writer.is_closing():
                            return
        except ControlError as error:
            writer.write(_line({"ok": False, "error": str(error)}))


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
