"""What a control socket's client asks for: a line of JSON, or of words, and the command that it means."""

import json
import shlex
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Any

from aioecho.ops.control_view import SORTS

__all__ = ["COMMANDS", "ControlError", "parse_request", "parse_seconds"]

COMMANDS: Mapping[str, str] = {
    "status": "state, counters, limits and workers",
    "list": "connections: older=1h host=10.0.0.0/8 worker=2 server=2 sort=age|sent|received|unsent limit=100",
    "kick": "end connections: kick ID...",
    "limits": "set limits, or tell them: limits max_connections=500; none is no limit; server=2 is one of several servers",
    "timeouts": "set timeouts, or tell them: timeouts idle=30, idle=5m, idle=none; server=2",
    "pause": "accept no more; connections go on: pause [server=2]",
    "resume": "accept again: resume [server=2]",
    "drain": "stop the program, as SIGTERM does: drain [grace=SECONDS]",
    "reload": "replace all workers one after another, as SIGHUP does; without workers load certificates anew",
    "reload-tls": "load certificates anew",
    "workers": "add or remove worker processes: workers +1, workers -1, workers 4",
    "trace": "the counters of one connection, every second: trace ID [every=1] [count=N]",
    "help": "this",
}
"""The commands, with what they do."""

# What else than values by name a command takes.
POSITIONAL = {"kick": "ids", "drain": "grace", "workers": "count", "trace": "id"}
TEXTS = {"workers": "count", "trace": "id"}  # these are no numbers: "+1" is one worker more, and "1.27" an id
WHOLE = {  # a whole number from 1
    "list": {"worker", "server", "limit"},
    **{command: {"server"} for command in ("limits", "timeouts", "pause", "resume")},
    "trace": {"count"},
}
NAMES = {
    "list": {"older", "host", "worker", "server", "sort", "limit"},
    "pause": {"server"},
    "resume": {"server"},
    "kick": {"ids"},
    "drain": {"grace"},
    "workers": {"count"},
    "trace": {"id", "every", "count"},
}
MOST = 100_000
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class ControlError(Exception):
    """What the client has got wrong, or what can't be done: one line for people."""


def parse_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Return the command of a line and its values; ControlError if it is none.

    ``{"command": "list", "older": "1h"}`` and ``list older=1h`` are the same.
    """
    text = line.decode("utf-8", "replace").strip()
    if text.startswith("{"):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ControlError(f"this is no JSON: {error}") from error
        command = values.pop("command", None)
        if not isinstance(command, str):
            raise ControlError('expected {"command": NAME, ...}; NAME is one of ' + ", ".join(COMMANDS))
    else:
        try:
            command, *words = shlex.split(text)
        except ValueError as error:
            raise ControlError(f"expected a command: {error}") from error
        values = _parse_words(command, words)
    if command not in COMMANDS:
        raise ControlError(f"there is no command {command!r}: expected one of {', '.join(COMMANDS)}")
    return command, _checked(command, values)


def _parse_words(command: str, words: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    rest = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            name = name.replace("-", "_")  # as options are written
            values[name] = value if name == TEXTS.get(command) else _parse_value(value)
        else:
            rest.append(word)
    if rest:
        name = POSITIONAL.get(command, "")
        if not name or (len(rest) > 1 and name != "ids"):
            raise ControlError(
                f"{command} does not take {rest[-1]!r}: {COMMANDS.get(command, 'there is no such command')}"
            )
        values[name] = rest if name == "ids" else rest[0] if name == TEXTS.get(command) else _parse_value(rest[0])
    return values


def _parse_value(text: str) -> Any:
    if text in ("none", "None", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_seconds(name: str, value: Any) -> float:
    """Return seconds, of a number or of text such as 90, 30s, 5m, 1h and 2d; ControlError if it is neither."""
    text = str(value)
    try:
        seconds = float(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf") or isinstance(value, bool):
        raise ControlError(f"{name} must be seconds, or text as 30s, 5m, 1h, 2d, not {value!r}")
    return seconds


def _checked(command: str, values: dict[str, Any]) -> dict[str, Any]:
    values.pop("interactive", None)
    for name in WHOLE.get(command, ()):
        value = values.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST):
            raise ControlError(f"{name} must be a whole number from 1 to {MOST}, not {value!r}")
    if command == "limits":
        return values
    if command == "timeouts":
        is_long = {name: isinstance(value, str) and value[-1:] in UNITS for name, value in values.items()}
        return {name: parse_seconds(name, value) if is_long[name] else value for name, value in values.items()}
    values = {name: value for name, value in values.items() if value is not None}  # null is what was not given
    for name in values:
        if name not in NAMES.get(command, set()):
            raise ControlError(f"{command} does not take {name!r}: {COMMANDS[command]}")
    for name in ("older", "grace", "every"):
        if name in values:
            values[name] = parse_seconds(name, values[name])
    if "host" in values:
        try:
            ip_network(str(values["host"]), strict=False)
        except ValueError as error:
            raise ControlError(f"host must be an address or a network: {error}") from error
    if values.get("sort", "age") not in SORTS:
        raise ControlError(f"sort must be one of {', '.join(SORTS)}, not {values['sort']!r}")
    if command == "kick" and not (
        isinstance(values.get("ids"), list) and values["ids"] and all(isinstance(each, str) for each in values["ids"])
    ):
        raise ControlError("kick takes the ids of connections, as list tells them")
    if command == "trace" and not isinstance(values.get("id"), str):
        raise ControlError("trace takes the id of a connection, as list tells it")
    return values
