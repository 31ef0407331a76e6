"""A server as a program of its own: its event loop, its signals, its end."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from aioecho.exceptions import EndpointError
from aioecho.loops import loop_factory
from aioecho.server import BaseServer
from aioecho.serving import serve
from aioecho.stats import DrainReport

__all__ = ["run", "run_server"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(
    RequestHandlerClass: Callable[..., Any], *endpoints: str, workers: int = 1, loop: str = "auto", **options: Any
) -> DrainReport:
    """Serve on all of `endpoints` until SIGTERM or SIGINT, then drain; a second signal ends it at once.

    Args:
        RequestHandlerClass, endpoints: as for :func:`aioecho.serve`, and `options` are :class:`aioecho.BaseServer`'s,
            such as `grace`, the seconds that handlers have to finish.
        workers: processes. More than one is not supported yet.
        loop: "uvloop", "asyncio", or "auto", which is uvloop if it is installed.

    In a thread other than the main one it serves too, but no signal reaches it.

    Raises:
        SystemExit: with one line that says why, if it can't listen: it is the program.
        ValueError, TypeError: an argument makes no sense.
    """
    if workers != 1:
        raise ValueError(f"workers={workers!r}: one process is all that is supported yet")
    server = serve(RequestHandlerClass, *endpoints, **options)
    try:
        return run_server(server, loop=loop)
    except EndpointError as error:
        raise SystemExit(f"aioecho: {error}") from None


def run_server(
    server: BaseServer, *, loop: str = "auto", when_serving: Callable[[BaseServer], object] = lambda server: None
) -> DrainReport:
    """Do what :func:`run` does for a server that was made but not started; call `when_serving` once it accepts.

    Raises:
        EndpointError: it can't listen.
    """
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        return runner.run(_serve_until_signal(server, when_serving))


async def _serve_until_signal(server: BaseServer, when_serving: Callable[[BaseServer], object]) -> DrainReport:
    loop = asyncio.get_running_loop()
    stopping: set[asyncio.Task[DrainReport]] = set()
    starting = loop.create_task(server.start())

    def stop() -> None:
        starting.cancel()
        stopping.add(loop.create_task(server.shutdown(0 if stopping else None)))

    with _signals(loop, stop):
        try:
            await starting
            when_serving(server)
            await server.serve_forever()
        except asyncio.CancelledError:
            pass  # by stop()
        except BaseException:
            await server.shutdown(0)
            raise
        report = await server.shutdown()
        await asyncio.gather(*stopping)
        return report


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` in the loop for each SIGTERM and SIGINT, as far as this thread gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
