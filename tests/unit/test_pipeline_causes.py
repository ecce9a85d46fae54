"""One trace for what belongs together: each action is told the one that it goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from sidecar.conversation import Call, Origin, TraceContext
from sidecar.protocol.jsonrpc import JsonObject, Message, Request, Response
from tests.support.calls import BOT
from tests.support.fakes import ANA, DENIED, REVOKED, Stage, call_tool, modern

SAMPLE = Request("s1", "sampling/createMessage", {"messages": []})
WHO = {"method": "elicitation/create", "params": {"message": "who?"}}
HEADERS = {"traceparent": "the client's"}


class CauseTracer:
    """Each action has a trace of its own; whose cause it was told, and which headers."""

    def __init__(self) -> None:
        self.told: list[tuple[str | None, Mapping[str, str]]] = []

    def begin(
        self,
        meta: Mapping[str, object],
        headers: Mapping[str, str],
        cause: TraceContext | None = None,
    ) -> TraceContext:
        self.told.append((cause.trace_id if cause else None, headers))
        return TraceContext(str(len(self.told)))

    def malformed(self, code: str) -> None:
        """No matter here."""


class Told:
    """A stage whose messages bring headers, and what the tracer was told of each action."""

    def __init__(self) -> None:
        self.tracer = CauseTracer()
        self.stage = Stage(tracer=self.tracer)
        self.stage.origin = replace(self.stage.origin, headers=HEADERS)

    async def of(self, message: Message) -> Any:
        """What was told of a message of the client's."""
        before = len(self.tracer.told)
        await self.stage.send(message)
        return self.tracer.told[before]

    async def of_servers(self, message: Message, cause: Call | None = None) -> Any:
        """What was told of a message of the server's."""
        before, origin = len(self.tracer.told), self.stage.origin
        if cause is not None:
            origin = replace(origin, cause=cause.trace)
        await self.stage.pipeline.from_server(self.stage.conversation, message, origin)
        return self.tracer.told[before]


@pytest.fixture
async def told() -> Told:
    made = Told()
    await made.stage.shake_hands()
    return made


async def test_what_begins_by_itself_has_no_cause(told: Told) -> None:
    assert await told.of(call_tool("t", 1)) == (None, HEADERS)


async def test_a_server_asks_for_the_one_call_that_it_works_on(told: Told) -> None:
    await told.stage.send(call_tool("t", 1))
    assert await told.of_servers(SAMPLE) == (told.stage.calls[-1].trace.trace_id, {})


async def test_which_of_two_calls_it_asks_for_is_not_guessed(told: Told) -> None:
    await told.stage.send(call_tool("t", 1))
    await told.stage.send(call_tool("t", 2))
    assert await told.of_servers(SAMPLE) == (None, HEADERS)


async def test_the_transport_may_know_which_of_two_calls_it_asks_for(told: Told) -> None:
    await told.stage.send(call_tool("t", 1))
    first = told.stage.calls[-1]
    await told.stage.send(call_tool("t", 2))
    assert await told.of_servers(SAMPLE, first) == (first.trace.trace_id, {})


async def test_a_question_inside_an_answer_belongs_to_its_call(told: Told) -> None:
    await told.stage.send(call_tool("t", 1))
    call = told.stage.calls[-1]
    answer = Response(1, result={"resultType": "input_required", "inputRequests": {"q": WHO}})
    assert await told.of_servers(answer) == (call.trace.trace_id, {})


async def test_what_is_asked_of_a_task_goes_on_with_the_call_that_made_it(told: Told) -> None:
    await told.stage.exchange(call_tool("t", 1), {"task": {"taskId": "t1", "status": "working"}})
    made = told.stage.calls[-1].trace.trace_id
    assert await told.of(Request(2, "tasks/get", {"taskId": "t1"})) == (made, HEADERS)
    assert await told.of(Request(3, "tasks/get", {"taskId": "t2"})) == (None, HEADERS)


async def test_a_round_goes_on_with_the_one_before(told: Told) -> None:
    def asks(state: str) -> JsonObject:
        return {"resultType": "input_required", "inputRequests": {}, "requestState": state}

    await told.stage.exchange(modern("tools/call", 7, name="t"), asks("s1"))
    first = told.stage.calls[-1].trace.trace_id
    again = modern("tools/call", 8, name="t", inputResponses={}, requestState="s1")
    assert await told.of(again) == (first, HEADERS)
    second = told.stage.calls[-1].trace.trace_id
    await told.stage.deliver(Response(8, result=asks("s2")))
    third = modern("tools/call", 9, name="t", inputResponses={}, requestState="s2")
    assert await told.of(third) == (second, HEADERS)


@pytest.mark.parametrize("goes_on", ["task", "round"])
async def test_nobody_gets_into_anothers_trace_by_a_name_that_was_told(
    told: Told, goes_on: str
) -> None:
    result = {"task": {"taskId": "t1"}, "resultType": "input_required", "requestState": "s1"}
    await told.stage.exchange(modern("tools/call", 7, name="t"), result)
    assert told.stage.origin.actor is ANA
    told.stage.origin = Origin(BOT, headers=HEADERS)
    message = {
        "task": modern("subscriptions/listen", 8, notifications={"taskIds": ["t1"]}),
        "round": modern("tools/call", 8, name="t", inputResponses={}, requestState="s1"),
    }[goes_on]
    assert await told.of(message) == (None, HEADERS)
    told.stage.origin = Origin(ANA, headers=HEADERS)
    again = {
        "task": modern("subscriptions/listen", 9, notifications={"taskIds": ["t1"]}),
        "round": modern("tools/call", 9, name="t", inputResponses={}, requestState="s1"),
    }[goes_on]
    cause, _ = await told.of(again)
    assert cause is not None


async def test_what_ends_a_stream_later_belongs_to_its_opening(told: Told) -> None:
    stage = told.stage
    await stage.pipeline.stream(stage.conversation, "open", stage.origin)
    opening = str(len(told.tracer.told))
    with stage.pipeline.open.stream(stage.conversation, "open", stage.origin, lambda: None):
        assert told.tracer.told[-1] == (opening, HEADERS)
        before = len(told.tracer.told)
        stage.decider.default = DENIED
        stage.pipeline.open.change()
        await stage.pipeline.open.sweep()
    assert stage.recorder.finished_calls[-1].outcome == "denied"
    assert stage.recorder.finished_calls[-1].trace.trace_id == str(before)
    assert len(told.tracer.told) == before


async def test_what_ends_a_session_later_belongs_to_its_handshake() -> None:
    made = Told()
    made.stage.conversation.end = lambda: None
    await made.stage.shake_hands()
    hello = made.stage.recorder.finished_calls[0]
    assert hello.operation.message.method == "initialize"
    made.stage.decider.default = REVOKED
    made.stage.pipeline.open.change()
    await made.stage.pipeline.open.sweep()
    assert made.tracer.told[-1] == (hello.trace.trace_id, {})
