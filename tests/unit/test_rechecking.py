"""What is open is asked about again when the policy changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from sidecar import due, rechecking
from sidecar.conversation import Call, Conversation, Origin
from sidecar.errors import DecisionUnavailable, UpstreamError
from sidecar.policy import identity
from sidecar.policy.decision import Decision
from sidecar.policy.enforcement import Drop, Forward, Reply, Rules
from sidecar.policy.identity import Actor, Principal
from sidecar.protocol.jsonrpc import JsonObject, Request, Response
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session
from tests.support.fakes import (
    ALLOWED,
    ANA,
    DENIED,
    REVOKED,
    Answer,
    Stage,
    call_tool,
    modern,
)

BEA = identity.static(Principal("human", "bea", "static"))
LATE = DecisionUnavailable("late", detail="timeout")
SECOND_REASON = Decision(allow=False, reasons=(*DENIED.reasons, *REVOKED.reasons))
LISTEN = modern("subscriptions/listen", "s", notifications={"toolsListChanged": True})


class Opened:
    """A stage with a call in flight, a subscription, a stream and a session."""

    def __init__(self, **options: Any) -> None:
        self.stage = Stage(**options)
        self.stage.conversation.end = self.end_session
        self.replies: list[Response] = []
        self.ended: list[str] = []
        self.stack = ExitStack()

    def end_session(self) -> None:
        self.ended.append("session")
        self.stage.pipeline.close(self.stage.conversation)

    async def withdraw(self, reply: Response) -> None:
        self.replies.append(reply)

    async def begin(self, message: Request) -> Call:
        """Let a request through, as a transport does."""
        assert isinstance(await self.stage.send(message), Forward)
        call = self.stage.calls[-1]
        call.withdraw = self.withdraw
        return call

    async def all(self) -> None:
        await self.stage.shake_hands()
        await self.begin(call_tool("echo"))
        await self.begin(LISTEN)
        self.stream()

    def stream(self) -> None:
        stage = self.stage
        held = stage.pipeline.open.stream(
            stage.conversation, "open", stage.origin, lambda: self.ended.append("stream")
        )
        self.stack.enter_context(held)

    async def change(self, answer: Answer) -> None:
        """The policy answers something else, and everything is asked about."""
        self.stage.decider.default = answer
        self.stage.decider.questions.clear()
        self.stage.pipeline.open.change()
        await self.stage.pipeline.open.sweep()

    @property
    def answered(self) -> set[object]:
        return {each.id for each in self.replies}

    @property
    def codes(self) -> set[tuple[int, str]]:
        errors = [each.error or {} for each in self.replies]
        return {(each["code"], each["data"]["reasons"][0]["code"]) for each in errors}


@pytest.mark.parametrize(
    ("answer", "ended", "answered"),
    [
        pytest.param(ALLOWED, set(), set(), id="allowed"),
        pytest.param(LATE, set(), set(), id="no decision"),
        pytest.param(DENIED, {"stream"}, {"s"}, id="denied"),
        pytest.param(SECOND_REASON, {"stream"}, {"s"}, id="revoked is not the first reason"),
        pytest.param(REVOKED, {"stream", "session"}, {"s", 1}, id="revoked"),
    ],
)
async def test_a_stream_ends_with_any_deny_and_all_else_with_a_revocation(
    answer: Answer, ended: set[str], answered: set[object]
) -> None:
    opened = Opened()
    await opened.all()
    assert len(opened.stage.pipeline.open) == 4
    await opened.change(answer)
    assert set(opened.ended) == ended
    assert opened.answered == answered
    assert len(opened.stage.pipeline.open) == 4 - len(ended) - len(answered)
    again = {
        (each["target"]["type"], each["target"]["name"]) for each in opened.stage.decider.questions
    }
    assert again == {
        ("tool", "echo"),
        ("subscription", "toolsListChanged"),
        ("stream", "open"),
        ("negotiation", "initialize"),
    }


async def test_the_opening_input_is_asked_again() -> None:
    opened = Opened()
    await opened.begin(call_tool("echo", text="hello"))
    first = opened.stage.decider.questions[-1]
    await opened.change(ALLOWED)
    (again,) = opened.stage.decider.questions
    assert without_time(again) == without_time(first)


def without_time(question: JsonObject) -> JsonObject:
    context = {key: value for key, value in question["context"].items() if key != "time"}
    return {**question, "context": context}


async def test_answers_go_out_before_streams_close_and_sessions_end() -> None:
    opened = Opened()
    await opened.all()

    async def slow(reply: Response) -> None:
        await asyncio.sleep(0.01)
        opened.ended.append("call")

    opened.stage.calls[-2].withdraw = slow
    await opened.change(REVOKED)
    assert opened.ended == ["call", "stream", "session"]


async def test_a_call_is_recorded_as_denied_with_its_decision() -> None:
    opened = Opened()
    call = await opened.begin(call_tool("echo"))
    await opened.change(REVOKED)
    (reply,) = opened.replies
    assert opened.codes == {(-31403, "revoked")}
    assert reply.error is not None
    assert reply.error["data"]["decision_id"] == call.decision_id
    recorder = opened.stage.recorder
    assert recorder.verdicts == [("tools/call", "allow", ()), ("tools/call", "deny", ("revoked",))]
    assert recorder.ends == [("tools/call", "denied")]
    assert call.asked > call.forwarded > 0
    assert opened.stage.pipeline.in_flight == 0


async def test_a_stream_that_is_closed_has_a_record_of_its_own() -> None:
    opened = Opened()
    opened.stream()
    await opened.change(DENIED)
    recorder = opened.stage.recorder
    assert recorder.verdicts == [("stream/open", "deny", ("not_granted",))]
    assert recorder.ends == [("stream/open", "denied")]


async def test_what_is_asked_again_in_vain_leaves_no_record() -> None:
    opened = Opened()
    await opened.all()
    before = list(opened.stage.recorder.verdicts)
    await opened.change(ALLOWED)
    await opened.change(LATE)
    assert opened.stage.recorder.verdicts == before


async def test_shadow_lifts_a_deny_and_no_revocation() -> None:
    opened = Opened(rules=Rules("all"))
    await opened.all()
    await opened.change(DENIED)
    assert (opened.ended, opened.replies) == ([], [])
    await opened.change(REVOKED)
    assert opened.ended == ["stream", "session"]


async def test_only_the_revoked_of_two_clients_is_ended() -> None:
    opened = Opened()
    conversations = {
        actor.principal.id: Conversation(
            Session(MethodTable.of()), opened.stage.conversation.server, "http"
        )
        for actor in (ANA, BEA)
    }
    for actor in (ANA, BEA):
        await started(opened, conversations[actor.principal.id], actor)

    def revoked(document: JsonObject) -> Decision:
        return REVOKED if document["actor"]["id"] == "bea" else ALLOWED

    await opened.change(revoked)
    assert opened.ended == ["bea"]
    assert len(opened.replies) == 1
    assert len(conversations["bea"].calls) == 0
    assert len(conversations["ana"].calls) == 1


async def started(opened: Opened, conversation: Conversation, actor: Actor) -> None:
    pipeline, stage = opened.stage.pipeline, opened.stage
    conversation.end = lambda: opened.ended.append(actor.principal.id)
    conversation.greeted.set()
    hello = Request("hello", "initialize", {"protocolVersion": "2025-11-25"})
    for message in (hello, call_tool("echo")):
        _, ticket, call = await pipeline.from_client(
            conversation, message, Origin(actor), stage.server.ask
        )
        assert ticket is not None
        assert call is not None
        ticket.release()
        call.withdraw = opened.withdraw
        if message is hello:
            answer = Response("hello", result={"protocolVersion": "2025-11-25"})
            await pipeline.from_server(conversation, answer, Origin(actor))


async def test_the_sessions_of_one_client_are_asked_about_once() -> None:
    opened, several = Opened(), 20
    server = opened.stage.conversation.server
    for _ in range(several):
        conversation = Conversation(Session(MethodTable.of()), server, "http")
        await started(opened, conversation, ANA)
        conversation.calls.drain()

    def names() -> list[str]:
        return [each["target"]["type"] for each in opened.stage.decider.questions]

    await opened.change(ALLOWED)
    assert names().count("negotiation") == 1
    await opened.change(REVOKED)
    assert names().count("negotiation") == 1
    assert opened.ended == ["ana"] * several
    assert opened.stage.recorder.ends.count(("initialize", "denied")) == several


# ── Races ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_that_is_being_decided_is_refused_when_its_turn_comes() -> None:
    opened = Opened()
    held = opened.stage.decider.hold("echo")
    sending = asyncio.get_running_loop().create_task(opened.stage.send(call_tool("echo")))
    while not opened.stage.decider.questions:
        await asyncio.sleep(0)
    opened.stage.decider.held.clear()
    await opened.change(REVOKED)
    opened.stage.decider.default = ALLOWED  # the answer of the policy before the change
    held.set()
    outcome = await sending
    assert isinstance(outcome, Reply)
    assert outcome.response.error is not None
    assert outcome.response.error["data"]["reasons"][0]["code"] == "revoked"
    assert opened.stage.sent == []
    assert opened.stage.recorder.ends == [("tools/call", "denied")]


async def test_what_begins_by_an_answer_of_the_policy_before_is_asked_about() -> None:
    opened = Opened()
    await opened.change(REVOKED)
    opened.stream()
    await opened.stage.pipeline.open.sweep()
    assert opened.ended == ["stream"]


@pytest.mark.parametrize("suspended", [False, True])
async def test_the_answer_to_a_withdrawn_call_goes_nowhere(suspended: bool) -> None:
    opened = Opened()
    call = await opened.begin(call_tool("echo"))
    if suspended:
        opened.stage.pipeline.suspend(opened.stage.conversation, call)
    await opened.change(REVOKED)
    late = Response(1, result={"content": []})
    assert await opened.stage.deliver(late) == Drop()
    assert opened.stage.recorder.ends == [("tools/call", "denied")]


async def test_an_answer_that_is_being_judged_is_withdrawn_with_its_call() -> None:
    opened = Opened()
    await opened.begin(call_tool("echo"))
    opened.stage.decider.hold("-")
    asks = {"inputRequests": {"r": {"method": "sampling/createMessage", "params": {}}}}
    answering = asyncio.ensure_future(opened.stage.deliver(Response(1, result=asks)))
    while opened.stage.decider.asked_about[-1] != "-":
        await asyncio.sleep(0)
    await opened.change(REVOKED)
    opened.stage.decider.default = ALLOWED
    opened.stage.decider.held["-"].set()
    assert await answering == Drop()
    assert opened.answered == {1}


async def begin_and_answer(opened: Opened) -> None:
    await opened.stage.exchange(call_tool("echo"), {"content": []})


async def begin_and_fail(opened: Opened) -> None:
    call = await opened.begin(call_tool("echo"))
    opened.stage.pipeline.upstream_failed(
        opened.stage.conversation, call, UpstreamError("gone", sent=True)
    )


async def begin_and_abandon(opened: Opened) -> None:
    call = await opened.begin(call_tool("echo"))
    opened.stage.pipeline.abandon(opened.stage.conversation, call)


async def begin_and_close(opened: Opened) -> None:
    await opened.stage.shake_hands()
    await opened.begin(call_tool("echo"))
    opened.stage.pipeline.close(opened.stage.conversation)


async def be_refused(opened: Opened) -> None:
    opened.stage.decider.default = DENIED
    await opened.stage.send(call_tool("echo"))


async def close_the_stream(opened: Opened) -> None:
    opened.stream()
    opened.stack.close()


@pytest.mark.parametrize(
    "end",
    [
        begin_and_answer,
        begin_and_fail,
        begin_and_abandon,
        begin_and_close,
        be_refused,
        close_the_stream,
    ],
)
async def test_what_is_over_is_not_kept(end: Callable[[Opened], Any]) -> None:
    opened = Opened()
    await end(opened)
    assert len(opened.stage.pipeline.open) == 0
    await opened.change(REVOKED)
    assert opened.stage.decider.questions == []


# ── All the time ──────────────────────────────────────────────────────────────────────────────────


async def test_what_got_no_decision_is_asked_again_until_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(due, "AGAIN", 0.001)
    opened = Opened()
    await opened.all()
    await opened.change(LATE)
    await opened.stage.pipeline.open.step()
    assert opened.ended == []
    opened.stage.decider.default = REVOKED
    await opened.stage.pipeline.open.step()
    assert opened.ended == ["stream", "session"]
    assert opened.answered == {1, "s"}


async def test_a_question_that_fails_is_no_end_of_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Opened()
    await opened.all()

    def answer(document: JsonObject) -> Decision:
        if document["target"]["type"] == "tool":
            raise RuntimeError("a bug")
        return REVOKED

    await opened.change(answer)
    assert opened.ended == ["stream", "session"]
    assert "a bug" in caplog.text


async def test_a_client_that_does_not_take_the_end_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rechecking, "TO_CLOSE", 0.01)
    opened = Opened()
    await opened.all()

    async def never(reply: Response) -> None:
        await asyncio.Event().wait()

    async def fails(reply: Response) -> None:
        raise OSError("the pipe is gone")

    stuck, broken = opened.stage.calls[-2:]
    stuck.withdraw, broken.withdraw = never, fails
    await opened.change(REVOKED)
    assert opened.ended == ["stream", "session"]
    assert "not taken in time" in caplog.text
    assert "the pipe is gone" in caplog.text


async def test_few_are_asked_about_at_a_time() -> None:
    opened, many = Opened(), 5 * rechecking.AT_ONCE
    for number in range(many):
        await opened.begin(call_tool("echo", number))
    decider = opened.stage.decider
    held = decider.hold("echo")
    sweeping = asyncio.get_running_loop().create_task(opened.change(REVOKED))
    for _ in range(many):
        await asyncio.sleep(0)
    assert len(decider.questions) == rechecking.AT_ONCE
    held.set()
    await sweeping
    assert len(decider.questions) == len(opened.replies) == many


# ── Expiry ────────────────────────────────────────────────────────────────────────────────────────


async def expired(opened: Opened, ended: int, answered: int) -> None:
    """Until so much has ended, which nobody asks the policy about."""
    asked = len(opened.stage.decider.questions)
    async with asyncio.timeout(10):
        while (len(opened.ended), len(opened.replies)) != (ended, answered):
            await asyncio.sleep(0.005)
    assert len(opened.stage.decider.questions) == asked


async def test_streams_end_when_the_evidence_of_their_opener_does_and_nothing_else() -> None:
    opened = Opened(actor=replace(ANA, expires_at=time.time() + 0.2))
    await opened.all()
    await expired(opened, ended=1, answered=1)
    assert opened.ended == ["stream"]
    assert opened.answered == {"s"}
    assert opened.codes == {(-31401, "credential_expired")}
    assert len(opened.stage.pipeline.open) == 2
    recorder = opened.stage.recorder
    assert ("stream/open", "deny", ("credential_expired",)) in recorder.verdicts
    assert {("stream/open", "denied"), ("subscriptions/listen", "denied")} <= set(recorder.ends)


async def test_a_stream_that_is_over_does_not_expire() -> None:
    opened = Opened(actor=replace(ANA, expires_at=time.time() + 0.1))
    opened.stream()
    opened.stack.close()
    opened.stream()
    await expired(opened, ended=1, answered=0)
    assert opened.ended == ["stream"]
    assert opened.stage.recorder.ends == [("stream/open", "denied")]


async def test_what_is_opened_by_evidence_that_is_over_ends_at_once() -> None:
    opened = Opened(actor=replace(ANA, expires_at=time.time() - 1))
    opened.stream()
    await expired(opened, ended=1, answered=0)


# ── What was done is done ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("message", [call_tool("echo"), LISTEN])
async def test_a_call_that_was_on_its_way_may_have_executed_and_a_subscription_does_nothing(
    message: Request,
) -> None:
    opened = Opened()
    await opened.begin(message)
    await opened.change(REVOKED)
    (reply,) = opened.replies
    assert reply.error is not None
    told = reply.error["data"]["reasons"][0]["message"]
    assert ("it may have executed" in told) is (message is not LISTEN)


@pytest.mark.parametrize(("answer", "ended"), [(DENIED, []), (REVOKED, ["session"])])
async def test_a_pipe_without_a_handshake_ends_with_a_revocation_as_one_with(
    answer: Answer, ended: list[str]
) -> None:
    opened = Opened()
    for _ in range(2):
        opened.stage.pipeline.open.hold_pipe(opened.stage.conversation, opened.stage.origin)
    assert len(opened.stage.pipeline.open) == 1
    await opened.change(answer)
    assert opened.ended == ended
