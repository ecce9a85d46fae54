"""Sentences that hold for whatever is sent: nothing unjudged leaves, and nothing judged changes."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import ProtocolError
from sidecar.policy.decision import Decision
from sidecar.policy.enforcement import Deliver, Drop, Forward, Outcome, Reply
from sidecar.protocol.framing import LineDecoder
from sidecar.protocol.jsonrpc import (
    FROM_CLIENT,
    FROM_SERVER,
    Message,
    Notification,
    Request,
    Response,
    decode,
    encode,
)
from sidecar.protocol.methods import Direction, Governed
from sidecar.protocol.session import Session, check_headers
from tests.support.fakes import DENIED, Stage, plain, tool
from tests.support.messages import IDS, MESSAGES, TABLE, VALUES

HEADERS = st.dictionaries(
    st.sampled_from(["mcp-protocol-version", "mcp-method", "mcp-name"]),
    st.sampled_from(["2026-07-28", "2025-06-18", "tools/call", "t", "=?base64?dA==?=", "", "x"]),
)


# ── Garbage ───────────────────────────────────────────────────────────────────────────────────────


def is_answerable(error: ProtocolError) -> None:
    """Whoever sent it can be told, under an id that both sides read alike."""
    assert error.rpc_code in (-32700, -32600, -32601, -32602, -32020)
    assert error.status in (200, 400, 404)
    assert type(error.request_id) in (type(None), str, int)


def read(frame: bytes) -> None:
    """All that is done with bytes before anybody is asked."""
    for strictness, direction in (
        (FROM_CLIENT, Direction.FROM_CLIENT),
        (FROM_SERVER, Direction.FROM_SERVER),
    ):
        try:
            message = decode(frame, strictness)
            assert decode(encode(message), strictness) == message
            check_headers(message, {}, TABLE)
            if not isinstance(message, Response):
                Session(TABLE).receive(message, direction)
        except ProtocolError as error:
            is_answerable(error)


@given(st.binary(max_size=60))
def test_bytes_are_a_message_or_a_protocol_error(frame: bytes) -> None:
    read(frame)
    for line in LineDecoder(1 << 20).feed(frame):
        read(line)


FRAGMENTS = st.sampled_from(
    [
        *('{"jsonrpc":"2.0"', '"id":1', '"method":"tools/call"', '"params":{"name":"t"}', "}", "{"),
        *(",", ":", "[", "]", '"', "\\u", "\\ud800", "NaN", "1e999", "9" * 20, "null", "-0", " "),
        *('"result":{}', '"error":{"code":1}', '"Method":"x"', "\x00", "\r", "\ufeff", "é", "true"),
    ]
)


@given(st.lists(FRAGMENTS, max_size=12).map("".join))
def test_what_looks_like_a_message_is_one_or_a_protocol_error(text: str) -> None:
    read(text.encode("utf-8", "surrogatepass"))


@given(st.builds(encode, MESSAGES), st.integers(0, 200), st.binary(min_size=1, max_size=2))
def test_a_damaged_message_is_a_message_or_a_protocol_error(
    frame: bytes, place: int, damage: bytes
) -> None:
    at = place % (len(frame) + 1)
    read(frame[:at] + damage + frame[at:])
    read(frame[:at] + damage + frame[at + len(damage) :])
    read(frame[:at])


@given(MESSAGES, HEADERS)
def test_any_headers_are_fine_or_a_protocol_error(
    message: Message, headers: dict[str, str]
) -> None:
    try:
        check_headers(message, headers, TABLE)
    except ProtocolError as error:
        is_answerable(error)


# ── What leaves is what was judged ────────────────────────────────────────────────────────────────


def without_trace(message: Message) -> bytes:
    known = plain(message)
    assert known is not None
    return encode(known)


async def converse(stage: Stage, messages: list[Message]) -> list[tuple[Message, Outcome]]:
    outcomes: list[tuple[Message, Outcome]] = []
    for message in messages:
        try:
            outcomes.append((message, await stage.send(message)))
        except ProtocolError:
            continue
    stage.pipeline.close(stage.conversation)
    assert stage.pipeline.in_flight == 0
    finished = stage.recorder.finished_calls
    assert len({id(each) for each in finished}) == len(finished)
    return outcomes


CONVERSATIONS = st.lists(MESSAGES, min_size=1, max_size=6)


@given(CONVERSATIONS)
def test_with_everything_allowed_what_leaves_is_what_came(messages: list[Message]) -> None:
    stage = Stage(catalog_wait=0)
    for message, outcome in asyncio.run(converse(stage, messages)):
        if isinstance(outcome, Forward):
            left = decode(outcome.permitted.frame)
            assert without_trace(left) == without_trace(message)
        elif isinstance(outcome, Reply):
            assert isinstance(message, Request)
            assert outcome.response.error is not None
            assert outcome.response.error["code"] == -32601


@given(CONVERSATIONS)
def test_with_everything_denied_nothing_governed_leaves(messages: list[Message]) -> None:
    stage = Stage(DENIED, catalog_wait=0)
    for message, outcome in asyncio.run(converse(stage, messages)):
        if not isinstance(outcome, Forward):
            continue
        assert isinstance(message, (Request, Notification))
        row = TABLE.rows[message.method]
        assert row.governed in (Governed.TABLE, Governed.LISTING, Governed.NEGOTIATION)


@given(CONVERSATIONS)
def test_what_is_forwarded_was_asked_about_as_it_left(messages: list[Message]) -> None:
    stage = Stage(catalog_wait=0)
    for message, outcome in asyncio.run(converse(stage, messages)):
        if not isinstance(outcome, Forward) or not isinstance(message, Request):
            continue
        left = decode(outcome.permitted.frame)
        assert isinstance(left, Request)
        if left.method == "tools/call":
            asked = [each["tool"] for each in stage.decider.questions if "tool" in each]
            params = left.params or {}
            wanted = {"name": params["name"], "arguments": params.get("arguments") or {}}
            assert wanted in [{key: each[key] for key in wanted} for each in asked]


@given(CONVERSATIONS)
def test_without_a_record_nothing_leaves(messages: list[Message]) -> None:
    stage = Stage(catalog_wait=0)
    stage.recorder.broken = True
    asyncio.run(converse(stage, messages))
    assert stage.sent == []


@given(CONVERSATIONS, st.lists(st.builds(Response, IDS, VALUES), max_size=6))
def test_each_request_is_answered_at_most_once(
    messages: list[Message], answers: list[Response]
) -> None:
    async def run() -> None:
        stage = Stage(catalog_wait=0)
        outcomes: list[tuple[Message, Outcome]] = []
        for message in messages:
            try:
                outcomes.append((message, await stage.send(message)))
            except ProtocolError:
                continue
        delivered = [each for each in answers if await stage.deliver(each) != Drop()]
        forwarded = [
            message.id
            for message, outcome in outcomes
            if isinstance(message, Request) and isinstance(outcome, Forward)
        ]
        for each in delivered:
            same = [other for other in forwarded if _same_id(other, each.id)]
            assert len([d for d in delivered if _same_id(d.id, each.id)]) <= len(same)

    asyncio.run(run())


def _same_id(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


# ── Listings ──────────────────────────────────────────────────────────────────────────────────────

TOOL_NAMES = st.sampled_from("abcdef")


@given(st.lists(TOOL_NAMES, max_size=8), st.frozensets(TOOL_NAMES), st.booleans())
def test_what_is_seen_of_a_listing_is_an_ordered_part_of_it(
    names: list[str], visible: frozenset[str], allow: bool
) -> None:
    async def run() -> None:
        stage = Stage(Decision(allow=allow, visible=visible))
        items = [tool(name, number=number) for number, name in enumerate(names)]
        delivery = await stage.exchange(Request(1, "tools/list"), {"tools": items})
        assert isinstance(delivery, Deliver)
        shown = (
            delivery.replaced.result["tools"] if isinstance(delivery.replaced, Response) else items
        )
        wanted = visible if allow else frozenset()
        assert shown == [each for each in items if each["name"] in wanted]

    asyncio.run(run())
