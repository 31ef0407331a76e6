"""A server as a program of its own: its event loop, its signals, its processes, its end."""

import asyncio
import functools
import itertools
import math
import ssl as ssl_module
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aioecho.certificates import TLS
from aioecho.choice import serve
from aioecho.datagrams.server import DatagramServer
from aioecho.exceptions import AioechoError
from aioecho.net.endpoints import StdioEndpoint, UDPEndpoint
from aioecho.ops.control import parse_control
from aioecho.parts import Composite
from aioecho.runtime.interpreters import is_subinterpreter
from aioecho.runtime.log_config import LogConfig, apply_log_config, renew_log
from aioecho.runtime.log_files import reopen_log_files
from aioecho.runtime.loops import loop_factory
from aioecho.runtime.stdio import fill_standard_streams
from aioecho.serving.base import BaseServer
from aioecho.several import is_factory, make_servers, servers_of
from aioecho.stats import DrainReport
from aioecho.workers.control import SupervisorControl
from aioecho.workers.guard import check_can_start_workers, refuse_start_in_worker
from aioecho.workers.order import Order
from aioecho.workers.processors import count_processors
from aioecho.workers.signals import gets_signals, giving_back
from aioecho.workers.single import run_server
from aioecho.workers.supervisor import SUPERVISOR_SIGNALS, Supervisor

__all__ = [
    "HEALTHCHECK",
    "MakeServer",
    "check_sessions",
    "make_servers_in_worker",
    "needs_workers",
    "run",
    "run_workers",
]

MakeServer = Callable[[list[list[str]]], BaseServer]
"""What makes a worker's server, of inherited endpoints: a list for every endpoint of the program, as a host may have several
addresses."""

HEALTHCHECK = 30.0
"""Seconds that a worker's event loop may be held up before the worker is killed: longer than a handler does it by mistake."""


def run(
    RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any],
    *endpoints: str,
    server_class: type[BaseServer] | None = None,
    workers: int | str = 1,
    loop: str = "auto",
    reuse_port: bool = False,
    max_requests: int | None = None,
    max_requests_jitter: int = 0,
    timeout_worker_healthcheck: float | None = HEALTHCHECK,
    log_config: LogConfig | None = None,
    metrics: str | None = None,
    ssl: ssl_module.SSLContext | TLS | Callable[[], ssl_module.SSLContext | TLS] | None = None,
    control: str | None = None,
    **options: Any,
) -> DrainReport:
    """Serve on all of `endpoints` until SIGTERM or SIGINT, then drain; a second signal ends it at once.

    Args:
        RequestHandlerClass, endpoints: as for :func:`aioecho.serve`, and `options` are :class:`aioecho.BaseServer`'s,
            such as `grace`, the seconds that handlers have to finish. Limits are for each process. Or, without endpoints, a
            factory: a function without arguments that returns a server, or a list of servers which are one program then, all
            with limits and options of their own. Every worker calls it.
        server_class: the class of the server, a subclass of :class:`aioecho.TCPServer` for instance, with hooks of its own.
        workers: processes that serve. "auto" is as many as this process has processors to use: the ones that it may be
            scheduled on, or fewer by the CPU quota of its control group (rounded up). Unless it is 1, this process serves
            nothing: it starts the workers, and replaces a worker that dies. SIGHUP replaces all, one after another, and no
            client is lost; SIGTTIN and SIGTTOU add and remove one; SIGUSR1 logs their stats. Workers import the handler and
            its options, and so the program, if these are defined in it: it has to call run() under
            ``if __name__ == "__main__":``. A frozen program (PyInstaller) can't have workers.
        loop: "uvloop", "asyncio", or "auto", which is uvloop if it is installed, and asyncio's loop in a subinterpreter.
        reuse_port: give each worker a TCP or UDP socket of its own (SO_REUSEPORT), and let the kernel divide the clients.
            Datagram sessions need that with several workers, as all of a peer's datagrams then reach the same one.
        max_requests: replace a worker when it has had so many connections, or datagrams or their sessions, and up to
            `max_requests_jitter` more, chosen for each worker, so that they do not all go at the same time.
        timeout_worker_healthcheck: seconds after which a worker process is killed and replaced whose event loop does not run:
            a handler that waits without `await`, or computes for long, holds it up. None: never. One that a debugger is
            attached to is not killed.
        log_config: what configures logging, in this process and in each worker: a file, .json or .toml for
            logging.config.dictConfig() or .ini for fileConfig(), which SIGHUP reads again; a mapping for dictConfig(); or a
            function. Without it a worker has the logging that the modules set up which it imports, and no other.
        metrics: where to tell Prometheus of all processes, ``/metrics``, and health checks, ``/healthz`` and ``/readyz``:
            "127.0.0.1:9464" or "unix:PATH". It asks for no password: give no address that strangers reach.
        ssl: an :class:`aioecho.TLS`, which SIGHUP loads anew too; or a context; or a function that returns one, which worker
            processes need, as a context can't be sent to them.
        control: a Unix socket for live control, "unix:PATH" or "unix:PATH?mode=660"; without a mode only its user may open it.
            None: there is none.

    `reuse_port` and `max_requests` make a worker process of even one. In a thread other than the main one, and in a
    subinterpreter, it serves without workers, and no signal reaches it. If the program was started with stdin, stdout or
    stderr closed, it gets /dev/null there: a socket would be put in that place otherwise.

    Raises:
        SystemExit: with one line that says why, if it can't listen, or its workers can't live: it is the program.
        ValueError, TypeError: an argument makes no sense, or can't be sent to workers.
        RuntimeError: an event loop runs in this thread; or workers are wanted, and this is not the main thread of the main
            interpreter.
        ImportError: "uvloop" was asked for, and is not installed or cannot be loaded here.
    """
    if asyncio._get_running_loop() is not None:
        raise RuntimeError(
            "run() is a program of its own, and an event loop runs here already: use `async with aioecho.serve(...)` in it,"
            " or aioecho.run_in_thread()"
        )
    try:
        refuse_start_in_worker()
        fill_standard_streams()
        if log_config is not None:
            apply_log_config(log_config)
        renew = functools.partial(renew_log, log_config)
        if server_class is not None:
            options["server_class"] = server_class
        if ssl is not None:
            options["ssl"] = ssl
        has_workers = needs_workers(workers, reuse_port, max_requests)
        if has_workers and isinstance(ssl, ssl_module.SSLContext):
            raise TypeError(
                "worker processes each need a context of their own: give as ssl an aioecho.TLS, or a function that returns one"
            )
        server, make_server = _make_first(RequestHandlerClass, endpoints, options, log_config, has_workers)
        if not has_workers:
            return run_server(server, loop=loop, metrics=metrics, control=control, when_reloading=renew)
        return run_workers(
            server,
            make_server,
            workers=workers,
            loop=loop,
            reuse_port=reuse_port,
            max_requests=max_requests,
            max_requests_jitter=max_requests_jitter,
            timeout_worker_healthcheck=timeout_worker_healthcheck,
            when_reloading=renew,
            metrics=metrics,
            control=control,
        )
    except AioechoError as error:
        raise SystemExit(f"aioecho: {error}") from None


def needs_workers(workers: int | str, reuse_port: bool, max_requests: int | None) -> bool:
    """Tell whether worker processes are to serve, even a single one, and not this process."""
    return workers != 1 or reuse_port or max_requests is not None


def _make_first(
    RequestHandlerClass: Any,
    endpoints: Sequence[str],
    options: dict[str, Any],
    log_config: LogConfig | None,
    has_workers: bool,
) -> tuple[BaseServer, MakeServer]:
    """Make the server that serves here or, with workers, is made for its checks alone; return what makes a worker's too."""
    if not endpoints and "sock" not in options and is_factory(RequestHandlerClass):
        _check_factory(RequestHandlerClass, options)
        make_server = functools.partial(make_servers_in_worker, RequestHandlerClass, log_config)
        return make_servers(RequestHandlerClass), make_server
    context = _made(options.get("ssl"))
    if has_workers and isinstance(context, TLS):
        context.load()
    server = serve(RequestHandlerClass, *endpoints, **{**options, "ssl": context})
    of_workers = {name: value for name, value in options.items() if name != "sock"}  # it is among the endpoints, by now
    return server, functools.partial(_make_server, RequestHandlerClass, log_config, of_workers)


def _made(ssl: Any) -> Any:
    return ssl() if callable(ssl) else ssl


def _check_factory(factory: Any, options: Mapping[str, Any]) -> None:
    if options:
        name = getattr(factory, "__qualname__", repr(factory))
        raise TypeError(f"{', '.join(options)}: with a factory, these are given to the servers that {name} makes")


def make_servers_in_worker(
    factory: Callable[[], Any], log_config: LogConfig | None, endpoints: list[list[str]]
) -> BaseServer:
    """Make the servers of a factory, to serve on the endpoints of inherited sockets.

    Raises:
        AioechoError: the factory, which may be newer than the supervisor, has other endpoints.
    """
    if log_config is not None:
        apply_log_config(log_config)
    server = make_servers(factory)
    if len(server.endpoints) != len(endpoints):
        raise AioechoError(
            f"the factory has {len(server.endpoints)} endpoints now, and had {len(endpoints)} when the program started:"
            " restart the program"
        )
    server.inherit(endpoints)
    return server


def _make_server(
    RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any],
    log_config: LogConfig | None,
    options: dict[str, Any],
    endpoints: list[list[str]],
) -> BaseServer:
    if log_config is not None:
        apply_log_config(log_config)
    options = {**options, "ssl": _made(options.get("ssl"))}
    if not isinstance(RequestHandlerClass, Mapping):
        return serve(RequestHandlerClass, *itertools.chain(*endpoints), **options)
    groups = iter(endpoints)
    served: dict[Callable[..., Any], list[str]] = {}
    for handler_class, given in RequestHandlerClass.items():
        count = 1 if isinstance(given, str) else len(given)
        served[handler_class] = list(itertools.chain(*itertools.islice(groups, count)))
    return serve(served, **options)


def run_workers(
    server: BaseServer,
    make_server: MakeServer,
    *,
    workers: int | str,
    loop: str = "auto",
    reuse_port: bool = False,
    max_requests: int | None = None,
    max_requests_jitter: int = 0,
    timeout_worker_healthcheck: float | None = HEALTHCHECK,
    metrics: str | None = None,
    when_serving: Callable[[Sequence[str]], object] = lambda names: None,
    control: str | None = None,
    when_reloading: Callable[[], object] = reopen_log_files,
) -> DrainReport:
    """Do what :func:`run` does with worker processes. Every worker calls `make_server` with its endpoints.

    `server` was made as the workers' servers will be, and is never started. `make_server` gets a list for every endpoint, as
    a host may have several addresses. `when_serving` is called with the names of the endpoints once all workers accept, and
    `when_reloading` at SIGHUP, before the workers are replaced.

    Raises:
        EndpointError: it can't listen.
        AioechoError: a worker ended before it was ready, or workers died too often.
        ValueError, TypeError: as for :func:`run`.
        RuntimeError: this is not the main thread of the main interpreter.
    """
    if not gets_signals():
        where = "interpreter" if is_subinterpreter() else "thread"
        raise RuntimeError(f"worker processes are started from the main {where} alone, as signals reach no other")
    if any(isinstance(endpoint, StdioEndpoint) for endpoint in server.endpoints):
        raise ValueError("stdio: is one connection: it needs one worker, without reuse_port and max_requests")
    refuse_start_in_worker()
    check_can_start_workers()
    _check_count("max_requests", max_requests, least=1)
    _check_count("max_requests_jitter", max_requests_jitter, least=0)
    _check_seconds("timeout_worker_healthcheck", timeout_worker_healthcheck)
    if workers == "auto":
        workers = count_processors()
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ValueError(f'workers must be a whole number from 1, or "auto", not {workers!r}')
    loop_factory(loop)
    if workers > 1:
        check_sessions(server, reuse_port=reuse_port)
    queries = [f"?{endpoint.query}" if endpoint.query else "" for endpoint in server.endpoints]
    if any(queries):
        make_server = functools.partial(_make_with_queries, make_server, queries)
    order = Order(
        make_server=make_server,
        loop=loop,
        max_requests=max_requests,
        max_requests_jitter=max_requests_jitter,
        is_measured=metrics is not None,
    )
    supervisor = Supervisor(
        server.endpoints,
        order,
        workers=workers,
        backlogs=[each.limits.backlog for each in servers_of(server) for _ in each.endpoints],
        grace=server.grace,
        reuse_port=reuse_port,
        healthcheck=timeout_worker_healthcheck,
        metrics=metrics,
        when_serving=when_serving,
        when_reloading=when_reloading,
        control=SupervisorControl(None if control is None else parse_control(control), server),
    )
    with giving_back(SUPERVISOR_SIGNALS), asyncio.Runner(loop_factory=loop_factory("asyncio")) as runner:
        return runner.run(supervisor.run())


def _make_with_queries(make_server: MakeServer, queries: list[str], endpoints: list[list[str]]) -> BaseServer:
    """Make a worker's server of inherited sockets, which have the options that the supervisor's endpoints had."""
    return make_server([[text + query for text in group] for group, query in zip(endpoints, queries, strict=True)])


def check_sessions(server: BaseServer, *, reuse_port: bool) -> None:
    """Raise ValueError if several processes can't serve this, as any would get any datagram of a peer's session."""
    parts = server.parts if isinstance(server, Composite) else [server]
    sessions = [part for part in parts if isinstance(part, DatagramServer) and part.has_sessions]
    endpoints = [endpoint for part in sessions for endpoint in part.endpoints]
    if sessions and not (
        reuse_port and all(isinstance(endpoint, UDPEndpoint) and not endpoint.is_multicast for endpoint in endpoints)
    ):
        raise ValueError(
            "a peer's datagrams would go to several workers, and sessions need them in one: give each worker a socket of"
            " its own, with reuse_port (--reuse-port) and udp:// endpoints"
        )


def _check_count(name: str, value: object, *, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")


def _check_seconds(name: str, value: object) -> None:
    if value is not None and (
        not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf
    ):
        raise ValueError(f"{name} must be a number of seconds above 0, or None, not {value!r}")
