"""The metrics' port: /metrics for Prometheus, /healthz and /readyz for orchestrators and balancers."""

import asyncio
import logging
import platform
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, Self

from aioecho.metrics import OPENMETRICS, TEXT, Metrics, format_metrics
from aioecho.net.endpoints import TCPEndpoint, UnixEndpoint, parse_endpoint
from aioecho.ops.http import Headers, HTTPServer, Response
from aioecho.serving.base import BaseServer
from aioecho.serving.measuring import begin_measuring, measure_in_turns

__all__ = ["Collect", "MetricsEndpoint", "parse_metrics_address", "prefers_openmetrics"]

logger = logging.getLogger("aioecho.metrics")

# Seconds for which the values that were gathered are told again: a flood of requests does not gather anew for each.
FRESH_FOR = 0.1

Collect = Callable[[], Awaitable[Sequence[tuple[str, Metrics]]]]
"""Gathers the metrics of all processes: the number of the slot, for the label ``worker``, or "", and the metrics."""


def parse_metrics_address(text: str) -> str:
    """Return the endpoint of where to tell metrics, given as ``127.0.0.1:9464``, ``[::1]:9464`` or ``unix:PATH``.

    Raises:
        ValueError: it is none of these.
        TypeError: it is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"metrics must be HOST:PORT, as 127.0.0.1:9464, or unix:PATH, not {text!r}")
    endpoint = text if text.startswith(("unix:", "tcp://")) else f"tcp://{text}"
    try:
        parsed = parse_endpoint(endpoint)
    except ValueError as error:
        raise ValueError(f"metrics must be HOST:PORT, as 127.0.0.1:9464, or unix:PATH, not {text!r}") from error
    if not isinstance(parsed, TCPEndpoint | UnixEndpoint) or (isinstance(parsed, TCPEndpoint) and endpoint[6] == ":"):
        raise ValueError(f"metrics must be HOST:PORT, as 127.0.0.1:9464, or unix:PATH, not {text!r}")
    return endpoint


class MetricsEndpoint:
    """Tells metrics at an address, as parse_metrics_address() has it, as long as ``async with`` lasts.

    Args:
        address: where to listen.
        collect: gathers the metrics. It is called for one request at a time.
        find_obstacle: finds out why no client should be sent here now, "" if nothing speaks against it.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, address: str, collect: Collect, find_obstacle: Callable[[], Awaitable[str]]) -> None:
        self._server = HTTPServer(parse_metrics_address(address), self._answer)
        self._collect = collect
        self._find_obstacle = find_obstacle
        self._lock = asyncio.Lock()
        self._texts: dict[bool, bytes] = {}  # by whether it is OpenMetrics
        self._parts: Sequence[tuple[str, Metrics]] = ()
        self._collected_at = float("-inf")

    @classmethod
    def of_server(cls, address: str, server: BaseServer) -> Self:
        """Return one for a server of this process, and begin to measure it.

        Raises:
            ValueError: the address is none.
        """

        async def collect() -> Sequence[tuple[str, Metrics]]:
            return [("", await measure_in_turns(server))]

        async def find_obstacle() -> str:
            if server.is_draining:
                return "draining"
            if server.is_paused:
                return "paused"
            return "" if server.is_serving() else "starting"

        made = cls(address, collect, find_obstacle)
        begin_measuring(server)
        return made

    @property
    def names(self) -> Sequence[str]:
        """The endpoint string of where it listens, with the real port."""
        return self._server.names

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            EndpointError: that can't be done.
        """
        await self._server.start()
        for name in self.names:
            where = name.removeprefix("tcp://")
            logger.info("metrics on %s", name if where == name else f"http://{where}/metrics")
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._server.shutdown()

    async def _answer(self, path: str, headers: Headers) -> Response:
        if path == "/metrics":
            is_openmetrics = prefers_openmetrics(headers.get("accept", ""))
            text = await self._get_text(is_openmetrics)
            return Response(HTTPStatus.OK, text, OPENMETRICS if is_openmetrics else TEXT)
        if path == "/healthz":
            return Response.of_text(HTTPStatus.OK, "ok")
        if path == "/readyz":
            obstacle = await self._find_obstacle()
            if obstacle:
                return Response.of_text(HTTPStatus.SERVICE_UNAVAILABLE, obstacle)
            return Response.of_text(HTTPStatus.OK, "ready")
        return Response.of_text(HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz")

    async def _get_text(self, is_openmetrics: bool) -> bytes:
        async with self._lock:  # what waits here gets what the first one has gathered
            loop = asyncio.get_running_loop()
            if loop.time() - self._collected_at > FRESH_FOR:
                self._parts = [("", _build()), *await self._collect()]
                self._texts = {}
                self._collected_at = loop.time()
            if is_openmetrics not in self._texts:
                text = format_metrics(self._parts, openmetrics=is_openmetrics)
                self._texts[is_openmetrics] = text.encode("utf-8", "backslashreplace")
            return self._texts[is_openmetrics]


def _build() -> Metrics:
    from aioecho import __version__  # it is made when all modules are there

    metrics = Metrics()
    metrics.add("aioecho_build", 1, __version__, platform.python_version())
    return metrics


def prefers_openmetrics(accept: str) -> bool:
    """Return whether the value of an Accept header asks for OpenMetrics 1.0 rather than for the older text format."""
    best = {True: 0.0, False: 0.0}
    for asked in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in asked.split(";"))
        options = dict(parameter.partition("=")[::2] for parameter in parameters)
        try:
            weight = float(options.get("q", "1"))
        except ValueError:
            continue
        if kind == "application/openmetrics-text":
            if options.get("version", "1.0.0").strip('"') != "1.0.0":
                continue
        elif kind not in ("text/plain", "text/*", "*/*"):
            continue
        is_openmetrics = kind == "application/openmetrics-text"
        best[is_openmetrics] = max(best[is_openmetrics], weight)
    return best[True] > 0 and best[True] >= best[False]
