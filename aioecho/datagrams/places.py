"""How the places for sessions are shared among hosts."""

from collections.abc import Iterator
from itertools import islice
from typing import Generic, TypeVar

__all__ = ["Places"]

T = TypeVar("T")

# Holders of places that are looked at for one that may yield. They are looked at in turn, the oldest first.
LOOKS = 64


class Places(Generic[T]):
    """The holders of places, by their hosts; None is the host of all that have none. What it tells takes no longer for many.

    Its length is how many places are taken.
    """

    def __init__(self) -> None:
        self._holders: dict[str | None, dict[T, None]] = {}
        self._hosts: dict[int, dict[str | None, None]] = {}  # by how many places they have
        self._most = 0  # that any of them has
        self._taken = 0

    def __len__(self) -> int:
        return self._taken

    def count_of(self, host: str | None) -> int:
        """Return how many places a host has."""
        return len(self._holders.get(host, ()))

    def add(self, host: str | None, holder: T) -> None:
        """Give a place to a holder."""
        holders = self._holders.setdefault(host, {})
        holders[holder] = None
        self._taken += 1
        self._move(host, len(holders) - 1, len(holders))
        self._most = max(self._most, len(holders))

    def remove(self, host: str | None, holder: T) -> None:
        """Take a holder's place away; do nothing if it has none."""
        holders = self._holders.get(host)
        if holders is None or holder not in holders:
            return
        del holders[holder]
        self._taken -= 1
        self._move(host, len(holders) + 1, len(holders))
        if not holders:
            del self._holders[host]
        if self._most not in self._hosts:
            self._most -= 1  # that host's

    def _move(self, host: str | None, before: int, now: int) -> None:
        if before:
            hosts = self._hosts[before]
            del hosts[host]
            if not hosts:
                del self._hosts[before]
        if now:
            self._hosts.setdefault(now, {})[host] = None

    def find_yielding(self, newcomers_host: str | None) -> Iterator[T]:
        """Yield holders of the host that has most places, if one of them may yield to a newcomer of another host.

        One may if its host then still has at least as many as the newcomer's. Only LOOKS of them are given, in turn.
        """
        if self._most < self.count_of(newcomers_host) + 2:
            return
        holders = self._holders[next(iter(self._hosts[self._most]))]
        for holder in list(islice(holders, LOOKS)):
            yield holder
            del holders[holder]  # now the last
            holders[holder] = None
