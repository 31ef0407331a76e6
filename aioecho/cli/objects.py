"""Objects of the user's own that a command names: ``module:Class``, and the option --framing."""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from aioecho.cli.console import ImportMistake, Mistake
from aioecho.framing import Framing, parse_framing
from aioecho.framing.spec import FRAMINGS
from aioecho.workers.guard import StartedByImport, importing

__all__ = ["FRAMING_HELP", "did_you_mean", "find_framing", "find_object", "framing_option", "is_object_name"]

FRAMING_HELP = (
    "lines, length:4 (or length:size=2,byteorder=little), delimited:\\r\\n, fixed:8, varint, netstrings, octet-counted,"
    " content-length, slip, cobs, or one of yours as module:object."
)


def is_object_name(name: str) -> bool:
    """Tell whether a name has the form ``module:object``."""
    module_name, colon, attribute = name.partition(":")
    return bool(colon and all(module_name.split(".")) and all(part.isidentifier() for part in attribute.split(".")))


def find_object(name: str, folder: str) -> Any:
    """Import "module:object". `folder` comes first on the path.

    Raises:
        Mistake: there is none; the message says what was looked for, and where (caller).
        ImportMistake: the module raises something as it is imported (caller).
    """
    module_name, _, attribute = name.partition(":")
    where = str(Path(folder).resolve())
    if where not in sys.path[:1]:  # by an object before it
        sys.path.insert(0, where)
    try:
        with importing(module_name):
            module = importlib.import_module(module_name)
    except StartedByImport as error:
        raise Mistake(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise ImportMistake(module_name, error) from error  # the module is there, and imports something that is not
        hint = f": leave out .py, and say {module_name[:-3]}:{attribute}" if module_name.endswith(".py") else ""
        raise Mistake(f"no module {module_name!r} in {where} nor among the installed ones{hint}") from error
    except Exception as error:
        raise ImportMistake(module_name, error) from error
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            file = getattr(module, "__file__", None) or module_name
            raise Mistake(
                f"no {attribute!r} in module {module_name!r} ({file}){did_you_mean(part, dir(found))}"
            ) from None
    return found


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return what an error message adds for a name that is close to one of `names`; "" if it is not."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def find_framing(text: str, folder: str = ".") -> Framing:
    """Return the framing that a text names, as --framing has it.

    Raises:
        Mistake: it names none; the message says what it could have been (caller).
    """
    name = text.partition(":")[0]
    if name in FRAMINGS or not is_object_name(text):
        try:
            return parse_framing(text)
        except ValueError as error:
            more = "" if name in FRAMINGS else "; for your own say module:object"
            raise Mistake(f"{error}{more}") from error
    found = find_object(text, folder)
    if isinstance(found, type) and issubclass(found, Framing):
        try:
            found = found()
        except TypeError as error:
            raise Mistake(f"{text} needs arguments ({error}): name an object that has them") from error
    if not isinstance(found, Framing):
        raise Mistake(f"{text} is no framing, but {found!r}: expected an object or a class of aioecho.framing.Framing")
    return found


def framing_option(help_text: str) -> Callable[[Any], Any]:
    """Return the option --framing. Its value comes as an object."""
    return click.option(
        "--framing",
        metavar="SPEC",
        callback=lambda context, option, text: None if text is None else find_framing(text),
        help=f"{help_text} SPEC is {FRAMING_HELP}",
    )
