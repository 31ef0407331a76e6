"""The sockets that workers serve on: bound once by the supervisor, and shared, or divided between the slots."""

from collections.abc import Sequence

from aioecho.net.binding import bind_endpoint, bind_sibling
from aioecho.net.bound import BoundSocket
from aioecho.net.endpoints import Endpoint, HostEndpoint

__all__ = ["SupervisorSockets"]


class SupervisorSockets:
    """The sockets of all endpoints.

    Args:
        endpoints: where to listen.
        backlogs: for every endpoint, how many clients the kernel queues for a socket.
        reuse_port: bind TCP and UDP endpoints for every slot apart.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, backlogs: Sequence[int], reuse_port: bool) -> None:
        self._endpoints = endpoints
        self._backlogs = backlogs
        self._reuse_port = reuse_port
        # For every endpoint: whether each slot has its own sockets, and the first slot's.
        self._bound: list[tuple[bool, list[BoundSocket]]] = []
        self.all: list[BoundSocket] = []
        """Every socket, the slots' own and the ones that are closed by now included."""

    @property
    def names(self) -> list[str]:
        """The endpoint strings of where they listen, in order and without doubles, with real ports."""
        return list(dict.fromkeys(bound.name for _, group in self._bound for bound in group))

    async def bind(self) -> None:
        """Bind all of them.

        Raises:
            EndpointError: one can't be listened on. The others stay bound until :meth:`close`.
        """
        for endpoint, backlog in zip(self._endpoints, self._backlogs, strict=True):
            # A Unix socket can't be bound twice, nor an inherited one.
            # Each socket in a multicast group gets a copy of every datagram: one that all share gets it once.
            is_divided = self._reuse_port and isinstance(endpoint, HostEndpoint) and not endpoint.is_multicast
            bound = await bind_endpoint(endpoint, backlog=backlog, reuse_port=is_divided)
            self._bound.append((is_divided, bound))
            self.all += bound

    def of_slot(self, own: list[BoundSocket], *, is_first: bool) -> list[list[BoundSocket]]:
        """Return what a new slot serves on, for every endpoint. Append to `own` the sockets that are bound for it alone.

        Raises:
            EndpointError: another socket can't be bound. `own` has the sockets that were, for the caller to close.
        """
        sockets: list[list[BoundSocket]] = []
        for is_divided, bound in self._bound:
            if is_first or not is_divided:
                sockets.append(bound)
                continue
            sockets.append([])
            for first in bound:
                own.append(bind_sibling(first))
                self.all.append(own[-1])
                sockets[-1].append(own[-1])
        return sockets

    def close(self) -> None:
        """Close all but the slots' own."""
        for _, group in self._bound:
            for bound in group:
                bound.refuse_clients()  # the workers accept the others
                bound.close()
