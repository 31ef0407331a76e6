"""Types of handler classes: for streams, datagrams, sessions or batches, aioecho's or socketserver's, and what is none at all.

A handler class of aioecho's says what it is for by its attribute `serves`: see BaseRequestHandler.
"""

import dis
import functools
import inspect
import socket
import sys
from collections.abc import Callable
from typing import Any

from aioecho.config import Timeouts
from aioecho.framing import Framing

__all__ = [
    "check_handler_class",
    "check_socket_type",
    "is_blocking",
    "is_handle_function",
    "makes_batches",
    "makes_sessions",
    "serves_datagrams",
    "signature_of",
    "undo_partial",
]

CO_COROUTINES = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR

# Values of `serves`, and the handler classes of socketserver's that serve the same.
FOR_DATAGRAMS = ("datagrams", "sessions", "batches")
OF_SOCKETSERVER = {"StreamRequestHandler": "streams", "DatagramRequestHandler": "datagrams"}


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
    socketserver = sys.modules.get("socketserver")  # if no module has imported it, this is no class of it
    return (
        socketserver is not None
        and isinstance(RequestHandlerClass, type)
        and issubclass(RequestHandlerClass, socketserver.BaseRequestHandler)
    )


def makes_sessions(RequestHandlerClass: Any) -> bool:
    """Tell whether this is a handler class for a peer's datagrams together, or a functools.partial of one."""
    return _serves(undo_partial(RequestHandlerClass)) == "sessions"


def makes_batches(RequestHandlerClass: Any) -> bool:
    """Tell whether this is a handler class for all the datagrams that have come, or a functools.partial of one."""
    return _serves(undo_partial(RequestHandlerClass)) == "batches"


def serves_datagrams(RequestHandlerClass: Any) -> bool | None:
    """Tell whether this is a handler class of aioecho's for datagrams, or one for streams; None if it is neither."""
    serves = _serves(RequestHandlerClass)
    return None if serves is None else serves in FOR_DATAGRAMS


def _serves(plain: Any) -> str | None:
    serves = getattr(plain, "serves", None) if inspect.isclass(plain) else None
    return serves if serves == "streams" or serves in FOR_DATAGRAMS else None


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return what inspect.signature() does. From Python 3.14 on that evaluates annotations, and not all need to exist here."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.STRING)
    return inspect.signature(function)


def is_handle_function(RequestHandlerClass: Any) -> bool:
    """Tell whether this is a coroutine function of two arguments, a reader and a writer, as asyncio.start_server() takes."""
    if not inspect.iscoroutinefunction(undo_partial(RequestHandlerClass)):
        return False
    needed = [
        parameter
        for parameter in signature_of(RequestHandlerClass).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    return len(needed) == 2 and all(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) for parameter in needed
    )


def check_handler_class(RequestHandlerClass: Any) -> None:
    """Raise TypeError unless this makes handlers, as far as that can be told before it does."""
    if not callable(RequestHandlerClass):
        raise TypeError(f"RequestHandlerClass must be callable, not {RequestHandlerClass!r}")
    plain = undo_partial(RequestHandlerClass)
    if inspect.isclass(plain) and hasattr(plain, "serve_forever"):
        raise TypeError(
            f"{plain.__qualname__} is a server: give the handler class that it is to serve with, and to run() or serve()"
            f" besides server_class={plain.__qualname__}"
        )
    if is_blocking(plain):
        if inspect.iscoroutinefunction(plain.handle):
            raise TypeError(
                f"{plain.__qualname__} is a handler of socketserver's, whose handle() can't be a coroutine; derive it"
                " from aioecho.StreamRequestHandler"
            )
    elif inspect.isclass(plain):
        if inspect.isabstract(plain):
            raise TypeError(f"{plain.__qualname__} has no handle(): a handler class defines `async def handle(self)`")
        handle = getattr(plain, "handle", None)
        if handle is None and not _may_set_handle(plain):
            raise TypeError(
                f"{plain.__qualname__} makes no handlers, as it has no handle(): derive it from one of aioecho's"
            )
        if _returns_nothing(handle) and not _may_set_handle(plain):
            raise TypeError(
                f"the handle() of {plain.__qualname__} is a plain function: define it as `async def handle(self)`; or, for a"
                " thread of its own, derive the class from one of socketserver's handlers"
            )
        _check_attributes(plain)
        _check_other_methods(plain)
        if _makes_generators(handle):
            raise TypeError(
                f"the handle() of {plain.__qualname__} makes generators, which cannot be awaited: define it as"
                " `async def handle(self)`, without `yield`"
            )
        if _serves(plain) is not None and not _takes_three(RequestHandlerClass):
            raise TypeError(
                f"{plain.__qualname__} is called with (request, client_address, server) to make a handler, and its __init__()"
                " does not take these: write `def __init__(self, *args, more)` with `super().__init__(*args)`, and give"
                f" functools.partial({plain.__qualname__}, more=...)"
            )
    elif inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None)):  # noqa: B004
        raise TypeError(
            f"{getattr(plain, '__qualname__', plain)!s} is a coroutine function, and RequestHandlerClass is called without"
            " `await`: give a class that defines `async def handle(self)`, a plain function that returns an object of one, or"
            " `async def handle(reader, writer)`"
        )

    elif inspect.isfunction(plain) and not _takes_three(RequestHandlerClass):
        raise TypeError(
            f"{plain.__qualname__} is called with (request, client_address, server) to make a handler, and does not take these:"
            " give a handler class, or `async def handle(reader, writer)`"
        )


def _check_attributes(plain: Any) -> None:
    """Raise TypeError if what a handler class is set by is of the wrong type."""
    for name, kind, example in (
        ("framing", Framing, "aioecho.framing.Lines()"),
        ("timeouts", Timeouts, "aioecho.Timeouts()"),
    ):
        value = getattr(plain, name, None)
        # A descriptor gives every handler its own.
        if not (value is None or isinstance(value, kind) or hasattr(type(value), "__get__")):
            raise TypeError(f"{plain.__qualname__}.{name} must be None or as {example}, not {value!r}")


def _check_other_methods(plain: Any) -> None:
    """Raise TypeError if another method than handle() is a plain function where a coroutine is awaited."""
    for name in ("setup", "finish", "draining"):
        if _serves(plain) is not None and _returns_nothing(getattr(plain, name, None)):
            raise TypeError(
                f"the {name}() of {plain.__qualname__} is a plain function, and is awaited: define it as"
                f" `async def {name}(self)`"
            )


def _returns_nothing(function: Any) -> bool:
    """Tell whether this is a plain function that returns None wherever it returns, and so nothing that could be awaited."""
    if not inspect.isfunction(function) or function.__code__.co_flags & (CO_COROUTINES | inspect.CO_GENERATOR):
        return False
    returns = 0
    before = None
    for instruction in dis.get_instructions(function):
        returned = before if instruction.opname == "RETURN_VALUE" else instruction
        if instruction.opname in ("RETURN_VALUE", "RETURN_CONST"):
            assert returned is not None
            # Where something jumps to a return, it is another value.
            is_none = (
                returned.opname in ("LOAD_CONST", "LOAD_COMMON_CONSTANT", "RETURN_CONST") and returned.argval is None
            )
            if not is_none or (returned is before and instruction.is_jump_target):
                return False
            returns += 1
        before = instruction
    return returns > 0


def _may_set_handle(plain: Any) -> bool:
    """Tell whether an object of a class, or what the class makes, may have another handle() than the class."""
    if (
        type(plain).__call__ is not type.__call__
        or plain.__new__ is not object.__new__
        or plain.__getattribute__ is not object.__getattribute__
        or hasattr(plain, "__getattr__")
    ):
        return True
    functions = (found for kind in plain.__mro__ for found in vars(kind).values() if inspect.isfunction(found))
    return any("handle" in (*function.__code__.co_names, *function.__code__.co_consts) for function in functions)


def _takes_three(function: Any) -> bool:
    try:
        signature_of(function).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # it has no signature, as some written in C
        return True
    return True


def _makes_generators(function: Any) -> bool:
    return inspect.isasyncgenfunction(function) or (
        inspect.isgeneratorfunction(function) and not function.__code__.co_flags & inspect.CO_ITERABLE_COROUTINE
    )


def check_socket_type(RequestHandlerClass: Any, socket_type: int, endpoint: object) -> None:
    """Raise TypeError if this is for datagrams and the sockets are for streams, as at `endpoint`, or the other way round."""
    plain = undo_partial(RequestHandlerClass)
    serves = _serves_of_socketservers(plain) if is_blocking(plain) else _serves(plain)
    if serves is None or (serves in FOR_DATAGRAMS) == (socket_type == socket.SOCK_DGRAM):
        return
    takes, does_not = ("datagrams", "streams") if serves in FOR_DATAGRAMS else ("streams", "datagrams")
    raise TypeError(f"{plain.__qualname__} is a handler of {takes}: it can't serve {does_not}, as on {endpoint}")


def _serves_of_socketservers(plain: type) -> str | None:
    socketserver = sys.modules["socketserver"]
    for name, serves in OF_SOCKETSERVER.items():
        if issubclass(plain, getattr(socketserver, name)):
            return serves
    return None
