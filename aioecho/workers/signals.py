"""Signals that a program's server takes for as long as it serves, and gives back: at its end, and in a forked child."""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from aioecho.runtime.interpreters import is_subinterpreter

__all__ = ["gets_signals", "giving_back", "handling", "keep_for_children", "log_stop"]

# What handled the signals before they were taken, to be set again in a forked child.
_previous: dict[int, Any] = {}
_is_registered = False

# The signals that were blocked before a thread blocked more of them, to fork.
_masks = threading.local()


def gets_signals() -> bool:
    """Tell whether Python's signal handlers can be set here, and are called."""
    return threading.current_thread() is threading.main_thread() and not is_subinterpreter()


def keep_for_children(numbers: Iterable[int]) -> None:
    """Have a forked child handle these signals as this process does now, whatever it does later."""
    global _is_registered
    for number in numbers:
        _previous.setdefault(number, signal.getsignal(number))
    if not _is_registered:
        _is_registered = True
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_give_back_in_child)


@contextlib.contextmanager
def giving_back(numbers: Iterable[int]) -> Iterator[None]:
    """Set what handles these signals now again at the end, and the descriptor that wakes an event loop.

    A forked child has it at once. Does nothing in a thread that gets no signals.
    """
    if not gets_signals():
        yield
        return
    numbers = list(numbers)
    handlers = {number: signal.getsignal(number) for number in numbers}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    keep_for_children(numbers)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            _set(number, handler)
            _previous.pop(number, None)
        with contextlib.suppress(ValueError, OSError):  # it was closed meanwhile
            signal.set_wakeup_fd(wakeup)


@contextlib.contextmanager
def handling(loop: asyncio.AbstractEventLoop, actions: Mapping[signal.Signals, Callable[[], object]]) -> Iterator[None]:
    """Do in the loop what a signal stands for, as far as this thread gets them."""
    if not gets_signals():
        yield
        return
    for number, action in actions.items():
        loop.add_signal_handler(number, action)
    try:
        yield
    finally:
        for number in actions:
            loop.remove_signal_handler(number)


def log_stop(logger: logging.Logger, number: int, count: int, what: str, grace: float, of: str | None = None) -> None:
    """Log at once that a signal stops the server, and for how many connections that waits.

    At WARNING for Ctrl-C, if it waits: a person sits there, and without any configuration that is what logging shows.
    """
    name = signal.Signals(number).name
    of_what = "" if of is None else f" of {of}"
    if not count:
        logger.info("%s: stopping", name)
        return
    is_loud = number == signal.SIGINT
    limit = f"at most {grace:g} s" if grace != float("inf") else "without a limit"
    logger.log(
        logging.WARNING if is_loud else logging.INFO,
        "%s: stopping; waiting for %d %s%s, %s; a second signal ends them at once",
        *(name, count, what if count == 1 else f"{what}s", of_what, limit),
    )


def _set(number: int, handler: Any) -> None:
    if handler is not None:  # None: it was not set by Python, which can't set it again
        signal.signal(number, handler)


def _block() -> None:
    # A signal to the child could come before it has given them back, and would be lost, or count as the parent's.
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _previous)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _give_back_in_child() -> None:
    if _previous and gets_signals():
        # The descriptor is the parent's too: each signal of the child's would count as one of the parent's.
        signal.set_wakeup_fd(-1)
        for number, handler in _previous.items():
            _set(number, handler)
        _previous.clear()
    try:
        _unblock()
    except KeyboardInterrupt:  # Python ignores what is raised here: the child would go on
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
