"""Kinds of handler classes: for streams or for datagrams, ours or socketserver's, and what is none at all."""

import dis
import functools
import inspect
import socket
import sys
from types import FunctionType
from typing import Any

from aioecho.handlers import DatagramRequestHandler, DatagramSessionHandler, StreamRequestHandler

__all__ = [
    "check_handler_class",
    "check_kind",
    "is_blocking",
    "makes_sessions",
    "serves_datagrams",
    "undo_partial",
]

FOR_STREAMS: tuple[type, ...] = (StreamRequestHandler,)
FOR_DATAGRAMS: tuple[type, ...] = (DatagramRequestHandler, DatagramSessionHandler)


def undo_partial(RequestHandlerClass: Any) -> Any:
    """Return what a functools.partial is one of, in the end; anything else as it is."""
    while isinstance(RequestHandlerClass, functools.partial):
        RequestHandlerClass = RequestHandlerClass.func
    return RequestHandlerClass


def is_blocking(RequestHandlerClass: Any) -> bool:
    """Tell whether this is a handler class of socketserver's, or a functools.partial of one."""
    # No call of undo_partial() where there is nothing to undo: this is asked for each connection.
    if isinstance(RequestHandlerClass, functools.partial):
        RequestHandlerClass = undo_partial(RequestHandlerClass)
    socketserver = sys.modules.get("socketserver")  # if nobody has imported it, it is none
    return (
        socketserver is not None
        and isinstance(RequestHandlerClass, type)
        and issubclass(RequestHandlerClass, socketserver.BaseRequestHandler)
    )


def makes_sessions(RequestHandlerClass: Any) -> bool:
    """Tell whether this is a handler class for a peer's datagrams together, or a functools.partial of one."""
    plain = undo_partial(RequestHandlerClass)
    return inspect.isclass(plain) and issubclass(plain, DatagramSessionHandler)


def serves_datagrams(RequestHandlerClass: Any) -> bool | None:
    """Tell whether this is a handler class of ours for datagrams, or one for streams; None if it is neither."""
    if inspect.isclass(RequestHandlerClass):
        if issubclass(RequestHandlerClass, FOR_STREAMS):
            return False
        if issubclass(RequestHandlerClass, FOR_DATAGRAMS):
            return True
    return None


def check_handler_class(RequestHandlerClass: Any) -> None:
    """Raise TypeError unless this makes handlers, as far as that can be told before it does."""
    if not callable(RequestHandlerClass):
        raise TypeError(f"RequestHandlerClass must be callable, not {RequestHandlerClass!r}")
    plain = undo_partial(RequestHandlerClass)
    if is_blocking(plain):
        if inspect.iscoroutinefunction(plain.handle):
            raise TypeError(
                f"{plain.__qualname__} is a handler of socketserver's, whose handle() can't be a coroutine; derive it"
                " from aioecho.StreamRequestHandler"
            )
    elif inspect.isclass(plain):
        if inspect.isabstract(plain) or _lacks_handle(plain):
            raise TypeError(f"{plain.__qualname__} has no handle(): a handler class defines `async def handle(self)`")
        handle = getattr(plain, "handle", None)
        if _is_never_awaitable(handle):
            raise TypeError(
                f"the handle() of {plain.__qualname__} gives nothing to await: define it as `async def handle(self)`,"
                f"{' without `yield`,' if _makes_generators(handle) else ''} or, if it is to block, derive the class"
                " from a handler of socketserver's"
            )
    elif inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None)):  # noqa: B004
        raise TypeError(
            f"{getattr(plain, '__qualname__', plain)!s} is a coroutine function, and RequestHandlerClass is called without"
            " `await`: give a class that defines `async def handle(self)`, or a plain function that returns an object of one"
        )


def _lacks_handle(plain: Any) -> bool:
    """Tell whether no object of a class can have a handle()."""
    found = inspect.getattr_static(plain, "handle", None)
    if callable(found) or hasattr(type(found), "__get__"):  # None has none
        return False
    # Objects may have one that their class has not: of one's own making, or by their constructor.
    if plain.__new__ is not object.__new__ or type(plain).__call__ is not type.__call__:
        return False
    if plain.__getattribute__ is not object.__getattribute__ or hasattr(plain, "__getattr__"):
        return False
    codes = (getattr(vars(base).get("__init__"), "__code__", None) for base in plain.__mro__)
    return not any(code is not None and "handle" in code.co_names for code in codes)


def _is_never_awaitable(handle: Any) -> bool:
    """Tell whether what a function returns can't be awaited. One that is decorated, or no function of Python's, is believed."""
    if not isinstance(handle, FunctionType):
        return False
    if inspect.iscoroutinefunction(handle) or handle.__code__.co_flags & inspect.CO_ITERABLE_COROUTINE:
        return False
    return _makes_generators(handle) or _returns_only_none(handle)


def _makes_generators(function: Any) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _returns_only_none(function: FunctionType) -> bool:
    """Tell whether a function returns, and never anything but None, as one without `return`; one that only raises does not."""
    returns = False
    before = None
    for each in dis.get_instructions(function):
        if each.opname == "RETURN_CONST":  # of 3.12 and 3.13
            is_none = each.argval is None
        elif each.opname == "RETURN_VALUE":
            # What is jumped to returns what was there before the jump, too: `return x or None`.
            is_none = (
                not each.is_jump_target
                and before is not None
                and before.opname == "LOAD_CONST"
                and before.argval is None
            )
        else:
            before = each
            continue
        if not is_none:
            return False
        returns = True
    return returns


def check_kind(RequestHandlerClass: Any, socket_type: int, endpoint: object) -> None:
    """Raise TypeError if this is for datagrams and the sockets are for streams, as at `endpoint`, or the other way round."""
    takes, does_not, wrong = (
        ("datagrams", "streams", FOR_DATAGRAMS)
        if socket_type == socket.SOCK_STREAM
        else ("streams", "datagrams", FOR_STREAMS)
    )
    plain = undo_partial(RequestHandlerClass)
    if inspect.isclass(plain) and issubclass(plain, wrong + _same_of_socketservers(wrong)):
        raise TypeError(f"{plain.__qualname__} is a handler of {takes}: it can't serve {does_not}, as on {endpoint}")


def _same_of_socketservers(kinds: tuple[type, ...]) -> tuple[type, ...]:
    """Return the handler classes of socketserver's that have the names of these."""
    socketserver = sys.modules.get("socketserver")
    return tuple(getattr(socketserver, kind.__name__) for kind in kinds if hasattr(socketserver, kind.__name__))
