"""Work that goes on beside everything else, for as long as its owner lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("sidecar.opa")

PAUSE_AFTER_FAILURE = 1.0


class Background:
    """Does `step` again and again, from now until `stop`.

    A step that fails is a bug: it is logged and comes again, since a watch that has silently ended
    would go on showing what it saw last.
    """

    def __init__(self, step: Callable[[], Awaitable[None]], name: str) -> None:
        self._step = step
        # Held here until `stop`, which is what the ban on `asyncio.create_task` is about.
        self._task = asyncio.get_running_loop().create_task(self._run(), name=name)

    async def stop(self) -> None:
        """Cancel the step that is being done, and return when it has ended."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            try:
                await self._step()
            except Exception:
                logger.exception("background_step_failed name=%s", self._task.get_name())
                await asyncio.sleep(PAUSE_AFTER_FAILURE)
