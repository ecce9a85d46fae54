"""Decisions come in any order, and what they let through leaves in the order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.policy.enforcement import Drop, Forward, Outcome, Reply
from sidecar.protocol.jsonrpc import Message, Notification, Request, Response
from tests.support.fakes import DENIED, Stage, call_tool, plain, tool

NAMES = ["a", "b", "c", "d"]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def start(coroutine: Coroutine[Any, Any, Outcome]) -> asyncio.Task[Outcome]:
    return asyncio.get_running_loop().create_task(coroutine)


def stage_of(*held: str) -> Stage:
    """A stage where decisions on `held` wait, and every tool is known."""
    stage = Stage(tools=[[tool(name) for name in NAMES]], catalog_wait=0.01)
    for name in held:
        stage.decider.hold(name)
    return stage


def cancel(request_id: object) -> Notification:
    return Notification("notifications/cancelled", {"requestId": request_id})


@given(st.permutations(NAMES), st.sets(st.sampled_from(NAMES)), st.booleans())
def test_calls_leave_in_the_order_of_arrival(
    decided: list[str], denied: set[str], lasting: bool
) -> None:
    async def run() -> Stage:
        stage = stage_of(*NAMES)
        stage.conversation.lasting = lasting
        stage.decider.by_name = dict.fromkeys(denied, DENIED)
        calls = [start(stage.send(call_tool(name, name))) for name in NAMES]
        for name in decided:
            await settle()
            stage.decider.held[name].set()
        await asyncio.gather(*calls)
        return stage

    stage = asyncio.run(run())
    left = [each.params["name"] for each in stage.sent if isinstance(each, Request) and each.params]
    assert left == [name for name in NAMES if name not in denied]
    assert stage.pipeline.in_flight == len(left)


async def test_decisions_are_asked_for_at_the_same_time() -> None:
    stage = stage_of("a", "b")
    calls = [start(stage.send(call_tool(name, name))) for name in ("a", "b")]
    await settle()
    assert stage.decider.asked_about == ["a", "b"]
    stage.decider.held["b"].set()
    await settle()
    assert stage.sent == []
    stage.decider.held["a"].set()
    await asyncio.gather(*calls)
    assert [getattr(each, "id", None) for each in stage.sent] == ["a", "b"]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Request(9, "tools/list"), id="a listing"),
        pytest.param(Request(9, "logging/setLevel", {"level": "info"}), id="a level"),
        pytest.param(Notification("notifications/initialized"), id="initialized"),
        pytest.param(Notification("notifications/roots/list_changed"), id="roots"),
    ],
)
async def test_what_might_matter_to_a_waiting_call_waits_behind_it(message: Message) -> None:
    stage = stage_of("a")
    call, other = start(stage.send(call_tool("a"))), start(stage.send(message))
    await settle()
    assert stage.sent == []
    stage.decider.held["a"].set()
    await asyncio.gather(call, other)
    assert [plain(each) for each in stage.sent] == [call_tool("a"), message]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Request(9, "ping"), id="a ping"),
        pytest.param(Notification("notifications/progress", {"progressToken": 1}), id="progress"),
        pytest.param(cancel(77), id="a cancel"),
    ],
)
async def test_some_messages_overtake_what_waits(message: Message) -> None:
    stage = stage_of("a")
    call = start(stage.send(call_tool("a")))
    await settle()
    assert isinstance(await stage.send(message), Forward)
    assert [plain(each) for each in stage.sent] == [message]
    stage.decider.held["a"].set()
    await call
    assert len(stage.sent) == 2


async def test_an_answer_overtakes_what_waits() -> None:
    stage = stage_of("a")
    await stage.shake_hands()
    await stage.deliver(Request("s1", "roots/list"))
    call = start(stage.send(call_tool("a")))
    await settle()
    assert isinstance(await stage.send(Response("s1", {"roots": []})), Forward)
    stage.decider.held["a"].set()
    await call


async def test_the_next_leaves_when_the_bytes_of_the_first_have_left() -> None:
    stage = stage_of()
    outcome, ticket, _ = await stage.pipeline.from_client(
        stage.conversation, call_tool("a", 1), stage.origin, stage.server.ask
    )
    assert isinstance(outcome, Forward)
    assert ticket is not None
    second = start(stage.send(call_tool("b", 2)))
    await settle()
    assert stage.sent == []
    ticket.release()
    await second
    assert len(stage.sent) == 1


async def test_what_overtakes_has_no_place_in_the_queue() -> None:
    stage = stage_of()
    _, ticket, call = await stage.pipeline.from_client(
        stage.conversation, Request(1, "ping"), stage.origin, stage.server.ask
    )
    assert ticket is None
    assert call is not None


# ── Taking a request back ─────────────────────────────────────────────────────────────────────────


async def test_a_waiting_request_that_is_taken_back_never_leaves() -> None:
    stage = stage_of("a")
    call, behind = start(stage.send(call_tool("a", 7))), start(stage.send(call_tool("b", 8)))
    await settle()
    assert await stage.send(cancel(7)) == Drop()
    stage.decider.held["a"].set()
    assert await call == Drop()
    assert isinstance(await behind, Forward)
    assert [plain(each) for each in stage.sent] == [call_tool("b", 8)]
    await stage.deliver(Response(8, {}))
    assert sorted(stage.recorder.ends) == [
        ("notifications/cancelled", "cancelled"),
        ("tools/call", "cancelled"),
        ("tools/call", "success"),
    ]
    assert stage.pipeline.in_flight == 0
    assert isinstance(await stage.send(call_tool("a", 7)), Forward)


async def test_a_denied_request_that_was_taken_back_gets_no_answer() -> None:
    stage = stage_of("a")
    stage.decider.by_name["a"] = DENIED
    call = start(stage.send(call_tool("a", 7)))
    await settle()
    await stage.send(cancel(7))
    stage.decider.held["a"].set()
    assert await call == Drop()
    assert stage.pipeline.in_flight == 0


async def test_a_request_that_has_left_is_taken_back_at_the_server() -> None:
    stage = stage_of()
    await stage.send(call_tool("a", 7))
    assert isinstance(await stage.send(cancel(7)), Forward)
    assert stage.sent_methods == ["tools/call", "notifications/cancelled"]
    assert stage.recorder.ends == [
        ("tools/call", "cancelled"),
        ("notifications/cancelled", "success"),
    ]
    assert stage.pipeline.in_flight == 0
    assert not isinstance(await stage.deliver(Response(7, {})), Drop)
    assert isinstance(await stage.deliver(Response(7, {})), Drop)
    assert len(stage.recorder.ends) == 2


async def test_a_late_answer_is_judged_as_what_was_asked() -> None:
    stage = Stage(DENIED)
    await stage.send(Request(7, "tools/list"))
    await stage.send(cancel(7))
    late = await stage.deliver(Response(7, {"tools": [tool("secret")]}))
    assert "secret" not in str(late)


async def test_an_id_that_was_taken_back_is_not_lent_to_another_question() -> None:
    stage = Stage(DENIED)
    await stage.send(Request(7, "tools/list"))
    await stage.send(cancel(7))
    with pytest.raises(Exception, match="in flight"):
        await stage.send(Request(7, "ping"))
    assert "secret" not in str(await stage.deliver(Response(7, {"tools": [tool("secret")]})))


@pytest.mark.parametrize("request_id", [8, "7", None, 7.0, True, [7], {"a": 7}], ids=repr)
async def test_a_cancel_of_something_else_passes_and_ends_nothing(request_id: object) -> None:
    stage = stage_of("a")
    call = start(stage.send(call_tool("a", 7)))
    await settle()
    assert isinstance(await stage.send(cancel(request_id)), Forward)
    stage.decider.held["a"].set()
    assert isinstance(await call, Forward)


async def test_the_handshake_is_never_taken_back() -> None:
    stage = stage_of("initialize")
    hello = start(stage.send(Request(0, "initialize", {})))
    await settle()
    assert isinstance(await stage.send(cancel(0)), Forward)
    stage.decider.held["initialize"].set()
    assert isinstance(await hello, Forward)
    assert stage.recorder.ends == [("notifications/cancelled", "success")]


# ── A client that goes away at any moment ─────────────────────────────────────────────────────────

MESSAGES: list[Message] = [
    call_tool("a", 1),
    call_tool("denied", 2),
    Request(3, "tools/list"),
    Request(4, "initialize", {}),
    Request(5, "ping"),
    cancel(1),
    Notification("notifications/initialized"),
    Request(6, "nobody/knows"),
]


@given(
    order=st.permutations(MESSAGES),
    steps=st.lists(st.integers(0, 6), min_size=len(MESSAGES), max_size=len(MESSAGES)),
    victims=st.sets(st.integers(0, len(MESSAGES) - 1)),
    held=st.booleans(),
)
def test_each_call_ends_exactly_once_whenever_its_client_goes_away(
    order: list[Message], steps: list[int], victims: set[int], held: bool
) -> None:
    async def run() -> Stage:
        stage = stage_of(*(["a", "denied"] if held else []))
        stage.decider.by_name["denied"] = DENIED
        tasks = []
        for number, message in enumerate(order):
            tasks.append(start(stage.send(message)))
            for _ in range(steps[number]):
                await asyncio.sleep(0)
            if number in victims:
                tasks[steps[number] % len(tasks)].cancel()
        for event in stage.decider.held.values():
            event.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(
            isinstance(each, (Forward, Reply, Drop, asyncio.CancelledError)) for each in done
        )
        for message in list(stage.sent):
            if isinstance(message, Request):
                await stage.deliver(Response(message.id, {"tools": []}))
        assert stage.pipeline.in_flight == 0
        assert isinstance(await stage.send(Request("last", "logging/setLevel")), Forward)
        stage.pipeline.close(stage.conversation)
        return stage

    stage = asyncio.run(run())
    finished = stage.recorder.finished_calls
    assert len({id(each) for each in finished}) == len(finished)
    assert {id(each) for each in stage.recorder.decided_calls} <= {id(each) for each in finished}
    assert stage.pipeline.in_flight == 0
