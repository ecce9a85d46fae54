"""A call whose stream ended before its answer: its record tells what really became of it."""

from __future__ import annotations

import pytest

from sidecar.limits import Load
from sidecar.policy.enforcement import Deliver, Drop, Forward
from sidecar.protocol.jsonrpc import Notification, Response
from sidecar.protocol.session import MAX_ABANDONED
from tests.support.fakes import Stage, call_tool


async def suspended(number: int = 1, **options: object) -> Stage:
    """A conversation with so many calls whose streams have ended."""
    stage = Stage(**options)  # type: ignore[arg-type]
    for each in range(1, number + 1):
        assert isinstance(await stage.send(call_tool("slow", each)), Forward)
        stage.pipeline.suspend(stage.conversation, stage.calls[-1])
    return stage


async def test_an_answer_on_another_stream_ends_it_as_it_ended() -> None:
    stage = await suspended()
    assert stage.recorder.ends == []
    assert await stage.deliver(Response(1, {"content": [], "isError": True})) == Deliver()
    assert stage.recorder.ends == [("tools/call", "tool_error")]
    assert await stage.deliver(Response(1, {})) == Drop()


async def test_its_client_may_still_cancel_it() -> None:
    stage = await suspended()
    cancel = Notification("notifications/cancelled", {"requestId": 1})
    assert isinstance(await stage.send(cancel), Forward)
    assert stage.recorder.ends[0] == ("tools/call", "cancelled")
    assert await stage.deliver(Response(1, {})) == Deliver()  # the server had not seen it
    assert len(stage.recorder.ends) == 2


@pytest.mark.parametrize("end", ["close", "forget"])
async def test_it_ends_with_its_conversation(end: str) -> None:
    stage = await suspended(2)
    getattr(stage.pipeline, end)(stage.conversation)
    getattr(stage.pipeline, end)(stage.conversation)
    assert stage.recorder.ends == [("tools/call", "cancelled")] * 2
    assert stage.pipeline.in_flight == 0


async def test_a_conversation_that_is_forgotten_still_answers_who_waits() -> None:
    stage = await suspended()
    await stage.send(call_tool("quick", 2))
    stage.pipeline.forget(stage.conversation)
    assert await stage.deliver(Response(2, {})) == Deliver()
    assert stage.recorder.ends == [("tools/call", "cancelled"), ("tools/call", "success")]


async def test_it_takes_nobodys_place() -> None:
    stage = await suspended(3, load=Load(calls=1, per_actor=1))
    assert stage.pipeline.in_flight == 0
    for each in (1, 2, 3):
        await stage.deliver(Response(each, {}))
    assert stage.pipeline.in_flight == 0
    assert isinstance(await stage.send(call_tool("quick", 4)), Forward)
    assert stage.pipeline.in_flight == 1


async def test_of_too_many_the_oldest_is_given_up() -> None:
    stage = await suspended(MAX_ABANDONED + 1)
    assert [(call.request_id, call.outcome) for call in stage.recorder.finished_calls] == [
        (1, "cancelled")
    ]
    assert await stage.deliver(Response(1, {})) == Drop()
    assert await stage.deliver(Response(2, {})) == Deliver()


async def test_where_nothing_is_resumed_it_was_cancelled() -> None:
    stage = await suspended(lasting=False)
    assert stage.recorder.ends == [("tools/call", "cancelled")]
    assert await stage.deliver(Response(1, {})) == Drop()
    assert stage.pipeline.in_flight == 0
