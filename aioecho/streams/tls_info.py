"""What a TLS transport is between: the stream that it delivers to, and the SSL object that it asks."""

import ssl
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["TOLD_BY_SSL", "Stream"]

TOLD_BY_SSL: dict[str, Callable[[ssl.SSLObject], Any]] = {
    "ssl_object": lambda made: made,
    "sslcontext": lambda made: made.context,
    "server_name": lambda made: getattr(made, "asked_for", None),  # which aioecho.TLS notes
    "peercert": ssl.SSLObject.getpeercert,
    "cipher": ssl.SSLObject.cipher,
    "compression": ssl.SSLObject.compression,
    "alpn_protocol": ssl.SSLObject.selected_alpn_protocol,
}
"""What get_extra_info() asks the ssl module for, by name."""


class Stream(Protocol):
    """The protocol of a stream, as its TLS transport sees it."""

    def data_received(self, data: bytes) -> object:
        """Take data."""

    def eof_received(self) -> object:
        """Note that no more data comes."""

    def pause_writing(self) -> None:
        """Note that too much is unsent."""

    def resume_writing(self) -> None:
        """Note that not too much is unsent any more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""

    def abort_for(self, reason: str) -> None:
        """Abort the connection; count `reason`."""
