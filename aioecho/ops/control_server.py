"""Live control of a server in this process, without workers."""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from aioecho.exceptions import CertificateError
from aioecho.net import systemd
from aioecho.ops.control import ControlServer, parse_control
from aioecho.ops.control_commands import Gathered
from aioecho.ops.control_request import ControlError
from aioecho.ops.control_view import ServerView
from aioecho.serving.base import BaseServer
from aioecho.serving.drain import OVER_GRACE

__all__ = ["ServerBackend", "make_control"]

logger = logging.getLogger("aioecho.control")


def make_control(where: str, server: BaseServer, when_reloading: Callable[[], object]) -> ControlServer:
    """Return the control socket of a server in this process; ValueError if `where` is no Unix socket."""

    def drain(grace: float | None) -> None:
        logger.info("stopping, by live control")
        systemd.notify_stopping((server.grace if grace is None else grace) + OVER_GRACE)
        server.begin_shutdown(grace)

    return ControlServer(parse_control(where), ServerBackend(server, drain, when_reloading))


class ServerBackend:
    """Carries out the commands on `server`. `drain` is called with seconds of grace, or None, to stop the program.

    `when_reloading` is called before certificates are loaded anew, by `reload`.
    """

    def __init__(
        self, server: BaseServer, drain: Callable[[float | None], object], when_reloading: Callable[[], object]
    ) -> None:
        self._server = server
        self._view = ServerView(server)
        self.drain = drain
        self._when_reloading = when_reloading

    async def ask(self, what: str, *, worker: int | None = None, **values: Any) -> Gathered:
        """Ask the server; a large answer is made in turns."""
        if worker is not None:
            raise ControlError("there are no workers: this process serves itself")
        try:
            answer = self._view.questions[what](**values)
        except (ValueError, TypeError) as error:
            return Gathered({}, {"": str(error)}, [])
        if what != "control.list":
            return Gathered({"": [answer]}, {}, [])
        parts = []
        try:
            for part in answer:
                if part is not None:
                    parts.append(part)
                await asyncio.sleep(0)
        except ValueError as error:
            return Gathered({}, {"": str(error)}, [])
        return Gathered({"": parts}, {}, [])

    def describe(self) -> dict[str, Any]:
        """Return that there are no workers."""
        return {"workers": []}

    async def set_live(self, kind: str, changes: Mapping[str, Any], server: int | None) -> Gathered:
        """Set limits or timeouts."""
        return await self.ask(f"control.{kind}", changes=changes, server=server)

    async def set_paused(self, is_paused: bool, server: int | None) -> Gathered:
        """Pause or resume."""
        return await self.ask("control.pause" if is_paused else "control.resume", server=server)

    def reload(self) -> str:
        """Do what was asked for at a reload, and load certificates anew."""
        self._when_reloading()
        try:
            self._server.reload_tls()
        except CertificateError as error:
            raise ControlError(str(error)) from error
        except RuntimeError:
            return f"process {os.getpid()} has opened its log files anew; it has no certificates to load"
        return f"process {os.getpid()} has loaded its certificates anew"

    def set_workers(self, change: str) -> int:
        """Raise ControlError."""
        raise ControlError("there are no workers: start the program with --workers 2 or more")
