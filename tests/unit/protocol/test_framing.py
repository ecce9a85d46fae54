"""Frames are the same however the bytes come: whole, one by one, or in any pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import MalformedMessage
from sidecar.protocol.framing import (
    Event,
    EventDecoder,
    FrameTooLarge,
    LineDecoder,
    encode_event,
    encode_line,
    event_of,
    refuse_raw_returns,
)

PLENTY = 1 << 20


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


@st.composite
def in_pieces(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> tuple[bytes, list[bytes]]:
    """Bytes, and the same bytes cut anywhere, also into empty pieces."""
    data = draw(whole)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    edges = [0, *cuts, len(data)]
    return data, [data[a:b] for a, b in pairwise(edges)]


# ── Lines ─────────────────────────────────────────────────────────────────────────────────────────


def lines(pieces: Iterable[bytes], limit: int = PLENTY) -> tuple[list[bytes], bytes | None]:
    decoder = LineDecoder(limit)
    return [frame for piece in pieces for frame in decoder.feed(piece)], decoder.finish()


@pytest.mark.parametrize(
    ("data", "frames", "tail"),
    [
        pytest.param(b"", [], None, id="nothing"),
        pytest.param(b"a\n", [b"a"], None, id="one"),
        pytest.param(b"a\nb\n", [b"a", b"b"], None, id="two"),
        pytest.param(b"a\r\nb\r\n", [b"a", b"b"], None, id="CRLF"),
        pytest.param(b"a\rb\n", [b"a\rb"], None, id="CR inside stays"),
        pytest.param(b"a\r\r\n", [b"a\r"], None, id="one CR is dropped"),
        pytest.param(b"\n\r\n \t\n", [], None, id="empty lines are none"),
        pytest.param(b" a \n", [b" a "], None, id="white space stays"),
        pytest.param(b"a\nb", [b"a"], b"b", id="a tail without newline"),
        pytest.param(b"a\nb\r", [b"a"], b"b", id="a tail with half a line end"),
        pytest.param("é€😀\n".encode(), ["é€😀".encode()], None, id="UTF-8"),
        pytest.param(
            "\u2028\x85\x0b\x0c\n".encode(), ["\u2028\x85\x0b\x0c".encode()], None, id="LF"
        ),
    ],
)
def test_lines_are_the_same_whole_and_byte_by_byte(
    data: bytes, frames: list[bytes], tail: bytes | None
) -> None:
    assert lines([data]) == (frames, tail)
    assert lines(one_by_one(data)) == (frames, tail)
    assert lines([data, b"more"])[0] == frames


@given(
    in_pieces(st.lists(st.sampled_from([b"a", b"{}", b"\n", b"\r", b" ", b"\xc3"])).map(b"".join))
)
def test_lines_do_not_depend_on_the_pieces(cut: tuple[bytes, list[bytes]]) -> None:
    data, pieces = cut
    assert lines(pieces) == lines([data])
    expected = [part.removesuffix(b"\r") for part in data.split(b"\n")]
    frames, tail = lines([data])
    assert [*frames, tail or b""] == [
        *(each for each in expected[:-1] if each.strip()),
        expected[-1] if expected[-1].strip() else b"",
    ]


@pytest.mark.parametrize("pieces", [[b"12345\n"], one_by_one(b"12345\n")], ids=["whole", "bytes"])
def test_a_line_may_be_as_long_as_the_bound(pieces: list[bytes]) -> None:
    assert lines(pieces, limit=5) == ([b"12345"], None)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"123456\n"], id="whole"),
        pytest.param(one_by_one(b"123456"), id="byte by byte, without end"),
        pytest.param([b"1\n2\n3\n123", b"456"], id="after others"),
    ],
)
def test_a_longer_line_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(FrameTooLarge) as refused:
        lines(pieces, limit=5)
    assert refused.value.status == 413
    assert refused.value.code == "message_too_large"
    assert isinstance(refused.value, MalformedMessage)


def test_what_stands_before_a_line_that_is_too_long_is_still_given() -> None:
    frames = LineDecoder(3).feed(b"a\nb\ntoo long\n")
    assert [next(frames), next(frames)] == [b"a", b"b"]
    with pytest.raises(FrameTooLarge):
        next(frames)


def test_the_bound_counts_each_line_for_itself() -> None:
    assert lines([b"123\n" * 100], limit=3)[0] == [b"123"] * 100


@pytest.mark.parametrize(
    ("frame", "fine"),
    [
        pytest.param(b'{"a":1}', True, id="none"),
        pytest.param(b'{"a":"\\r"}', True, id="an escape is none"),
        pytest.param(b'{"a":1,\r"b":2}', False, id="between tokens"),
        pytest.param(b"\r{}", False, id="in front"),
        pytest.param(b"{}\r", False, id="behind"),
    ],
)
def test_a_raw_carriage_return_is_refused(frame: bytes, fine: bool) -> None:
    if fine:
        assert refuse_raw_returns(frame) is frame
    else:
        with pytest.raises(MalformedMessage):
            refuse_raw_returns(frame)


# ── Events ────────────────────────────────────────────────────────────────────────────────────────

Meaning = tuple[str | None, str, str | None, str | None]


def events(pieces: Iterable[bytes], limit: int = PLENTY) -> list[Event]:
    decoder = EventDecoder(limit)
    return [event for piece in pieces for event in decoder.feed(piece)]


def meaning(found: Iterable[Event]) -> list[Meaning]:
    """The events without keep-alives, and without the bytes they came in."""
    told = [(each, each.raw) for each in found]
    if told:
        told[0] = (told[0][0], told[0][1].removeprefix(b"\xef\xbb\xbf"))
    return [
        (each.data, each.name, each.id, each.retry)
        for each, raw in told
        if any(line and not line.startswith(b":") for line in re.split(rb"[\r\n]", raw))
    ]


def by_the_standard(stream: bytes) -> list[Meaning]:
    """A second reading, after the text of WHATWG HTML 9.2.6: blocks up to each empty line."""
    found: list[Meaning] = []
    block: list[str] = []
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    for line in re.split(r"\r\n|\r|\n", text)[:-1]:
        if line:
            block += [line] if not line.startswith(":") else []
            continue
        fields: dict[str, list[str]] = {}
        for each in block:
            name, _, value = each.partition(":")
            fields.setdefault(name, []).append(value[1:] if value.startswith(" ") else value)
        data = "\n".join(fields["data"]) if "data" in fields else None
        name = (fields.get("event") or ["message"])[-1] or "message"
        id_, retry = (fields[key][-1] if key in fields else None for key in ("id", "retry"))
        found += [(data, name, id_, retry)] if block else []
        block = []
    return found


STREAMS = {
    "one": b'data: {"a":1}\n\n',
    "no space": b"data:x\n\n",
    "two spaces": b"data:  x\n\n",
    "several lines": b"data: a\ndata\ndata: b\n\n",
    "all fields": b"event: message\nid: 7\nretry: 100\ndata: x\n\n",
    "a name": b"event: endpoint\ndata: /messages\n\n",
    "an empty name": b"event:\ndata: x\n\n",
    "last id wins": b"id: 1\nid: 2\ndata: x\n\n",
    "an id alone": b"id: 1\n\n",
    "a primer": b"id: 1\nretry: 500\ndata:\n\n",
    "unknown fields": b"foo: bar\ndata: x\nDATA: y\n data: z\n\n",
    "comment inside": b"data: a\n: ping\ndata: b\n\n",
    "comment between": b": ping\n\ndata: a\n\n: ping\n",
    "only comments": b":\n:\n\n: x\n\n",
    "CR": b"data: a\r\rdata: b\r\r",
    "CRLF": b"data: a\r\n\r\ndata: b\r\n\r\n",
    "mixed": b"data: a\r\n\ndata: b\n\r\ndata: c\r\r\ndata: d\n\r",
    "LF after CRLF": b"data: a\r\n\ndata: b\r\n\n",
    "byte order mark": b"\xef\xbb\xbfdata: a\n\n",
    "byte order mark later": b"data: a\n\n\xef\xbb\xbfdata: b\n\n",
    "byte order mark on a line": b"data: a\n\xef\xbb\xbfdata: b\n\n",
    "UTF-8": "data: é€😀\n\n".encode(),
    "broken UTF-8": b"data: \xc3\n\n",
    "unfinished": b"data: a\n\ndata: b\n",
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_events_are_read_as_the_standard_says(stream: bytes) -> None:
    assert meaning(events([stream])) == by_the_standard(stream)
    assert meaning(events(one_by_one(stream))) == by_the_standard(stream)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_tail_does_not_change_the_events_before_it(stream: bytes) -> None:
    whole = events([stream])
    assert events([stream + b"data: tai"])[: len(whole)] == whole


PIECES = st.sampled_from(
    [
        *(b"data: a", b"data:", b"data", b"id: 1", b"event: e", b"retry: 5", b": c", b"x: y"),
        *(b"\r", b"\n", b"\r\n", b"\n\n", b"\xef\xbb\xbf", "é😀".encode()),
    ]
)


@given(in_pieces(st.lists(PIECES, max_size=30).map(b"".join)))
def test_events_do_not_depend_on_the_pieces(cut: tuple[bytes, list[bytes]]) -> None:
    stream, pieces = cut
    assert meaning(events(pieces)) == meaning(events([stream])) == by_the_standard(stream)


@given(in_pieces(st.lists(PIECES, max_size=30).map(b"".join)))
def test_what_is_given_put_together_is_what_came(cut: tuple[bytes, list[bytes]]) -> None:
    stream, pieces = cut
    closed = [*pieces, b"\n\n"]
    assert b"".join(each.raw for each in events(closed)) == stream + b"\n\n"


def test_a_keep_alive_is_given_at_once() -> None:
    decoder = EventDecoder(PLENTY)
    assert [each.raw for each in decoder.feed(b": ping\n")] == [b": ping\n"]
    assert [each.data for each in decoder.feed(b"\n")] == [None]


def test_an_event_is_given_with_its_last_byte() -> None:
    decoder = EventDecoder(PLENTY)
    assert list(decoder.feed(b"data: a\r\n")) == []
    assert [each.data for each in decoder.feed(b"\r")] == ["a"]
    assert meaning(decoder.feed(b"\n")) == []


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"data: 123456\n", id="a line"),
        pytest.param(b"data: 1234567890", id="a line without end"),
        pytest.param(b"data: 1\n" * 3, id="a block"),
        pytest.param(b": 1234567890\n", id="a comment"),
        pytest.param(b"data: 1\r\n" * 3, id="a block with CRLF"),
    ],
)
def test_an_event_beyond_the_bound_is_refused(stream: bytes) -> None:
    for pieces in ([stream], one_by_one(stream)):
        with pytest.raises(FrameTooLarge):
            events(pieces, limit=12)


def test_an_event_may_be_as_large_as_the_bound() -> None:
    stream = b"data: 1234\n\n"
    for pieces in ([stream * 3], one_by_one(stream * 3)):
        assert len(events(pieces, limit=len(stream))) == 3


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_the_bound_is_the_same_whole_and_byte_by_byte(newline: bytes) -> None:
    block = b"data: 1234" + newline + newline
    assert len(events(one_by_one(block), limit=len(block))) in (1, 2)
    with pytest.raises(FrameTooLarge):
        events(one_by_one(b"data: 1234" + newline + b"id: 1" + newline), limit=len(block))


ONE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)


@given(
    data=st.text(st.characters(codec="ascii", exclude_characters="\r\n")).map(str.encode),
    name=ONE_LINE.filter(bool),
    id_=st.none() | ONE_LINE,
    retry=st.none() | st.integers(0, 10**6).map(str),
)
def test_an_event_is_read_as_it_was_written(
    data: bytes, name: str, id_: str | None, retry: str | None
) -> None:
    like = Event(b"", "other", name, id_, retry)
    (event,) = events([encode_event(data, like)])
    assert (event.data, event.name, event.id, event.retry) == (data.decode(), name, id_, retry)
    assert event.raw == encode_event(data, like)


def test_an_event_needs_no_other_one_to_be_like() -> None:
    assert encode_event(b"{}") == encode_event(b"{}", Event(b"")) == b"data: {}\n\n"


@pytest.mark.parametrize("line", [b"{}", b"\xff\xfe", '{"ü": 1}'.encode()])
def test_a_line_is_an_event_that_keeps_its_bytes(line: bytes) -> None:
    event = event_of(line)
    assert event.raw == encode_line(line, event) == line + b"\n"
    assert event.data is not None
    assert event.data.encode("utf-8", "surrogateescape") == line
    assert (event.id, event.name) == (None, "message")
