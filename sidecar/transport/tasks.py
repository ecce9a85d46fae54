"""Background tasks that are held, counted, and whose failures are seen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("sidecar.transport")


class Tasks:
    """The tasks of one transport: at most `limit` at a time, ended together."""

    def __init__(self, limit: int) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(limit)

    async def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start `work`; waits for room first, which is how a flood is slowed down."""
        try:
            await self._room.acquire()
        except BaseException:
            work.close()
            raise
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)

    async def settle(self, patience: float) -> None:
        """Wait for what runs, for at most `patience` seconds."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=patience)

    async def cancel(self) -> None:
        """End what still runs."""
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a message could not be handled", exc_info=error)
