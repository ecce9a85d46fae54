"""How much may go on at once, and who is refused beyond it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import limits
from sidecar.conversation import Call
from sidecar.limits import Load
from sidecar.policy.enforcement import AnswerServer, Deliver, Forward, Reply
from sidecar.policy.identity import Principal, static
from sidecar.protocol.jsonrpc import Notification, Request, Response
from sidecar.protocol.methods import Direction
from sidecar.protocol.session import Target
from tests.support.calls import allowed, operation
from tests.support.fakes import Stage, call_tool, modern

ANA, BOB = (static(Principal("human", name, "static")) for name in ("ana", "bob"))
LISTEN: dict[str, Any] = {"notifications": {"toolsListChanged": True}}


def tool_call(**changes: Any) -> Call:
    return allowed(**{"actor": ANA, **changes})


def subscription() -> Call:
    target = Target("subscription", "tools", "listing")
    return tool_call(operation=operation("subscriptions/listen", target))


def fill(load: Load, *calls: Call) -> list[str | None]:
    """Begin them, and why each is refused."""
    told = []
    for each in calls:
        load.begin(each)
        error = load.exceeded(each)
        told.append(None if error is None else str(error))
    return told


ALL, ONE, OPEN = (
    "too many calls in flight",
    "too many calls of one actor in flight",
    "too many open streams",
)


@pytest.mark.parametrize(
    ("load", "calls", "told"),
    [
        pytest.param(Load(calls=1), [tool_call(), tool_call()], [None, ALL], id="in all"),
        pytest.param(
            Load(per_actor=1),
            [tool_call(), tool_call(), tool_call(actor=BOB)],
            [None, ONE, None],
            id="of one actor, and not of another",
        ),
        pytest.param(
            Load(per_actor=1),
            [
                tool_call(actor=static(ANA.principal, BOB.principal)),
                tool_call(actor=ANA),
                tool_call(actor=static(ANA.principal, BOB.principal)),
            ],
            [None, None, ONE],
            id="an actor is its whole chain",
        ),
        pytest.param(
            Load(calls=1, per_actor=1, streams=2),
            [subscription(), subscription(), tool_call(), subscription()],
            [None, None, None, OPEN],
            id="subscriptions are streams, and no calls",
        ),
        pytest.param(
            Load(calls=0, per_actor=0),
            [tool_call(operation=operation("notifications/progress", None))],
            [None],
            id="a notification is over at once",
        ),
        pytest.param(
            Load(calls=0, per_actor=0),
            [tool_call(operation=operation("ping", None, direction=Direction.FROM_SERVER))],
            [None],
            id="a server's question takes nothing from its client",
        ),
    ],
)
def test_what_counts_and_what_is_refused(
    load: Load, calls: list[Call], told: list[str | None]
) -> None:
    assert fill(load, *calls) == told


@given(st.lists(st.sampled_from(["ana", "bob", "stream"]), max_size=30))
def test_what_has_ended_makes_room(kinds: list[str]) -> None:
    load = Load(calls=3, per_actor=2, streams=2)
    makers = {"ana": tool_call, "bob": lambda: tool_call(actor=BOB), "stream": subscription}
    calls = [makers[each]() for each in kinds]
    before = fill(load, *calls)
    for each in calls:
        load.end(each)
    assert (load.in_flight, load.streams) == (0, 0)
    assert fill(load, *calls) == before


async def test_one_actor_does_not_starve_another() -> None:
    stage = Stage(actor=ANA, load=Load(calls=10, per_actor=2))
    outcomes = [await stage.send(call_tool("a", number)) for number in (1, 2, 3)]
    assert [type(each) for each in outcomes] == [Forward, Forward, Reply]
    assert isinstance(outcomes[2], Reply)
    assert outcomes[2].status == 200
    error = outcomes[2].response.error
    assert error is not None
    assert (error["code"], error["data"]["retryable"]) == (-31429, True)
    stage.origin = type(stage.origin)(BOB)
    assert isinstance(await stage.send(call_tool("a", 4)), Forward)


async def test_subscriptions_are_bounded_by_the_streams_and_leave_room_for_calls() -> None:
    stage = Stage(load=Load(calls=1, streams=1))
    stage.conversation.session.protocol_version = None
    first = await stage.send(modern("subscriptions/listen", 1, **LISTEN))
    second = await stage.send(modern("subscriptions/listen", 2, **LISTEN))
    assert isinstance(first, Forward)
    assert isinstance(second, Reply)
    assert second.response.error is not None
    assert second.response.error["code"] == -31429
    assert stage.pipeline.in_flight == 0
    assert isinstance(await stage.send(call_tool("a", 3)), Forward)
    await stage.deliver(Response(1, {}))
    assert isinstance(await stage.send(modern("subscriptions/listen", 4, **LISTEN)), Forward)


async def test_a_stream_too_many_is_refused_without_asking_and_written_down() -> None:
    stage = Stage(load=Load(streams=1))
    with stage.pipeline.load.stream():
        assert await stage.pipeline.stream(stage.conversation, "open", stage.origin) is None
        asked = len(stage.decider.questions)
        with stage.pipeline.load.stream():
            refused = await stage.pipeline.stream(stage.conversation, "resume", stage.origin)
            closing = await stage.pipeline.stream(stage.conversation, "close", stage.origin)
    assert refused is not None
    assert (refused.reasons[0].code, refused.retryable) == ("too_many_calls", True)
    assert closing is None
    assert len(stage.decider.questions) == asked + 1
    assert stage.recorder.verdicts[1] == ("stream/resume", "error", ("too_many_calls",))
    assert stage.recorder.ends[1] == ("stream/resume", "policy_error")
    assert stage.pipeline.load.streams == 0


async def test_a_server_can_not_ask_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_QUESTIONS", 2)
    stage = Stage()
    await stage.shake_hands()
    question = {"messages": [], "maxTokens": 1}
    told = [
        await stage.deliver(Request(number, "sampling/createMessage", question))
        for number in (1, 2, 3)
    ]
    assert [type(each) for each in told] == [Deliver, Deliver, AnswerServer]
    assert isinstance(told[2], AnswerServer)
    message = told[2].permitted.message
    assert isinstance(message, Response)
    assert message.error is not None
    assert (message.id, message.error["code"]) == (3, -31429)
    assert isinstance(await stage.deliver(Notification("notifications/message")), Deliver)
    await stage.send(Response(1, {}))
    assert isinstance(await stage.deliver(Request(4, "ping")), Deliver)
