"""A small HTTP/1.1 server for GET: what is asked of the metrics' port.

It is a server of aioecho's own kind with limits of its own, so that no client of it can hold up what else the process does: the
clients, the size and the time of a request, and the requests a second are bounded.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from aioecho.config import Limits, Timeouts
from aioecho.ops.rate import Rate
from aioecho.server import StreamServer
from aioecho.serving.base import BaseServer
from aioecho.serving.handlers import StreamRequestHandler

__all__ = ["HTTPServer", "Headers", "Response"]

# Clients at once: a Prometheus or two, a balancer's and an orchestrator's health checks, and a person. Over FEW the one that
# has been idle for longest makes room; over MOST clients wait in the kernel's queue.
FEW, MOST = 12, 16

# Bytes: the most of a request's head. That of Prometheus 3 has 600.
MOST_OF_HEAD = 2**13

# Seconds for a whole request, from its first byte, and for the first byte of the first one.
REQUEST_TIMEOUT = 5.0

# Seconds that a connection may be idle between two requests. Prometheus asks every minute by default.
IDLE_TIMEOUT = 150.0

# Requests a second of all clients together, and how many may come at once.
RATE, BURST = 100.0, 20

Headers = Mapping[str, str]
"""A request's headers, their names in lower case. Of one that comes twice it is the last."""


@dataclass(frozen=True)
class Response:
    """What a request is answered with. `allow` names the methods, where the status is 405."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    allow: str = ""

    @classmethod
    def of_text(cls, status: HTTPStatus, text: str, **options: Any) -> "Response":
        """Return one whose body is a line."""
        return cls(status, f"{text}\n".encode(), **options)


class _BadRequest(Exception):
    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.response = Response.of_text(status, why)


class HTTPServer(StreamServer):
    """Answers GET and HEAD with what `answer(path, headers)` returns.

    Args:
        endpoint: where to listen, for streams.
        answer: a coroutine function. It is called for each request in bounds.
    """

    _log_level = logging.DEBUG  # its owner says where it listens, and for what

    def __init__(self, endpoint: str, answer: Callable[[str, Headers], Awaitable[Response]]) -> None:
        super().__init__(
            endpoint,
            functools.partial(_Handler, _Requests(answer)),
            limits=Limits(max_connections=MOST, backlog=MOST, max_buffer=MOST_OF_HEAD, max_frame=MOST_OF_HEAD),
            timeouts=Timeouts(idle=IDLE_TIMEOUT, message=REQUEST_TIMEOUT, write=REQUEST_TIMEOUT),
            grace=1.0,
        )


class _Requests:
    """What the handlers of a server share: the answers, the rate, and which handlers are idle."""

    def __init__(self, answer: Callable[[str, Headers], Awaitable[Response]]) -> None:
        self.answer = answer
        self._idle: dict[_Handler, None] = {}  # the longest first
        self.rate = Rate(RATE, BURST)

    def make_room(self, count: int) -> None:
        """Close the connection that has been idle for longest, if so many are too many."""
        if count > FEW and self._idle:
            idle = next(iter(self._idle))
            self.set_idle(idle, False)
            idle.writer.close()

    def set_idle(self, handler: "_Handler", is_idle: bool) -> None:
        """Note whether a handler waits for another request."""
        self._idle.pop(handler, None)
        if is_idle:
            self._idle[handler] = None


class _Handler(StreamRequestHandler):
    def __init__(self, requests: _Requests, request: Any, client_address: Any, server: BaseServer) -> None:
        super().__init__(request, client_address, server)
        self._requests = requests

    async def handle(self) -> None:
        """Answer requests until one asks for the end, or is none."""
        self._requests.make_room(len(self.server.connections))
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                head = await self._read_head()
            while head is not None and await self._serve(head):
                self._requests.set_idle(self, True)
                head = await self._read_head()
        except TimeoutError:
            pass  # it is silent
        except _BadRequest as error:
            await self._respond(error.response, is_last=True)
        finally:
            self._requests.set_idle(self, False)

    async def _read_head(self) -> bytes | None:
        """Return the next request's head, None if there is none."""
        try:
            return await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError as error:
            raise _BadRequest(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request's head is at most {MOST_OF_HEAD} bytes"
            ) from error

    async def _serve(self, head: bytes) -> bool:
        """Answer a request; return whether the connection stays open."""
        self._requests.set_idle(self, False)
        method, target, version, headers = _parse(head)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        connection = headers.get("connection", "").lower()
        is_last = has_body or "close" in connection or (version == "HTTP/1.0" and "keep-alive" not in connection)
        await self._requests.rate.wait_for_turn()
        if method in ("GET", "HEAD"):
            response = await self._requests.answer(target.partition("?")[0], headers)
        else:
            response = Response.of_text(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{method} is not allowed here, GET is", allow="GET, HEAD"
            )
        await self._respond(response, is_last=is_last, has_body=method != "HEAD")
        return not is_last

    async def _respond(self, response: Response, *, is_last: bool, has_body: bool = True) -> None:
        lines = [
            f"HTTP/1.1 {response.status.value} {response.status.phrase}",
            f"Content-Type: {response.content_type}",
            f"Content-Length: {len(response.body)}",
            "Cache-Control: no-store",
        ]
        if response.allow:
            lines.append(f"Allow: {response.allow}")
        lines.append(f"Connection: {'close' if is_last else 'keep-alive'}")
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        await self.send(head + response.body if has_body else head)


def _parse(head: bytes) -> tuple[str, str, str, Headers]:
    """Return a request's method, target, version and headers."""
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    match first.split(" "):
        case [method, target, version] if method.isalpha() and target and version.startswith("HTTP/"):
            if version not in ("HTTP/1.0", "HTTP/1.1"):
                raise _BadRequest(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this is HTTP/1.1")
        case _:
            raise _BadRequest(HTTPStatus.BAD_REQUEST, "this is no HTTP request")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _BadRequest(HTTPStatus.BAD_REQUEST, "this is no header of a request")
        headers[name.lower()] = value.strip()
    return method, target, version, headers
