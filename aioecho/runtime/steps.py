"""Coroutine functions that are written as generators, so that they can wait by ``yield``."""

import functools
import inspect
import types
from collections.abc import Callable, Coroutine, Generator
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

__all__ = ["steps", "turn"]

P = ParamSpec("P")
T = TypeVar("T")


def steps(function: Callable[P, Generator[Any, None, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make a generator function a coroutine function, in which ``yield x`` waits for x, as in types.coroutine().

    Its calls give real coroutines. An ``await`` in their place would look for an iterator, which costs half as much again
    as all else that a coroutine does which waits once.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__
    code = code.replace(co_flags=code.co_flags & ~inspect.CO_GENERATOR | inspect.CO_COROUTINE)
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return cast("Callable[P, Coroutine[Any, Any, T]]", functools.update_wrapper(made, function))


@types.coroutine
def turn() -> Generator[None, None, None]:
    """Let the loop run once."""
    yield
