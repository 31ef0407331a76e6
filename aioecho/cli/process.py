"""What makes a service of the process: the file with its id, and what it says at its start."""

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path

import click

from aioecho import __version__
from aioecho.net.checking import check_folder

__all__ = ["PIDFile", "check_pid_file", "introduce"]

logger = logging.getLogger("aioecho.cli")


class PIDFile:
    """A file with the id of this process.

    The constructor checks that no other process that lives has it, and makes the file beside it, so that :meth:`write` does not
    fail. It never writes through a link: the folder may be another user's, where this process is root's.

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
            self._draft.unlink(missing_ok=True)  # of an earlier process with this id
            self._open = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(self._open, f"{os.getpid()}\n".encode())
        except OSError as error:
            raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from error

    def write(self) -> None:
        """Put the file in its place."""
        try:
            self._draft.replace(self._path)
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


def check_pid_file(path: str) -> None:
    """Raise ClickException if a PIDFile could not be written. That a live process has it is no mistake here."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        check_folder(path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from error


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
