"""The user and the group that `serve` serves as, and what is given to them: Unix sockets and log files."""

import contextlib
import dataclasses
import grp
import os
import pwd

from aioecho.cli.console import Mistake
from aioecho.net.endpoints import Endpoint, PathEndpoint, parse_endpoint
from aioecho.net.numbers import MOST_ID, is_at_most
from aioecho.ops.control import parse_control
from aioecho.ops.metrics import parse_metrics_address
from aioecho.parts import Composite
from aioecho.runtime.log_files import give_log_files
from aioecho.serving.base import BaseServer

__all__ = ["Owner", "find_control", "find_metrics", "find_owner", "give_sockets"]


@dataclasses.dataclass(frozen=True)
class Owner:
    """The user and group to serve as. None is the one that the process has."""

    user: int | None
    group: int | None
    groups: tuple[int, ...]

    def take_over(self) -> None:
        """Make the process theirs, for good, and the log files that are open."""
        give_log_files(self.user, self.group)
        if self.group is not None:
            os.setgroups(self.groups)
            os.setgid(self.group)
        if self.user is not None:
            os.setuid(self.user)


def find_owner(user: str | None, group: str | None) -> Owner | None:
    """Return the owner that `user` and `group`, names or numbers, are; None for none, or if the process is theirs already.

    Raises:
        Mistake: there is none of that name, or only root may serve as another (caller).
    """
    uid = gid = None
    groups: tuple[int, ...] = ()
    try:
        if user is not None:
            if user.isdecimal():
                uid = _find_number("user", user)
                with contextlib.suppress(KeyError):  # a number needs no entry, but then a group
                    user = pwd.getpwuid(uid).pw_name
            else:
                uid = pwd.getpwnam(user).pw_uid
            if not user.isdecimal():
                gid = pwd.getpwnam(user).pw_gid
                groups = tuple(os.getgrouplist(user, gid))
            elif group is None:
                raise Mistake(
                    f"--user {user}: there is no such user, and so no group of its own: give one with --group"
                )
    except KeyError:
        raise Mistake(f"--user {user}: there is no such user") from None
    if group is not None:
        try:
            gid = _find_number("group", group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise Mistake(f"--group {group}: there is no such group") from None
        groups = groups or (gid,)
    if uid in (None, os.geteuid()) and gid in (None, os.getegid()):
        return None
    if os.geteuid():
        raise Mistake("--user and --group: only root may serve as another user or group")
    return Owner(uid, gid, groups)


def _find_number(what: str, text: str) -> int:
    if not is_at_most(MOST_ID, text):
        raise Mistake(f"--{what} {text[:40]}: the number of a {what} is at most {MOST_ID}")
    return int(text)


def give_sockets(server: BaseServer, owner: Owner | None) -> None:
    """Have the Unix sockets of a server that was not started given to `owner`, unless their endpoints name an owner."""
    parts = server.parts if isinstance(server, Composite) else ()
    for each in {server, *parts}:
        each.endpoints = [_give(endpoint, owner) for endpoint in each.endpoints]


def find_control(text: str, owner: Owner | None) -> str:
    """Return a control socket's endpoint, which is given to `owner` unless it names an owner itself.

    Raises:
        ValueError: it is no Unix socket's.
    """
    return str(_give(parse_control(text), owner))


def find_metrics(text: str, owner: Owner | None) -> str:
    """Return where to tell metrics: a Unix socket there is given to `owner` likewise.

    Raises:
        ValueError: it is no address for metrics.
    """
    return str(_give(parse_endpoint(parse_metrics_address(text)), owner))


def _give(endpoint: Endpoint, owner: Owner | None) -> Endpoint:
    if not isinstance(endpoint, PathEndpoint) or owner is None or not endpoint.has_file:
        return endpoint
    if endpoint.owner is not None or endpoint.group is not None:
        return endpoint
    user, group = (None if each is None else str(each) for each in (owner.user, owner.group))
    return dataclasses.replace(endpoint, owner=user, group=group)
