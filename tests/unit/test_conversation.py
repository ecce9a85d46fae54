"""What lasts longer than a message: the order of arrival, ids, and what is known of a server."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.conversation import (
    MAX_ROUNDS,
    Call,
    Conversation,
    Server,
    Ticket,
    TraceContext,
    Turn,
    decision_id,
)
from sidecar.policy.document import Facts, Task
from sidecar.policy.identity import Principal, static
from sidecar.protocol.catalog import Entry, Lookup, read_tool
from sidecar.protocol.jsonrpc import Message, Notification, Request
from sidecar.protocol.methods import Direction, MethodTable
from sidecar.protocol.session import Operation, Session
from tests.support.fakes import ANA, call_tool, modern, tool

TABLE = MethodTable.of()


def receive(message: Message) -> Operation:
    return Session(TABLE).receive(message, Direction.FROM_CLIENT)


# ── The order of arrival ──────────────────────────────────────────────────────────────────────────


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_first_waits_for_nobody() -> None:
    async with asyncio.timeout(1):
        await Turn().take().wait()


async def test_each_waits_for_the_one_before() -> None:
    turn = Turn()
    first, second, third = turn.take(), turn.take(), turn.take()
    went: list[int] = []

    async def go(number: int, ticket: Ticket) -> None:
        await ticket.wait()
        went.append(number)

    async with asyncio.timeout(1), asyncio.TaskGroup() as tasks:
        for number, ticket in ((3, third), (2, second), (1, first)):
            tasks.create_task(go(number, ticket))
        await settle()
        assert went == [1]
        first.release()
        await settle()
        assert went == [1, 2]
        second.release()
    assert went == [1, 2, 3]
    third.release()


async def test_a_place_given_up_early_lets_nobody_overtake() -> None:
    turn = Turn()
    first, second, third = turn.take(), turn.take(), turn.take()
    second.release()
    assert not third_may_go(third)
    first.release()
    await settle()
    assert third_may_go(third)


def third_may_go(ticket: Ticket) -> bool:
    return ticket.before is None or ticket.before.done()


async def test_a_place_may_be_given_up_twice() -> None:
    turn = Turn()
    first, second = turn.take(), turn.take()
    for ticket in (second, second, first, first):
        ticket.release()
    await settle()
    assert third_may_go(turn.take())


async def test_one_that_stops_waiting_stops_nobody_else() -> None:
    turn = Turn()
    first, second, third = turn.take(), turn.take(), turn.take()
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(second.wait())
        await settle()
        waiting.cancel()
    second.release()
    assert not first.done.cancelled()
    first.release()
    async with asyncio.timeout(1):
        await third.wait()


@given(st.permutations(range(5)))
def test_whatever_is_ready_first_leaves_in_the_order_of_arrival(ready: list[int]) -> None:
    async def run() -> list[int]:
        turn, left = Turn(), list[int]()
        tickets = [turn.take() for _ in ready]
        decided = [asyncio.Event() for _ in ready]

        async def action(number: int) -> None:
            await decided[number].wait()
            await tickets[number].wait()
            left.append(number)
            tickets[number].release()

        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            for number in range(len(ready)):
                tasks.create_task(action(number))
            for number in ready:
                decided[number].set()
                await asyncio.sleep(0)
        return left

    assert asyncio.run(run()) == list(range(5))


# ── Ids ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_decision_id_is_a_uuid_of_version_7() -> None:
    value = decision_id()
    assert re.fullmatch(
        r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", value
    )
    assert uuid.UUID(value).variant == uuid.RFC_4122
    assert abs((uuid.UUID(value).int >> 80) / 1000 - time.time()) < 60


def test_decision_ids_are_sorted_by_time_and_never_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = []
    for moment in range(1_790_000_000, 1_790_000_100):
        monkeypatch.setattr(time, "time", lambda moment=moment: moment)
        ids += [decision_id(), decision_id()]
    assert ids[::2] == sorted(ids[::2])
    assert len(set(ids)) == len(ids)


def call(message: Message) -> Call:
    return Call(receive(message), ANA, "tickets", "stdio", decision_id(), TraceContext())


def test_a_call_is_known_by_the_id_that_its_asker_waits_under() -> None:
    assert call(call_tool("t", "x")).request_id == "x"
    assert call(Notification("notifications/initialized")).request_id is None


# ── What is known of a server ─────────────────────────────────────────────────────────────────────


def facts(server: Server, message: Message) -> Facts:
    operation = receive(message)
    return server.facts(operation, operation.targets[0])


def test_a_tool_is_looked_up_and_nothing_else_is() -> None:
    server = Server("tickets")
    listed = read_tool(tool("t"))
    server.catalog.observe(None, [listed], None)
    assert facts(server, call_tool("t")).tool == Lookup(True, listed)
    assert facts(server, call_tool("u")).tool == Lookup(False)
    assert facts(server, Request(1, "prompts/get", {"name": "t"})) == Facts()


def test_a_prompt_and_a_resource_are_known_or_not() -> None:
    server = Server("tickets")
    server.offers.shared.prompts.observe(None, [Entry("p")], None)
    server.offers.shared.resources.observe(None, [Entry("a://1")], "2")
    for name, known in (("p", True), ("q", False)):
        assert facts(server, Request(1, "prompts/get", {"name": name})) == Facts(known=known)
    for uri, found in (("a://1", True), ("a://2", None)):
        assert facts(server, Request(1, "resources/read", {"uri": uri})) == Facts(known=found)


def test_who_has_an_offer_of_their_own_is_judged_by_that() -> None:
    server, operation = Server("tickets"), receive(call_tool("t"))
    listed = read_tool(tool("t"))
    server.offers.to("ana").tools.observe(None, [listed], None)
    server.offers.to("bob").tools.observe(None, [], None)
    for caller, lookup in (("ana", Lookup(True, listed)), ("bob", Lookup(False)), (None, None)):
        talk = Conversation(Session(TABLE), server, "http", caller=caller)
        found = server.facts(operation, operation.targets[0], talk.offer).tool
        assert found == (lookup or Lookup(None))


def test_what_a_call_acts_on_is_said_by_the_configuration_then_by_the_server() -> None:
    server = Server("tickets", resources={"t": "ticket:{id}", "p": "prompt:{id}"})
    declared = {"evaluation": {"resource": {"type": "t", "id": "$params.arguments.id"}}}
    listed = [tool(name, inputSchema={"x-authzen-mapping": declared}) for name in ("t", "u")]
    server.catalog.observe(None, map(read_tool, listed), None)
    assert facts(server, call_tool("t", id=4711)).resource == "ticket:4711"
    assert facts(server, call_tool("u", id=4711)).resource == "t:4711"
    assert facts(server, call_tool("t", number=4711)).resource is None
    assert facts(server, call_tool("v", id=4711)).resource is None
    prompt = Request(1, "prompts/get", {"name": "p", "arguments": {"id": "1"}})
    assert facts(server, prompt).resource is None


@pytest.mark.parametrize(
    ("result", "made"),
    [
        pytest.param({"task": {"taskId": "t1", "status": "working"}}, True, id="2025-11-25"),
        pytest.param({"resultType": "task", "taskId": "t1"}, True, id="2026-07-28"),
        pytest.param({"taskId": "t1"}, False, id="no task"),
        pytest.param({"resultType": "complete", "taskId": "t1"}, False, id="another result"),
        pytest.param({"task": "t1"}, False, id="a task that is none"),
        pytest.param({"task": {"taskId": 1}}, False, id="an id that is none"),
        pytest.param({"content": []}, False, id="a plain result"),
    ],
)
def test_a_task_is_remembered_with_its_tool_and_its_owners(result: Any, made: bool) -> None:
    bot = static(Principal("agent", "bot", "static"), ANA.principal)
    server = Server("tickets")
    server.remember(receive(call_tool("export")), bot, result)
    expected = Task("export", ("static|bot", "static|ana")) if made else None
    assert facts(server, modern("tasks/get", taskId="t1")).task == expected
    listen = modern("subscriptions/listen", notifications={"taskIds": ["t1"]})
    assert facts(server, listen).task == expected
    other = modern("subscriptions/listen", notifications={"resourceSubscriptions": ["t1"]})
    assert facts(server, other).task is None


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(modern("tasks/get", taskId="t1"), id="asking after it"),
        pytest.param(Request(1, "prompts/get", {"name": "p"}), id="a prompt"),
        pytest.param(Request(1, "ping"), id="what has no target"),
    ],
)
def test_only_a_call_makes_a_task(message: Message) -> None:
    server = Server("tickets")
    mine = Task("export", ("static|ana",))
    server.tasks.remember("t1", mine)
    stranger = static(Principal("human", "eve", "static"))
    server.remember(receive(message), stranger, {"resultType": "task", "taskId": "t1"})
    server.remember(receive(message), stranger, {"task": {"taskId": "t1"}})
    assert server.tasks.get("t1") == mine


def again(state: Any, **params: Any) -> Request:
    return modern("tools/call", name="t", inputResponses={}, requestState=state, **params)


def test_rounds_are_counted_by_the_state_that_goes_with_them() -> None:
    server = Server("tickets")
    first, asks = modern("tools/call", name="t"), {"resultType": "input_required"}
    assert facts(server, first).round is None
    server.remember(receive(first), ANA, {**asks, "requestState": "s1"})
    assert facts(server, again("s1")).round == 2
    server.remember(receive(again("s1")), ANA, {**asks, "requestState": "s2"})
    assert facts(server, again("s2")).round == 3
    assert facts(server, again("s1")).round == 2
    assert facts(server, again("never seen")).round == 2
    assert facts(server, modern("tools/call", name="t", inputResponses={})).round == 2


def test_a_result_without_target_that_asks_for_input_is_taken_as_it_is() -> None:
    Server("tickets").remember(receive(Request(1, "ping")), ANA, {"resultType": "input_required"})


def test_what_is_remembered_has_a_bound() -> None:
    server = Server("tickets")
    for number in range(MAX_ROUNDS + 10):
        server.rounds.remember(str(number), number)
    assert len(server.rounds) == MAX_ROUNDS


def test_servers_and_conversations_share_nothing_by_accident() -> None:
    one, other = Server("a"), Server("b")
    one.catalog.observe(None, [read_tool(tool("t"))], None)
    one.tasks.remember("t1", Task("t", ()))
    assert not other.catalog.complete
    assert not other.tasks
    first = Conversation(Session(TABLE), one, "stdio")
    second = Conversation(Session(TABLE), one, "stdio")
    first.calls.ask(1, call(call_tool("t")))
    assert second.calls.get(1) is None
    assert second.turn is not first.turn
