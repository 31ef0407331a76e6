"""The one log record that is made of every connection that has ended, whatever its handler."""

import logging
from typing import Any

__all__ = ["log_end", "logger"]

logger = logging.getLogger("aioecho.connection")


def log_end(
    client_address: Any, outcome: str, reason: str, seconds: float = 0.0, bytes_in: int = 0, bytes_out: int = 0
) -> None:
    """Log, at DEBUG, that a connection has ended, with the facts as fields of the record too. Bytes not counted are 0."""
    facts = {
        "client_address": client_address,
        "outcome": outcome,
        "reason": reason,
        "seconds": seconds,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
    }
    logger.debug(
        "connection from %(client_address)s: %(outcome)s (%(reason)s) after %(seconds).3f s,"
        " %(bytes_in)d bytes in, %(bytes_out)d out",
        facts,
        extra=facts,
    )
