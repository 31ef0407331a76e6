"""What makes a service of the process: the file with its id, the user that it serves as, and what it says at its start."""

import contextlib
import dataclasses
import grp
import logging
import os
import pwd
import sys
from pathlib import Path

import click

from aioecho import __version__
from aioecho.cli.console import Mistake
from aioecho.net.numbers import MOST_ID, is_at_most
from aioecho.ops.control import parse_control

__all__ = ["Owner", "PIDFile", "find_control", "find_owner", "introduce"]

logger = logging.getLogger("aioecho.cli")


class PIDFile:
    """A file with the id of this process.

    The constructor checks that no other process that lives has it, and makes the file beside it, so that :meth:`write` does not
    fail.

    Raises:
        ClickException: the file has the id of a live process, or can't be written.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).absolute()
        self._open = -1
        other = self._read()
        if other is not None and other != os.getpid() and _is_alive(other):
            raise click.ClickException(f"{path}: process {other} is running; stop it, or remove the file")
        self._draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._draft.write_text(f"{os.getpid()}\n")
        except OSError as error:
            raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from error

    def write(self) -> None:
        """Put the file in its place."""
        try:
            self._draft.replace(self._path)
            self._open = os.open(self._path, os.O_RDWR)
        except OSError as error:
            logger.error("cannot write %s: %s", self._path, error.strerror or error)

    def remove(self) -> None:
        """Remove the file, unless another process has written it since.

        Empty it, if that is forbidden: the user that it serves as by now may not change the folder, mostly.
        """
        with contextlib.suppress(OSError):
            self._draft.unlink(missing_ok=True)
        if self._read() == os.getpid():
            with contextlib.suppress(OSError):
                self._path.unlink()
        if self._open >= 0:
            if os.pread(self._open, 32, 0).strip() == str(os.getpid()).encode():
                os.ftruncate(self._open, 0)
            os.close(self._open)
            self._open = -1

    def _read(self) -> int | None:
        try:
            return int(self._path.read_text())
        except (OSError, ValueError):  # there is none, or it was not written whole
            return None


def _is_alive(process: int) -> bool:
    if process <= 0:  # a group, to kill()
        return False
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        return True
    except (OSError, OverflowError):
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Owner:
    """The user and group to serve as. None is the one that the process has."""

    user: int | None
    group: int | None
    groups: tuple[int, ...]

    def take_over(self) -> None:
        """Make the process theirs, for good."""
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


def find_control(text: str, owner: Owner | None) -> str:
    """Return a control socket's endpoint, which is given to `owner` unless it names an owner itself.

    Raises:
        ValueError: it is no Unix socket's.
    """
    endpoint = parse_control(text)
    has_file = not endpoint.path.startswith("\0")
    if owner is not None and has_file and endpoint.owner is None and endpoint.group is None:
        user, group = (None if each is None else str(each) for each in (owner.user, owner.group))
        endpoint = dataclasses.replace(endpoint, owner=user, group=group)
    return str(endpoint)


def introduce(loop: str, workers: int | None) -> None:
    """On a terminal, say once on stderr what runs, and how to stop it. `workers` is None for a server of one process."""
    try:
        if not sys.stderr.isatty():
            return
    except (AttributeError, ValueError):  # there is none, or it is closed
        return
    name = loop
    if loop == "uvloop":
        import uvloop

        name = f"uvloop {uvloop.__version__}"  # type: ignore[attr-defined]
    count = "" if workers is None else f", {workers} worker{'s' if workers != 1 else ''}"
    with contextlib.suppress(OSError):
        # At once: log records come from another thread.
        click.echo(
            f"aioecho {__version__}, process {os.getpid()}, {name}{count}\nto stop: Ctrl-C or SIGTERM, twice for at once",
            err=True,
        )
