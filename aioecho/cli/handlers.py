"""What `serve` serves: the handlers that the command line names, and which endpoints are of which."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from aioecho.choice import are_for_datagrams
from aioecho.cli.console import Mistake
from aioecho.cli.objects import did_you_mean, find_framing, find_object, is_object_name
from aioecho.echo import FRAME_HANDLERS
from aioecho.serving.handlers import StreamRequestHandler

__all__ = ["find_framed_handlers", "find_handler", "sort_by_handler", "split_bind"]

_ENDPOINT = re.compile("(tcp|udp|fd)://|(unix|unixgram|systemd|stdio):")


def split_bind(text: str, default: str) -> tuple[str, str]:
    """Return the handler and the endpoint that ``HANDLER=ENDPOINT``, or an endpoint alone, names."""
    # An endpoint may have a = in its path or its options, and a handler a colon: what begins like an endpoint is one.
    match = None if _ENDPOINT.match(text) else re.fullmatch(r"(?P<handler>[^=/?]+)=(?P<endpoint>.+)", text)
    return (default, text) if match is None else (match["handler"], match["endpoint"])


def sort_by_handler(binds: list[tuple[str, str]]) -> tuple[list[tuple[str, bool]], list[str]]:
    """Return the handler of every endpoint, with whether it is for datagrams, and the endpoints: one handler's together."""
    groups: dict[tuple[str, bool], list[str]] = {}
    try:
        for handler, endpoint in binds:
            groups.setdefault((handler, are_for_datagrams(endpoint)), []).append(endpoint)
    except ValueError as error:
        raise Mistake(str(error)) from error
    served = [of_handler for of_handler, endpoints in groups.items() for _ in endpoints]
    return served, list(itertools.chain(*groups.values()))


def find_framed_handlers(
    text: str, folder: str, served: list[tuple[str, bool]]
) -> dict[str, type[StreamRequestHandler]]:
    """Return the ready-made handlers of frames, with the framing that `text` names.

    Raises:
        Mistake: it names none, or a handler is `served` that has no use for one (caller).
    """
    for handler, for_datagrams in served:
        if handler not in FRAME_HANDLERS or for_datagrams:
            what = f"{handler} over datagrams" if for_datagrams else handler
            raise Mistake(
                f"--framing is for the ready-made {' and '.join(FRAME_HANDLERS)} over streams, not for {what}: a class of"
                " yours has a `framing` of its own"
            )
    framing = find_framing(text, folder)
    return {name: type(kind.__name__, (kind,), {"framing": framing}) for name, kind in FRAME_HANDLERS.items()}


def _hint(name: str) -> str:
    """Return what an error message says last of a name that is no handler's: what to write in its place."""
    if match := re.fullmatch(r"(?:\./)?([\w/]+)\.py(:\w+)?", name):
        return f"for your own say {match[1].replace('/', '.')}{match[2] or ':Class'}"
    if re.search(r":[0-9]+$", name) or name.startswith(("tcp:", "udp:", "unix:")):
        return f"an endpoint is given by --bind {name}"
    return "for your own say module:Class"


def find_handler(name: str, folder: str, ready_made: Mapping[str, Any]) -> Any:
    """Return the ready-made handler called `name`, or import "module:Class". `folder` comes first on the path.

    Raises:
        Mistake: there is none; the message says what was looked for, and where (caller).
    """
    if name in ready_made:
        return ready_made[name]
    if not is_object_name(name):
        raise Mistake(
            f"no handler is called {name!r}{did_you_mean(name, ready_made)}: the ready-made ones are"
            f" {', '.join(ready_made)}; {_hint(name)}"
        )
    return find_object(name, folder)
