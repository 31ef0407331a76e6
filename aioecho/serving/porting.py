"""What a subclass of a server has of socketserver's that would never be called here: a mistake that is told at the start."""

from typing import Any

__all__ = ["check_hooks"]

# The hooks and class attributes of socketserver's servers, and what there is in their place.
REPLACED = {
    "process_request": "give a callable that makes the handler, or use aioecho.compat.socketserver",
    "process_request_thread": "use aioecho.compat.socketserver",
    "finish_request": "give a callable that makes the handler",
    "get_request": "use aioecho.compat.socketserver",
    "shutdown_request": "override finish() in the handler",
    "close_request": "override finish() in the handler",
    "server_bind": "bind a socket and give it as sock=, or as fd://N",
    "server_activate": "use lifespan=",
    "server_close": "use lifespan=",
    "service_actions": "start a task in lifespan=",
    "handle_timeout": "use Timeouts",
    "request_queue_size": "use Limits(backlog=...)",
    "max_packet_size": "use Limits(max_datagram=...)",
    "address_family": "give an address of that family",
    "socket_type": "use a server class for that kind of socket",
}


def check_hooks(kind: type[Any]) -> None:
    """Raise TypeError if a server class, or one that it is derived from, has what only socketserver's servers call or read."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "aioecho":
            continue
        for name, instead in REPLACED.items():
            if name in vars(base):
                raise TypeError(f"{base.__qualname__}.{name} is socketserver's, and has no effect here: {instead}")
