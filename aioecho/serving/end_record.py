"""What log records tell of a handler's end: the one record of every connection that has ended, and the handler's traceback."""

import logging
from typing import Any

from aioecho.runtime.logs import ErrorInfo, format_address
from aioecho.serving.ends import OUTCOMES

__all__ = ["handlers_part", "log_end", "logger"]

logger = logging.getLogger("aioecho.connection")

# The modules that call handlers' methods. At the top of a traceback they tell nothing of a handler's mistake.
CALLERS = (
    "aioecho.serving.",
    "aioecho.datagrams.",
    "aioecho.blocking.",
    "aioecho.runtime.",
    "aioecho.compat.",
    "socketserver.",
)


def log_end(client_address: Any, reason: str, seconds: float = 0.0, bytes_in: int = 0, bytes_out: int = 0) -> None:
    """Log, at DEBUG, that a connection has ended, with the facts as fields of the record too. Bytes not counted are 0."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    facts = {
        "client_address": client_address,
        "outcome": OUTCOMES[reason],
        "reason": reason,
        "seconds": seconds,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
    }
    logger.debug(
        "connection from %(peer)s: %(outcome)s (%(reason)s) after %(seconds).3f s,"
        " %(bytes_in)d bytes in, %(bytes_out)d out",
        {**facts, "peer": format_address(client_address)},
        extra=facts,
    )


def handlers_part(error: BaseException) -> ErrorInfo:
    """Return what logging takes as `exc_info`: the error with its traceback from the handler's own first frame on."""
    traceback = error.__traceback__
    while traceback is not None and f"{traceback.tb_frame.f_globals.get('__name__')}.".startswith(CALLERS):
        traceback = traceback.tb_next
    return (type(error), error, traceback or error.__traceback__)
