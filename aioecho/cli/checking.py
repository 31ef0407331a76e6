"""The option --check-config of `serve`: what can be told of a start without listening."""

import asyncio
from collections.abc import Sequence

import click

from aioecho.cli.process import check_pid_file
from aioecho.exceptions import EndpointError
from aioecho.net.checking import check_endpoints
from aioecho.net.endpoints import Endpoint, parse_endpoint
from aioecho.serving.base import BaseServer

__all__ = ["check_start"]


def check_start(server: BaseServer, *, metrics: str | None, control: str | None, pid_file: str | None) -> None:
    """Check that a program could listen where it is to listen, and write its PID file.

    Args:
        server: not started.
        metrics, control: endpoints.
        pid_file: a path.

    Raises:
        ClickException: it could not; the message names what is in the way.
    """
    besides: Sequence[Endpoint] = [parse_endpoint(text) for text in (metrics, control) if text is not None]
    try:
        asyncio.run(check_endpoints([*server.endpoints, *besides]))
    except EndpointError as error:
        raise click.ClickException(str(error)) from error
    if pid_file is not None:
        check_pid_file(pid_file)
