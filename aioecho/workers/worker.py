"""One worker process: how it comes to its server, what it hears from its supervisor and tells it, and its end.

The supervisor starts a fresh interpreter that calls :func:`main`. Between the two is a socket pair, over which each
sends lines of JSON. From the supervisor: "serve" (once everything is loaded), "retire" (others serve on: leave them what
is queued), "drain" (nobody serves on: take it in), "end" (at once), "stats", "ping". To it: "loaded", "failed", "ready",
"replace" (me, please), "stats", "pong", "ended". The end of the stream tells that the other one is gone.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import random
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from aioecho.exceptions import AioechoError
from aioecho.runtime.loops import end_other_tasks, loop_factory
from aioecho.serving.base import BaseServer

__all__ = ["SIGNALS", "Channel", "Order", "main", "make_order", "refuse_if_loading"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU)
"""What the supervisor is told by. A signal sent to the whole group, as Ctrl-C is, means the supervisor alone."""

# Seconds for which a worker whose supervisor is gone may hang over its grace.
ORPHAN_PATIENCE = 1.0

_is_loading = False


class Channel:
    """Messages over a socket of a pair: each is a name with values. Neither side ever waits for the other."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.has_ended = False
        self._rest = b""
        sock.setblocking(False)

    def send(self, name: str, **values: Any) -> None:
        """Send a message; if the other one is gone, or has not listened for thousands of them, it is lost."""
        with contextlib.suppress(OSError):
            self.sock.send(json.dumps({"": name, **values}).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that are there, each with its name under ""; `has_ended` tells whether these were the last."""
        while True:
            try:
                data = self.sock.recv(2**16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.has_ended = True
                break
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker is to do; it is pickled."""

    make_server: Callable[[list[list[str]]], BaseServer]
    """Called with endpoints of inherited sockets: for each of the supervisor's endpoints a list, as a host may have several."""
    loop: str
    max_requests: int | None
    max_requests_jitter: int


def make_order(order: Order) -> bytes:
    """Return everything a fresh interpreter needs to obey `order`.

    Raises:
        TypeError: it can't be sent to another process.
    """
    try:
        pickled = pickle.dumps(order)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        # Of one error each version of Python makes another, and none says what to do.
        message = f"worker processes import the handler and its options, and these can't be: {error}"
        raise TypeError(message) from error
    return pickle.dumps((list(sys.path), list(sys.argv), _name_main() if b"__main__" in pickled else None, pickled))


def _name_main() -> tuple[str, str]:
    """Return how another interpreter finds the program that runs: as a module, or as a file."""
    program = sys.modules["__main__"]
    name = getattr(getattr(program, "__spec__", None), "name", None)
    if name is not None:
        return "module", name
    file = getattr(program, "__file__", None)
    if file is None or not os.path.exists(file):
        raise TypeError(
            "worker processes import the handler, and its program has no file: put the handler's class into a module"
        )
    return "file", os.path.abspath(file)


def refuse_if_loading() -> None:
    """Raise SystemExit in a worker that is importing its program: that starts a server again, without end."""
    if _is_loading:
        raise SystemExit(
            "the program starts its server whenever it is imported, as each worker process does: call run() under"
            ' `if __name__ == "__main__":`'
        )


def main(control: int, order: int, sockets: list[list[int]], grace: float) -> NoReturn:
    """Be a worker: `control` and `order` are descriptors, `sockets` those to serve on, a list for each endpoint."""
    for number in SIGNALS:
        # Not SIG_IGN, which the programs that a handler starts would inherit.
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the supervisor has blocked them for the time until now
    for descriptor in (control, order, *itertools.chain(*sockets)):
        os.set_inheritable(descriptor, False)
    channel = Channel(socket.socket(fileno=control))
    threading.Thread(target=_outlive_by, args=(control, grace + ORPHAN_PATIENCE), daemon=True).start()
    try:
        server, what = _load(order, sockets)
        runner = asyncio.Runner(loop_factory=loop_factory(what.loop))
    except BaseException as error:
        text = str(error) if isinstance(error, AioechoError | SystemExit) else f"{type(error).__name__}: {error}"
        is_plain = isinstance(error, AioechoError | SystemExit)
        channel.send("failed", why=text, traceback=None if is_plain else traceback.format_exc()[-(2**15) :])
        channel.sock.close()
        sys.exit(1)
    with runner, channel.sock:
        runner.run(_Worker(server, channel, what).run())
    sys.exit()


def _load(order: int, sockets: list[list[int]]) -> tuple[BaseServer, Order]:
    """Import what the order names, and make the server."""
    global _is_loading
    data = os.pread(order, os.fstat(order).st_size, 0)  # read() would move the position that all workers share
    os.close(order)
    sys.path[:], sys.argv[:], program, pickled = pickle.loads(data)
    _is_loading = True
    try:
        if program is not None:
            _import_main(*program)
        what: Order = pickle.loads(pickled)
        return what.make_server([[f"fd://{number}" for number in group] for group in sockets]), what
    finally:
        _is_loading = False


def _import_main(kind: str, name: str) -> None:
    """Import the program under another name, so that what stands under ``if __name__ == "__main__"`` is left out."""
    # The name is multiprocessing's, for code that asks for it.
    if kind == "module":
        found = runpy.run_module(name, run_name="__mp_main__", alter_sys=True)
    else:
        found = runpy.run_path(name, run_name="__mp_main__")
    module = types.ModuleType("__mp_main__")
    module.__dict__.update(found)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module


def _outlive_by(control: int, seconds: float) -> None:
    """End the process if the supervisor is gone and the loop hangs: it would keep the port from the next server."""
    hangup = select.poll()
    hangup.register(control, 0)  # POLLHUP comes unasked
    hangup.poll()
    # A drain that takes its time is left all of it.
    threading.Event().wait(min(seconds, threading.TIMEOUT_MAX))
    os._exit(1)


class _Worker:
    """Obeys the supervisor, in the event loop."""

    def __init__(self, server: BaseServer, channel: Channel, what: Order) -> None:
        self._server = server
        self._channel = channel
        self._stops: set[asyncio.Task[Any]] = set()
        if what.max_requests is not None:
            self._count(what.max_requests + random.randint(0, what.max_requests_jitter))

    async def run(self) -> None:
        """Serve when told to, until told to stop."""
        loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[str] = asyncio.Queue()
        loop.add_reader(self._channel.sock.fileno(), self._listen)
        self._channel.send("loaded")
        try:
            if await self._heard.get() != "serve":
                return
            await self._server.start()
            # `kill` of one worker: it goes when another is there.
            loop.add_signal_handler(signal.SIGTERM, self._channel.send, "replace")
            self._channel.send("ready")
            obeying = loop.create_task(self._obey())
            await self._server.serve_forever()
            obeying.cancel()
            report = await self._server.shutdown()
            self._channel.send("ended", report=dataclasses.asdict(report), stats=self._stats())
        finally:
            loop.remove_reader(self._channel.sock.fileno())
        await end_other_tasks()

    def _listen(self) -> None:
        for message in self._channel.receive():
            match message[""]:
                case "stats":
                    self._channel.send("stats", stats=self._stats())
                case "ping":
                    self._channel.send("pong")
                case other:
                    self._heard.put_nowait(other)
        if self._channel.has_ended:
            asyncio.get_running_loop().remove_reader(self._channel.sock.fileno())
            self._heard.put_nowait("drain")

    async def _obey(self) -> None:
        while True:
            order = await self._heard.get()
            if order == "retire":
                self._server.keep_backlog = True
            stop = asyncio.get_running_loop().create_task(self._server.shutdown(0 if order == "end" else None))
            self._stops.add(stop)

    def _stats(self) -> dict[str, int]:
        stats = vars(self._server.stats)
        counts = {name: value for name, value in stats.items() if isinstance(value, int)}
        if "drops" in stats:  # of datagrams: without it what was received would not add up
            counts["drops"] = sum(stats["drops"].values())
        return counts

    def _count(self, most: int) -> None:
        """Ask to be replaced after so many connections, and again after as many, if that has failed."""
        taken = 0

        def count() -> None:
            nonlocal taken
            taken += 1
            if taken % most == 0:
                self._channel.send("replace")

        self._server.on_accept = count
