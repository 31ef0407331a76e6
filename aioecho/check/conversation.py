"""What is said to a handler: records to send, and the replies that are expected."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aioecho.framing import Buffer, Delimited, Framing, Lines

__all__ = ["Conversation", "Whole", "default_conversation", "parse_script"]

PAYLOADS = (b"hello", b"one two three", b"42")
"""What is sent where no script says otherwise."""

_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}


class Whole(Framing):
    """What a datagram is: a record with nothing around it."""

    def split(self, buffer: Buffer, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
        """Return the buffer as a frame."""
        return [bytes(buffer)] if buffer else [], len(buffer), 1

    def join(self, frame: bytes, /) -> bytes:
        """Return the frame."""
        return frame


@dataclass(frozen=True)
class Conversation:
    """What is sent, record by record.

    Raises ValueError if there is nothing to send.
    """

    records: tuple[bytes, ...]
    """The bytes of every record, with what its framing adds."""

    payloads: tuple[bytes, ...]
    """The records without that."""

    framing: Framing
    """What cuts the stream into records."""

    expected: tuple[bytes, ...] = ()
    """What has to be among the replies, in this order."""

    def __post_init__(self) -> None:
        if not any(self.records):
            raise ValueError("a conversation has to send something")

    @property
    def is_text(self) -> bool:
        """Whether a record is a line, the last of which may lack its end, as senders of text leave it out."""
        return isinstance(self.framing, Lines | Delimited)

    def end(self, part: bytes, record: int) -> bytes | None:
        """Return the part of a record that came before the end of the stream as a whole record; None if it cannot be one."""
        payload, whole = self.payloads[record], self.records[record]
        if isinstance(self.framing, Delimited):
            return part + self.framing.separator
        if isinstance(self.framing, Lines):
            return part + whole[len(whole.rstrip(b"\r\n")) :]
        came = len(part) - (len(whole) - len(payload))
        try:
            return self.framing.join(payload[:came]) if came >= 0 else None
        except ValueError:
            return None

    def too_long(self, size: int) -> bytes | None:
        """Return a record of so many bytes; None if the framing has no such records."""
        try:
            return self.framing.join(b"x" * size)
        except ValueError:
            return None


def default_conversation(framing: Framing) -> Conversation:
    """Return a conversation of three short records.

    Raises:
        ValueError: the framing can write none of them: a script has to say what to send (caller).
    """
    size: Any = getattr(framing, "size", None)
    fitted = tuple((text * 2**10)[:size] for text in PAYLOADS) if isinstance(size, int) else PAYLOADS
    for payloads in (PAYLOADS, fitted):
        try:
            return Conversation(tuple(map(framing.join, payloads)), payloads, framing)
        except Exception as error:  # a framing of the user's own, whose frames may be more than bytes
            why = error
    raise ValueError(f"the framing cannot write {PAYLOADS[0]!r} ({why}): say with a script what to send")


def parse_script(text: bytes, framing: Framing | None) -> Conversation:
    r"""Return the conversation of a script.

    With a line that begins with ``> `` it is one of lines ``> sent``, ``< expected`` and ``# comment``, in which ``\n``,
    ``\r``, ``\t``, ``\0``, ``\\`` and ``\xHH`` are escapes. Without one every line is sent as it is. A record is the line as
    the framing writes it. Without a framing, or with one whose frames are more than bytes, a newline is added to what does not
    end with one.

    Raises:
        ValueError: a line makes no sense, which the message names by its number, or nothing is sent (caller).
    """
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    if not any(line.startswith(b"> ") for line in lines):
        return _conversation(lines, framing, ())
    sent: list[bytes] = []
    expected: list[bytes] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        if line[:2].rstrip() not in (b">", b"<"):
            raise ValueError(
                f"line {number} begins with none of '> ', '< ' and '#': {line.decode('utf-8', 'replace')!r}"
            )
        line = line.removesuffix(b"\r")
        (sent if line.startswith(b">") else expected).append(_unescape(line[2:], number))
    return _conversation(sent, framing, tuple(expected))


def _conversation(payloads: Sequence[bytes], framing: Framing | None, expected: tuple[bytes, ...]) -> Conversation:
    if framing is not None:
        try:
            return Conversation(tuple(map(framing.join, payloads)), tuple(payloads), framing, expected)
        except ValueError:  # the framing, or the conversation, says what is wrong
            raise
        except Exception:
            pass  # frames of a framing of the user's own may be more than bytes: only the script knows how they are sent
    records = tuple(payload if payload.endswith(b"\n") else payload + b"\n" for payload in payloads)
    return Conversation(records, tuple(payloads), Lines(), expected)


def _unescape(text: bytes, number: int) -> bytes:
    def plain(match: re.Match[bytes]) -> bytes:
        escape = match[1]
        if len(escape) == 3:
            return bytes.fromhex(escape[1:].decode())
        if escape not in _ESCAPES:
            name = escape.decode("utf-8", "replace")
            raise ValueError(rf"line {number} has an escape '\{name}', which is none of \n \r \t \0 \\ \xHH")
        return _ESCAPES[escape]

    return re.sub(rb"\\(x[0-9A-Fa-f]{2}|.|$)", plain, text, flags=re.DOTALL)
