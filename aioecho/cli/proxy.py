"""The options of `serve` for the PROXY protocol."""

import functools
from collections.abc import Callable
from typing import Any

import click

from aioecho.cli.console import Mistake
from aioecho.net.proxy_protocol import VERSIONS, ProxyProtocol

__all__ = ["proxy_options"]


def proxy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets what they say as `proxy`: a ProxyProtocol, or None."""

    @click.option("--proxy-protocol", type=click.Choice(list(VERSIONS)),
                  help="Expect a PROXY header, of this version, at the beginning of every connection or datagram.")  # fmt: skip
    @click.option("--proxy-allow-from", metavar="NETWORKS",
                  help="The trusted balancers: addresses or networks, with commas between them; * is"
                  " every address. Peers of Unix sockets need none.")  # fmt: skip
    @functools.wraps(command)
    def with_proxy(*arguments: Any, proxy_protocol: str | None, proxy_allow_from: str | None, **options: Any) -> Any:
        return command(*arguments, proxy=_proxy(proxy_protocol, proxy_allow_from), **options)

    return with_proxy


def _proxy(name: str | None, networks: str | None) -> ProxyProtocol | None:
    if name is None:
        if networks is not None:
            raise Mistake("--proxy-allow-from goes with --proxy-protocol v1, v2 or any")
        return None
    try:
        return ProxyProtocol.named(name, networks)
    except ValueError as error:
        raise Mistake(str(error).replace("trusted has", "--proxy-allow-from has")) from error
