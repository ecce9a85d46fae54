"""What waits is taken once, comes back when it is put back, and is asked about a few at a time."""

from __future__ import annotations

import asyncio

import pytest

from sidecar import due
from sidecar.due import Due, few_at_a_time


async def test_what_is_added_is_taken_once() -> None:
    waiting: Due[str, int] = Due()
    waiting.add({"a": 1})
    waiting.add({"b": 2, "a": 3})
    await waiting.wait()
    assert waiting.take() == {"a": 3, "b": 2}
    assert waiting.take() == {}


async def test_what_is_put_back_comes_again_and_gives_way_to_what_is_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(due, "AGAIN", 0.01)
    waiting: Due[str, int] = Due()
    waiting.add({"a": 1})
    taken = waiting.take()
    waiting.add({"a": 2})
    waiting.put_back({**taken, "b": 3})
    assert waiting.take() == {"a": 2, "b": 3}
    waiting.put_back({"b": 3})
    await asyncio.wait_for(waiting.wait(), 5)
    assert waiting.take() == {"b": 3}


async def test_nothing_is_waited_for() -> None:
    waiting: Due[str, int] = Due()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting.wait(), 0.01)


@pytest.mark.parametrize("count", [0, 1, 3, 10])
async def test_each_is_asked_once_and_only_so_many_at_a_time(count: int) -> None:
    asked: list[int] = []
    going = most = 0

    async def ask(group: int) -> None:
        nonlocal going, most
        going += 1
        most = max(most, going)
        await asyncio.sleep(0)
        asked.append(group)
        going -= 1

    await few_at_a_time(range(count), 3, ask)
    assert sorted(asked) == list(range(count))
    assert most == min(3, count)
