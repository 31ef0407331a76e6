"""The options of `serve` that are the fields of Limits and Timeouts, made of these classes."""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from aioecho.config import Limits, Timeouts

__all__ = ["make_limits", "make_timeouts", "setting_options"]

# Options of their own, under uvicorn's names.
_OTHERS = {"backlog"}

_NONE = "none"

_TIMEOUT = "timeout_"


class _Setting(click.ParamType):  # type: ignore[type-arg] # only later versions of click have one
    """The text of a field's value; "none" is None. The class itself checks the value."""

    def __init__(self, kind: type[Limits | Timeouts], field: str, hint: Any) -> None:
        self._kind, self._field = kind, field
        parts = get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)
        self.choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        self._is_optional = NoneType in parts
        self._number = next((part for part in parts if part in (int, float)), None)
        what = "|".join(self.choices) or ("N" if kind is Limits else "PART" if "jitter" in field else "SECONDS")
        self.name = f"{what}|{_NONE}" if self._is_optional else what

    def get_metavar(self, *args: Any, **options: Any) -> str:
        """Return what help shows as the value."""
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value, and the text "none" as it is: None is what was not given. Anything else is a usage error."""
        if value == _NONE and self._is_optional:
            return _NONE
        try:
            found = value if self._number is None else self._number(value)
        except ValueError:
            kind = "whole number" if self._number is int else "number"
            self.fail(f"{value!r} is no {kind}{', nor none' if self._is_optional else ''}.", param, ctx)
        try:
            self._kind(**{self._field: found})
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
        return found


class _SettingOption(click.Option):
    """An option whose help is what is written of the field: read when it is asked for."""

    def __init__(
        self, names: Any, *, kind: type[Limits | Timeouts], field: dataclasses.Field[Any], **options: Any
    ) -> None:
        super().__init__(names, **options)
        self._kind, self._field = kind, field

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and the first sentence of the field's documentation."""
        default = _NONE if self._field.default is None else self._field.default
        text = _read_docs(self._kind).get(self._field.name, "").partition(". ")[0].rstrip(".")
        self.help = f"{' '.join(text.split())}.  [default: {default}]"
        return super().get_help_record(ctx)


def _read_docs(kind: type[Any]) -> dict[str, str]:
    """Return what is written of each field; nothing where the source is not there."""
    try:
        tree = ast.parse(inspect.getsource(kind))
    except (OSError, SyntaxError):
        return {}
    docs = {}
    for node, following in pairwise(getattr(tree.body[0], "body", [])):
        match node, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = text
    return docs


def setting_options() -> Iterator[Callable[[Any], Any]]:
    """Yield a decorator for each field that has no option of its own."""
    for kind in (Limits, Timeouts):
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name not in _OTHERS:
                name = (_TIMEOUT if kind is Timeouts else "") + field.name
                value = _Setting(kind, field.name, hints[field.name])
                flag = f"--{name.replace('_', '-')}"
                yield click.option(flag, name, cls=_SettingOption, kind=kind, field=field, type=value)


def make_limits(settings: Mapping[str, Any], *, limit_concurrency: int | None) -> Limits:
    """Return the limits that were given. `limit_concurrency` is three of them, as far as they were not given themselves."""
    concurrency = ("max_connections", "max_handlers", "max_sessions") if limit_concurrency is not None else ()
    return Limits(**{**dict.fromkeys(concurrency, limit_concurrency), **_given(Limits, settings, "")})


def make_timeouts(settings: Mapping[str, Any]) -> Timeouts:
    """Return the timeouts that were given."""
    return Timeouts(**_given(Timeouts, settings, _TIMEOUT))


def _given(kind: type[Any], settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    values = {field.name: settings.get(prefix + field.name) for field in dataclasses.fields(kind)}
    return {name: None if value == _NONE else value for name, value in values.items() if value is not None}
