"""A server as blocking handlers see it, in their threads."""

import contextlib
from typing import Any

from aioecho.serving.base import BaseServer

__all__ = ["BlockingServerView"]


class BlockingServerView:
    """The `server` of a blocking handler: the server itself but for `shutdown()`, which is no coroutine, as in socketserver.

    It is equal to the server, an instance of the same class, and setting an attribute sets the server's.
    """

    __slots__ = ("_server",)

    _server: BaseServer

    def __init__(self, server: BaseServer) -> None:
        object.__setattr__(self, "_server", server)

    def shutdown(self, grace: float | None = None) -> None:
        """Begin what :meth:`aioecho.BaseServer.shutdown` does, and return at once; do nothing when that is over.

        To wait for the end would be for ever: the handler itself has to end before.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._server.begin_shutdown(grace)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._server, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._server, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._server)

    def __repr__(self) -> str:
        return repr(self._server)

    def __eq__(self, other: object) -> bool:
        return bool(self._server == (other._server if type(other) is BlockingServerView else other))

    def __hash__(self) -> int:
        return hash(self._server)
