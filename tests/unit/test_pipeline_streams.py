"""Streams that are opened, resumed and closed are actions too."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest

from sidecar.errors import DecisionUnavailable
from sidecar.policy.decision import Decision
from sidecar.policy.enforcement import Refusal, Rules
from tests.support.fakes import DENIED, REVOKED, Answer, Stage

Action = Literal["open", "resume", "close"]
LATE = DecisionUnavailable("late", detail="timeout")
OBLIGED = Decision(allow=True, obligations=({"type": "mask_result"},))
ACTIONS: list[Action] = ["open", "resume", "close"]


def ask(stage: Stage, action: Action = "open") -> asyncio.Task[Refusal | None]:
    asking = stage.pipeline.stream(stage.conversation, action, stage.origin)
    return asyncio.get_running_loop().create_task(asking)


@pytest.mark.parametrize("action", ACTIONS)
async def test_an_allowed_stream_is_asked_about_by_what_is_done_to_it(action: Action) -> None:
    stage = Stage()
    assert await ask(stage, action) is None
    (question,) = stage.decider.questions
    assert question["target"] == {"type": "stream", "name": action}
    assert stage.recorder.verdicts == [(f"stream/{action}", "allow", ())]
    assert stage.recorder.ends == [(f"stream/{action}", "success")]
    assert stage.pipeline.in_flight == 0


@pytest.mark.parametrize(
    ("answer", "verdict", "code", "end"),
    [
        pytest.param(DENIED, "deny", "not_granted", "denied", id="denied"),
        pytest.param(LATE, "error", "policy_unavailable", "policy_error", id="late"),
        pytest.param(OBLIGED, "deny", "obligation_unsupported", "denied", id="obligation"),
    ],
)
async def test_a_refused_stream_is_recorded(
    answer: Answer, verdict: str, code: str, end: str
) -> None:
    stage = Stage(answer)
    refusal = await ask(stage)
    assert refusal is not None
    assert (refusal.verdict, refusal.reasons[0].code) == (verdict, code)
    assert stage.recorder.verdicts == [("stream/open", verdict, (code,))]
    assert stage.recorder.ends == [("stream/open", end)]
    assert stage.pipeline.in_flight == 0


async def test_a_stream_that_can_not_be_written_down_is_refused() -> None:
    stage = Stage()
    stage.recorder.broken = True
    refusal = await ask(stage)
    assert refusal is not None
    assert refusal.reasons[0].code == "audit_failed"
    assert stage.recorder.ends == [("stream/open", "policy_error")]


async def test_shadow_opens_a_denied_stream_and_no_revoked_one() -> None:
    assert await ask(Stage(DENIED, rules=Rules("all"))) is None
    assert await ask(Stage(REVOKED, rules=Rules("all"))) is not None


async def test_a_client_that_does_not_wait_for_its_stream_ends_it() -> None:
    stage = Stage()
    stage.decider.hold("open")
    asking = ask(stage)
    await asyncio.sleep(0)
    assert stage.pipeline.in_flight == 1
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert stage.recorder.ends == [("stream/open", "cancelled")]
    assert stage.pipeline.in_flight == 0
