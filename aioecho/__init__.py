"""socketserver's handler pattern on asyncio and uvloop.

Write a handler class with an ``async def handle(self)``, and give it to :func:`run` for a program of its own, or to
:func:`serve`, :class:`TCPServer` or :class:`UDPServer` inside an application.
"""

from aioecho.background import BackgroundServer, run_in_thread
from aioecho.certificates import TLS
from aioecho.choice import serve
from aioecho.client import Backoff, Connection, connect
from aioecho.config import Limits, Timeouts
from aioecho.datagrams.server import DatagramServer, UDPServer, UnixDatagramServer
from aioecho.exceptions import (
    AioechoError,
    CertificateError,
    ConnectionClosed,
    ConnectionTimeout,
    EndpointError,
    FrameTooLong,
    FramingError,
    LineTooLong,
)
from aioecho.net.proxy_header import ProxyHeader, ProxyTLS
from aioecho.net.proxy_protocol import ProxyProtocol
from aioecho.server import TCPServer, UnixStreamServer
from aioecho.serving.base import BaseServer
from aioecho.serving.datagram_handlers import DatagramBatchHandler, DatagramRequestHandler, DatagramSessionHandler
from aioecho.serving.handlers import BaseRequestHandler, StreamRequestHandler
from aioecho.serving.live import ByteCounts, Connections, LiveConnection
from aioecho.stats import DatagramStats, DrainReport, Stats
from aioecho.streams.reader import StreamReader
from aioecho.streams.writer import StreamWriter
from aioecho.workers.program import run

__version__ = "0.3.0"

__all__ = [
    "TLS",
    "AioechoError",
    "BackgroundServer",
    "Backoff",
    "BaseRequestHandler",
    "BaseServer",
    "ByteCounts",
    "CertificateError",
    "Connection",
    "ConnectionClosed",
    "ConnectionTimeout",
    "Connections",
    "DatagramBatchHandler",
    "DatagramRequestHandler",
    "DatagramServer",
    "DatagramSessionHandler",
    "DatagramStats",
    "DrainReport",
    "EndpointError",
    "FrameTooLong",
    "FramingError",
    "Limits",
    "LineTooLong",
    "LiveConnection",
    "ProxyHeader",
    "ProxyProtocol",
    "ProxyTLS",
    "Stats",
    "StreamReader",
    "StreamRequestHandler",
    "StreamWriter",
    "TCPServer",
    "Timeouts",
    "UDPServer",
    "UnixDatagramServer",
    "UnixStreamServer",
    "__version__",
    "connect",
    "run",
    "run_in_thread",
    "serve",
]
