"""One action from its arrival to its end: judged, recorded, let through or not, finished once."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest

from sidecar.errors import (
    DecisionError,
    DecisionInvalid,
    DecisionUnavailable,
    MalformedMessage,
    UpstreamError,
    UpstreamTimeout,
)
from sidecar.limits import Load
from sidecar.policy import identity
from sidecar.policy.decision import Decision, Reason
from sidecar.policy.enforcement import Deliver, Drop, Forward, Outcome, Reply, Rules
from sidecar.protocol.jsonrpc import JsonObject, Message, Notification, Request, Response
from tests.support.fakes import (
    ALLOWED,
    ANA,
    CARRIER,
    DENIED,
    REVOKED,
    TRACE_ID,
    Stage,
    call_tool,
    modern,
    plain,
    tool,
)

LATE = DecisionUnavailable("OPA is late", detail="timeout")
UNDEFINED = DecisionInvalid("undefined", detail="undefined_decision")
OBLIGED = Decision(allow=True, obligations=({"type": "mask_result"},))
BROKEN_ANSWERS = [
    pytest.param(DecisionUnavailable("x", detail="connection_error"), True, id="not reached"),
    pytest.param(LATE, True, id="late"),
    pytest.param(DecisionUnavailable("x", detail="server_error"), True, id="500"),
    pytest.param(UNDEFINED, False, id="undefined"),
    pytest.param(DecisionInvalid("x", detail="bad_response"), False, id="garbage"),
    pytest.param(DecisionInvalid("x", detail="evaluation_error"), False, id="evaluation"),
]


def error_of(outcome: Outcome) -> JsonObject:
    assert isinstance(outcome, Reply)
    assert outcome.response.error is not None
    return outcome.response.error


def nothing_is_left(stage: Stage) -> None:
    """Every call ended once, and nobody waits."""
    assert stage.pipeline.in_flight == 0
    assert len(stage.conversation.calls) == len(stage.conversation.server_calls) == 0
    finished = stage.recorder.finished_calls
    assert len({id(each) for each in finished}) == len(finished)
    assert all(each.outcome is not None for each in (*finished, *stage.recorder.decided_calls))
    assert {id(each) for each in stage.recorder.decided_calls} <= {id(each) for each in finished}


# ── Allowed ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "message",
    [call_tool("t", 7, id=4711), modern("tools/call", 7, name="t", arguments={"id": 4711})],
    ids=["legacy", "modern"],
)
async def test_an_allowed_call_reaches_the_server_and_its_answer_the_client(
    message: Request,
) -> None:
    stage = Stage()
    outcome = await stage.send(message)
    assert isinstance(outcome, Forward)
    assert plain(outcome.permitted.message) == message
    assert stage.pipeline.in_flight == 1
    assert stage.recorder.verdicts == [("tools/call", "allow", ())]
    assert stage.recorder.ends == []
    assert await stage.deliver(Response(7, {"content": []})) == Deliver()
    assert stage.recorder.ends == [("tools/call", "success")]
    nothing_is_left(stage)


async def test_the_call_knows_when_what_happened() -> None:
    stage = Stage()
    await stage.exchange(call_tool("t"), {})
    (call,) = stage.calls
    moments = [call.received, call.asked, call.answered, call.forwarded, call.finished]
    assert moments == sorted(moments)
    assert 0 not in moments
    assert (call.actor, call.server, call.transport) == (ANA, "tickets", "stdio")
    assert (call.verdict, call.mode, call.decision) == ("allow", "enforce", ALLOWED)


async def test_the_question_says_who_asks_what_of_whom() -> None:
    stage = Stage(tools=[[tool("t")]], pod=lambda: {"name": "p1"}, deadline=0.25)
    await stage.send(call_tool("t", id=4711))
    (question,) = stage.decider.questions
    assert question["actor"]["id"] == "ana"
    assert question["tool"]["arguments"] == {"id": 4711}
    assert question["server"] == {"name": "tickets"}
    assert question["enforcer"]["version"] == "0.0.0"
    assert question["context"]["source_address"] == "10.1.2.3"
    assert question["context"]["trace_id"] == TRACE_ID
    assert question["context"]["pod"] == {"name": "p1"}
    assert question["context"]["time"].endswith("Z")
    assert stage.decider.deadlines == [0.25]
    assert stage.decider.headers == [CARRIER]
    assert stage.calls[0].tool_known is True


async def test_the_trace_begins_with_what_the_client_sent() -> None:
    stage = Stage()
    stage.origin = type(stage.origin)(ANA, None, {"traceparent": "from-http"})
    await stage.send(Request(1, "ping", {"_meta": {"traceparent": "from-meta"}}))
    await stage.send(Request(2, "ping", {"_meta": "odd"}))
    assert stage.tracer.began_with == [
        ({"traceparent": "from-meta"}, {"traceparent": "from-http"}),
        ({}, {"traceparent": "from-http"}),
    ]


@pytest.mark.parametrize(
    ("response", "end", "rpc_error"),
    [
        pytest.param(Response(1, {"content": []}), "success", None, id="a result"),
        pytest.param(Response(1, {"isError": True}), "tool_error", None, id="a tool's error"),
        pytest.param(Response(1, {"isError": "yes"}), "success", None, id="nearly an error"),
        pytest.param(Response(1, [1]), "success", None, id="an odd result"),
        pytest.param(
            Response(1, error={"code": -32602, "message": "no"}),
            *("upstream_error", (-32602, "no")),
            id="an error",
        ),
        pytest.param(Response(1, error={"code": 5}), "upstream_error", (5, ""), id="a bare error"),
    ],
)
async def test_the_end_of_a_call_is_what_the_server_said(
    response: Response, end: str, rpc_error: tuple[int, str] | None
) -> None:
    stage = Stage()
    await stage.send(call_tool("t"))
    assert await stage.deliver(response) == Deliver()
    assert (stage.calls[0].outcome, stage.calls[0].rpc_error) == (end, rpc_error)
    nothing_is_left(stage)


# ── Not allowed ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(call_tool("t", 7), id="a call"),
        pytest.param(modern("tools/call", 7, name="t"), id="a modern call"),
        pytest.param(Request(7, "resources/read", {"uri": "u:a"}), id="a read"),
        pytest.param(Request(7, "resources/subscribe", {"uri": "u:a"}), id="a subscription"),
        pytest.param(Request(7, "prompts/get", {"name": "p"}), id="a prompt"),
        pytest.param(
            Request(7, "completion/complete", {"ref": {"type": "ref/prompt", "name": "p"}}),
            id="a completion",
        ),
        pytest.param(Request(7, "tasks/result", {"taskId": "t1"}), id="a task"),
        pytest.param(modern("subscriptions/listen", 7), id="listening"),
        pytest.param(Request(7, "acme/reindex"), id="a declared method"),
    ],
)
async def test_a_denied_action_goes_nowhere_and_its_caller_learns_why(message: Request) -> None:
    stage = Stage(DENIED)
    outcome = await stage.send(message)
    error = error_of(outcome)
    assert isinstance(outcome, Reply)
    assert (outcome.response.id, outcome.status, error["code"]) == (7, 200, -31403)
    assert error["data"]["reasons"][0]["code"] == "not_granted"
    assert error["data"]["decision_id"] == stage.calls[0].decision_id
    assert stage.sent == []
    assert stage.recorder.verdicts == [(message.method, "deny", ("not_granted",))]
    assert stage.recorder.ends == [(message.method, "denied")]
    assert stage.calls[0].rpc_error == (-31403, error["message"])
    nothing_is_left(stage)


@pytest.mark.parametrize(("answer", "retryable"), BROKEN_ANSWERS)
async def test_without_a_decision_nothing_goes_anywhere(
    answer: DecisionError, retryable: bool
) -> None:
    stage = Stage(answer)
    error = error_of(await stage.send(call_tool("t")))
    assert (error["code"], error["data"]["retryable"]) == (-31503, retryable)
    assert error["data"]["reasons"][0]["code"] == answer.code
    assert stage.sent == []
    assert stage.recorder.verdicts == [("tools/call", "error", (answer.code,))]
    assert stage.recorder.ends == [("tools/call", "policy_error")]
    assert stage.calls[0].error is answer
    nothing_is_left(stage)


async def test_after_a_failure_the_next_call_is_judged_anew() -> None:
    stage = Stage(LATE)
    await stage.send(call_tool("t"))
    stage.decider.default = ALLOWED
    assert isinstance(await stage.send(call_tool("t")), Forward)


async def test_an_obligation_that_is_not_built_denies() -> None:
    stage = Stage(OBLIGED)
    error = error_of(await stage.send(call_tool("t")))
    assert error["data"]["reasons"][0]["code"] == "obligation_unsupported"
    assert stage.recorder.verdicts == [("tools/call", "deny", ("obligation_unsupported",))]
    assert stage.recorder.ends == [("tools/call", "denied")]
    nothing_is_left(stage)


async def test_a_denial_may_be_a_result() -> None:
    stage = Stage(DENIED, rules=Rules(denial="result"))
    outcome = await stage.send(call_tool("t"))
    assert isinstance(outcome, Reply)
    assert outcome.response.result["isError"] is True
    nothing_is_left(stage)


@pytest.mark.parametrize(
    ("message", "status"),
    [
        pytest.param(Request(7, "nobody/knows"), 200, id="legacy"),
        pytest.param(modern("nobody/knows", 7), 404, id="modern"),
        pytest.param(modern("tasks/result", 7, taskId="1"), 404, id="of another era"),
        pytest.param(Request(7, "sampling/createMessage"), 200, id="the server's"),
    ],
)
async def test_an_unknown_method_is_denied_and_nobody_is_asked(
    message: Request, status: int
) -> None:
    stage = Stage(rules=Rules("all"))
    outcome = await stage.send(message)
    assert isinstance(outcome, Reply)
    assert (outcome.response.id, outcome.status, error_of(outcome)["code"]) == (7, status, -32601)
    assert (stage.decider.questions, stage.sent) == ([], [])
    assert stage.recorder.verdicts == [(message.method, "deny", ("unknown_method",))]
    assert stage.recorder.ends == [(message.method, "denied")]
    nothing_is_left(stage)


@pytest.mark.parametrize("method", ["notifications/none", "tools/call", "notifications/message"])
async def test_an_unknown_notification_is_dropped_and_recorded(method: str) -> None:
    stage = Stage()
    assert await stage.send(Notification(method, {"name": "t"})) == Drop()
    assert (stage.decider.questions, stage.sent) == ([], [])
    assert stage.recorder.ends == [(method, "denied")]
    nothing_is_left(stage)


async def test_what_is_malformed_is_nobodys_action() -> None:
    stage = Stage()
    with pytest.raises(MalformedMessage) as refused:
        await stage.send(Request(7, "tools/call", {"name": ["t"]}))
    stage.pipeline.malformed(refused.value)
    assert stage.tracer.malformed_codes == ["malformed_message"]
    assert stage.recorder.decided_calls == stage.recorder.finished_calls == []
    nothing_is_left(stage)


async def test_each_thing_listened_to_is_judged() -> None:
    listen = modern(
        "subscriptions/listen",
        notifications={"resourceSubscriptions": ["u:a", "u:b"], "toolsListChanged": True},
    )
    stage = Stage()
    assert isinstance(await stage.send(listen), Forward)
    assert stage.decider.asked_about == ["u:a", "u:b", "toolsListChanged"]
    for answer, code in ((DENIED, -31403), (LATE, -31503), (REVOKED, -31403)):
        stage = Stage()
        stage.decider.by_name["u:b"] = answer
        assert error_of(await stage.send(listen))["code"] == code
        assert stage.sent == []
        nothing_is_left(stage)


# ── Evidence ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(call_tool("t"), id="a decision"),
        pytest.param(Request(1, "tools/list"), id="a listing"),
        pytest.param(Request(1, "initialize", {}), id="negotiation"),
        pytest.param(Request(1, "ping"), id="the table"),
        pytest.param(Notification("notifications/initialized"), id="a notification"),
    ],
)
async def test_without_a_record_nothing_is_let_through(message: Request | Notification) -> None:
    stage = Stage()
    stage.recorder.broken = True
    outcome = await stage.send(message)
    assert stage.sent == []
    if isinstance(message, Notification):
        assert outcome == Drop()
    else:
        error = error_of(outcome)
        assert (error["code"], error["data"]["reasons"][0]["code"]) == (-31503, "audit_failed")
    assert stage.recorder.ends == [(message.method, "policy_error")]
    nothing_is_left(stage)


async def test_a_denial_that_can_not_be_written_down_is_still_one() -> None:
    stage = Stage(DENIED)
    stage.recorder.broken = True
    assert error_of(await stage.send(call_tool("t")))["code"] == -31403
    nothing_is_left(stage)


# ── What the table lets pass, and negotiation ─────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Request(1, "ping"), id="ping"),
        pytest.param(Request(1, "logging/setLevel", {"level": "info"}), id="level"),
        pytest.param(Notification("notifications/initialized"), id="initialized"),
        pytest.param(Notification("notifications/roots/list_changed"), id="roots"),
        pytest.param(Notification("notifications/progress", {"progressToken": 1}), id="progress"),
        pytest.param(Notification("notifications/cancelled", {"requestId": 9}), id="cancel"),
        pytest.param(Notification("notifications/cancelled"), id="cancel of nothing"),
    ],
)
@pytest.mark.parametrize("answer", [DENIED, REVOKED, LATE], ids=["denied", "revoked", "late"])
async def test_the_table_passes_without_asking(message: Message, answer: Any) -> None:
    stage = Stage(answer)
    assert isinstance(await stage.send(message), Forward)
    assert stage.decider.questions == []
    assert [plain(each) for each in stage.sent] == [message]
    if isinstance(message, Request):
        assert await stage.deliver(Response(1, {})) == Deliver()
    nothing_is_left(stage)


NEGOTIATIONS = [
    pytest.param(Request(1, "initialize", {"protocolVersion": "2025-06-18"}), id="initialize"),
    pytest.param(modern("server/discover"), id="discover"),
]


@pytest.mark.parametrize("message", NEGOTIATIONS)
@pytest.mark.parametrize("answer", [ALLOWED, DENIED, LATE, UNDEFINED, OBLIGED])
async def test_negotiation_never_depends_on_the_policy(message: Request, answer: Any) -> None:
    stage = Stage(answer)
    assert isinstance(await stage.send(message), Forward)
    assert stage.decider.questions[0]["target"] == {"type": "negotiation", "name": message.method}
    assert await stage.deliver(Response(1, {"protocolVersion": "2025-06-18"})) == Deliver()
    assert stage.recorder.ends == [(message.method, "success")]
    nothing_is_left(stage)


@pytest.mark.parametrize("message", NEGOTIATIONS)
@pytest.mark.parametrize("shadow", ["off", "allowed", "all"])
async def test_a_revoked_key_negotiates_nothing(
    message: Request, shadow: Literal["off", "allowed", "all"]
) -> None:
    stage = Stage(REVOKED, rules=Rules(shadow))
    error = error_of(await stage.send(message))
    assert (error["code"], error["data"]["reasons"][0]["code"]) == (-31403, "revoked")
    assert stage.sent == []
    assert stage.recorder.verdicts == [(message.method, "deny", ("revoked",))]
    nothing_is_left(stage)


# ── Shadow ────────────────────────────────────────────────────────────────────────────────────────

SHADOW_DENIED = Decision(allow=False, reasons=(Reason("later"),), mode="shadow")


@pytest.mark.parametrize(
    ("answer", "shadow", "passes"),
    [
        pytest.param(DENIED, "all", True, id="all lifts a denial"),
        pytest.param(DENIED, "allowed", False, id="allowed lifts none that did not ask"),
        pytest.param(SHADOW_DENIED, "allowed", True, id="allowed lifts one that asked"),
        pytest.param(SHADOW_DENIED, "off", False, id="off lifts none"),
        pytest.param(OBLIGED, "all", True, id="all lifts an obligation"),
        pytest.param(REVOKED, "all", False, id="nothing lifts a revocation"),
        pytest.param(LATE, "all", False, id="nothing lifts an error"),
        pytest.param(UNDEFINED, "all", False, id="nothing lifts no decision"),
    ],
)
async def test_shadow_lifts_valid_refusals_and_nothing_else(
    answer: Any, shadow: Literal["off", "allowed", "all"], passes: bool
) -> None:
    stage = Stage(answer, rules=Rules(shadow))
    outcome = await stage.send(call_tool("t"))
    assert isinstance(outcome, Forward) == passes
    (call,) = stage.calls
    if passes:
        assert call.mode == "shadow"
        assert call.verdict == ("allow" if answer is OBLIGED else "deny")
        await stage.deliver(Response(1, {}))
        assert call.outcome == "success"
    nothing_is_left(stage)


async def test_what_shadow_lifts_is_recorded_as_refused() -> None:
    stage = Stage(DENIED, rules=Rules("all"))
    await stage.exchange(call_tool("t"), {})
    assert stage.recorder.verdicts == [("tools/call", "deny", ("not_granted",))]
    assert stage.recorder.ends == [("tools/call", "success")]


# ── Ids, bounds and ends ──────────────────────────────────────────────────────────────────────────


async def test_an_id_in_flight_is_refused_and_the_first_call_goes_on() -> None:
    stage = Stage()
    await stage.send(call_tool("first", 7))
    with pytest.raises(MalformedMessage) as refused:
        await stage.send(call_tool("second", 7))
    assert refused.value.request_id == 7
    with pytest.raises(MalformedMessage):
        await stage.send(Request(7, "nobody/knows"))
    assert isinstance(await stage.send(call_tool("third", "7")), Forward)
    assert await stage.deliver(Response(7, {})) == Deliver()
    assert await stage.deliver(Response("7", {})) == Deliver()
    nothing_is_left(stage)


async def test_an_id_is_free_again_after_its_answer_or_refusal() -> None:
    stage = Stage()
    stage.decider.by_name["denied"] = DENIED
    await stage.send(call_tool("denied", 7))
    await stage.exchange(call_tool("t", 7), {})
    await stage.exchange(call_tool("t", 7), {})
    nothing_is_left(stage)


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(Response(8, {}), id="never asked"),
        pytest.param(Response("7", {}), id="the text of the id"),
        pytest.param(Response(None, {}), id="no id"),
    ],
)
async def test_an_answer_that_nobody_asked_for_is_dropped(response: Response) -> None:
    stage = Stage()
    await stage.send(call_tool("t", 7))
    assert await stage.deliver(response) == Drop()
    assert await stage.deliver(Response(7, {})) == Deliver()
    assert await stage.deliver(Response(7, {})) == Drop()
    nothing_is_left(stage)


async def test_an_error_without_id_is_delivered() -> None:
    assert await Stage().deliver(Response(None, error={"code": -32700})) == Deliver()


async def test_an_answer_before_the_question_was_let_through_is_nobodys() -> None:
    stage = Stage(DENIED)
    held = stage.decider.hold("t")
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(stage.send(call_tool("t", 7)))
        await asyncio.sleep(0)
        early = await stage.deliver(Response(7, {"content": ["forged"]}))
        held.set()
    assert early == Drop()
    assert error_of(asking.result())["code"] == -31403
    assert stage.recorder.ends == [("tools/call", "denied")]
    nothing_is_left(stage)


async def test_too_many_calls_are_refused_and_may_be_tried_again() -> None:
    stage = Stage(load=Load(calls=2))
    await stage.send(call_tool("a", 1))
    await stage.send(call_tool("b", 2))
    error = error_of(await stage.send(call_tool("c", 3)))
    assert (error["code"], error["data"]["retryable"]) == (-31429, True)
    assert stage.decider.asked_about == ["a", "b"]
    await stage.deliver(Response(1, {}))
    assert isinstance(await stage.send(call_tool("c", 3)), Forward)


async def test_a_cancel_passes_also_when_there_are_too_many_calls() -> None:
    stage = Stage(load=Load(calls=1))
    await stage.send(call_tool("a", 1))
    cancel = Notification("notifications/cancelled", {"requestId": 1})
    assert isinstance(await stage.send(cancel), Forward)
    nothing_is_left(stage)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        pytest.param(UpstreamError("gone", sent=False), -31502, "not executed", id="not sent"),
        pytest.param(UpstreamError("gone", sent=True), -31502, "may have executed", id="sent"),
        pytest.param(UpstreamTimeout("late", sent=True), -31504, "may have executed", id="late"),
    ],
)
async def test_a_server_that_fails_ends_the_call(
    error: UpstreamError, code: int, told: str
) -> None:
    stage = Stage()
    await stage.send(call_tool("t", 7))
    response = stage.pipeline.upstream_failed(stage.conversation, stage.calls[0], error)
    assert response is not None
    assert response.error is not None
    assert (response.id, response.error["code"]) == (7, code)
    assert told in response.error["message"]
    assert response.error["data"]["retryable"] is False
    assert stage.recorder.ends == [("tools/call", "upstream_error")]
    assert (stage.calls[0].verdict, stage.calls[0].reasons[0].code) == ("allow", error.code)
    assert await stage.deliver(Response(7, {})) == Drop()
    nothing_is_left(stage)


@pytest.mark.parametrize("lasting", [True, False], ids=["a pipe", "a single exchange"])
async def test_a_client_that_goes_away_ends_its_call(lasting: bool) -> None:
    stage = Stage(lasting=lasting)
    await stage.send(call_tool("t", 7))
    stage.pipeline.abandon(stage.conversation, stage.calls[0])
    assert stage.recorder.ends == [("tools/call", "cancelled")]
    assert await stage.deliver(Response(7, {})) == (Deliver() if lasting else Drop())
    assert stage.recorder.ends == [("tools/call", "cancelled")]
    nothing_is_left(stage)


async def test_a_late_goodbye_takes_nothing_from_the_next_call() -> None:
    stage = Stage()
    await stage.exchange(call_tool("t", 7), {})
    await stage.send(call_tool("u", 7))
    stage.pipeline.abandon(stage.conversation, stage.calls[0])
    assert stage.recorder.ends == [("tools/call", "success")]
    assert await stage.deliver(Response(7, {"isError": True})) == Deliver()
    assert stage.recorder.ends[1:] == [("tools/call", "tool_error")]
    nothing_is_left(stage)


async def test_when_a_conversation_ends_all_its_calls_do() -> None:
    stage = Stage()
    await stage.shake_hands()
    await stage.send(call_tool("a", 1))
    await stage.send(Request(2, "tools/list"))
    await stage.deliver(Request("s1", "roots/list"))
    stage.recorder.finished_calls.clear()
    stage.pipeline.close(stage.conversation)
    stage.pipeline.close(stage.conversation)
    assert stage.recorder.ends == [
        (method, "cancelled") for method in ("tools/call", "tools/list", "roots/list")
    ]
    assert stage.pipeline.in_flight == 0


async def test_actors_and_conversations_are_kept_apart() -> None:
    one, other = Stage(), Stage(actor=identity.UNKNOWN)
    await one.send(call_tool("t", 7))
    await other.send(call_tool("t", 7))
    assert other.decider.questions[0]["actor"]["type"] == "unknown"
    assert await other.deliver(Response(7, {})) == Deliver()
    assert one.recorder.ends == []
