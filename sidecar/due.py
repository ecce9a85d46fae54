"""What is to be asked about again: it is waited for together, and asked about a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import Generic, TypeVar

AGAIN = 0.5
"""Seconds before what got no decision is asked again."""

Key = TypeVar("Key")
Value = TypeVar("Value")
Group = TypeVar("Group")


class Due(Generic[Key, Value]):
    """Questions, each known by a key, of which the latest counts."""

    def __init__(self) -> None:
        self._waiting: dict[Key, Value] = {}
        self._news = asyncio.Event()

    def add(self, items: Mapping[Key, Value]) -> None:
        """They are to be asked at once."""
        self._waiting.update(items)
        self._news.set()

    def put_back(self, items: Mapping[Key, Value]) -> None:
        """They got no decision and come again in a while, unless there are later ones."""
        self._waiting = {**items, **self._waiting}

    async def wait(self) -> None:
        """Until there is something to ask; what was put back does not wait for more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(AGAIN if self._waiting else None):
                await self._news.wait()

    def take(self) -> dict[Key, Value]:
        """All of them, which are not waiting any more."""
        self._news.clear()
        taken, self._waiting = self._waiting, {}
        return taken


async def few_at_a_time(
    groups: Collection[Group], at_once: int, ask: Callable[[Group], Awaitable[None]]
) -> None:
    """Do `ask` for each, for so many at once; `ask` raises nothing."""
    left = iter(groups)

    async def some() -> None:
        for group in left:
            await ask(group)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(at_once, len(groups))):
            tasks.create_task(some())
