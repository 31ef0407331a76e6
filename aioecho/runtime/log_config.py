"""Logging as a file says, in JSON or TOML for dictConfig(), in INI for fileConfig(); or as a mapping, or a function, does."""

import json
import logging
import os
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from aioecho.runtime.log_files import all_loggers, reopen_log_files

__all__ = ["LogConfig", "apply_log_config", "renew_log"]

logger = logging.getLogger("aioecho.logs")

LogConfig = str | os.PathLike[str] | Mapping[str, Any] | Callable[[], object]
"""A file, what dictConfig() takes, or a function that configures logging."""


def apply_log_config(config: LogConfig) -> None:
    """Configure logging. A file is for dictConfig() if it is .json or .toml, else for fileConfig().

    If that fails all stays as it was. What a function raises is raised.

    Loggers that it does not name go on, also if it does not say so: by dictConfig()'s default they would be disabled.

    Raises:
        OSError: it can't be read.
        ValueError: what it says makes no sense; the message says what (caller).
    """
    if callable(config):
        config()
        return
    path = "the log configuration" if isinstance(config, Mapping) else os.fspath(config)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".yaml", ".yml"):
        raise ValueError(f"{path}: expected .json, .toml or .ini: write it as one of these")
    text = b""
    if not isinstance(config, Mapping):
        with open(path, "rb") as opened:
            text = opened.read()
    import logging.config  # not at the top: it imports socketserver, which is_blocking() would then look at for each client

    before = _take_snapshot()
    try:
        if isinstance(config, Mapping):
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, **config})
        elif suffix in (".json", ".toml"):
            table = json.loads(text) if suffix == ".json" else tomllib.loads(text.decode())
            if not isinstance(table, dict):
                raise ValueError("expected a mapping for logging.config.dictConfig()")
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, **table})
        else:
            logging.config.fileConfig(path, disable_existing_loggers=False)
    except Exception as error:  # what it names is imported and called
        _restore(before)
        raise ValueError(f"{path}: {_explain(error)}") from error


def renew_log(config: LogConfig | None) -> None:
    """At SIGHUP, read the file that configures logging again, and open log files anew that were rotated."""
    if isinstance(config, str | os.PathLike):
        try:
            apply_log_config(config)
        except OSError as error:
            logger.error("SIGHUP: logging stays as it was: cannot read %s: %s", config, error.strerror or error)
        except ValueError as error:
            logger.error("SIGHUP: logging stays as it was: %s", error)
    reopen_log_files()


def _explain(error: BaseException) -> str:
    """Return an error and its cause as one line: what dictConfig() raises names the place, and its cause the mistake."""
    own = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    cause = error.__cause__
    return " ".join((own if cause is None else f"{own}: {_explain(cause)}").split())


def _take_snapshot() -> list[tuple[logging.Logger, dict[str, Any]]]:
    names = ("level", "propagate", "disabled", "handlers", "filters")
    return [
        (logger, {name: list(value) if isinstance(value := getattr(logger, name), list) else value for name in names})
        for logger in all_loggers()
    ]


def _restore(before: list[tuple[logging.Logger, dict[str, Any]]]) -> None:
    known = dict(before)
    for logger in all_loggers():
        for name, value in known.get(logger, {"handlers": [], "disabled": False}).items():
            setattr(logger, name, value)
        logger.setLevel(logger.level)  # which forgets what is remembered of levels
