"""The options that any endpoint string may have behind its ``?``: whether TLS is spoken there, and PROXY headers."""

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from aioecho.net.proxy_protocol import ProxyProtocol

__all__ = ["OptionalEndpoint", "split_options"]

OPTIONS = ("proxy", "proxy_from", "tls")
SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class OptionalEndpoint:
    """The part of an endpoint that these options are."""

    proxy: ProxyProtocol | None = field(default=None, kw_only=True)
    """None: as the server has it."""
    tls: bool | None = field(default=None, kw_only=True)
    """Whether TLS is spoken. None: if the server has certificates."""

    @property
    def query(self) -> str:
        """These options as they stand in an endpoint string, without ``?``; "" if there are none."""
        options = [] if self.proxy is None else [self.proxy.query]
        options += [f"tls={name}" for name, value in SWITCH.items() if value is self.tls]
        return "&".join(options)

    def show(self, name: str) -> str:
        """Return an endpoint string with these options behind it."""
        query = self.query
        return f"{name}{'&' if '?' in name else '?'}{query}" if query else name

    def check_for_client(self) -> None:
        """Raise ValueError if these options are given: they are a server's."""
        if self.query:
            raise ValueError(f"cannot connect to {self}: what follows ? is for servers")


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """Return an endpoint string without these options, and what they say.

    Raises:
        ValueError: an option makes no sense.
    """
    front, mark, query = text.partition("?")
    if not mark or not re.search(r"(^|&)(proxy|proxy_from|tls)(=|&|$)", query):
        return text, {}
    given = dict(parse_qsl(query, keep_blank_values=True))
    parts = query.split("&")
    rest = [part for part in parts if part.partition("=")[0] not in OPTIONS]
    if len(parts) - len(rest) != sum(name in given for name in OPTIONS):
        raise ValueError(f"bad endpoint {text!r}: an option is there twice")
    options: dict[str, Any] = {}
    if "proxy" in given:
        try:
            options["proxy"] = ProxyProtocol.named(given["proxy"], given.get("proxy_from"))
        except ValueError as error:
            raise ValueError(f"bad endpoint {text!r}: {error}") from None
    elif "proxy_from" in given:
        raise ValueError(f"bad endpoint {text!r}: proxy_from= goes with proxy=v1, proxy=v2 or proxy=any")
    if "tls" in given:
        if given["tls"] not in SWITCH:
            raise ValueError(f"bad endpoint {text!r}: tls= is on or off")
        options["tls"] = SWITCH[given["tls"]]
    return front + ("?" + "&".join(rest) if rest else ""), options
