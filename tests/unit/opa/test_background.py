"""Steps that come again and again."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.opa.background import Background
from tests.support.opa import eventually


async def test_a_failing_step_is_logged_and_comes_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.opa.background.PAUSE_AFTER_FAILURE", 0)
    steps: list[int] = []

    async def step() -> None:
        steps.append(len(steps))
        await asyncio.sleep(0)
        if len(steps) == 2:
            raise RuntimeError("a bug")

    work = Background(step, "work")
    await eventually(lambda: len(steps) > 5, within=1)
    await work.stop()
    assert caplog.messages == ["background_step_failed name=work"]
    assert "a bug" in caplog.text
    count = len(steps)
    await asyncio.sleep(0)
    assert len(steps) == count


async def test_stop_lets_a_step_clean_up_first() -> None:
    events: list[str] = []

    async def step() -> None:
        try:
            events.append("begun")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            events.append("cleaned")

    work = Background(step, "work")
    await eventually(lambda: events, within=1)
    await work.stop()
    await work.stop()
    assert events == ["begun", "cleaned"]
