"""What live control sees of one server, and does to it, in the server's own process."""

import asyncio
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

from aioecho.exceptions import AioechoError
from aioecho.runtime.logs import format_address
from aioecho.serving.base import BaseServer
from aioecho.serving.networks import NetworkLists, read_networks
from aioecho.several import servers_of

__all__ = ["SORTS", "ServerView"]

SORTS = ("age", "sent", "received", "unsent")
"""What connections may be sorted by, largest first."""

# Where the files are that are not of the program which is looked into: this package's, and asyncio's.
NOT_OWN = (os.path.dirname(os.path.dirname(__file__)) + os.sep, os.path.dirname(asyncio.__file__) + os.sep)

# Connections that are looked at in one turn of the event loop: it takes about a millisecond.
IN_A_TURN = 100

# Characters of a label that are told: it may be what a peer has sent.
MOST_OF_LABEL = 200


def _changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    """Return limits or timeouts with `changes`; ValueError, for people, if there is no such thing or a value makes no sense."""
    names = [field.name for field in dataclasses.fields(settings)]
    for name in changes:
        if name not in names:
            raise ValueError(f"there is no {name!r}: expected one of {', '.join(names)}")
    return dataclasses.replace(settings, **changes)


class ServerView:
    """Answers what live control asks of a server, and obeys. In the server's event loop only.

    Where the program has several servers, of a factory, they are counted from 1 in their order. `server` is the number of one;
    None is all.
    """

    def __init__(self, server: BaseServer) -> None:
        self._server = server
        self._servers = servers_of(server)
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
        return {
            "pid": os.getpid(),
            "state": _state(server),
            "stats": stats,
            "reasons": dict(server.stats.reasons),
            "endpoints": list(server.names),
            "servers": [
                {
                    "endpoints": list(each.names),
                    "state": _state(each),
                    "active": each.stats.active,
                    "limits": dataclasses.asdict(each.limits),
                    "timeouts": dataclasses.asdict(each.timeouts),
                }
                for each in self._servers
            ],
        }

    def find(
        self,
        older: float | None = None,
        host: str | None = None,
        server: int | None = None,
        sort: str = "age",
        limit: int = 10_000,
    ) -> Iterator[dict[str, Any] | None]:
        """Yield the `limit` first connections by `sort`, in parts; the last part tells how many match: "matched".

        A part has lines of JSON, "text", and what every line is sorted by, "keys". Between two parts there may be another turn
        of the event loop; None is no part, only such a turn. Nothing that the garbage collector tracks is kept for a
        connection: it would look at all objects of the process, for longer than a turn may take.

        `older`: seconds of their age at least. `host`: an address, or a network.
        """
        now = asyncio.get_running_loop().time()
        networks = None if host is None else read_networks([str(ip_network(host, strict=False))], [])
        found: list[Any] = []
        keys: list[float] = []
        asked = self._server if server is None else self._select(server)[0]
        for some in _in_turns(list(asked.connections)):
            for connection in some:
                age = now - (connection.since or now)
                if (older is None or age >= older) and (networks is None or _is_of(connection, networks)):
                    found.append(connection)
                    keys.append(age if sort == "age" else getattr(connection.bytes(), sort) or 0)
            yield None
        order = sorted(range(len(found)), key=keys.__getitem__, reverse=True)[:limit]
        yield None
        for some in _in_turns(order):
            rows = [(keys[index], self._row(found[index], now)) for index in some if found[index].id]
            yield {"keys": [key for key, _ in rows], "text": "".join(f"{json.dumps(row)}\n" for _, row in rows)}
        yield {"matched": len(found)}

    def look(self, id: str) -> dict[str, Any] | None:
        """Return what find() tells of one connection, and what its task waits in; None if there is none."""
        (connection,) = self._server.ids.search([id]) or [None]
        if connection is None:
            return None
        return {**self._row(connection, asyncio.get_running_loop().time()), "waits_at": _find_line(connection)}

    def kick(self, ids: Sequence[str]) -> list[str]:
        """Kick connections; return the ids of the ones that were here."""
        found = self._server.ids.search(ids)
        kicked = [connection.id for connection in found]
        for connection in found:
            connection.kick("by live control")
        return kicked

    def set_limits(self, changes: Mapping[str, Any], server: int | None = None) -> None:
        """Set limits, from now on; ValueError if one makes no sense. Then none is set."""
        self._set("limits", changes, server)

    def set_timeouts(self, changes: Mapping[str, Any], server: int | None = None) -> None:
        """Set timeouts, from now on; ValueError if one makes no sense. Then none is set."""
        self._set("timeouts", changes, server)

    def _set(self, kind: str, changes: Mapping[str, Any], number: int | None) -> None:
        servers = self._select(number)
        before = [getattr(server, kind) for server in servers]
        for server, settings in zip(servers, before, strict=True):
            try:
                setattr(server, kind, _changed(settings, changes))
            except (ValueError, TypeError) as error:
                for changed, earlier in zip(servers, before, strict=True):
                    if getattr(changed, kind) is not earlier:
                        setattr(changed, kind, earlier)
                if len(servers) == 1:
                    raise
                raise ValueError(f"server {servers.index(server) + 1}: {error}; server=N names one") from error

    def pause(self, server: int | None = None) -> None:
        """Accept no more, until resume()."""
        for each in self._select(server):
            each.pause()

    def resume(self, server: int | None = None) -> None:
        """Accept again."""
        for each in self._select(server):
            each.resume()

    def _select(self, number: int | None) -> Sequence[BaseServer]:
        """Return all servers, or the one with this number; ValueError, for people, if there is none."""
        count = len(self._servers)
        if number is not None and not 1 <= number <= count:
            has = "there is one server" if count == 1 else f"there are {count} servers"
            raise ValueError(f"there is no server {number}: {has}, as status tells")
        return self._servers if number is None else [self._servers[number - 1]]

    def reload_tls(self) -> None:
        """Load the certificates anew; ValueError, for people, if that fails."""
        try:
            self._server.reload_tls()
        except (AioechoError, RuntimeError) as error:
            raise ValueError(str(error)) from error

    def _row(self, connection: Any, now: float) -> dict[str, Any]:
        """Return what is told of a connection."""
        counts = connection.bytes()
        handler = connection.handler
        kind = getattr(connection, "RequestHandlerClass", None) if handler is None else type(handler)
        since = connection.since
        return {
            "worker": self._server.ids.prefix.rstrip("."),
            "id": connection.id,
            "client": format_address(connection.client_address),
            "age_s": None if since is None else round(now - since, 3),
            "handler": getattr(kind, "__qualname__", None),
            "label": None if (label := connection.label) is None else label[:MOST_OF_LABEL],
            "received_bytes": counts.received,
            "sent_bytes": counts.sent,
            "unsent_bytes": counts.unsent,
        }


def _state(server: BaseServer) -> str:
    return "draining" if server.is_draining else "paused" if server.is_paused else "serving"


def _find_line(connection: Any) -> str | None:
    """Return the line that a connection's task waits in: the innermost one of the program's own, where there is one."""
    task = getattr(connection, "task", None)
    inner = None if task is None else task.get_coro()
    own = other = None
    while frame := getattr(inner, "cr_frame", None) or getattr(inner, "gi_frame", None):
        file = frame.f_code.co_filename
        line = f"{os.path.basename(file)}:{frame.f_lineno}"
        own, other = (own, line) if file.startswith(NOT_OWN) else (line, other)
        inner = getattr(inner, "cr_await", None) or getattr(inner, "gi_yieldfrom", None)
    return own or other


def _is_of(connection: Any, networks: NetworkLists) -> bool:
    """Tell whether a client is of some networks. One of a Unix socket is of none."""
    return isinstance(connection.client_address, tuple) and networks.allow(connection.client_address)


def _in_turns(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), IN_A_TURN):
        yield items[start : start + IN_A_TURN]
