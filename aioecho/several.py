"""The servers that a factory gives, as one program."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from aioecho.config import Limits
from aioecho.exceptions import CertificateError
from aioecho.parts import Composite, inherit
from aioecho.serving.base import BaseServer
from aioecho.serving.drain import Drain
from aioecho.serving.handler_types import signature_of
from aioecho.serving.registry import Registry

__all__ = ["Several", "is_factory", "make_servers", "servers_of"]


def is_factory(found: Any) -> bool:
    """Tell whether this can be called without an argument, and is no class: what makes handlers takes three."""
    if isinstance(found, type | Mapping) or not callable(found):
        return False
    try:
        signature_of(found).bind()
    except (TypeError, ValueError):
        return False
    return True


def make_servers(factory: Callable[[], Any]) -> BaseServer:
    """Call a factory, and return the server that it gives, or its servers as one.

    Raises:
        TypeError: it gives something else (caller).
        ValueError: it gives no server, or one that was started, or one twice (caller).
    """
    name = getattr(factory, "__qualname__", repr(factory))
    if inspect.iscoroutinefunction(factory):
        raise TypeError(f"the factory {name} is a coroutine function: it is called before a loop runs; see lifespan=")
    found = factory()
    servers = [found] if isinstance(found, BaseServer) else list(found) if isinstance(found, Iterable) else [found]
    if not all(isinstance(server, BaseServer) for server in servers):
        raise TypeError(
            f"a factory returns a server, as aioecho.TCPServer(...), or a list of servers: {name} returned {found!r}"
        )
    if not servers:
        raise ValueError(f"the factory {name} returned no server: return one, or a list of them")
    if len({id(server) for server in servers}) < len(servers):
        raise ValueError(f"the factory {name} returned the same server twice")
    if any(server.event_loop is not None for server in servers):
        raise ValueError(f"the factory {name} returned a server that was started: the program itself starts it")
    return servers[0] if len(servers) == 1 else Several(servers)


def servers_of(server: BaseServer) -> Sequence[BaseServer]:
    """Return the servers of a program, in their order: what make_servers() was given, or the one server itself."""
    return server.servers if isinstance(server, Several) else [server]


class Several(Composite):
    """Servers of one program, every one with its own limits, hooks and lifespan, under one start and one drain.

    They start in their order. When one begins to stop, all do, within the longest `grace` or the one that was asked for; their
    lifespans are left once all have drained. `limits` and `timeouts` are the first one's, and may be replaced: `servers` have
    the others'.

    Args:
        servers: not started yet.
    """

    def __init__(self, servers: Sequence[BaseServer]) -> None:
        first = servers[0]
        Registry.__init__(self, first.RequestHandlerClass, ssl=None, limits=first.limits, timeouts=first.timeouts)
        self.endpoints = [endpoint for server in servers for endpoint in server.endpoints]
        self.grace = max(server.grace for server in servers)
        self._parts = servers
        self.ids = self.ids  # of all, so that no two connections have the same
        self._not_drained = set(servers)
        self._all_drained = asyncio.Event()
        for server in servers:
            server.composite = self

    @property
    def servers(self) -> Sequence[BaseServer]:
        """The servers, in their order."""
        return self._parts

    @property
    def is_paused(self) -> bool:
        """Whether none of them accepts clients."""
        return all(server.is_paused for server in self._parts)

    @property
    def what_it_serves(self) -> str:
        """What `connections` are, for people."""
        kinds = {server.what_it_serves for server in self._parts}
        return kinds.pop() if len(kinds) == 1 else super().what_it_serves

    def inherit(self, groups: Sequence[Sequence[str]]) -> None:
        """Serve on other endpoints in place of their own: see :meth:`BaseServer.inherit`."""
        inherit(self._parts, groups)

    # What is set on them.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "relay":  # a group is one server's
            for number, server in enumerate(self._parts):
                server.relay = functools.partial(_send_for, number, value)

    def deliver(self, topic: str, data: bytes, full: Literal["close", "skip"]) -> None:
        """Write what another worker's server of the same place has published."""
        number, _, topic = topic.partition(":")
        # While workers are replaced, the program of another one may be older, with other servers.
        if number.isdecimal() and int(number) < len(self._parts):
            self._parts[int(number)].deliver(topic, data, full)

    def _apply_limits(self, limits: Limits) -> None:
        self._parts[0].limits = limits

    def _timeouts_changed(self) -> None:
        self._parts[0].timeouts = self.timeouts

    def reload_tls(self) -> None:
        """Load the files of all servers that have some anew, now: see :meth:`BaseServer.reload_tls`."""
        errors: list[Exception] = []
        for server in self._parts:
            try:
                server.reload_tls()
            except (CertificateError, RuntimeError) as error:
                errors.append(error)
        failed = [error for error in errors if isinstance(error, CertificateError)]
        if failed:
            raise failed[0]
        if len(errors) == len(self._parts):
            raise errors[0]

    def has_failed(self) -> bool:
        """Tell whether the lifespan of one raised or ended too early."""
        return any(server.has_failed() for server in self._parts)

    # Their end.

    async def _undo_start(self) -> None:
        await self.shutdown(0)  # also of the ones that have started

    def _begin_shutdown_of(self, part: BaseServer, grace: float, why: str | None) -> Drain:
        return part._begin_shutdown(grace, why)

    def one_stops(self, grace: float | None, why: str | None) -> None:
        """Stop all, as one of them begins to."""
        if not self._is_told:
            self._begin_shutdown(grace, why)

    _is_told = False

    def _begin_shutdown(self, grace: float | None, why: str | None = None) -> Drain:
        self._is_told = True
        return super()._begin_shutdown(grace, why)

    async def wait_drained(self, server: BaseServer) -> None:
        """Wait until all have drained, as `server` has."""
        self._not_drained.discard(server)
        if not self._not_drained:
            self._all_drained.set()
        await self._all_drained.wait()


def _send_for(number: int, relay: Callable[[str, bytes, str], bool], topic: str, data: bytes, full: str) -> bool:
    return relay(f"{number}:{topic}", data, full)
