"""Requests on their way: where a stream was, how long to wait, and what goes with each request."""

from __future__ import annotations

import pytest

from sidecar.protocol.framing import Event
from sidecar.protocol.jsonrpc import Request
from sidecar.transport.flight import MAX_RETRY, MIN_RETRY, RETRY, Cursor, Flight, Link, key_of


def test_a_cursor_keeps_the_last_id_and_wish() -> None:
    cursor = Cursor()
    for event in (Event(b"", id="1"), Event(b"", retry="40"), Event(b"", id="")):
        cursor.note(event)
    assert (cursor.last, cursor.retry) == ("1", 0.04)


@pytest.mark.parametrize(
    ("wish", "seconds"),
    [
        ("1500", 1.5),
        ("0", MIN_RETRY),
        ("-1", RETRY),
        ("1.5", RETRY),
        ("", RETRY),
        ("٣", RETRY),
        ("soon", RETRY),
    ],
)
def test_a_wish_that_is_no_number_is_none(wish: str, seconds: float) -> None:
    cursor = Cursor()
    cursor.note(Event(b"", retry=wish))
    assert cursor.retry == seconds


def test_it_waits_longer_in_vain_but_never_less_than_the_server_wants() -> None:
    assert [Cursor().patience(failures) for failures in (0, 1, 2, 10, 10**6)] == [
        1.0,
        2.0,
        4.0,
        MAX_RETRY,
        MAX_RETRY,
    ]
    assert Cursor(retry=100.0).patience(0) == Cursor(retry=100.0).patience(5) == 100.0


def test_a_link_sends_what_is_known_of_the_session() -> None:
    session = {"Mcp-Session-Id": "s", "MCP-Protocol-Version": "2025-11-25"}
    assert Link().headers() == {}
    assert Link(modern="2026-07-28").headers() == {"MCP-Protocol-Version": "2026-07-28"}
    link = Link(session="s", version="2025-11-25", modern="2026-07-28")
    assert link.headers() == session
    headers = link.stream_headers(Cursor(last="7"))
    assert dict(headers) == {
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        **session,
        "Last-Event-ID": "7",
    }
    assert "Last-Event-ID" not in link.stream_headers(Cursor())


@pytest.mark.parametrize(
    ("modern", "gone", "last", "resumable"),
    [
        (False, False, "1", True),
        (False, False, None, False),
        (False, True, "1", False),
        (True, False, "1", False),
    ],
)
def test_only_a_living_session_resumes(
    modern: bool, gone: bool, last: str | None, resumable: bool
) -> None:
    flight = Flight(Request(1, "tools/call"), modern, Link(gone=gone), Cursor(last))
    assert flight.resumable is resumable


def test_ids_of_two_types_are_two() -> None:
    assert key_of(1) != key_of("1")
