"""AnyIO on uvloop: create_tcp_listener and a function per connection."""

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call, unused-ignore"

from __future__ import annotations

import anyio
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from ._options import BACKLOG, HOST, READ_BYTES, read_options

options = read_options()


async def echo(stream: SocketStream) -> None:
    """Send back each chunk."""
    async with stream:
        try:
            while True:
                data = await stream.receive(READ_BYTES)
                if options.delay_s:
                    await anyio.sleep(options.delay_s)
                await stream.send(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass


async def lines(stream: SocketStream) -> None:
    """Send back each line."""
    async with stream:
        buffered = BufferedByteReceiveStream(stream)
        try:
            while True:
                line = await buffered.receive_until(b"\n", READ_BYTES)
                await stream.send(line + b"\n")
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead):
            pass


async def main() -> None:
    """Serve until killed."""
    listener = await anyio.create_tcp_listener(local_host=HOST, local_port=options.port, backlog=BACKLOG)
    await listener.serve(lines if options.mode == "lines" else echo)


if __name__ == "__main__":
    anyio.run(main, backend_options={"use_uvloop": True})
