"""How a request can end: the reasons, the outcome of each, and whose doing an error was.

The outcome follows from the reason, so a connection keeps the reason alone. docs/pages/logging.md has the same table.
"""

import asyncio
import errno
import socket
import ssl
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from inspect import CO_OPTIMIZED
from types import FrameType
from typing import Any, Literal, Protocol, cast

from aioecho.exceptions import ConnectionTimeout, FrameTooLong, FramingError, LineTooLong

__all__ = [
    "OUTCOMES",
    "PROXY_REASONS",
    "Ended",
    "Outcome",
    "Reason",
    "Reporting",
    "ending",
    "find_other_stream",
    "find_peers_reason",
]

Outcome = Literal["completed", "failed", "cancelled", "rejected"]

Reason = Literal[
    "finished",
    "error",
    "idle",
    "message",
    "write",
    "max_age",
    "half_closed",
    "handler",
    "datagram_handler",
    "timeout",
    "too long",
    "framing",
    "incomplete",
    "connection lost",
    "write buffer",
    "key updates",
    "memory",
    "broadcast",
    "shed",
    "cancelled",
    "kicked",
    "unsent",
    "handshake",
    "refused",
    "not allowed",
    "overflow",
    "per host",
    "no thread",
    "probe",
    "proxy untrusted",
    "proxy missing",
    "proxy version",
    "proxy malformed",
    "proxy too large",
    "proxy checksum",
    "proxy timeout",
]

OUTCOMES: Mapping[str, Outcome] = {
    "finished": "completed",
    "error": "failed",
    "idle": "failed",
    "message": "failed",
    "write": "failed",
    "max_age": "failed",
    "half_closed": "failed",
    "handler": "failed",
    "datagram_handler": "cancelled",
    "timeout": "failed",
    "too long": "failed",
    "framing": "failed",
    "incomplete": "failed",
    "connection lost": "failed",
    "write buffer": "failed",
    "key updates": "failed",
    "memory": "failed",
    "broadcast": "failed",
    "shed": "failed",
    "cancelled": "cancelled",
    "kicked": "cancelled",
    "unsent": "cancelled",
    "handshake": "rejected",
    "refused": "rejected",
    "not allowed": "rejected",
    "overflow": "rejected",
    "per host": "rejected",
    "no thread": "rejected",
    "probe": "completed",
    "proxy untrusted": "rejected",
    "proxy missing": "rejected",
    "proxy version": "rejected",
    "proxy malformed": "rejected",
    "proxy too large": "rejected",
    "proxy checksum": "rejected",
    "proxy timeout": "rejected",
}
"""The outcome that every reason has."""

PROXY_REASONS: Mapping[str, Reason] = {
    "bad signature": "proxy missing",
    "version not allowed": "proxy version",
    "malformed": "proxy malformed",
    "too large": "proxy too large",
    "bad checksum": "proxy checksum",
}
"""The reasons of connections, by that of a ProxyHeaderError."""

# What an OSError may be beside a ConnectionError when the peer's host has vanished.
VANISHED = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}

# What a stream raises that its peer or the network has caused. A ConnectionTimeout is an OSError.
OF_STREAMS = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, LineTooLong, FrameTooLong, FramingError)

# What the timeout of a blocking socket says of itself, in the socket module and in ssl.
TIMED_OUT = {"timed out", "The read operation timed out", "The write operation timed out"}


# What a blocking socket raises where a peer breaks TLS, after the handshake. It raises others if it is asked not to block.
BROKEN_TLS = {ssl.SSL_ERROR_SSL, ssl.SSL_ERROR_ZERO_RETURN, ssl.SSL_ERROR_EOF, ssl.SSL_ERROR_SYSCALL}


class Reporting(Protocol):
    """The server of a request, as far as the request's end needs it."""

    def call_handle_error(self, request: Any, client_address: Any, ended: "Ended") -> None:
        """Call the hook, for the exception that is being handled."""


class Ended:
    """The part of a connection, of a session and of a datagram's handler that knows how it ended."""

    __slots__ = ()

    client_address: Any
    reason: Reason
    request: Any

    @property
    def counted_address(self) -> Any:
        """The address by which limits per host count it; None where they do not."""
        return self.client_address

    @property
    def outcome(self) -> Outcome:
        """How it ended, or would if it ended now: what `reason` has in :data:`OUTCOMES`."""
        return OUTCOMES[self.reason]

    def report_end(self, error: BaseException, server: Reporting, request: Any = None) -> bool:
        """Set the reason for the error that is being handled, which a handler raised, and report it if there is need.

        `request` is what handle_error() gets, if that is not the `request` of this.
        Return False if the task is to end with that error: a cancellation, or the end of the program.
        """
        is_settled = isinstance(error, Exception)
        # mypy looks for the slot in this class. The derived classes have it: of several bases one alone may have slots.
        self.reason = self._find_reason(error)  # type: ignore[misc]
        if is_settled and self.reason not in ("finished", "probe"):
            server.call_handle_error(self.request if request is None else request, self.client_address, self)
        return is_settled

    def _find_reason(self, error: BaseException) -> Reason:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):  # the latter meets one that swallows the former
            return "connection lost" if self.is_peer_lost() else self.why_cancelled()
        return find_peers_reason(error, self) or "error"

    def is_listening(self) -> bool:
        """Tell whether broadcasts are for it: the handle() of a stream's handler runs in the loop."""
        return False

    # What the peer and the network have done, to be overridden where there is a stream.

    def get_stream(self) -> object:
        """Return the reader, or the blocking socket, of the request; None for datagrams."""
        return None

    def is_peer_lost(self) -> bool:
        """Tell whether the connection broke."""
        return False

    def why_cancelled(self) -> Reason:
        """Return the reason of an end by cancellation."""
        return "cancelled"

    def is_answered(self) -> bool:
        """Tell whether the peer may close in good order: nothing was read since the last write."""
        return False


# What handle_error() is called for.
ending: ContextVar[Ended | None] = ContextVar("ending", default=None)


def find_peers_reason(error: BaseException, ended: Ended) -> Reason | None:
    """Return the reason of an end by `error`, which a handler raised, if that is the peer's doing or the network's, else None.

    An exception group is the peer's doing if every error in it is. What another stream than the request's own raised is not,
    such as another client's, to which the handler wrote. "finished": the peer closed in good order, between two messages.
    """
    if isinstance(error, BaseExceptionGroup):
        reasons = [find_peers_reason(inner, ended) for inner in error.exceptions]
        if None in reasons:
            return None
        return next((reason for reason in reasons if reason != "finished"), "finished")
    owner, stream = _find_owner(error), ended.get_stream()
    if owner is not None and not _is_same(owner, stream):
        return None
    if isinstance(error, ConnectionTimeout):
        return cast(Reason, error.which)
    if isinstance(error, LineTooLong | FrameTooLong):
        return "too long"
    if isinstance(error, FramingError):
        return "framing"
    if isinstance(error, asyncio.LimitOverrunError):
        return "too long" if owner is not None else None
    if isinstance(error, asyncio.IncompleteReadError):
        if stream is None:
            return None
        return "finished" if not error.partial and ended.is_answered() else "incomplete"
    return _find_reason_of_system(error, ended, owner) if isinstance(error, OSError) else None


def _find_reason_of_system(error: OSError, ended: Ended, owner: object) -> Reason | None:
    stream = ended.get_stream()
    if isinstance(stream, asyncio.StreamReader):
        # What a stream breaks with may be any OSError.
        if error is stream.exception() or owner is not None:
            return "connection lost"
    elif isinstance(stream, socket.socket) and isinstance(error, TimeoutError) and error.errno is None:
        # Where the traceback does not tell, it is a call of the handler's own to a socket: to this one, mostly.
        is_its_own = owner is not None or (bool(error.args) and error.args[0] in TIMED_OUT)
        return "timeout" if is_its_own and _has_timeout(stream) else None
    elif isinstance(error, ssl.SSLError) and owner is not None and error.errno in BROKEN_TLS:
        return "connection lost"  # as async streams have it
    if isinstance(error, ConnectionRefusedError):  # that of a connection that the handler opens itself
        return None
    may_be_lost = isinstance(error, ConnectionError | ssl.SSLEOFError) or error.errno in VANISHED
    return "connection lost" if may_be_lost and ended.is_peer_lost() else None


def _has_timeout(sock: socket.socket) -> bool:
    # One that was wrapped, in TLS of the handler's own, has passed it on.
    return sock.fileno() < 0 or sock.gettimeout() is not None


def _is_same(owner: object, stream: object) -> bool:
    if isinstance(stream, socket.socket) and isinstance(owner, socket.socket):
        # What was wrapped in TLS by the handler has no descriptor any more.
        return owner is stream or (stream.fileno() < 0 and isinstance(owner, ssl.SSLSocket))
    return owner is stream


def _find_self(frame: FrameType) -> object:
    """Return the object whose method a frame is of, by the name of its first argument; None if it has another."""
    variables = frame.f_locals
    me = variables.get("self")
    # Up to Python 3.12 it is a copy, which the frame keeps. With an error that is caught there it would be a cycle, and all
    # that the connection has read would wait for the garbage collector.
    if isinstance(variables, dict) and frame.f_code.co_flags & CO_OPTIMIZED:
        variables.clear()
    return me


def _find_owner(error: BaseException) -> object:
    """Return the reader, or the blocking socket, in whose methods an error was raised; None if it was raised elsewhere."""
    owner: object = None
    files: tuple[object, ...] | None = None  # of the blocking handler's socket
    socketserver = sys.modules.get("socketserver")  # if nothing has imported it, no handler is of it
    traceback = error.__traceback__
    while traceback is not None:
        me = _find_self(traceback.tb_frame)
        traceback = traceback.tb_next
        if isinstance(me, asyncio.StreamReader | socket.socket):
            owner = me
        elif isinstance(me, asyncio.StreamWriter):
            owner = getattr(me, "_reader", None) or me
        elif isinstance(me, asyncio.Protocol):
            owner = getattr(me, "reader", None) or me
        elif isinstance(me, socket.SocketIO):
            # One that was closed since does not know its socket any more, as the handler's own, by socketserver's finish().
            owner = getattr(me, "_sock", None) or (me if files and not any(file is me for file in files) else owner)
        elif socketserver is not None and isinstance(me, socketserver.StreamRequestHandler):
            files = tuple(getattr(getattr(me, name, None), "raw", None) for name in ("rfile", "wfile"))
    return owner


def find_other_stream(error: BaseException, stream: object) -> Any:
    """Return the peer's address of another stream than `stream`, which raised `error`; None if there is none, or no address."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, (find_other_stream(inner, stream) for inner in error.exceptions)), None)
    owner = _find_owner(error) if isinstance(error, OF_STREAMS) else None
    if owner is None or _is_same(owner, stream):
        return None
    try:
        if isinstance(owner, socket.socket):
            return owner.getpeername()
        transport = getattr(owner, "_transport", None)
        return None if transport is None else transport.get_extra_info("peername")
    except (OSError, ValueError, AttributeError):  # it is closed
        return None
