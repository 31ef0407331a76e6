"""What the options of `serve` for the PROXY protocol say."""

from aioecho.cli.console import Mistake
from aioecho.net.proxy_protocol import ProxyProtocol

__all__ = ["make_proxy"]


def make_proxy(name: str | None, networks: str | None) -> ProxyProtocol | None:
    """Return what `--proxy-protocol` and `--proxy-allow-from` say, or None.

    Raises:
        Mistake: the networks are none, or are given alone (caller).
    """
    if name is None:
        if networks is not None:
            raise Mistake("--proxy-allow-from goes with --proxy-protocol v1, v2 or any")
        return None
    try:
        return ProxyProtocol.named(name, networks)
    except ValueError as error:
        raise Mistake(str(error).replace("trusted has", "--proxy-allow-from has")) from error
