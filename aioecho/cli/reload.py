"""For development: replace the process that serves when a file of the program has changed."""

import importlib
import logging
import os
import signal
import threading
from typing import Any

from aioecho.cli.console import Mistake

__all__ = ["check_can_watch", "watch"]

logger = logging.getLogger("aioecho.cli")


def check_can_watch() -> None:
    """Raise Mistake unless there is what watches files."""
    try:
        importlib.import_module("watchfiles")
    except ImportError as error:
        raise Mistake('--reload needs watchfiles: pip install "aioecho[reload]"') from error


def watch(folder: str) -> None:
    """Watch the .py files in a folder and below from now on, in a thread. When some change, send this process SIGHUP.

    With workers that replaces them, one after another. If the program can't be loaded any more the old ones serve on.
    """
    threading.Thread(target=_watch, args=(folder,), name="aioecho reload", daemon=True).start()


def _watch(folder: str) -> None:
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts the changes that are told of below
    watchfiles: Any = importlib.import_module("watchfiles")  # of an extra
    for changes in watchfiles.watch(folder, watch_filter=watchfiles.PythonFilter(), raise_interrupt=False):
        names = sorted({os.path.relpath(path, folder) for _, path in changes})
        logger.info("%s changed: reloading", ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""))
        os.kill(os.getpid(), signal.SIGHUP)
