"""What a server says: answers, questions to the client, and questions inside of answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sidecar.errors import DecisionInvalid, DecisionUnavailable, ProtocolError
from sidecar.policy.decision import Decision
from sidecar.policy.document import Task
from sidecar.policy.enforcement import AnswerServer, Deliver, Delivery, Drop, Forward, Rules
from sidecar.protocol.jsonrpc import JsonObject, Message, Notification, Request, Response
from tests.support.fakes import ALLOWED, DENIED, Answer, Stage, call_tool, modern

SAMPLE = Request("s1", "sampling/createMessage", {"messages": [], "tools": [{"name": "rm"}]})
ROOTS = Request("s2", "roots/list")
ELICIT = Request("s3", "elicitation/create", {"message": "who?", "mode": "url", "url": "u:x"})
QUESTIONS = [
    pytest.param(SAMPLE, "sampling", id="sampling"),
    pytest.param(ROOTS, "roots", id="roots"),
    pytest.param(ELICIT, "elicitation", id="elicitation"),
]
LATE = DecisionUnavailable("late", detail="timeout")
OBLIGED = Decision(allow=True, obligations=({"type": "mask_result"},))


async def greeted(answer: Answer = ALLOWED, **options: Any) -> Stage:
    """A stage after the handshake, with nothing recorded of it."""
    stage = Stage(answer, **options)
    await stage.shake_hands()
    stage.decider.questions.clear()
    for seen in (stage.recorder.verdicts, stage.recorder.decided_calls):
        seen.clear()
    stage.recorder.finished_calls.clear()
    return stage


def told(delivery: Delivery) -> Response:
    """What the server is told in place of the client's answer."""
    assert isinstance(delivery, AnswerServer)
    message = delivery.permitted.message
    assert isinstance(message, Response)
    assert message.error is not None
    return message


def nothing_is_left(stage: Stage) -> None:
    assert stage.pipeline.in_flight == 0
    assert len(stage.conversation.server_calls) == len(stage.conversation.calls) == 0


# ── Questions to the client ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("question", "kind"), QUESTIONS)
async def test_an_allowed_question_reaches_the_client_and_its_answer_the_server(
    question: Request, kind: str
) -> None:
    stage = await greeted()
    assert await stage.deliver(question) == Deliver()
    (document,) = stage.decider.questions
    assert (document["target"]["type"], document["actor"]["id"]) == (kind, "ana")
    assert document["mcp"]["direction"] == "server_to_client"
    assert stage.recorder.verdicts == [(question.method, "allow", ())]
    assert stage.pipeline.in_flight == 1
    answer = Response(question.id, {"roots": []})
    assert isinstance(await stage.send(answer), Forward)
    assert stage.sent == [answer]
    assert stage.recorder.ends == [(question.method, "success")]
    nothing_is_left(stage)


@pytest.mark.parametrize(("question", "kind"), QUESTIONS)
@pytest.mark.parametrize(
    ("answer", "reason", "end"),
    [
        pytest.param(DENIED, ("deny", "not_granted", -31403), "denied", id="denied"),
        pytest.param(LATE, ("error", "policy_unavailable", -31503), "policy_error", id="late"),
        pytest.param(
            OBLIGED, ("deny", "obligation_unsupported", -31403), "denied", id="an obligation"
        ),
    ],
)
async def test_a_refused_question_is_answered_by_the_sidecar(
    question: Request, kind: str, answer: Answer, reason: tuple[str, str, int], end: str
) -> None:
    stage = await greeted(answer)
    verdict, code, rpc_code = reason
    response = told(await stage.deliver(question))
    assert response.error is not None
    assert (response.id, response.error["code"]) == (question.id, rpc_code)
    assert stage.recorder.verdicts == [(question.method, verdict, (code,))]
    assert stage.recorder.ends == [(question.method, end)]
    assert await stage.send(Response(question.id, {})) == Drop()
    nothing_is_left(stage)


async def test_a_question_that_can_not_be_written_down_is_refused() -> None:
    stage = await greeted()
    stage.recorder.broken = True
    response = told(await stage.deliver(ROOTS))
    assert response.error is not None
    assert response.error["data"]["reasons"][0]["code"] == "audit_failed"
    assert stage.recorder.ends == [("roots/list", "policy_error")]
    nothing_is_left(stage)


async def test_shadow_lets_a_denied_question_through() -> None:
    stage = await greeted(DENIED, rules=Rules("all"))
    assert await stage.deliver(ROOTS) == Deliver()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        pytest.param(Request("s1", "tools/call", {"name": "t"}), "unknown_method", id="ours"),
        pytest.param(Request("s1", "nobody/knows"), "unknown_method", id="nobody's"),
        pytest.param(
            Request("s1", "elicitation/create", {"Task": {}}), "malformed_message", id="look-alike"
        ),
    ],
)
async def test_a_question_that_is_none_is_refused_and_recorded(message: Request, code: str) -> None:
    stage = await greeted()
    assert told(await stage.deliver(message)).id == "s1"
    assert stage.decider.questions == []
    assert [each[2] for each in stage.recorder.verdicts] == [(code,)]
    nothing_is_left(stage)


async def test_a_modern_server_asks_nothing_in_messages_of_its_own() -> None:
    stage = Stage()
    await stage.send(modern("tools/call", 1, name="t"))
    assert told(await stage.deliver(ROOTS)).id == "s2"


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Request("s1", "ping"), id="ping"),
        pytest.param(Request("s1", "tasks/get", {"taskId": "c1"}), id="a task of the client"),
        pytest.param(Request("s1", "tasks/list"), id="tasks of the client"),
    ],
)
async def test_what_the_table_lets_pass_is_passed_and_its_answer_too(message: Request) -> None:
    stage = await greeted(DENIED)
    assert await stage.deliver(message) == Deliver()
    assert isinstance(await stage.send(Response("s1", {})), Forward)
    assert stage.decider.questions == []
    nothing_is_left(stage)


@pytest.mark.parametrize(
    "method",
    [
        "notifications/message",
        "notifications/progress",
        "notifications/cancelled",
        "notifications/tools/list_changed",
        "notifications/resources/updated",
        "notifications/elicitation/complete",
    ],
)
async def test_notifications_of_the_table_pass(method: str) -> None:
    stage = await greeted(DENIED)
    assert await stage.deliver(Notification(method, {"requestId": "none"})) == Deliver()
    assert stage.decider.questions == []
    nothing_is_left(stage)


async def test_an_unknown_notification_of_the_server_is_dropped_and_recorded() -> None:
    stage = await greeted()
    assert await stage.deliver(Notification("notifications/odd")) == Drop()
    assert stage.recorder.verdicts == [("notifications/odd", "deny", ("unknown_method",))]
    nothing_is_left(stage)


# ── Answers of the client ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("request_id", ["never", 1, None])
async def test_an_answer_that_no_server_asked_for_is_dropped(request_id: Any) -> None:
    stage = await greeted()
    await stage.deliver(Request("1", "roots/list"))
    assert await stage.send(Response(request_id, error={"code": 1})) == Drop()
    assert stage.sent == []


async def test_a_question_is_answered_once() -> None:
    stage = await greeted()
    await stage.deliver(ROOTS)
    assert isinstance(
        await stage.send(Response("s2", error={"code": -1, "message": "no"})), Forward
    )
    assert await stage.send(Response("s2", {})) == Drop()
    assert stage.recorder.ends == [("roots/list", "tool_error")]
    assert stage.recorder.finished_calls[0].rpc_error == (-1, "no")


async def test_ids_of_the_server_and_of_the_client_are_kept_apart() -> None:
    stage = await greeted()
    await stage.send(call_tool("t", 1))
    await stage.deliver(Request(1, "roots/list"))
    assert isinstance(await stage.send(Response(1, {"roots": []})), Forward)
    assert await stage.deliver(Response(1, {"content": []})) == Deliver()
    nothing_is_left(stage)


async def test_an_answer_to_a_question_that_is_being_judged_is_nobodys() -> None:
    stage = await greeted(DENIED)
    stage.decider.hold("-")
    asking = asyncio.ensure_future(stage.deliver(SAMPLE))
    await asyncio.sleep(0)
    early = await stage.send(Response("s1", {"content": "forged"}))
    stage.decider.held["-"].set()
    assert told(await asking).id == "s1"
    assert early == Drop()
    assert stage.sent == []
    assert stage.recorder.ends == [(SAMPLE.method, "denied")]
    nothing_is_left(stage)


async def test_a_server_that_repeats_an_id_is_refused_and_its_first_question_stands() -> None:
    stage = await greeted()
    await stage.deliver(ROOTS)
    for message in (ROOTS, Request("s2", "nobody/knows"), Request("s2", "ping")):
        with pytest.raises(ProtocolError):
            await stage.deliver(message)
    assert isinstance(await stage.send(Response("s2", {})), Forward)
    nothing_is_left(stage)


async def test_a_question_that_the_server_takes_back_is_over() -> None:
    stage = await greeted()
    await stage.deliver(ROOTS)
    cancel = Notification("notifications/cancelled", {"requestId": "s2"})
    assert await stage.deliver(cancel) == Deliver()
    assert stage.recorder.ends == [("roots/list", "cancelled")]
    assert await stage.send(Response("s2", {})) == Drop()
    nothing_is_left(stage)


async def test_a_question_that_the_server_takes_back_while_it_is_judged_is_over() -> None:
    stage = await greeted()
    stage.decider.hold("-")
    asking = asyncio.ensure_future(stage.deliver(ROOTS))
    await asyncio.sleep(0)
    await stage.deliver(Notification("notifications/cancelled", {"requestId": "s2"}))
    stage.decider.held["-"].set()
    assert await asking == Drop()
    assert stage.recorder.ends == [("roots/list", "cancelled")]
    nothing_is_left(stage)


async def test_a_question_whose_judging_is_given_up_is_over() -> None:
    stage = await greeted()
    stage.decider.hold("-")
    asking = asyncio.ensure_future(stage.deliver(ROOTS))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert stage.recorder.ends == [("roots/list", "cancelled")]
    nothing_is_left(stage)


# ── Questions inside of answers ───────────────────────────────────────────────────────────────────


def asks(*questions: Any, state: str = "s1") -> JsonObject:
    requests = {f"q{number}": each for number, each in enumerate(questions)}
    return {"resultType": "input_required", "inputRequests": requests, "requestState": state}


CALL = modern("tools/call", 7, name="t")
WHO = {"method": "elicitation/create", "params": {"message": "who?"}}
WHERE = {"method": "roots/list"}


async def test_questions_inside_an_answer_are_each_judged() -> None:
    stage = Stage()
    assert await stage.exchange(CALL, asks(WHO, WHERE)) == Deliver()
    assert [each["target"]["type"] for each in stage.decider.questions] == [
        "tool",
        "elicitation",
        "roots",
    ]
    assert stage.recorder.ends == [
        ("elicitation/create", "success"),
        ("roots/list", "success"),
        ("tools/call", "success"),
    ]
    nothing_is_left(stage)


@pytest.mark.parametrize(
    ("answer", "rpc_code", "end"),
    [
        pytest.param(DENIED, -31403, "denied", id="denied"),
        pytest.param(LATE, -31503, "policy_error", id="late"),
        pytest.param(
            DecisionInvalid("x", detail="bad_response"), -31503, "policy_error", id="garbage"
        ),
    ],
)
async def test_a_refused_question_takes_the_place_of_the_answer(
    answer: Answer, rpc_code: int, end: str
) -> None:
    stage = Stage()
    stage.decider.by_name["form"] = answer
    delivery = await stage.exchange(CALL, asks(WHERE, WHO, WHERE))
    assert isinstance(delivery, Deliver)
    assert isinstance(delivery.replaced, Response)
    assert delivery.replaced.error is not None
    assert (delivery.replaced.id, delivery.replaced.error["code"]) == (7, rpc_code)
    assert stage.recorder.ends == [
        ("roots/list", "success"),
        ("elicitation/create", end),
        ("tools/call", end),
    ]
    nothing_is_left(stage)


@pytest.mark.parametrize(
    "question",
    [
        pytest.param({"method": "tools/call", "params": {"name": "t"}}, id="another method"),
        pytest.param({"method": "ping"}, id="a ping"),
        pytest.param({}, id="nothing"),
        pytest.param("roots/list", id="text"),
        pytest.param({"method": ["roots/list"]}, id="a method that is none"),
    ],
)
async def test_a_question_that_is_none_takes_the_place_of_the_answer(question: Any) -> None:
    stage = Stage()
    delivery = await stage.exchange(CALL, asks(question))
    assert isinstance(delivery, Deliver)
    assert isinstance(delivery.replaced, Response)
    assert delivery.replaced.error is not None
    nothing_is_left(stage)


async def test_questions_without_saying_so_are_judged_as_well() -> None:
    """A reader that goes by `inputRequests` alone must not find a question that nobody judged."""
    for result in (
        {"inputRequests": {"q": WHO}},
        {"resultType": "complete", "inputRequests": {"q": WHO}},
        {"resultType": "complete", "status": "input_required", "inputRequests": {"q": WHO}},
        {"task": {"taskId": "t1", "inputRequests": {"q": WHO}}},
        {"inputRequests": [WHERE]},
        {"inputRequests": "who?"},
    ):
        stage = Stage()
        stage.decider.by_name["form"] = DENIED
        delivery = await stage.exchange(modern("tasks/get", 7, taskId="t1"), result)
        assert isinstance(delivery, Deliver)
        assert delivery.replaced is not None


STATE = {"taskId": "t1", "status": "input_required", "inputRequests": {"q": WHO, "r": WHERE}}


@pytest.mark.parametrize("params", [STATE, {"task": STATE}], ids=["state", "task"])
async def test_a_task_that_asks_in_a_notification_is_judged_for_it(params: JsonObject) -> None:
    news = Notification("notifications/tasks", params)
    for denied, delivery in ((), Deliver()), (("-",), Drop()), (("form",), Drop()):
        stage = Stage()
        stage.conversation.session.protocol_version = None
        stage.decider.by_name.update(dict.fromkeys(denied, DENIED))
        assert await stage.deliver(news) == delivery, denied
        nothing_is_left(stage)


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff"])
async def test_a_question_that_the_policy_would_read_otherwise_is_refused(text: str) -> None:
    params = {"mode": "url", "url": "https://a.example/" + text, "message": "go"}
    stage = await greeted()
    answer = told(await stage.deliver(Request("s1", "elicitation/create", params)))
    assert answer.id == "s1"
    question = {"method": "elicitation/create", "params": params}
    delivery = await stage.exchange(CALL, asks(question))
    assert isinstance(delivery, Deliver)
    assert isinstance(delivery.replaced, Response)
    assert delivery.replaced.error is not None


async def test_a_method_without_target_may_be_answered_with_anything() -> None:
    stage = Stage()
    assert await stage.exchange(Request(1, "ping"), asks()) == Deliver()
    nothing_is_left(stage)


async def test_an_answer_whose_questions_are_given_up_is_over() -> None:
    stage = Stage()
    stage.decider.hold("form")
    await stage.send(CALL)
    judging = asyncio.ensure_future(stage.deliver(Response(7, asks(WHO))))
    await asyncio.sleep(0)
    judging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await judging
    assert stage.recorder.ends == [
        ("elicitation/create", "cancelled"),
        ("tools/call", "cancelled"),
    ]
    nothing_is_left(stage)


# ── What later messages are judged by ─────────────────────────────────────────────────────────────


async def test_rounds_are_counted_and_their_answers_judged() -> None:
    stage = Stage()
    await stage.exchange(CALL, asks(WHERE))
    answers: JsonObject = {"q0": {"roots": []}}
    second = modern("tools/call", 8, name="t", inputResponses=answers, requestState="s1")
    await stage.exchange(second, asks(WHERE, state="s2"))
    third = modern("tools/call", 9, name="t", inputResponses=answers, requestState="s2")
    await stage.exchange(third, {"content": []})
    rounds = [each.get("round") for each in stage.decider.questions if "tool" in each]
    assert rounds == [
        None,
        {"n": 2, "input_responses": answers},
        {"n": 3, "input_responses": answers},
    ]


@pytest.mark.parametrize(
    ("call", "result"),
    [
        pytest.param(
            Request(1, "tools/call", {"name": "export", "task": {"ttl": 1}}),
            {"task": {"taskId": "t1", "status": "working"}},
            id="legacy",
        ),
        pytest.param(
            modern("tools/call", 1, name="export"),
            {"resultType": "task", "taskId": "t1"},
            id="modern",
        ),
    ],
)
async def test_a_task_is_judged_by_who_started_it(call: Request, result: JsonObject) -> None:
    stage = Stage()
    await stage.exchange(call, result)
    assert stage.conversation.server.tasks["t1"] == Task("export", ("static|ana",))
    await stage.send(Request(2, "tasks/result", {"taskId": "t1"}))
    await stage.send(Request(3, "tasks/result", {"taskId": "t2"}))
    asked: list[JsonObject] = [each["task"] for each in stage.decider.questions if "task" in each]
    assert asked == [
        {"id": "t1", "known": True, "tool": "export", "owner": ["static|ana"]},
        {"id": "t2", "known": False},
    ]


async def test_the_revision_is_the_one_that_the_server_chose() -> None:
    stage = Stage()
    hello = {"protocolVersion": "2025-11-25", "clientInfo": {"name": "c", "version": "1"}}
    await stage.exchange(Request(0, "initialize", hello), {"protocolVersion": "2025-03-26"})
    await stage.send(Notification("notifications/initialized"))
    await stage.send(call_tool("t"))
    asked = stage.decider.questions[-1]["mcp"]
    assert asked["protocol_version"] == "2025-03-26"
    assert asked["claimed_client"] == {"name": "c", "version": "1"}


async def test_a_handshake_that_failed_chose_nothing() -> None:
    stage = Stage()
    await stage.send(Request(0, "initialize", {"protocolVersion": "2025-11-25"}))
    refused: Message = Response(0, error={"code": -32602, "message": "no"})
    assert await stage.deliver(refused) == Deliver()
    assert stage.recorder.ends == [("initialize", "upstream_error")]
