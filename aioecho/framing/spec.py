"""Framings as text, as a command line or a configuration file names them: ``length:4``, ``lines:max_size=1024``."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from aioecho.framing.announced import FixedSize, LengthPrefixed, Varint
from aioecho.framing.base import Framing
from aioecho.framing.decimal import ContentLength, Netstrings, OctetCounted
from aioecho.framing.separated import Delimited, Lines
from aioecho.framing.stuffed import COBS, SLIP

__all__ = ["FRAMINGS", "format_framing", "parse_bytes", "parse_framing"]

FRAMINGS: dict[str, type[Any]] = {
    "lines": Lines,
    "delimited": Delimited,
    "length": LengthPrefixed,
    "fixed": FixedSize,
    "varint": Varint,
    "netstrings": Netstrings,
    "octet-counted": OctetCounted,
    "content-length": ContentLength,
    "slip": SLIP,
    "cobs": COBS,
}
"""The framings by the names that texts know them by."""

_ESCAPES = {"n": b"\n", "r": b"\r", "t": b"\t", "0": b"\0", "\\": b"\\"}
_BOOLEANS = {"true": True, "false": False}


def parse_framing(text: str) -> Framing:
    r"""Return the framing that a text names: ``NAME`` or ``NAME:VALUE,…``, with the values of the class's parameters.

    A value is given by its place or as ``parameter=VALUE``: ``length:4``, ``length:size=2,byteorder=little``,
    ``delimited:\x1c\r,start=\x0b``. In bytes ``\n``, ``\r``, ``\t``, ``\0``, ``\\`` and ``\xHH`` are escapes. A comma has
    to be written as ``\x2c``, and an equals sign as ``\x3d``.

    Raises:
        ValueError: it names none; the message is one line that says what it could have been (caller).
    """
    name, _, rest = text.partition(":")
    if name not in FRAMINGS:
        raise ValueError(f"no framing is called {name!r}{_suggest(name, FRAMINGS)}: there are {', '.join(FRAMINGS)}")
    kind = FRAMINGS[name]
    parameters = {field.name: field for field in dataclasses.fields(kind)}
    by_place = [field.name for field in parameters.values() if not field.kw_only]
    values: dict[str, Any] = {}
    for index, part in enumerate(rest.split(",") if rest else ()):
        match = re.fullmatch(r"([A-Za-z_][\w-]*)=(.*)", part, re.DOTALL)
        if match:
            parameter, value = match[1].replace("-", "_"), match[2]
        elif index < len(by_place):
            parameter, value = by_place[index], part
        else:
            raise ValueError(f"the framing {name} has no parameter in the place of {part!r}: {_list(parameters)}")
        if parameter not in parameters:
            raise ValueError(
                f"the framing {name} has no parameter {parameter!r}{_suggest(parameter, parameters)}: {_list(parameters)}"
            )
        if parameter in values:
            raise ValueError(f"the framing {name} gets two values for {parameter} in {text!r}")
        values[parameter] = _read_value(name, parameter, parameters[parameter].type, value)
    missing = [
        parameter
        for parameter, field in parameters.items()
        if field.default is dataclasses.MISSING and parameter not in values
    ]
    if missing:
        raise ValueError(f"the framing {name} needs its {missing[0]}, as in {name}:{_EXAMPLES[name]}")
    try:
        framing: Framing = kind(**values)
    except ValueError as error:
        raise ValueError(f"the framing {name} cannot be {text!r}: {error}") from error
    return framing


_EXAMPLES = {"delimited": r"\r\n", "fixed": "8"}


def _suggest(name: str, names: Iterable[str]) -> str:
    import difflib  # not where nothing is wrong

    close = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _list(parameters: Iterable[str]) -> str:
    return f"its parameters are {', '.join(parameters)}"


def _read_value(name: str, parameter: str, kind: Any, text: str) -> Any:
    what = f"{parameter} of the framing {name}"
    if kind is bytes:
        data = parse_bytes(what, text)
        if not data:
            raise ValueError(rf"{what} is empty: write a comma as \x2c")
        return data
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(f"{what} must be true or false, not {text!r}")
        return _BOOLEANS[text.lower()]
    if parameter == "byteorder":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{what} must be a number, not {text!r}") from None


def parse_bytes(what: str, text: str) -> bytes:
    r"""Return the bytes that a text stands for: UTF-8, with the escapes ``\n``, ``\r``, ``\t``, ``\0``, ``\\`` and ``\xHH``.

    Raises:
        ValueError: there is another escape; the message calls the text `what` (caller).
    """
    parts = []
    for escape, plain in re.findall(r"\\(x[0-9A-Fa-f]{2}|.|$)|([^\\]+)", text, re.DOTALL):
        if plain:
            parts.append(plain.encode("utf-8", "surrogateescape"))
        elif len(escape) == 3:
            parts.append(bytes.fromhex(escape[1:]))
        elif escape in _ESCAPES:
            parts.append(_ESCAPES[escape])
        else:
            raise ValueError(rf"{what} has an escape '\{escape}', which is none of \n \r \t \0 \\ \xHH")
    return b"".join(parts)


def format_framing(framing: Framing) -> str:
    """Return the text for a framing, without what is default but a size. For one of your own that is ``module:Class``."""
    name = next((name for name, kind in FRAMINGS.items() if type(framing) is kind), None)
    if name is None:
        return f"{type(framing).__module__}:{type(framing).__qualname__}"
    fields: Any = dataclasses.fields(framing)  # type: ignore[arg-type]  # all that have a name are dataclasses
    parts = []
    for index, field in enumerate(fields):
        value = getattr(framing, field.name)
        if value != field.default or field.name == "size":
            text = _format_value(value)
            parts.append(f"{field.name}={text}" if index or field.kw_only else text)
    return f"{name}:{','.join(parts)}" if parts else name


def _format_value(value: object) -> str:
    if not isinstance(value, bytes):
        return str(value).lower()
    escapes = {byte[0]: f"\\{letter}" for letter, byte in _ESCAPES.items()}
    return "".join(
        escapes.get(byte) or (chr(byte) if 32 < byte < 127 and byte not in b",=" else f"\\x{byte:02x}")
        for byte in value
    )
