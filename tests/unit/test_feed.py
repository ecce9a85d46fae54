"""The records for whoever listens: which ones, how many, and what it costs when nobody does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sidecar.conversation import Call, Stranger
from sidecar.errors import Overloaded
from sidecar.feed import KEPT, MAX_LISTENERS, MAX_WAITING, Feed, Listener, light
from sidecar.policy.identity import Principal, static
from sidecar.policy.masking import Masking
from sidecar.protocol.session import Target
from sidecar.recording import Content
from tests.support import calls


def happens(feed: Feed, *some: Call) -> None:
    for call in some:
        feed.decided(call)
        feed.finished(call)


async def told(listener: Listener) -> list[dict[str, Any]]:
    """Everything that waits."""
    async with asyncio.timeout(1):
        return [json.loads(line) for line in (await anext(listener)).splitlines()]


def nothing_waits(listener: Listener) -> bool:
    return not listener._news.is_set()


async def test_who_listens_is_told_of_decision_and_outcome() -> None:
    feed = Feed()
    with feed.listen() as listener:
        happens(feed, calls.allowed(), calls.denied())
        found = [(each["type"], each["decision"]) for each in await told(listener)]
    kinds = ("decision", "outcome")
    assert found == [(kind, verdict) for verdict in ("allow", "deny") for kind in kinds]


async def test_what_nobody_judged_is_not_told() -> None:
    feed = Feed()
    with feed.listen(last=KEPT) as listener:
        happens(feed, calls.passed())
        assert nothing_waits(listener)
    with feed.listen(last=KEPT) as listener:
        assert nothing_waits(listener)


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({}, True),
        ({"actor": "agent"}, True),
        ({"actor": "human"}, False),
        ({"actor": "agent:bot"}, True),
        ({"actor": "bot"}, True),
        ({"actor": "static|b*"}, True),
        ({"actor": "alice"}, True),
        ({"actor": "*|alice"}, True),
        ({"actor": "bo"}, False),
        ({"tool": "get_*"}, True),
        ({"tool": "refund*"}, False),
        ({"decision": "allow"}, True),
        ({"decision": "deny"}, False),
        ({"actor": "agent", "tool": "*ticket", "decision": "allow"}, True),
        ({"actor": "agent", "tool": "*ticket", "decision": "error"}, False),
    ],
)
async def test_only_what_is_wanted_is_told(wanted: dict[str, Any], fits: bool) -> None:
    feed = Feed()
    with feed.listen(**wanted) as listener:
        happens(feed, calls.allowed())
        assert nothing_waits(listener) is not fits
    with feed.listen(last=1, **wanted) as listener:
        assert nothing_waits(listener) is not fits


async def test_strangers_are_told_of_and_not_kept() -> None:
    feed = Feed()
    with feed.listen() as everything, feed.listen(actor="*") as actors:
        feed.refused(Stranger("token_expired", "http", "10.1.2.3", "/mcp"))
        (record,) = await told(everything)
        assert nothing_waits(actors)
    assert (record["type"], record["reason"], record["path"]) == (
        "refused",
        "token_expired",
        "/mcp",
    )
    with feed.listen(last=KEPT) as later:
        assert nothing_waits(later)


async def test_listeners_want_different_things() -> None:
    feed = Feed()
    with feed.listen(decision="deny") as denials, feed.listen(tool="get_ticket") as tickets:
        happens(feed, calls.denied(operation=calls.operation(target=Target("tool", "other"))))
        assert nothing_waits(tickets)
        assert len(await told(denials)) == 2


async def test_the_last_actions_are_told_first() -> None:
    feed = Feed()
    happens(feed, *(calls.allowed(decision_id=str(number)) for number in range(KEPT + 5)))
    happens(feed, calls.denied(decision_id="denied"))
    with feed.listen(last=2) as listener:
        found = [each["decision_id"] for each in await told(listener)]
        assert found == [str(KEPT + 4)] * 2 + ["denied"] * 2
    with feed.listen(last=999) as listener:
        assert len(await told(listener)) == 2 * KEPT
    with feed.listen(last=1, decision="allow") as listener:
        assert {each["decision_id"] for each in await told(listener)} == {str(KEPT + 4)}


async def test_a_listener_that_takes_nothing_misses_records_and_learns_how_many() -> None:
    feed = Feed()
    with feed.listen() as slow, feed.listen() as quick:
        count = 0
        while slow._missed < 10:
            happens(feed, calls.allowed(decision_id=str(count)))
            await told(quick)
            count += 1
        assert slow._waiting <= MAX_WAITING + 100
        slow_missed = slow._missed
        found = await told(slow)
        assert found[-1] == {"type": "missed", "count": slow_missed}
        assert sum(each.get("count", 1) for each in found) == 2 * count
        happens(feed, calls.allowed())
        assert [each["type"] for each in await told(slow)] == ["decision", "outcome"]


async def test_what_was_missed_is_said_where_it_is_missing() -> None:
    feed = Feed()
    with feed.listen() as listener:
        listener._waiting = MAX_WAITING
        feed.decided(calls.allowed())
        listener._waiting = 0
        feed.decided(calls.denied())
        assert [each["type"] for each in await told(listener)] == ["missed", "decision"]


async def test_the_end_is_told_after_everything_else() -> None:
    feed = Feed()
    with feed.listen() as listener:
        happens(feed, calls.allowed())
        feed.close()
        assert len(await told(listener)) == 2
        with pytest.raises(StopAsyncIteration):
            await anext(listener)


async def test_listeners_are_bounded_and_go() -> None:
    feed = Feed()
    for _ in range(3):
        listening = [feed.listen() for _ in range(MAX_LISTENERS)]
        for each in listening:
            each.__enter__()
        with pytest.raises(Overloaded), feed.listen():
            pass
        for each in listening:
            each.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, True),
        ({"name": "x", "arguments": {"id": 1, "more": [1, 2, {"a": "b"}]}}, True),
        ("x" * 4096, True),
        ("x" * 4097, False),
        ({"x" * 5000: 1}, False),
        ([["x" * 100] * 10] * 9, False),
        (list(range(101)), False),
        (dict.fromkeys(map(str, range(101))), False),
    ],
)
def test_what_holds_little_is_light(value: Any, expected: bool) -> None:
    assert light(value) is expected


async def test_a_call_that_holds_much_is_kept_as_bounded_records() -> None:
    params = {"name": "get_ticket", "arguments": {"text": "x" * 1_000_000}}
    huge = Target("tool", "y" * 1_000_000)
    call = calls.allowed(operation=calls.operation(target=huge, params=params))
    feed = Feed()
    happens(feed, call)
    (kept,) = feed._kept
    assert isinstance(kept, tuple)
    assert sum(map(len, kept)) < 10_000
    with feed.listen(last=1) as listener:
        assert [each["truncated"] for each in await told(listener)] == [True, True]


async def test_content_is_told_when_it_is_switched_on() -> None:
    actor = static(Principal("human", "ana", "idp"))
    call = calls.allowed(actor=actor, result={"token": "SECRET", "id": 7})
    feed = Feed(Content(arguments=True, results=True, masking=Masking(("result.id",))))
    happens(feed, call)
    call.result = None
    with feed.listen(last=1) as listener:
        decision, outcome = await told(listener)
    assert decision["arguments"] == {"id": "<string 10>"}
    assert outcome["result"] == {"token": "<masked>", "id": 7}
