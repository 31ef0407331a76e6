"""socketserver: the handler classes of the standard library, under each of its servers (`--server`)."""

from __future__ import annotations

import socketserver
import sys

from ._options import BACKLOG, HOST


def take(name: str) -> str:
    """Take `name VALUE` off the command line, which is this module's own option."""
    at = sys.argv.index(name)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


kind = take("--server")

from ._blocking_handlers import HANDLERS, options  # noqa: E402 - it reads the rest of the command line

if options.mode == "udp":
    kind = kind.replace("TCP", "UDP")

base: type[socketserver.BaseServer] = getattr(socketserver, kind)


class Server(base):  # type: ignore[misc, valid-type]
    """The chosen server, its queue as long as everyone's and its processes as many as there are clients."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = BACKLOG
    max_children = 10_000

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that leave; report anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


if __name__ == "__main__":
    with Server((HOST, options.port), HANDLERS[options.mode]) as server:
        server.serve_forever()
