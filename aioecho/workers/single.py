"""A server in the one process of a program: its event loop, its signals, its end."""

import asyncio
import contextlib
import functools
import logging
import signal
from collections.abc import Awaitable, Callable

from aioecho.exceptions import AioechoError, CertificateError
from aioecho.net import systemd
from aioecho.ops.control import ControlServer
from aioecho.ops.control_server import make_control
from aioecho.ops.metrics import MetricsEndpoint
from aioecho.runtime.collector import collect_little, short_collections
from aioecho.runtime.log_files import reopen_log_files
from aioecho.runtime.loops import end_other_tasks, loop_factory
from aioecho.serving.base import BaseServer
from aioecho.serving.drain import OVER_GRACE
from aioecho.stats import DrainReport
from aioecho.workers.signals import giving_back, handling, log_stop

__all__ = ["run_server"]

logger = logging.getLogger("aioecho.workers")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SERVER_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGUSR1)


def run_server(
    server: BaseServer,
    *,
    loop: str = "auto",
    metrics: str | None = None,
    control: str | None = None,
    when_serving: Callable[[BaseServer], object] = lambda server: None,
    when_reloading: Callable[[], object] = reopen_log_files,
) -> DrainReport:
    """Do what :func:`aioecho.run` does for a server that was made but not started; call `when_serving` once it accepts.

    `when_reloading` is called at SIGHUP, before certificates are loaded anew.

    Afterwards signals are handled as before, also if this raises.

    Raises:
        EndpointError: it can't listen.
        ValueError: `metrics` is no address, or `control` no Unix socket.
    """
    telling = MetricsEndpoint.of_server(metrics, server) if metrics is not None else contextlib.nullcontext()
    controlled = None if control is None else make_control(control, server, when_reloading)
    with giving_back(SERVER_SIGNALS), short_collections(), asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        return runner.run(_serve_and_tell(server, when_serving, when_reloading, telling, controlled))


async def _serve_and_tell(
    server: BaseServer,
    when_serving: Callable[[BaseServer], object],
    when_reloading: Callable[[], object],
    telling: contextlib.AbstractAsyncContextManager[object],
    control: ControlServer | None,
) -> DrainReport:
    async def begin(server: BaseServer) -> None:
        if control is not None:
            await control.start()
        when_serving(server)

    async with telling, control or contextlib.nullcontext():
        report = await _serve_until_signal(server, begin, when_reloading)
    await end_other_tasks()
    if server.has_failed():
        raise AioechoError("the lifespan of the server failed: see the log")
    return report


async def _serve_until_signal(
    server: BaseServer, begin: Callable[[BaseServer], Awaitable[None]], when_reloading: Callable[[], object]
) -> DrainReport:
    loop = asyncio.get_running_loop()
    stopping: set[asyncio.Task[DrainReport]] = set()
    starting = loop.create_task(server.start())
    watchdog = systemd.Watchdog()
    watchdog.start()

    def stop(number: signal.Signals) -> None:
        if stopping:
            server.end_at_once(f"by a second signal, {number.name}")
            return
        collect_little()
        systemd.notify_stopping(server.grace + OVER_GRACE)
        log_stop(logger, number, len(server.connections), server.what_it_serves, server.grace)
        starting.cancel()
        stopping.add(loop.create_task(server.shutdown()))

    def reload() -> None:
        is_told = server.is_serving() and not server.is_draining
        if is_told:
            systemd.notify_reloading("loading certificates and opening log files anew")
        when_reloading()
        try:
            server.reload_tls()
        except CertificateError as error:
            logger.error("SIGHUP: the certificate from before is served on: %s", error)
        except RuntimeError:
            logger.info("SIGHUP: there is nothing to reload; connections go on")
        if is_told:
            systemd.notify_ready(server.names)

    def log_stats() -> None:
        logger.info("stats: %s", server.stats)

    stops = {number: functools.partial(stop, number) for number in STOP_SIGNALS}
    with handling(loop, {**stops, signal.SIGHUP: reload, signal.SIGUSR1: log_stats}):
        try:
            await starting
            await begin(server)
            systemd.notify_ready(server.names)
            await server.serve_forever()
        except asyncio.CancelledError:
            pass  # by stop()
        except BaseException:
            await server.shutdown(0)
            raise
        report = await server.shutdown()
        await asyncio.gather(*stopping)
        watchdog.stop()
        return report
