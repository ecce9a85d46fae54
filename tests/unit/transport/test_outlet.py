"""What waits for one HTTP response: in order, bounded, and ended once."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.transport import outlet as module
from sidecar.transport.outlet import BOUND, Outlet


async def rest(outlet: Outlet) -> list[bytes]:
    """Everything that is in, which has to end."""
    found = []
    while (each := await outlet.next()) is not None:
        found.append(each[0])
        if each[1]:
            break
    return found


async def test_messages_come_in_order_and_the_answer_is_the_last() -> None:
    outlet = Outlet()
    await outlet.put(b"1")
    assert outlet.offer(b"2")
    await outlet.put_answer(b"3")
    assert await outlet.next() == (b"1", False)
    assert await outlet.next() == (b"2", False)
    assert await outlet.next() == (b"3", True)


async def test_after_the_answer_nothing_is_taken_in() -> None:
    outlet = Outlet()
    outlet.finish(b"answer")
    outlet.finish(b"another one")
    await outlet.put(b"late")
    assert not outlet.offer(b"late")
    assert await rest(outlet) == [b"answer"]
    assert await outlet.next() is None


async def test_what_is_in_when_it_is_closed_is_still_written() -> None:
    outlet = Outlet()
    await outlet.put(b"1")
    outlet.close()
    assert await rest(outlet) == [b"1"]


async def test_who_waits_for_a_message_gets_it_at_once() -> None:
    outlet = Outlet()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(outlet.next())
        await asyncio.sleep(0)
        outlet.offer(b"1")
    assert waiting.result() == (b"1", False)


async def test_silence_is_told_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_ALIVE", 0.0)
    outlet = Outlet()
    with pytest.raises(TimeoutError):
        await outlet.next()
    outlet.offer(b"1")
    assert await outlet.next() == (b"1", False)


async def test_a_reader_that_is_slow_holds_up_who_writes_and_keeps_the_order() -> None:
    outlet = Outlet()
    frames = [str(number).encode() for number in range(2 * BOUND)]
    async with asyncio.TaskGroup() as group:
        writing = [group.create_task(outlet.put(each)) for each in frames]
        answering = group.create_task(outlet.put_answer(b"answer"))
        await asyncio.sleep(0)
        assert sum(each.done() for each in writing) == BOUND
        assert not outlet.offer(b"no room")
        assert await rest(outlet) == [*frames, b"answer"]
    assert answering.done()


async def test_a_reader_that_is_gone_holds_up_nobody() -> None:
    outlet = Outlet()
    async with asyncio.TaskGroup() as group:
        for number in range(3 * BOUND):
            group.create_task(outlet.put(str(number).encode()))
        await asyncio.sleep(0)
        outlet.abandon()
    assert await outlet.next() is None


async def test_an_answer_whose_writer_is_cancelled_is_there_all_the_same() -> None:
    outlet = Outlet()
    for _ in range(BOUND):
        await outlet.put(b".")
    answering = asyncio.get_running_loop().create_task(outlet.put_answer(b"answer"))
    await asyncio.sleep(0)
    answering.cancel()
    await asyncio.wait({answering})
    assert (await rest(outlet))[-1] == b"answer"
