"""What a load sends to a server that does not echo, and what it expects: exchanges, from a command line or a file."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from aioecho.framing.spec import parse_bytes

__all__ = ["AnyFrame", "Exact", "Exchange", "Expected", "Pattern", "Script", "Sized", "make_script", "parse_script"]


class Expected(ABC):
    """What a reply has to be. `str()` of it is what the command line had."""

    needs_framing = False
    """Whether only a framing tells where the reply ends."""

    @abstractmethod
    def find(self, buffer: bytearray) -> int:
        """Return how many bytes at the front of what has come are the reply, 0 if it is not whole.

        Raises:
            ValueError: they are another (peer).
        """

    @abstractmethod
    def accepts(self, frame: bytes) -> bool:
        """Tell whether a frame is the reply."""


@dataclass(frozen=True)
class AnyFrame(Expected):
    """One frame of the framing, of any content."""

    needs_framing = True

    def find(self, buffer: bytearray) -> int:
        """Never called: a framing splits."""
        raise NotImplementedError

    def accepts(self, frame: bytes) -> bool:
        """Accept it."""
        return True

    def __str__(self) -> str:
        return "framing"


@dataclass(frozen=True)
class Sized(Expected):
    """So many bytes of any content."""

    size: int

    def find(self, buffer: bytearray) -> int:
        """Wait for all of them."""
        return self.size if len(buffer) >= self.size else 0

    def accepts(self, frame: bytes) -> bool:
        """Compare the size."""
        return len(frame) == self.size

    def __str__(self) -> str:
        return f"bytes:{self.size}"


@dataclass(frozen=True)
class Exact(Expected):
    """These very bytes."""

    data: bytes

    def find(self, buffer: bytearray) -> int:
        """Compare as much as has come."""
        if not self.data.startswith(buffer[: len(self.data)]):
            raise ValueError(f"expected {self.data[:24]!r}, got {bytes(buffer[:24])!r}")
        return len(self.data) if len(buffer) >= len(self.data) else 0

    def accepts(self, frame: bytes) -> bool:
        """Compare it."""
        return frame == self.data

    def __str__(self) -> str:
        return f"{len(self.data)} bytes of a file"


@dataclass(frozen=True)
class Pattern(Expected):
    """What a regular expression matches, from the first byte on. A frame it has to match anywhere."""

    regex: re.Pattern[bytes]

    def find(self, buffer: bytearray) -> int:
        """Match what has come. What does not match may do so when more comes."""
        match = self.regex.match(buffer)
        return match.end() if match else 0

    def accepts(self, frame: bytes) -> bool:
        """Search it."""
        return self.regex.search(frame) is not None

    def __str__(self) -> str:
        return f"'{self.regex.pattern.decode(errors='backslashreplace')}'"


@dataclass(frozen=True)
class Exchange:
    """Bytes to send, maybe none, and the reply to wait for. With a framing `send` is one frame."""

    send: bytes
    expect: Expected


@dataclass(frozen=True)
class Script:
    """Exchanges that a connection repeats, and before them the ones that it makes once, which are not measured."""

    exchanges: tuple[Exchange, ...]
    before: tuple[Exchange, ...] = ()

    def __str__(self) -> str:
        first = self.exchanges[0]
        shown = f"{first.send[:24]!r}"[1:] + ("…" if len(first.send) > 24 else "")
        rest = f", and {len(self.exchanges) - 1} more" if len(self.exchanges) > 1 else ""
        return f"{shown} for {first.expect}{rest}"


def make_script(send: str, expect: str | None) -> Script:
    """Return the script of one exchange. `send` and `expect` are as in parse_script(); `expect` None is any frame.

    Raises:
        ValueError: one of them cannot be read; the message says what was expected (caller).
    """
    return Script((Exchange(_read_send(send), AnyFrame() if expect is None else _read_expect(expect)),))


def parse_script(text: str) -> Script:
    r"""Return the script that a file holds: a line is ``send TEXT`` or ``expect REPLY``, empty, or a comment behind ``#``.

    TEXT has the escapes of parse_bytes(), or is ``@FILE``; several ``send`` in a row are sent together. REPLY is ``bytes:N``,
    ``framing``, ``@FILE``, or else a regular expression. What comes before a line ``repeat`` is done once on each connection.

    Raises:
        ValueError: a line cannot be read; the message names it (caller).
    """
    parts: list[list[Exchange]] = [[]]
    sent: list[bytes] = []
    for number, line in enumerate(text.splitlines(), 1):
        word, _, rest = line.strip().partition(" ")
        try:
            if not word or word.startswith("#"):
                continue
            if word == "send" and rest:
                sent.append(_read_send(rest))
            elif word == "expect" and rest:
                parts[-1].append(Exchange(b"".join(sent), _read_expect(rest)))
                sent = []
            elif word == "repeat" and not rest and len(parts) == 1 and not sent:
                parts.append([])
            else:
                raise ValueError("expected send TEXT, expect REPLY or, once and behind an expect, repeat")
        except ValueError as error:
            raise ValueError(f"line {number} of the script, {line.strip()!r}: {error}") from None
    if sent:
        raise ValueError("the script ends with a send: a message is measured by the reply that is expected")
    if not parts[-1]:
        raise ValueError(
            "the script has no exchange to repeat: it needs send TEXT and expect REPLY, in lines of their own"
        )
    if not all(exchange.send for exchange in parts[-1]):
        raise ValueError(
            "the script repeats an expect with no send before it: put what comes once before a line repeat"
        )
    return Script(tuple(parts[-1]), tuple(parts[0]) if len(parts) > 1 else ())


def _read_send(text: str) -> bytes:
    data = _read_file(text[1:]) if text.startswith("@") else parse_bytes("the text to send", text)
    if not data:
        raise ValueError("there is nothing to send")
    return data


def _read_expect(text: str) -> Expected:
    if text == "framing":
        return AnyFrame()
    if text.startswith("@"):
        data = _read_file(text[1:])
        if not data:
            raise ValueError(f"{text[1:]} is empty, and so no reply")
        return Exact(data)
    if text.startswith("bytes:"):
        number = text.removeprefix("bytes:")
        if not number.isascii() or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"expected bytes:N with a number above 0, not {text!r}")
        return Sized(int(number))
    try:
        regex = re.compile(text.encode("utf-8", "surrogateescape"))
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    if regex.match(b""):
        raise ValueError(
            f"the regular expression {text!r} matches nothing at all, and so every reply before it has come"
        )
    return Pattern(regex)


def _read_file(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror or error}") from None
