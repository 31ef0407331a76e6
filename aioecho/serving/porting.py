"""What a server is given that would have no effect here, as a hook of socketserver's: a mistake that is told at the start."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from aioecho.config import Limits, Timeouts

__all__ = ["check_hooks", "check_options"]

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


def check_options(names: Iterable[str]) -> None:
    """Raise TypeError if an option of a server is a field of its limits or timeouts, or a part of its endpoint."""
    for name in names:
        for kind, option in ((Limits, "limits"), (Timeouts, "timeouts")):
            # `proxy` is both: an option, and a timeout.
            if name != "proxy" and any(field.name == name for field in dataclasses.fields(kind)):
                raise TypeError(
                    f"{name} is a field of {kind.__name__}: give {option}=aioecho.{kind.__name__}({name}=...)"
                )
        if name in ("host", "port"):
            raise TypeError(f"{name} is no option: write the endpoint tcp://HOST:PORT")
