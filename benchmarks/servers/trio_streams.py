"""trio: serve_tcp and a function per connection."""

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call, unused-ignore"

from __future__ import annotations

import trio

from ._options import BACKLOG, HOST, READ_BYTES, read_options

options = read_options()


async def echo(stream: trio.SocketStream) -> None:
    """Send back each chunk; trio ends the whole server if a handler lets an error out."""
    try:
        while data := await stream.receive_some(READ_BYTES):
            if options.delay_s:
                await trio.sleep(options.delay_s)
            await stream.send_all(data)
    except trio.BrokenResourceError:
        pass


async def main() -> None:
    """Serve until killed."""
    await trio.serve_tcp(echo, options.port, host=HOST, backlog=BACKLOG)


if __name__ == "__main__":
    trio.run(main)
