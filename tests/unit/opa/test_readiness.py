"""Readiness with a scripted OPA."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidecar.config import Opa
from sidecar.errors import DecisionInvalid, DecisionUnavailable
from sidecar.opa.expected import Expected, Stamp
from sidecar.opa.readiness import UNMARKED, Readiness, question
from sidecar.policy.decision import Decision
from tests.support.opa import eventually

DOWN = DecisionUnavailable("nobody there", detail="connection_error")
UNDEFINED = DecisionInvalid("undefined", detail="undefined_decision")
FAST = Opa(canary=0.01)


class Scripted:
    """Answers with `answer` until that is changed."""

    def __init__(self, answer: Decision | Exception) -> None:
        self.answer, self.asked = answer, 0
        self.documents: list[dict[str, Any]] = []

    async def decide(
        self, document: dict[str, Any], *, deadline: float, headers: Mapping[str, str]
    ) -> Decision:
        self.asked += 1
        self.documents.append(document)
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Own:
    on_served: Callable[[], None]
    lagging = False

    def status(self) -> dict[str, Any]:
        return {"revision": "served", "expected": "r2", "rejected": {"at": "t", "error": "e"}}


def ask() -> dict[str, Any]:
    return question(enforcer_version="1", server="s", transport="stdio")


@asynccontextmanager
async def asking(opa: Scripted, settings: Opa = FAST, **options: Any) -> AsyncIterator[Readiness]:
    readiness = Readiness(opa, ask, settings, **options)
    assert not readiness.ready
    readiness.start()
    try:
        await eventually(lambda: opa.asked, within=1)
        await asyncio.sleep(0.001)
        yield readiness
    finally:
        await readiness.stop()


@pytest.mark.parametrize("allow", [True, False])
async def test_any_valid_decision_is_ready(allow: bool) -> None:
    opa = Scripted(Decision(allow, revision="r1", watermark="w1"))
    async with asking(opa, Opa(canary=60)) as readiness:
        assert readiness.ready
        assert readiness.status() == {
            "ready": True,
            "opa": {"answers": True, "since": readiness.since},
            "policy": {"revision": "r1"},
        }
        assert readiness.watermark == "w1"
        assert opa.asked == 1


@pytest.mark.parametrize("error", [DOWN, UNDEFINED])
async def test_no_decision_is_not_ready(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    opa = Scripted(error)
    async with asking(opa) as readiness:
        await eventually(lambda: opa.asked > 2, within=1)
        assert not readiness.ready
        assert str(error) in readiness.status()["opa"]["error"]
        opa.answer = Decision(True)
        await eventually(lambda: readiness.ready, within=1)
        opa.answer = error
        await eventually(lambda: not readiness.ready, within=1)
        asked = opa.asked
        await eventually(lambda: opa.asked > asked + 2, within=1)
    lines = [each for each in caplog.messages if each.startswith("opa_not_ready")]
    assert len(lines) == 1, "once per turn, not once per question"


async def test_a_slow_canary_hurries_while_there_is_no_answer() -> None:
    opa = Scripted(DOWN)
    async with asking(opa, Opa(canary=60)) as readiness:
        opa.answer = Decision(True)
        await eventually(lambda: readiness.ready, within=1)


async def test_the_question_is_the_canary() -> None:
    opa = Scripted(Decision(True))
    async with asking(opa):
        document = opa.documents[0]
    assert document["canary"] is True
    assert document["actor"]["type"] == "unknown"
    assert document["target"] == {"type": "listing", "name": "tools"}
    assert document["server"] == {"name": "s"}
    assert document["enforcer"]["version"] == "1"


async def test_changes_of_revision_and_watermark_are_told() -> None:
    opa, changes = Scripted(Decision(True, revision="r1")), list[tuple[Any, Any]]()
    async with asking(opa, on_change=lambda *change: changes.append(change)) as readiness:
        asked = opa.asked
        await eventually(lambda: opa.asked > asked + 2, within=1)
        assert changes == []
        opa.answer = DOWN
        await eventually(lambda: not readiness.ready, within=1)
        opa.answer = Decision(True, revision="r2")
        await eventually(lambda: changes, within=1)
        opa.answer = Decision(True, revision="r2", watermark="w")
        await eventually(lambda: len(changes) > 1, within=1)
    assert changes == [("r2", None), ("r2", "w")]


async def test_a_policy_is_as_old_as_its_revision_has_been_seen() -> None:
    opa = Scripted(Decision(True, revision="r1", watermark="w1"))
    async with asking(opa) as readiness:
        await eventually(lambda: readiness.age > 0.05, within=5)
        opa.answer = Decision(True, revision="r1", watermark="w2")
        await eventually(lambda: readiness.watermark == "w2", within=5)
        assert readiness.age > 0.05
        before = readiness.age
        opa.answer = Decision(True, revision="r2", watermark="w2")
        await eventually(lambda: readiness.revision == "r2", within=5)
        assert readiness.age < before


@pytest.mark.parametrize("watermark", ["w", None])
async def test_where_nothing_says_that_nothing_has_changed_a_change_is_told_now_and_then(
    watermark: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opa, changes = Scripted(Decision(True, revision="r1", watermark=watermark)), list[Any]()
    clock = SimpleNamespace(monotonic=lambda: float(opa.asked))
    monkeypatch.setattr("sidecar.opa.readiness.time", clock)  # a second goes by with each question
    async with asking(opa, on_change=lambda *change: changes.append(change)):
        await eventually(lambda: opa.asked > 20, within=5)
    every = opa.asked / UNMARKED if watermark is None else 0
    assert abs(len(changes) - every) <= 1


async def test_a_listener_that_fails_costs_nothing_but_a_log_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.opa.background.PAUSE_AFTER_FAILURE", 0.01)

    def fail(*_: object) -> None:
        raise RuntimeError("listener")

    opa = Scripted(Decision(True, revision="r1"))
    async with asking(opa, on_change=fail) as readiness:
        opa.answer = Decision(True, revision="r2")
        await eventually(lambda: "listener" in caplog.text, within=1)
        opa.answer = DOWN
        await eventually(lambda: not readiness.ready, within=1)
    assert [each.levelno for each in caplog.records if each.exc_info] == [logging.ERROR]


async def test_the_own_opa_has_its_say() -> None:
    opa, own = Scripted(Decision(True, revision="r1")), Own()
    async with asking(opa, Opa(canary=60), own=own) as readiness:
        assert readiness.ready
        assert readiness.status()["policy"] == own.status()
        own.lagging = True
        assert readiness.status()["ready"] is False
        opa.answer = Decision(True, revision="r2")
        own.on_served()
        await eventually(lambda: readiness.revision == "r2", within=1)


async def test_a_stamp_that_is_not_served_is_not_ready() -> None:
    opa, stamp = Scripted(Decision(True, revision="r1")), Stamp(Path("/nowhere"))
    async with asking(opa, Opa(canary=60), stamp=stamp) as readiness:
        assert readiness.ready
        assert readiness.status()["policy"] == {"revision": "r1", "stamped": None}
        stamp.expected = Expected("r2")
        assert (readiness.ready, readiness.lagging) == (False, True)
        assert readiness.status()["policy"] == {"revision": "r1", "stamped": "r2"}
        stamp.expected = Expected("r1")
        assert (readiness.ready, readiness.lagging) == (True, False)
