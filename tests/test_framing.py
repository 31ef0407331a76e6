"""Framings: what they split and join, alone and against other implementations of the same protocols."""

import copy
import io
import itertools
import pickle
import random
import re
import shutil
import socket
import subprocess
import textwrap
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aioecho import framing as framings
from aioecho.exceptions import AioechoError, FrameTooLong, FramingError, LineTooLong
from aioecho.framing import (
    COBS,
    SLIP,
    ContentLength,
    Delimited,
    FixedSize,
    Framing,
    LengthPrefixed,
    Lines,
    Netstrings,
    OctetCounted,
    Varint,
    format_framing,
    parse_framing,
)

MLLP = Delimited(b"\x1c\r", start=b"\x0b")
MBAP = LengthPrefixed(2, offset=4, strip=False)
POSTGRESQL = LengthPrefixed(4, offset=1, adjust=-4, strip=False)

FRAMINGS = [
    Lines(),
    Lines(keep_end=True),
    Delimited(b"\0"),
    Delimited(b"\r\n"),
    Delimited(b"aab", start=b"ab"),
    MLLP,
    LengthPrefixed(),
    LengthPrefixed(1),
    LengthPrefixed(3, "little"),
    LengthPrefixed(2, adjust=-2),
    LengthPrefixed(8, adjust=3, strip=False),
    MBAP,
    POSTGRESQL,
    Netstrings(),
    OctetCounted(),
    FixedSize(1),
    FixedSize(7),
    Varint(),
    Varint(3),
    SLIP(),
    COBS(),
    ContentLength(),
]
few = settings(max_examples=20, deadline=None)  # of each framing
every_framing = pytest.mark.parametrize("framing", FRAMINGS, ids=repr)


def shortly(value: object) -> str:
    return repr(value)[:60]


def statements() -> Framing:
    """The framing that the documentation gives as an example of one's own."""
    source = framings.__doc__.partition("what they are::\n")[2]  # type: ignore[union-attr]
    made: dict[str, Any] = {"Framing": Framing}
    exec(textwrap.dedent(source), made)
    return made["Statements"]()  # type: ignore[no-any-return]


class CountingBuffer(bytearray):
    """Counts the bytes that are looked at or copied."""

    looked_at = 0

    def find(self, sub: Any, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        end = len(self) if end is None else min(end, len(self))
        at = super().find(sub, start, end)
        self.looked_at += max(0, (end if at < 0 else at) - start) + 1
        return at

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        self.looked_at += len(part) if isinstance(index, slice) else 1
        return part

    def __bytes__(self) -> bytes:
        self.looked_at += len(self)
        return bytes(memoryview(self))

    def _whole(self, name: str, *arguments: Any) -> Any:
        self.looked_at += len(self)
        return getattr(super(), name)(*arguments)

    def split(self, *arguments: Any) -> Any:
        return self._whole("split", *arguments)

    def count(self, *arguments: Any) -> Any:
        return self._whole("count", *arguments)

    def index(self, *arguments: Any) -> Any:
        return self._whole("index", *arguments)

    def rfind(self, *arguments: Any) -> Any:
        return self._whole("rfind", *arguments)

    def __contains__(self, what: Any) -> bool:
        self.looked_at += len(self)
        return super().__contains__(what)

    def __iter__(self) -> Any:
        self.looked_at += len(self)
        return super().__iter__()


def read(
    framing: Framing, pieces: Iterable[bytes], *, heed_wanted: bool = True, buffer: bytearray | None = None
) -> tuple[list[Any], bytes]:
    """Split a stream as a reader does: return its frames, the type of the error in place of a refused one, and the rest."""
    buffer = bytearray() if buffer is None else buffer
    records: list[Any] = []
    skip, resyncing, scanned, wanted = 0, False, 0, 0
    for piece in pieces:
        buffer += piece
        while buffer:
            if skip:
                dropped = min(skip, len(buffer))
                del buffer[:dropped]
                skip -= dropped
                continue
            if resyncing:
                used, found = framing.resync(buffer)
                del buffer[:used]
                if not found:
                    break
                resyncing = False
                continue
            if heed_wanted and len(buffer) < wanted:
                break
            before = bytearray(buffer)
            try:
                frames, used, wanted = framing.split(buffer, scanned)
            except (FrameTooLong, FramingError) as error:
                assert buffer == before
                records.append(type(error))
                if error.skip == 0:
                    return records, b""
                skip, resyncing = error.skip or 0, error.skip is None
                scanned = wanted = 0
                continue
            assert buffer == before
            assert all(type(frame) is bytes for frame in frames)
            assert 0 <= used <= len(buffer)
            records += frames
            del buffer[:used]
            scanned = len(buffer) if wanted > len(buffer) else 0
            if scanned or not buffer:
                break
            assert used, "split() wants to be called again though nothing has changed"
    return records, bytes(buffer)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def encodable(framing: Framing, frame: bytes) -> bytes | None:
    """Return a frame that a framing can join, made of these bytes, or None."""
    match framing:
        case Lines(keep_end=True):
            frame = frame.replace(b"\n", b"") + b"\n"
        case FixedSize(size=size):
            frame = frame.ljust(size, b".")[:size]
        case LengthPrefixed(strip=False):
            frame = framing.offset * b"h" + framing.size * b"\0" + frame
    try:
        joined = framing.join(frame)
    except ValueError:
        return None
    if isinstance(framing, LengthPrefixed) and not framing.strip:
        return joined  # with its length
    return frame


places = st.lists(st.integers(0, 2000), max_size=20)
bytes_of_use = st.one_of(
    st.binary(max_size=20),
    st.text("ab:,0129 \0\r\n\x0b\x1c\xc0\xdb\xdc\xdd", max_size=20).map(lambda text: text.encode("latin-1")),
    st.integers(0, 1100).map(lambda size: b"y" * size),
)


# Frames that come in any pieces


@every_framing
@few
@given(parts=st.lists(bytes_of_use, max_size=8), places=places)
@example(parts=[b"x" * 254, b"x" * 254 + b"\0", b"\0" + b"x" * 255, b"\0\0", b"x" * 508], places=[])
def test_frames_that_are_joined_come_out_of_any_pieces_of_the_stream(
    framing: Framing, parts: list[bytes], places: list[int]
) -> None:
    frames = [frame for part in parts if (frame := encodable(framing, part)) is not None]
    stream = b"".join(map(framing.join, frames))
    assert read(framing, [stream]) == (frames, b"")
    assert read(framing, cut(stream, places)) == (frames, b"")
    assert read(framing, cut(stream, places), heed_wanted=False) == (frames, b"")
    assert read(framing, byte_by_byte(stream)) == (frames, b"")


@every_framing
@few
@given(parts=st.lists(bytes_of_use, max_size=6), bound=st.integers(1, 30), places=places, whole=st.booleans())
@example(parts=[b"\r\n\r\n"], bound=1, places=[], whole=False)
def test_what_is_refused_does_not_depend_on_how_the_stream_is_cut(
    framing: Framing, parts: list[bytes], bound: int, places: list[int], whole: bool
) -> None:
    if whole:  # else garbage
        parts = [framing.join(frame) for part in parts if (frame := encodable(framing, part)) is not None]
    stream = b"".join(parts)
    for limited in (framing, framing.limited(bound)):
        expected = read(limited, [stream])
        for pieces in (cut(stream, places), byte_by_byte(stream)):
            assert read(limited, pieces) == expected


@every_framing
@few
@given(parts=st.lists(bytes_of_use, min_size=1, max_size=8), bound=st.integers(1, 30))
def test_every_frame_that_is_not_too_long_is_whole_beside_those_that_are(
    framing: Framing, parts: list[bytes], bound: int
) -> None:
    frames = [frame for part in parts if (frame := encodable(framing, part)) is not None]
    stream = b"".join(map(framing.join, frames))
    newline = 1 if isinstance(framing, Lines) and framing.keep_end else 0
    limited = framing.limited(bound)
    most = limited.max_size or 0
    expected = [frame if len(frame) - newline <= most else FrameTooLong for frame in frames]
    assert read(limited, [stream])[0] == expected
    assert read(limited, byte_by_byte(stream))[0] == expected


@few
@given(parts=st.lists(bytes_of_use, max_size=8), places=places)
def test_a_framing_of_ones_own_needs_no_more_than_the_documentation_shows(
    parts: list[bytes], places: list[int]
) -> None:
    framing = statements()
    frames = [part.replace(b";", b"") for part in parts]
    stream = b"".join(map(framing.join, frames))
    assert read(framing, cut(stream, places)) == (frames, b"")
    with pytest.raises(ValueError, match="semicolon"):
        framing.join(b"a;b")
    assert framing.limited(5).max_size == 5
    assert framing.max_size is None


@every_framing
def test_an_empty_buffer_has_no_frame(framing: Framing) -> None:
    frames, used, wanted = framing.split(b"", 0)
    assert (frames, used) == ([], 0)
    assert wanted >= 1


@every_framing
@pytest.mark.parametrize("heed_wanted", [True, False])
def test_a_frame_that_comes_byte_by_byte_costs_no_more_than_its_length(framing: Framing, heed_wanted: bool) -> None:
    if isinstance(framing, FixedSize):
        framing = FixedSize(4000)
    size = 250 if framing == LengthPrefixed(1) else 4000
    part = encodable(framing, b"x" * size)
    assert part is not None
    stream = framing.join(part)
    buffer = CountingBuffer()
    assert read(framing.limited(5000), byte_by_byte(stream), heed_wanted=heed_wanted, buffer=buffer) == ([part], b"")
    assert buffer.looked_at > 0
    # To search from the start for every byte takes 2,000 times. ContentLength reads its short header again if asked to early.
    assert buffer.looked_at <= (60 if isinstance(framing, ContentLength) and not heed_wanted else 20) * len(stream)


@every_framing
def test_wanted_is_the_size_of_a_frame_whose_header_is_there(framing: Framing) -> None:
    part = encodable(framing, b"x" * 200)
    assert part is not None
    stream = framing.join(part)
    before = framing.split(b"", 0)[2]
    for end in range(1, len(stream)):
        frames, used, wanted = framing.split(stream[:end], 0)
        assert frames == []
        assert end < used + wanted <= len(stream)
        before = wanted
    if framing.limit == "max_frame" or isinstance(framing, FixedSize):
        assert before == len(stream)


# Frames that are too long

TOO_LONG = [
    # a framing, the beginning of a frame of 1,000 bytes by which that is known, and how many bytes it takes in all
    (LengthPrefixed(max_size=999), b"\0\0\x03\xe8", 1004),
    (LengthPrefixed(2, "little", max_size=999), b"\xe8\x03", 1002),
    (LengthPrefixed(2, offset=4, strip=False, max_size=999), b"\0\0\0\0\x03\xe2", 1000),
    (LengthPrefixed(4, adjust=-4, max_size=999), b"\0\0\x03\xec", 1004),
    (LengthPrefixed(8, max_size=2**40), b"\xff" * 8, 2**64 + 7),
    (Netstrings(max_size=999), b"1000:", 1006),
    (OctetCounted(max_size=999), b"1000 ", 1005),
    (Varint(max_size=999), b"\xe8\x07", 1002),
    (Varint(2, max_size=999), b"\0\0\xe6\x07", 1002),
    (ContentLength(max_size=999), b"Content-Length: 1000\r\n\r\n", 1024),
    (Lines(max_size=999), b"x" * 1000, None),
    (Lines(keep_end=True, max_size=999), b"x" * 1000, None),
    (Delimited(b"\r\n", max_size=999), b"x" * 1001, None),
    (Delimited(b"\x1c\r", start=b"\x0b", max_size=999), b"\x0b" + b"x" * 1001, None),
    (OctetCounted(max_size=999), b"<" + b"x" * 999, None),
    (SLIP(max_size=999), b"x" * 1999, None),
    (COBS(max_size=999), b"x" * 1004, None),
]


@pytest.mark.parametrize(("framing", "beginning", "takes"), TOO_LONG, ids=shortly)
def test_a_frame_that_is_too_long_is_refused_before_its_body_comes(
    framing: Framing, beginning: bytes, takes: int | None
) -> None:
    frames, used, wanted = framing.split(beginning[:-1], 0)
    assert (frames, used) == ([], 0)
    assert wanted >= len(beginning)
    for scanned in (0, len(beginning) - 1):
        with pytest.raises(FrameTooLong) as caught:
            framing.split(beginning, scanned)
        assert caught.value.skip == takes
        assert caught.value.limit == framing.max_size
        assert (caught.value.size is None) == (takes is None)
        assert isinstance(caught.value, AioechoError)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("framing", "beginning", "takes"), TOO_LONG, ids=shortly)
def test_frames_before_one_that_is_too_long_are_not_lost(framing: Framing, beginning: bytes, takes: int | None) -> None:
    part = encodable(framing, b"good")
    assert part is not None
    good = framing.join(part)
    frames, used, wanted = framing.split(good * 2 + beginning, 0)
    assert frames == [part, part]
    assert used == len(good * 2)
    assert wanted <= len(good * 2 + beginning) - used
    with pytest.raises(FrameTooLong):
        framing.split((good * 2 + beginning)[used:], 0)


def test_what_is_skipped_is_not_kept() -> None:
    framing = Delimited(b"\r\n\r\n", max_size=10)
    buffer = bytearray()
    most = 0
    ended = []
    for piece in [b"x" * 100, b"\r\n", b"\rx\r", b"\n\r", b"\nok"]:
        buffer += piece
        used, found = framing.resync(buffer)
        del buffer[:used]
        most = max(most, len(buffer))
        ended.append(found)
    assert ended == [False, False, False, False, True]
    assert most <= 3
    assert buffer == b"ok"


@pytest.mark.parametrize("stream", [b"A" * 200_000 + b"DELETE *\nPING\n"])
def test_the_tail_of_a_line_that_is_refused_is_no_line(stream: bytes) -> None:
    pieces = cut(stream, range(0, len(stream), 65_536))
    assert read(Lines(max_size=65_536), pieces) == ([FrameTooLong, b"PING"], b"")


def test_a_line_of_exactly_the_limit_is_no_line_too_long() -> None:
    for framing, ending in [(Lines(max_size=5), b"\n"), (Delimited(b"\r\n", max_size=5), b"\r\n")]:
        assert read(framing, byte_by_byte(b"12345" + ending)) == ([b"12345"], b"")
        assert read(framing, byte_by_byte(b"123456" + ending)) == ([FrameTooLong], b"")


def test_the_servers_limits_hold_where_a_framing_has_none_of_its_own() -> None:
    assert Lines().limited(100) == Lines(max_size=100)
    assert Lines(max_size=5).limited(100) == Lines(max_size=5)
    assert FixedSize(5).limited(3).max_size == 5
    assert {framing.limit for framing in FRAMINGS if isinstance(framing, Lines | Delimited | SLIP | COBS)} == {
        "max_buffer"
    }
    rest = [framing for framing in FRAMINGS if not isinstance(framing, Lines | Delimited | SLIP | COBS)]
    assert {framing.limit for framing in rest} == {"max_frame"}
    with pytest.raises(ValueError, match="max_size"):
        Lines().limited(0)


@every_framing
def test_a_framing_can_be_compared_hashed_copied_and_pickled(framing: Framing) -> None:
    for other in (copy.copy(framing), copy.deepcopy(framing), pickle.loads(pickle.dumps(framing))):
        assert other == framing
        assert hash(other) == hash(framing)
    assert framing.limited(77) == framing.limited(77)


def test_the_errors_say_what_is_wrong_and_can_be_pickled() -> None:
    errors = [
        FrameTooLong(None, 10),
        FrameTooLong(20, 10, 24),
        LineTooLong(20, 10, 21),
        FramingError("the peer sent x", None),
    ]
    assert [str(error) for error in errors] == [
        "the peer sent a frame of more than 10 bytes, over the limit of 10 bytes",
        "the peer sent a frame of 20 bytes, over the limit of 10 bytes",
        "the peer sent a line of 20 bytes, over the limit of 10 bytes",
        "the peer sent x",
    ]
    for error in errors:
        same = pickle.loads(pickle.dumps(error))
        assert (type(same), str(same), same.skip) == (type(error), str(error), error.skip)


# What is malformed


@pytest.mark.parametrize(
    ("framing", "stream", "records"),
    [
        (Netstrings(), b"5:hello,05:hello,", [b"hello", FramingError]),
        (Netstrings(), b"00:,", [FramingError]),
        (Netstrings(), b"0:,0:,", [b"", b""]),
        (Netstrings(), b"5:hello;", [FramingError]),
        (Netstrings(), b"+5:hello,", [FramingError]),
        (Netstrings(), b" 5:hello,", [FramingError]),
        (Netstrings(), b"1_0:helloworld,", [FramingError]),
        (Netstrings(), b":,", [FramingError]),
        (Netstrings(), b"hello", [FramingError]),
        (Netstrings(), b"12345678901", [FramingError]),
        (Netstrings(), "٣:abc,".encode(), [FramingError]),
        (Varint(), b"\1a" + b"\xff" * 10, [b"a", FramingError]),
        (Varint(), b"\xff" * 9 + b"\x02", [FramingError]),
        (Varint(), b"\x83\x80\x00abc", [b"abc"]),
        (Varint(1), b"\xc0\0\xff\x82\0ab", [b"\xc0", b"\xffab"]),
        (Varint(1), b"0\1a0" + b"\xff" * 10, [b"0a", FramingError]),
        (COBS(), b"\2a\0\5a\0\2b\0", [b"a", FramingError, b"b"]),
        (COBS(), b"\0\0\2a\0", [b"a"]),
        (SLIP(), b"a\xc0b\xdbx\xc0c\xc0", [b"a", FramingError, b"c"]),
        (SLIP(), b"a\xdb\xc0c\xc0", [FramingError, b"c"]),
        (SLIP(), b"\xdb\xdb\xdc\xc0c\xc0", [FramingError, b"c"]),
        (SLIP(), b"\xdb\xdd\xdc\xc0", [b"\xdb\xdc"]),
        (SLIP(), b"\xc0\xc0\xc0a\xc0\xc0", [b"a"]),
        (MLLP, b"\x0ba\x1c\rb\x1c\r\x0bc\x1c\r", [b"a", FramingError, b"c"]),
        (MLLP, b"\n\x0ba\x1c\r\x0bc\x1c\r", [FramingError, b"c"]),
        (POSTGRESQL, b"Q\0\0\0\4Q\0\0\0\3", [b"Q\0\0\0\4", FramingError]),
        (LengthPrefixed(1, adjust=-1), b"\0", [FramingError]),
        (OctetCounted(), b"5 hello<1>x\n\n5 hello\n<2>y\n", [b"hello", b"<1>x", b"hello", b"<2>y"]),
        (OctetCounted(), b"5 hello5-x\n1 a", [b"hello", FramingError, b"a"]),
        (OctetCounted(), b"12345678901 x\n1 a", [FramingError, b"a"]),
        (OctetCounted(), b"0 a\n1 a", [b"0 a", b"a"]),
        (ContentLength(), b"Content-Length: 2\r\n\r\n{}content-LENGTH:1\r\nX: y\r\n\r\n1", [b"{}", b"1"]),
        (ContentLength(), b"Content-Type: x\r\nContent-Length: 2\r\n\r\n{}", [b"{}"]),
        (ContentLength(), b"Content-Type: x\r\n\r\n{}", [FramingError]),
        (ContentLength(), b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", [FramingError]),
        (ContentLength(), b"Content-Length: -2\r\n\r\n{}", [FramingError]),
        (ContentLength(), b"Content-Length : 2\r\n\r\n{}", [FramingError]),
        (ContentLength(), b"GET / HTTP/1.1\r\n\r\n{}", [FramingError]),
        (ContentLength(), b"x" * 5000, [FramingError]),
    ],
    ids=shortly,
)
def test_what_a_framing_does_not_allow_is_refused(framing: Framing, stream: bytes, records: list[Any]) -> None:
    assert read(framing, [stream])[0] == records
    assert read(framing, byte_by_byte(stream))[0] == records


@pytest.mark.parametrize(
    ("framing", "bad"),
    [(Netstrings(), b"x"), (MLLP, b"x"), (OctetCounted(), b"1x"), (ContentLength(), b"Content-Length\r\n\r\n")],
    ids=shortly,
)
def test_what_is_refused_after_a_good_frame_is_so_at_once_and_not_when_more_comes(framing: Framing, bad: bytes) -> None:
    stream = framing.join(b"good") + bad
    frames, used, wanted = framing.split(stream, 0)
    assert (frames, used) == ([b"good"], len(stream) - len(bad))
    assert wanted <= len(bad)
    with pytest.raises(FramingError):
        framing.split(bad, 0)


@pytest.mark.parametrize(
    ("framing", "frame", "match"),
    [
        (Lines(), b"a\nb", "newline"),
        (Lines(keep_end=True), b"a", "newline"),
        (Lines(keep_end=True), b"", "newline"),
        (Lines(keep_end=True), b"a\n\n", "newline"),
        (Delimited(b"\r\n\r\n"), b"a\r\n", "separator"),
        (MLLP, b"a\x1c\rb", "separator"),
        (LengthPrefixed(1), b"x" * 256, "1 bytes cannot tell"),
        (LengthPrefixed(1, adjust=5), b"x" * 4, "cannot tell"),
        (MBAP, b"12345", "header of 6 bytes"),
        (Varint(3), b"12", "3 bytes before"),
        (OctetCounted(), b"", "empty"),
        (SLIP(), b"", "empty"),
        (FixedSize(3), b"ab", "3 bytes, not 2"),
    ],
    ids=shortly,
)
def test_a_frame_that_cannot_be_encoded_is_the_callers_mistake(framing: Framing, frame: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        framing.join(frame)
    assert not isinstance(caught.value, AioechoError)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LengthPrefixed(0), "size"),
        (lambda: LengthPrefixed(9), "size"),
        (lambda: LengthPrefixed(4, "middle"), "byteorder"),  # type: ignore[arg-type]
        (lambda: LengthPrefixed(2, offset=-1), "offset"),
        (lambda: LengthPrefixed(2, offset=4), "strip=False"),
        (lambda: LengthPrefixed(1, adjust=-256), "adjust"),
        (lambda: Delimited(b""), "separator"),
        (lambda: Delimited(b"\n", start=b">\n"), "separator"),
        (lambda: FixedSize(0), "size"),
        (lambda: Lines(max_size=0), "max_size"),
        (lambda: Varint(max_size=True), "max_size"),
        (lambda: Varint(-1), "offset"),
        (lambda: COBS(max_size=-1), "max_size"),
    ],
)
def test_parameters_that_make_no_framing_are_named(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("text", "framing"),
    [
        ("lines", Lines()),
        ("length", LengthPrefixed()),
        ("length:2", LengthPrefixed(2)),
        ("length:2,little", LengthPrefixed(2, "little")),
        ("length:size=2,byteorder=little", LengthPrefixed(2, "little")),
        ("length:4,offset=1,adjust=-4,strip=false", POSTGRESQL),
        (r"delimited:\x1c\r,start=\x0b", MLLP),
        (r"delimited:start=\x0b,separator=\x1c\r", MLLP),
        (r"delimited:\x2c\x3d\\\0\t\n :;", Delimited(b",=\\\0\t\n :;")),
        ("delimited:=", Delimited(b"=")),
        ("delimited:€", Delimited("€".encode())),
        ("lines:max_size=7", Lines(max_size=7)),
        ("cobs:max-size=7", COBS(max_size=7)),
        ("fixed:8", FixedSize(8)),
        ("netstrings", Netstrings()),
        ("octet-counted", OctetCounted()),
        ("content-length", ContentLength()),
        ("varint", Varint()),
        ("varint:1", Varint(1)),
        ("slip", SLIP()),
    ],
)
def test_a_text_names_a_framing(text: str, framing: Framing) -> None:
    assert parse_framing(text) == framing


@pytest.mark.parametrize("framing", [*FRAMINGS, Lines(max_size=5), Delimited(bytes(range(256)))], ids=shortly)
def test_every_framing_has_a_text_that_names_it(framing: Framing) -> None:
    assert parse_framing(format_framing(framing)) == framing


def test_a_text_says_no_more_than_it_must() -> None:
    assert format_framing(LengthPrefixed(4)) == "length:4"
    assert format_framing(Lines()) == "lines"
    assert format_framing(LengthPrefixed(2, "little")) == "length:2,byteorder=little"
    assert format_framing(MLLP) == r"delimited:\x1c\r,start=\x0b"

    class Own(Lines):
        pass

    assert format_framing(Own()) == f"{__name__}:{Own.__qualname__}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lenght:4", "no framing is called 'lenght' (did you mean 'length'?): there are lines, delimited, length, "),
        ("", "no framing is called '': there are lines, "),
        ("length:9", "the framing length cannot be 'length:9': size must be a number of bytes from 1 to 8, not 9"),
        ("length:four", "size of the framing length must be a number, not 'four'"),
        ("length:,", "size of the framing length must be a number, not ''"),
        (
            "length:siez=4",
            "the framing length has no parameter 'siez' (did you mean 'size'?): its parameters are size, byt",
        ),
        ("length:2,size=3", "the framing length gets two values for size"),
        ("length:strip=maybe", "strip of the framing length must be true or false, not 'maybe'"),
        ("length:byteorder=litle", 'byteorder must be "big" or "little", not \'litle\''),
        ("slip:5", "the framing slip has no parameter in the place of '5': its parameters are max_size"),
        ("delimited", r"the framing delimited needs its separator, as in delimited:\r\n"),
        ("fixed", "the framing fixed needs its size, as in fixed:8"),
        ("delimited:,", r"separator of the framing delimited is empty: write a comma as \x2c"),
        (
            r"delimited:\q",
            r"separator of the framing delimited has an escape '\q', which is none of \n \r \t \0 \\ \xHH",
        ),
        (r"delimited:\x1", r"has an escape '\x'"),
        ("delimited:a\\", r"has an escape '\'"),
    ],
)
def test_a_text_that_names_no_framing_gets_one_line_that_says_what_it_could_be(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        parse_framing(text)
    assert "\n" not in str(caught.value)


# Datagrams


@every_framing
@few
@given(parts=st.lists(bytes_of_use, max_size=8))
def test_the_frames_that_a_datagram_holds_come_out_of_it(framing: Framing, parts: list[bytes]) -> None:
    frames = [frame for part in parts if (frame := encodable(framing, part)) is not None]
    assert list(framing.split_datagram(b"".join(map(framing.join, frames)))) == frames


@pytest.mark.parametrize(
    ("framing", "datagram", "frames"),
    [
        (Lines(), b"a:1|c\nb:2|c", [b"a:1|c", b"b:2|c"]),
        (Lines(), b"a:1|c\nb:2|c\n", [b"a:1|c", b"b:2|c"]),
        (Lines(), b"a\n\nb", [b"a", b"", b"b"]),
        (Lines(keep_end=True), b"a\nb", [b"a\n", b"b\n"]),
        (Delimited(b"\r\n"), b"a\r\nb", [b"a", b"b"]),
        (MLLP, b"\x0ba\x1c\r\x0bb", [b"a", b"b"]),
        (SLIP(), b"\xc0\xc0", []),
        (OctetCounted(), b"1 a<1>b\n", [b"a", b"<1>b"]),
    ],
    ids=shortly,
)
def test_the_last_separator_of_a_datagram_may_be_missing(
    framing: Framing, datagram: bytes, frames: list[bytes]
) -> None:
    assert list(framing.split_datagram(datagram)) == frames


@pytest.mark.parametrize(
    ("framing", "datagram", "error"),
    [
        (LengthPrefixed(2), b"\0\1a\0\5b", FramingError),
        (LengthPrefixed(2), b"\0\1a\0", FramingError),
        (Netstrings(), b"1:a,1:b", FramingError),
        (Netstrings(), b"1:a,x", FramingError),
        (Lines(max_size=3), b"a\nlong\nb", FrameTooLong),
        (Lines(max_size=3), b"a\nlong", FrameTooLong),
        (MLLP, b"\x0ba\x1c\rb", FramingError),
        (SLIP(), b"a\xc0b", FramingError),
        (FixedSize(1), b"a", None),
        (FixedSize(2), b"aab", FramingError),
    ],
    ids=shortly,
)
def test_what_a_datagram_holds_before_what_is_wrong_is_not_lost(
    framing: Framing, datagram: bytes, error: type[Exception] | None
) -> None:
    frames = framing.split_datagram(datagram)
    assert next(frames) in (b"a", b"aa")
    if error is None:
        assert list(frames) == []
        return
    with pytest.raises(error) as caught:
        next(frames)
    assert isinstance(caught.value, AioechoError)
    assert list(frames) == []


def test_a_separator_that_is_text_is_named() -> None:
    with pytest.raises(TypeError, match="separator must be bytes"):
        Delimited("\n")  # type: ignore[arg-type]


def test_join_writes_the_length_into_a_header_that_is_kept() -> None:
    assert MBAP.join(b"\0\7\0\0??\1\3\0\0\0\1") == b"\0\7\0\0\0\6\1\3\0\0\0\1"


# Other implementations

PAYLOADS = [
    b"hello",
    b"\0",
    b"\0\0a\0",
    b"\xc0\xdb\xdc\xdd\xdb",
    b"x" * 253,
    b"x" * 254,
    b"x" * 255 + b"\0",
    b"x" * 508,
    random.Random(1).randbytes(3000),
]


def test_netstrings_are_those_of_the_specification() -> None:
    # The example of https://cr.yp.to/proto/netstrings.txt, in its own bytes.
    example = bytes((0x31, 0x32, 0x3A, 0x68, 0x65, 0x6C, 0x6C, 0x6F, 0x20, 0x77, 0x6F, 0x72, 0x6C, 0x64, 0x21, 0x2C))
    assert read(Netstrings(), [example]) == ([b"hello world!"], b"")
    assert Netstrings().join(b"hello world!") == example


def test_netstrings_are_those_of_pynetstring() -> None:
    pynetstring = pytest.importorskip("pynetstring", reason="pynetstring is not installed (the extra test)")
    stream = b"".join(pynetstring.encode([b"", *PAYLOADS]))
    assert read(Netstrings(), [stream]) == ([b"", *PAYLOADS], b"")
    assert pynetstring.decode(b"".join(map(Netstrings().join, PAYLOADS))) == PAYLOADS


@pytest.mark.parametrize("leading", [True, False])
def test_slip_is_that_of_sliplib(leading: bool) -> None:
    sliplib = pytest.importorskip("sliplib", reason="sliplib is not installed (the extra test)")
    with sliplib.use_leading_end_byte(leading):
        driver = sliplib.Driver()
    stream = b"".join(map(driver.send, PAYLOADS))
    assert read(SLIP(), [stream]) == (PAYLOADS, b"")
    driver = sliplib.Driver()
    driver.receive(b"".join(map(SLIP().join, PAYLOADS)))
    assert [driver.get(block=False) for _ in PAYLOADS] == PAYLOADS
    if leading:
        assert stream == b"".join(map(SLIP().join, PAYLOADS))


def test_cobs_is_that_of_the_package_cobs() -> None:
    cobs = pytest.importorskip("cobs.cobs", reason="cobs is not installed: it has no wheel for some Pythons")
    payloads = [b"", *PAYLOADS, b"x" * 254 + b"\0" + b"x" * 254, b"x" * 600]
    for payload in payloads:
        assert COBS().join(payload) == cobs.encode(payload) + b"\0"
    assert read(COBS(), [b"".join(cobs.encode(payload) + b"\0" for payload in payloads)]) == (payloads, b"")
    # Encoders differ in what they write after a last block of 254 bytes.
    assert (
        read(COBS(), [b"\xff" + b"x" * 254 + b"\1\0"])[0] == [cobs.decode(b"\xff" + b"x" * 254 + b"\1")] == [b"x" * 254]
    )


def test_mllp_is_that_of_hl7s_client() -> None:
    client = pytest.importorskip("hl7.client", reason="hl7 is not installed (the extra test)")
    message = "MSH|^~\\&|A|B|C|D|20260101||ADT^A01|1|P|2.5\rPID|||555\r"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = client.MLLPClient(*listener.getsockname())
        peer, _ = listener.accept()
        with sender, peer:
            peer.sendall(MLLP.join(b"MSA|AA|1"))  # it waits in the client's socket
            acknowledgement = sender.send_message(message)
            peer.settimeout(10)
            stream = peer.recv(65_536)
    assert read(MLLP, byte_by_byte(stream)) == ([message.encode()], b"")
    assert read(MLLP, [acknowledgement]) == ([b"MSA|AA|1"], b"")


def test_mbap_is_that_of_pymodbus() -> None:
    framer = pytest.importorskip("pymodbus.framer", reason="pymodbus is not installed (the extra test)")
    pdu = pytest.importorskip("pymodbus.pdu", reason="pymodbus is not installed (the extra test)")
    theirs = framer.FramerSocket(pdu.DecodePDU(True))
    payloads = [b"\3\0\0\0\1", b"\7", b"\x10" + bytes(246)]
    units = [theirs.encode(payload, 17, number) for number, payload in enumerate(payloads)]
    frames, rest = read(MBAP, cut(b"".join(units), [3, 9, 14, 21]))
    assert (frames, rest) == (units, b"")
    for number, (payload, frame) in enumerate(zip(payloads, frames, strict=True)):
        assert theirs.decode(MBAP.join(frame)) == (len(frame), 17, number, payload)


def test_varint_is_that_of_protobufs_delimited_messages() -> None:
    proto = pytest.importorskip("google.protobuf.proto", reason="protobuf is not installed (the extra test)")
    wrappers = pytest.importorskip("google.protobuf.wrappers_pb2", reason="protobuf is not installed (the extra test)")
    messages = [wrappers.BytesValue(value=payload) for payload in [b"", *PAYLOADS, b"x" * 20_000]]
    stream = io.BytesIO()
    for message in messages:
        proto.serialize_length_prefixed(message, stream)
    frames, rest = read(Varint(), [stream.getvalue()])
    assert [wrappers.BytesValue.FromString(frame) for frame in frames] == messages
    assert rest == b""
    joined = io.BytesIO(b"".join(map(Varint().join, frames)))
    assert [proto.parse_length_prefixed(wrappers.BytesValue, joined) for _ in messages] == messages


@pytest.mark.parametrize("options", [["--octet-count"], []], ids=repr)
def test_octet_counted_reads_what_logger_writes(options: list[str]) -> None:
    logger = shutil.which("logger")
    if logger is None or b"--octet-count" not in subprocess.run([logger, "--help"], capture_output=True).stdout:
        pytest.skip("this machine has no logger of util-linux")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        where = ["--server", "127.0.0.1", "--port", str(listener.getsockname()[1])]
        subprocess.run(
            [logger, "--tcp", *where, *options, "--rfc3164", "--tag", "aioecho"],
            input="first\n1 second\nthïrd\n".encode(),
            check=True,
            timeout=30,
        )
        peer, _ = listener.accept()
        with peer, peer.makefile("rb") as file:
            stream = file.read()
    assert (b"\n" in stream) is not bool(options)
    for pieces in ([stream], byte_by_byte(stream)):
        frames, rest = read(OctetCounted(), pieces)
        assert rest == b""
        assert [frame.partition(b": ")[2].decode() for frame in frames] == ["first", "1 second", "thïrd"]
        assert all(frame.startswith(b"<13>") for frame in frames)
    if options:
        assert b"".join(map(OctetCounted().join, frames)) == stream
