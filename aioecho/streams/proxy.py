"""The PROXY header at the beginning of a stream: it is read to its end, and no byte of what follows is lost."""

from collections.abc import Generator
from typing import Any

from aioecho.net.proxy_header import ProxyHeader
from aioecho.net.proxy_protocol import ProxyProtocol
from aioecho.runtime.steps import steps
from aioecho.streams.protocol import ReadCountingProtocol
from aioecho.streams.writer import StreamWriter

__all__ = ["ProxiedWriter", "read_header"]


class ProxiedWriter(StreamWriter):
    """The writer of a connection that began with a PROXY header, which is its extra info "proxy"."""

    proxy: ProxyHeader

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the header as "proxy", and else what asyncio's does: the addresses are of the balancer's connection."""
        return self.proxy if name == "proxy" else super().get_extra_info(name, default)


@steps
def read_header(protocol: ReadCountingProtocol, proxy: ProxyProtocol) -> Generator[Any, None, ProxyHeader]:
    """Read the header that a stream begins with. What follows it stays in the reader's buffer.

    Raises:
        ProxyHeaderError: there is none, or it is not to be accepted.
        EOFError: the stream ended before the header did.
        OSError: the connection broke before that.
    """
    reader = protocol.reader
    while True:
        received = reader._buffer
        if received and (header := proxy.parse(received)) is not None:
            reader._take(header.size)
            protocol.unanswered = False  # a header is no message
            protocol.uncount(header.size)
            return header
        if reader._exception is not None:
            raise reader._exception
        if reader._eof:
            raise EOFError
        yield from reader._wait("read_header")
