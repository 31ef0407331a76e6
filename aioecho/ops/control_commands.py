"""The commands of live control, for a server in this process and for worker processes alike."""

import asyncio
import contextlib
import dataclasses
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from aioecho.ops.control_request import COMMANDS, ControlError

__all__ = ["Backend", "Commands", "Gathered"]

# Lines of a list that are joined at a time.
AT_ONCE = 100


@dataclasses.dataclass
class Gathered:
    """What the processes that serve have answered."""

    parts: dict[str, list[Any]]
    """What every process has answered, by its name: a large answer in several parts."""
    errors: dict[str, str]
    silent: list[str]
    """The names of processes that did not answer in time."""


class Backend(Protocol):
    """What the commands are carried out by."""

    async def ask(self, what: str, *, worker: int | None = None, **values: Any) -> Gathered:
        """Ask all processes that serve, or one worker, one of the questions of a ServerView."""

    def describe(self) -> dict[str, Any]:
        """Return what is known without asking.

        It has the list "workers". With workers it has "counts", by their names: the stats and reasons that were told last, by
        them and by the ones that have ended.
        """

    async def set_live(self, kind: str, changes: Mapping[str, Any], server: int | None) -> Gathered:
        """Set "limits" or "timeouts" in all processes, and any that start later. ValueError if they make no sense.

        `server` is the number of one of several servers; None is all.
        """

    async def set_paused(self, is_paused: bool, server: int | None) -> Gathered:
        """Pause or resume all processes, and any that start later. ValueError if there is no such server."""

    def drain(self, grace: float | None, /) -> object:
        """Begin to stop."""

    def reload(self) -> str:
        """Do what SIGHUP does; return what that is, as text. ControlError if it can't be done."""

    def set_workers(self, change: str) -> int:
        """Add or remove workers, "+1", "-1" or "4"; return how many there are then. ControlError if it can't be done."""


class Commands:
    """Answers requests, in lines: dictionaries, the last of which has "ok", and text that is lines of JSON already."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._started = time.monotonic()
        self._listing = asyncio.Lock()  # lists are made one after another: they take the most time by far

    async def answer(self, command: str, values: dict[str, Any]) -> AsyncGenerator[dict[str, Any] | str, None]:
        """Yield the lines of the answer.

        Raises:
            ControlError: it can't be done.
        """
        match command:
            case "help":
                yield {"ok": True, "commands": dict(COMMANDS)}
            case "status":
                yield await self._status()
            case "list":
                async with contextlib.aclosing(self._list(**values)) as lines:
                    async for line in lines:
                        yield line
            case "trace":
                async with contextlib.aclosing(self._trace(**values)) as lines:
                    async for line in lines:
                        yield line
            case "kick":
                yield await self._kick(values["ids"])
            case "limits" | "timeouts":
                yield await self._set(command, values)
            case "pause" | "resume":
                try:
                    yield _done(await self._backend.set_paused(command == "pause", values.get("server")))
                except ValueError as error:
                    raise ControlError(str(error)) from error
            case "reload-tls":
                yield _done(await self._backend.ask("control.reload_tls"))
            case "reload":
                yield {"ok": True, "what": self._backend.reload()}
            case "drain":
                self._backend.drain(values.get("grace"))
                yield {"ok": True}
            case "workers":
                yield {"ok": True, "workers": self._backend.set_workers(str(values.get("count", "")))}

    async def _status(self) -> dict[str, Any]:
        gathered = await self._backend.ask("control.status")
        known = self._backend.describe()
        # While workers are replaced the ones that serve count, and not the ones that drain.
        told = {
            name: parts[0]
            for name, parts in sorted(gathered.parts.items(), key=lambda each: each[1][0]["state"] == "draining")
        }
        for worker in known["workers"]:
            status = told.get(worker["name"])
            if status is not None:
                counts = status["stats"]
                worker.update(state=status["state"], active=counts["active"], accepted=counts["accepted"])
        # A worker that has ended since it answered is counted among the ended ones.
        stats, reasons = _sum(known.pop("counts", told))
        first: dict[str, Any] = next(iter(told.values()), {})
        servers = _merge_servers(told)
        own = servers[0] if servers else {}
        return {
            "ok": True,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "state": first.get("state", "not known"),
            "endpoints": first.get("endpoints", []),
            **known,
            "stats": stats,
            "reasons": reasons,
            "limits": own.get("limits"),
            "timeouts": own.get("timeouts"),
            **({"differing": own["differing"]} if "differing" in own else {}),
            **({"servers": servers} if len(servers) > 1 else {}),
            **_unanswered(gathered),
        }

    async def _list(
        self, worker: int | None = None, sort: str = "age", limit: int = 10_000, **filters: Any
    ) -> AsyncGenerator[dict[str, Any] | str, None]:
        async with self._listing:
            gathered = await self._backend.ask("control.list", worker=worker, sort=sort, limit=limit, **filters)
        if gathered.errors and not gathered.parts:
            _done(gathered)  # which raises
        matched = sum(parts[-1]["matched"] for parts in gathered.parts.values())
        found = [part for parts in gathered.parts.values() for part in parts[:-1]]
        shown = sum(len(part["keys"]) for part in found)
        if len(gathered.parts) > 1:
            keys, lines = [], []
            for part in found:
                keys += part["keys"]
                lines += part["text"].splitlines(keepends=True)
            order = sorted(range(shown), key=keys.__getitem__, reverse=True)[:limit]
            shown = len(order)
            for start in range(0, shown, AT_ONCE):
                yield "".join(lines[index] for index in order[start : start + AT_ONCE])
        else:
            for part in found:
                yield part["text"]
        yield {"ok": True, "shown": shown, "matched": matched, **_unanswered(gathered)}

    async def _trace(
        self, id: str, every: float = 1.0, count: int | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        has_seen = False
        while True:
            gathered = await self._backend.ask("control.look", id=id)
            found = next((parts[0] for parts in gathered.parts.values() if parts[0] is not None), None)
            if found is None:
                if not has_seen:
                    raise ControlError(f"there is no connection {id!r}: it has ended, or list never told of it")
                yield {"ok": True, "ended": True}
                return
            has_seen = True
            yield found
            count = None if count is None else count - 1
            if count == 0:
                yield {"ok": True, "ended": False}
                return
            await asyncio.sleep(max(every, 0.1))

    async def _kick(self, ids: list[str]) -> dict[str, Any]:
        gathered = await self._backend.ask("control.kick", ids=ids)
        kicked = [each for parts in gathered.parts.values() for each in parts[0]]
        gone = [each for each in ids if each not in kicked]
        return {"ok": True, "kicked": kicked, "gone": gone, **_unanswered(gathered)}

    async def _set(self, kind: str, values: dict[str, Any]) -> dict[str, Any]:
        changes = {name: value for name, value in values.items() if name != "server"}
        server = values.get("server")
        if not changes:
            return await self._tell(kind, server)
        try:
            return {**_done(await self._backend.set_live(kind, changes, server)), "set": changes}
        except (ValueError, TypeError) as error:
            raise ControlError(str(error)) from error

    async def _tell(self, kind: str, server: int | None) -> dict[str, Any]:
        """Return the limits, or the timeouts, of all servers, or of one."""
        status = await self._status()
        told = [_only(each, "server", "endpoints", kind, "differing") for each in status.get("servers", ())]
        told = told or [_only(status, kind, "differing")]
        if status[kind] is None:
            raise ControlError("no process has answered: try again")
        if server is not None and server > len(told):
            raise ControlError(f"there is no server {server}: status tells which there are")
        several = {"servers": told} if server is None and len(told) > 1 else {}
        return {**_only(status, "ok", "silent", "errors"), **told[(server or 1) - 1], **several}


def _sum(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sums of stats, and of reasons."""
    stats: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for of_one in counts.values():
        for name, count in of_one["stats"].items():
            stats[name.rpartition(".")[2]] += count  # of either kind, where a service has both
        reasons.update(of_one["reasons"])
    return dict(stats), dict(reasons)


def _only(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _merge_servers(told: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the processes tell of every server of the program, as one: what they are set to is the first process'."""
    merged = []
    for number, of_one in enumerate(zip(*(status["servers"] for status in told.values()), strict=False), 1):
        by_process = dict(zip(told, of_one, strict=True))
        differing = {kind: found for kind in ("limits", "timeouts") if (found := _differing(by_process, kind))}
        merged.append(
            {
                "server": number,
                **of_one[0],
                "active": sum(each["active"] for each in of_one),
                **({"differing": differing} if differing else {}),
            }
        )
    return merged


def _differing(by_process: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Return the limits, or timeouts, that are not the same in all workers: their values by the name of the worker."""
    values = {name: server[kind] for name, server in by_process.items()}
    names: Mapping[str, Any] = next(iter(values.values()), {})
    found = {name: {worker: of_worker[name] for worker, of_worker in values.items()} for name in names}
    return {name: by_worker for name, by_worker in found.items() if len(set(by_worker.values())) > 1}


def _unanswered(gathered: Gathered) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if gathered.silent:
        found["silent"] = gathered.silent
    if gathered.errors:
        found["errors"] = gathered.errors
    return found


def _done(gathered: Gathered) -> dict[str, Any]:
    if gathered.errors:
        texts = set(gathered.errors.values())
        if len(texts) == 1 and not gathered.parts:  # all say the same
            raise ControlError(texts.pop())
        raise ControlError("; ".join(f"{name}: {error}" if name else error for name, error in gathered.errors.items()))
    return {"ok": True, **_unanswered(gathered)}
