"""Logging as a file says: what is written for dictConfig() as JSON or TOML, or for fileConfig() as INI."""

import json
import logging
import logging.config
import os
import tomllib
from typing import Any

__all__ = ["apply_log_config"]


def apply_log_config(file: str | os.PathLike[str]) -> None:
    """Configure logging by `file`: dictConfig() if it is .json or .toml, else fileConfig(). If that fails all stays as it was.

    Loggers that it does not name go on, also if it does not say so: by dictConfig()'s default they would be disabled.

    Raises:
        OSError: it can't be read.
        ValueError: what it says makes no sense; the message says what (caller).
    """
    path = os.fspath(file)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".yaml", ".yml"):
        raise ValueError(f"{path}: expected .json, .toml or .ini: write it as one of these")
    with open(path, "rb") as opened:
        text = opened.read()
    before = _take_snapshot()
    try:
        if suffix in (".json", ".toml"):
            table = json.loads(text) if suffix == ".json" else tomllib.loads(text.decode())
            if not isinstance(table, dict):
                raise ValueError("expected a mapping for logging.config.dictConfig()")
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, **table})
        else:
            logging.config.fileConfig(path, disable_existing_loggers=False)
    except Exception as error:  # what it names is imported and called
        _restore(before)
        raise ValueError(f"{path}: {_explain(error)}") from error


def _explain(error: BaseException) -> str:
    """Return an error and its cause as one line: what dictConfig() raises names the place, and its cause the mistake."""
    own = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    cause = error.__cause__
    return " ".join((own if cause is None else f"{own}: {_explain(cause)}").split())


def _loggers() -> list[logging.Logger]:
    root = logging.getLogger()
    return [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]


def _take_snapshot() -> list[tuple[logging.Logger, dict[str, Any]]]:
    names = ("level", "propagate", "disabled", "handlers", "filters")
    return [
        (logger, {name: list(value) if isinstance(value := getattr(logger, name), list) else value for name in names})
        for logger in _loggers()
    ]


def _restore(before: list[tuple[logging.Logger, dict[str, Any]]]) -> None:
    known = dict(before)
    for logger in _loggers():
        for name, value in known.get(logger, {"handlers": [], "disabled": False}).items():
            setattr(logger, name, value)
        logger.setLevel(logger.level)  # which forgets what is remembered of levels
