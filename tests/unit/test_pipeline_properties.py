"""With everything allowed nobody can tell; with everything denied nothing happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from sidecar.errors import ProtocolError
from sidecar.policy.decision import Decision
from sidecar.policy.enforcement import (
    TRACE_CONTEXT,
    AnswerServer,
    Deliver,
    Drop,
    Forward,
    Permitted,
    Reply,
    by_table,
)
from sidecar.protocol.framing import EventDecoder, LineDecoder, encode_event, refuse_raw_returns
from sidecar.protocol.jsonrpc import (
    JsonObject,
    Message,
    Notification,
    Request,
    Response,
    decode,
    encode,
    to_object,
)
from sidecar.protocol.methods import Direction, Era, Governed
from sidecar.protocol.session import Operation, Session
from tests.support.fakes import ALLOWED, DENIED, Stage, plain
from tests.support.messages import MESSAGES, TABLE, TEXT, VALUES, good_messages, is_about

PLENTY = 1 << 20
FROM_CLIENT, FROM_SERVER = Direction.FROM_CLIENT, Direction.FROM_SERVER
LISTINGS = [row for row in TABLE.rows.values() if row.listing]


def frame(message: Message | None) -> bytes:
    assert message is not None
    return encode(message)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


# ── Everything is allowed ─────────────────────────────────────────────────────────────────────────


@given(good_messages(FROM_CLIENT), VALUES)
def test_what_is_allowed_goes_there_and_back_as_it_is(
    message: Request | Notification, result: Any
) -> None:
    async def talk() -> None:
        stage = Stage(ALLOWED, catalog_wait=0)
        outcome = await stage.send(message)
        if message.method == "notifications/cancelled" and outcome == Drop():
            return
        assert isinstance(outcome, Forward)
        left = decode(outcome.permitted.frame)
        assert frame(plain(left)) == frame(plain(message))
        if TABLE.rows[message.method].governed is Governed.DECISION:
            assert stage.decider.questions
            assert all(is_about(each, message) for each in stage.decider.questions)
        if isinstance(message, Request):
            assert await stage.deliver(Response(message.id, result)) == Deliver()

    run(talk())


@given(good_messages(FROM_SERVER), VALUES)
def test_what_a_server_may_ask_goes_there_and_back_as_it_is(
    message: Request | Notification, result: Any
) -> None:
    async def talk() -> None:
        stage = Stage(ALLOWED, catalog_wait=0)
        await stage.shake_hands()
        assert await stage.deliver(message) == Deliver()
        if isinstance(message, Request):
            answer = Response(message.id, result)
            outcome = await stage.send(answer)
            assert isinstance(outcome, Forward)
            assert outcome.permitted.frame == encode(answer)

    run(talk())


# ── Everything is denied ──────────────────────────────────────────────────────────────────────────


@given(good_messages(FROM_SERVER, "request"))
def test_a_denied_question_of_a_server_is_answered_and_never_asked(message: Request) -> None:
    async def talk() -> None:
        stage = Stage(DENIED, catalog_wait=0)
        await stage.shake_hands()
        delivery = await stage.deliver(message)
        row = TABLE.find(message.method, "request", FROM_SERVER, Era.LEGACY)
        if row is not None and row.governed is Governed.DECISION:
            assert isinstance(delivery, AnswerServer)
            answer = delivery.permitted.message
            assert isinstance(answer, Response)
            assert (answer.id, (answer.error or {})["code"]) == (message.id, -31403)

    run(talk())


def is_answerable(error: ProtocolError) -> None:
    assert error.rpc_code in (-32700, -32600, -32602)
    assert error.status == 400


FRAGMENTS = [b"", b"\n", b"\r", b" ", b"{", b"}", b"\xff", b"\x00", b'"', b",", b'"id":1,', b"[]"]


@given(st.lists(st.builds(encode, MESSAGES) | st.sampled_from(FRAGMENTS), max_size=6))
def test_of_any_bytes_nothing_governed_is_let_through_and_every_message_is_answered(
    pieces: list[bytes],
) -> None:
    async def talk() -> None:
        stage = Stage(DENIED, catalog_wait=0)
        for line in LineDecoder(PLENTY).feed(b"\n".join(pieces) + b"\n"):
            try:
                message = decode(refuse_raw_returns(line))
                outcome = await stage.send(message)
            except ProtocolError as error:
                is_answerable(error)
                continue
            if isinstance(outcome, Forward):
                assert not isinstance(message, Response)
                assert TABLE.rows[message.method].governed is not Governed.DECISION
            elif isinstance(message, Request):
                assert isinstance(outcome, Reply)
                assert frame(Response(message.id)) == frame(Response(outcome.response.id))
            else:
                assert outcome == Drop()

    run(talk())


# ── Listings ──────────────────────────────────────────────────────────────────────────────────────


@given(
    row=st.sampled_from(LISTINGS),
    names=st.lists(st.sampled_from("abcd") | VALUES, max_size=6),
    visible=st.none() | st.frozensets(st.sampled_from("abcd")),
    beside=st.dictionaries(TEXT, VALUES, max_size=3),
)
def test_of_every_listing_an_ordered_part_is_seen_and_all_that_stands_beside_it(
    row: Any, names: list[Any], visible: frozenset[str] | None, beside: JsonObject
) -> None:
    items = [{row.listing.item_name: name, "number": n} for n, name in enumerate(names)]
    page = {"nextCursor": "x", **beside, row.listing.items: items}

    async def talk() -> None:
        stage = Stage(Decision(allow=True, visible=visible))
        delivery = await stage.exchange(Request(1, row.name), page)
        assert isinstance(delivery, Deliver)
        if visible is None:
            assert delivery == Deliver()
            return
        wanted = [e for e, name in zip(items, names, strict=True) if name in sorted(visible)]
        if wanted == items:
            assert delivery == Deliver()
            return
        assert isinstance(delivery.replaced, Response)
        assert delivery.replaced.result == {**page, row.listing.items: wanted}

    run(talk())


# ── The context of a trace ────────────────────────────────────────────────────────────────────────

CARRIERS = st.fixed_dictionaries({"traceparent": TEXT}, optional={"tracestate": TEXT})


@given(good_messages(FROM_CLIENT), CARRIERS, CARRIERS)
def test_to_put_a_trace_in_and_take_it_out_changes_nothing_else(
    message: Request | Notification, one: Mapping[str, str], other: Mapping[str, str]
) -> None:
    operation = Session(TABLE).receive(message, FROM_CLIENT)
    assume(operation.method.governed is not Governed.DECISION)
    before = frame(message)
    left, again = (_sent(operation, each) for each in (one, other))
    assert frame(message) == before
    assert frame(plain(left)) == frame(plain(again)) == frame(plain(message))
    assert {k: v for k, v in _meta(left).items() if k in TRACE_CONTEXT} == one
    assert frame(_sent(Session(TABLE).receive(left, FROM_CLIENT), other)) == frame(again)


def _sent(operation: Operation, carrier: Mapping[str, str]) -> Request | Notification:
    permitted = by_table(operation, carrier)
    assert isinstance(permitted, Permitted)
    assert isinstance(permitted.message, (Request, Notification))
    return permitted.message


def _meta(message: Request | Notification) -> JsonObject:
    return dict((message.params or {}).get("_meta", {}))


# ── Pieces ────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(MESSAGES, min_size=1, max_size=2))
def test_messages_mean_the_same_cut_anywhere(messages: list[Message]) -> None:
    """Also inside a character: as others write them, they are not all ASCII."""
    raw = [json.dumps(to_object(each), ensure_ascii=False).encode() for each in messages]
    stream = b"\n".join(raw) + b"\n"
    events = b"".join(map(encode_event, raw))
    for cut in range(max(len(stream), len(events))):
        lines, blocks = LineDecoder(PLENTY), EventDecoder(PLENTY)
        found = [*lines.feed(stream[:cut]), *lines.feed(stream[cut:])]
        told = [*blocks.feed(events[:cut]), *blocks.feed(events[cut:])]
        assert found == raw
        assert [(each.data or "").encode() for each in told] == raw
