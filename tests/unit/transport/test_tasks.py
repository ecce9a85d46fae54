"""Background tasks are bounded, ended together, and their failures are seen."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.transport.tasks import Tasks


async def test_no_more_than_the_limit_run_at_a_time() -> None:
    tasks, gate, running = Tasks(2), asyncio.Event(), []

    async def work() -> None:
        running.append(1)
        await gate.wait()

    await tasks.spawn(work())
    await tasks.spawn(work())
    third = asyncio.get_running_loop().create_task(tasks.spawn(work()))
    await asyncio.sleep(0)
    assert (len(running), third.done()) == (2, False)
    gate.set()
    await third
    await tasks.settle(1)
    assert len(running) == 3


async def test_what_takes_too_long_is_cancelled() -> None:
    tasks, ended = Tasks(1), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    await tasks.spawn(work())
    await tasks.settle(0.01)
    assert ended == []
    await tasks.cancel()
    assert ended == [1]


async def test_a_failure_is_logged_and_makes_room(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks(1)

    async def fail() -> None:
        raise ValueError("what went wrong")

    async def nothing() -> None:
        return None

    await tasks.spawn(fail())
    await tasks.spawn(nothing())
    await tasks.settle(1)
    assert "what went wrong" in caplog.text


async def test_waiting_for_room_can_be_given_up() -> None:
    tasks, gate, ran = Tasks(1), asyncio.Event(), []

    async def wait() -> None:
        await gate.wait()

    async def late() -> None:
        ran.append(1)

    await tasks.spawn(wait())
    spawning = asyncio.get_running_loop().create_task(tasks.spawn(late()))
    await asyncio.sleep(0)
    spawning.cancel()
    gate.set()
    await tasks.settle(1)
    with pytest.raises(asyncio.CancelledError):
        await spawning
    assert ran == []
