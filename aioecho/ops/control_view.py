"""What live control sees of one server, and does to it, in the server's own process."""

import asyncio
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import Any

from aioecho.exceptions import AioechoError
from aioecho.runtime.addresses import unmapped
from aioecho.runtime.logs import format_address
from aioecho.serving.base import BaseServer

__all__ = ["SORTS", "ServerView", "changed"]

SORTS = {"age": "age_s", "sent": "sent_bytes", "received": "received_bytes", "unsent": "unsent_bytes"}
"""What connections may be sorted by, largest first."""

# Connections that are looked at in one turn of the event loop: it takes about half a millisecond.
IN_A_TURN = 50


def changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    """Return limits or timeouts with `changes`; ValueError, for people, if there is no such thing or a value makes no sense."""
    names = [field.name for field in dataclasses.fields(settings)]
    for name in changes:
        if name not in names:
            raise ValueError(f"there is no {name!r}: expected one of {', '.join(names)}")
    return dataclasses.replace(settings, **changes)


class ServerView:
    """Answers what live control asks of a server, and obeys. In the server's event loop only."""

    def __init__(self, server: BaseServer) -> None:
        self._server = server
        self.questions: dict[str, Callable[..., Any]] = {
            "control.status": self.status,
            "control.list": self.find,
            "control.look": self.look,
            "control.kick": self.kick,
            "control.limits": self.set_limits,
            "control.timeouts": self.set_timeouts,
            "control.pause": self.pause,
            "control.resume": self.resume,
            "control.reload_tls": self.reload_tls,
        }
        """What can be asked for, by name."""

    def status(self) -> dict[str, Any]:
        """Return counters, and what is set."""
        server = self._server
        stats = {name: value for name, value in vars(server.stats).items() if isinstance(value, int)}
        is_draining = server.is_draining
        state = "draining" if is_draining else "paused" if server.admission.is_paused else "serving"
        return {
            "pid": os.getpid(),
            "state": state,
            "stats": stats,
            "reasons": dict(server.stats.reasons),
            "limits": dataclasses.asdict(server.limits),
            "timeouts": dataclasses.asdict(server.timeouts),
            "endpoints": list(server.names),
        }

    def find(
        self, older: float | None = None, host: str | None = None, sort: str = "age", limit: int = 10_000
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield the `limit` first connections by `sort`, in parts; the last part is the number that match, in a list.

        `older`: seconds of their age at least. `host`: an address, or a network.
        """
        network = None if host is None else ip_network(host, strict=False)
        now = asyncio.get_running_loop().time()
        connections = list(self._server.connections)
        if older is not None:
            connections = [each for each in connections if now - (each.since or now) >= older]
        if network is not None:
            connections = [each for each in connections if _is_in(each.client_address, network)]
        count = len(connections)
        if sort == "age":  # known without a look at them all
            connections.sort(key=lambda each: each.since or now)
            del connections[limit:]
        yield []
        rows: list[dict[str, Any]] = []
        for start in range(0, len(connections), IN_A_TURN):
            rows += [_row(each, now) for each in connections[start : start + IN_A_TURN] if each.id]
            yield []
        if sort != "age":
            key = SORTS[sort]
            rows.sort(key=lambda row: -(row[key] or 0))
            del rows[limit:]
        for start in range(0, len(rows), IN_A_TURN):
            yield rows[start : start + IN_A_TURN]
        yield [{"matched": count}]

    def look(self, id: str) -> dict[str, Any] | None:
        """Return what find() tells of one connection, and what its task waits in; None if there is none."""
        connection: Any = self._server.connections.get(id)
        if connection is None:
            return None
        task = getattr(connection, "task", None)
        frames = [] if task is None else task.get_stack(limit=1)
        waits = f"{os.path.basename(frames[0].f_code.co_filename)}:{frames[0].f_lineno}" if frames else None
        return {**_row(connection, asyncio.get_running_loop().time()), "waits_at": waits}

    def kick(self, ids: Sequence[str]) -> list[str]:
        """Kick connections; return the ids of the ones that were here."""
        wanted = set(ids)
        found = [connection for connection in self._server.connections if connection.id in wanted]
        kicked = [connection.id for connection in found]
        for connection in found:
            connection.kick("by live control")
        return kicked

    def set_limits(self, changes: Mapping[str, Any]) -> None:
        """Set limits, from now on; ValueError if one makes no sense."""
        self._server.limits = changed(self._server.limits, changes)

    def set_timeouts(self, changes: Mapping[str, Any]) -> None:
        """Set timeouts, from now on; ValueError if one makes no sense."""
        self._server.timeouts = changed(self._server.timeouts, changes)

    def pause(self) -> None:
        """Accept no more, until resume()."""
        self._server.pause()

    def resume(self) -> None:
        """Accept again."""
        self._server.resume()

    def reload_tls(self) -> None:
        """Load the certificates anew; ValueError, for people, if that fails."""
        try:
            self._server.reload_tls()
        except (AioechoError, RuntimeError) as error:
            raise ValueError(str(error)) from error


def _row(connection: Any, now: float) -> dict[str, Any]:
    counts = connection.bytes()
    handler = connection.handler
    if handler is None:
        handler_class = getattr(connection, "RequestHandlerClass", None)
        name = getattr(handler_class, "__qualname__", None)
    else:
        name = type(handler).__qualname__
    since = connection.since
    return {
        "id": connection.id,
        "client": format_address(connection.client_address),
        "age_s": None if since is None else round(now - since, 3),
        "handler": name,
        "label": connection.label,
        "received_bytes": counts.received,
        "sent_bytes": counts.sent,
        "unsent_bytes": counts.unsent,
    }


def _is_in(address: Any, network: Any) -> bool:
    address = unmapped(address)
    if not isinstance(address, tuple):
        return False
    try:
        found = ip_address(str(address[0]).partition("%")[0])
    except ValueError:
        return False
    return found.version == network.version and found in network
