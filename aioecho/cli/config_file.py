"""The configuration file of `serve`: in TOML, with the options' names as keys. An option on the command line wins."""

import difflib
import tomllib
from typing import Any

import click
from click.core import ParameterSource

from aioecho.cli.console import Mistake

__all__ = ["config_option", "drop_overridden"]

# What makes no sense in a file, or was done by the time that it is read.
_NO_KEYS = {"config", "check-config", "help"}

# Options that take the place of others which the file has: of all endpoints if there is one on the command line.
_ENDPOINTS = ("endpoints", "host", "port", "uds", "fd")
_OVERRIDDEN = {
    **{name: set(_ENDPOINTS) - {name} for name in _ENDPOINTS},
    "limit_concurrency": {"max_connections", "max_handlers", "max_sessions"},
}


def _read(context: click.Context, option: click.Parameter, file: str | None) -> str | None:
    """Make what a file says the defaults of the command's options.

    Raises:
        Mistake: it can't be read, or a key or a value in it is none of the command's (caller).
    """
    if file is None:
        return None
    try:
        with open(file, "rb") as opened:
            table = tomllib.load(opened)
    except OSError as error:
        raise Mistake(f"cannot read {file}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Mistake(f"{file}: {error}") from error
    keys = {_key_of(param): param for param in context.command.params if _key_of(param) not in _NO_KEYS}
    found = {}
    for key, value in table.items():
        param = keys.get(key)
        if isinstance(value, dict) and param is None:
            raise Mistake(
                f"{file}: {key!r} is a table, and there are none: write all keys at the top, as --help has them"
            )
        if param is None:
            [nearest] = difflib.get_close_matches(key.replace("_", "-"), keys, 1, 0)
            raise Mistake(f"{file}: there is no key {key!r}; the nearest is {nearest!r}")
        assert param.name is not None
        try:
            found[param.name] = _as_given(value, param)
            param.type_cast_value(context, found[param.name])
        except click.BadParameter as error:
            raise Mistake(f"{file}: {key}: {error.message.rstrip('.')}") from error
    context.default_map = {**(context.default_map or {}), **found}
    return file


config_option = click.option(
    "--config", type=click.Path(), metavar="FILE", callback=_read, is_eager=True,
    help="Read options from this TOML file, with their names as keys: workers = 2. An option given here wins.",
)  # fmt: skip


def _key_of(param: click.Parameter) -> str:
    """Return an option's long name, without its dashes; an argument's name."""
    return next((name for name in param.opts if name.startswith("--")), param.opts[0]).lstrip("-")


def _as_given(value: Any, param: click.Parameter) -> Any:
    """Return a value as the command line would give it: text, several texts, or True and False."""
    if isinstance(param, click.Option) and param.is_flag:
        if not isinstance(value, bool):
            raise click.BadParameter(f"expected true or false, not {value!r}")
        return value
    values = value if isinstance(value, list) and param.multiple else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            raise click.BadParameter(f"expected {_describe(param)}, not {_show(each)}")
    return tuple(map(str, values)) if param.multiple else str(value)


def _describe(param: click.Parameter) -> str:
    is_number = isinstance(param.type, click.types.IntParamType | click.types.FloatParamType)
    return "a list of texts" if param.multiple else "a number" if is_number else "a text or a number"


def _show(value: Any) -> str:
    kinds = {bool: str(value).lower(), dict: "a table", list: "a list"}
    return kinds.get(type(value), str(value))


def drop_overridden(context: click.Context, options: dict[str, Any]) -> None:
    """Reset the options of the file that others on the command line take the place of: `--port` that of its `bind`."""
    for name, overridden in _OVERRIDDEN.items():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            for other in overridden:
                if context.get_parameter_source(other) is ParameterSource.DEFAULT_MAP:
                    options[other] = () if other == "endpoints" else None
