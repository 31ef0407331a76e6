"""Loading a server's certificates: at its start, on demand, and when the files have changed."""

import asyncio
import logging
import os
import ssl
import time
from collections.abc import Callable

from aioecho.certificates import TLS, Loaded, date
from aioecho.exceptions import CertificateError

__all__ = ["Renewal"]

logger = logging.getLogger("aioecho.tls")

# Seconds for which changed files must stay as they are: tools that renew certificates write several, one after another.
QUIET = 1.0

# Seconds before the end of a certificate's validity at which a warning is logged.
NOTICE = 14 * 24 * 3600.0

# What is compared of a file: its device, its inode, when it was changed, and its size; None if it is not there.
Signature = tuple[tuple[int, int, int, int] | None, ...]


class Renewal:
    """Loads what `tls` names, and gives every new context to `apply`. A context that could not be made changes nothing.

    `loaded` is what was loaded last, None before the start.
    """

    def __init__(self, tls: TLS, apply: Callable[[ssl.SSLContext], None]) -> None:
        self._tls = tls
        self._apply = apply
        self._files = tls.files()
        self.loaded: Loaded | None = None
        self._seen: Signature = ()  # of what was loaded; none, if that failed the last time
        self._complaint = ""  # of the poll, the last
        self._timer: asyncio.TimerHandle | None = None
        self._has_given_notice = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the files, and begin to look at them every `poll` seconds.

        A certificate that is not valid today is served, with a warning.

        Raises:
            CertificateError: they cannot be loaded.
        """
        self._loop = loop
        if "SSLKEYLOGFILE" in os.environ:
            logger.warning(
                "SSLKEYLOGFILE is set: with %s all connections can be decrypted", os.environ["SSLKEYLOGFILE"]
            )
        self._seen = self._look()
        loaded = self._tls.load()
        mistake = loaded.mistake()
        if mistake is not None:
            logger.warning("%s: %s; it is served all the same", os.fspath(self._tls.cert), mistake)
        self._take(loaded)
        self._poll_later()

    def stop(self) -> None:
        """Look at the files no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reload(self) -> None:
        """Load the files now.

        Raises:
            CertificateError: they cannot be loaded, or a certificate is not valid today. What was loaded before stays.
        """
        seen, self._seen = self._look(), ()  # the poll tries again, should this fail
        loaded = self._tls.load()
        mistake = loaded.mistake()
        if mistake is not None:
            raise CertificateError(f"cannot use {os.fspath(self._tls.cert)}: {mistake}")
        self._seen, self._complaint = seen, ""
        self._take(loaded)

    def _take(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._has_given_notice = False
        self._apply(loaded.context)
        logger.info("loaded %s, valid until %s", os.fspath(self._tls.cert), date(loaded.not_after))
        self._give_notice()

    def _give_notice(self) -> None:
        assert self.loaded is not None
        left = self.loaded.not_after - time.time()
        if left < NOTICE and not self._has_given_notice:
            self._has_given_notice = True
            if left > 0:
                logger.warning("%s expires on %s", os.fspath(self._tls.cert), date(self.loaded.not_after))

    # Looking at the files.

    def _look(self) -> Signature:
        return tuple(map(_signature, self._files))

    def _poll_later(self) -> None:
        if self._tls.poll is not None:
            self._timer = self._loop.call_later(self._tls.poll, self._poll)

    def _poll(self) -> None:
        self._give_notice()
        now = self._look()
        if now == self._seen:
            self._poll_later()
        else:
            self._wait_for_quiet(now)

    def _wait_for_quiet(self, before: Signature) -> None:
        assert self._tls.poll is not None
        self._timer = self._loop.call_later(min(QUIET, self._tls.poll), self._reload_if_quiet, before)

    def _reload_if_quiet(self, before: Signature) -> None:
        now = self._look()
        if now != before:
            self._wait_for_quiet(now)
            return
        try:
            self.reload()
        except CertificateError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.warning("the files have changed, and the certificate from before is served on: %s", error)
        self._poll_later()


def _signature(path: str) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)  # of what a symbolic link leads to
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
