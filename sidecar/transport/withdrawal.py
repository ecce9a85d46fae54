"""The end of an HTTP exchange before its time: what the policy has let begin, it refuses now.

The handler of the request is interrupted where it waits, so that the server's side is closed, and
then answers its client: with the refusal of a call, or with nothing where a stream just ends.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from sidecar.protocol.jsonrpc import Response

PATIENCE = 1.0
"""Seconds that a client has to take the end of a stream."""


class Withdrawn(Exception):
    """The exchange was ended; `reply` is for who waits for an answer."""

    def __init__(self, reply: Response | None) -> None:
        super().__init__("what was allowed before is refused now")
        self.reply = reply


class Withdrawable:
    """A block that `end` or `withdraw` interrupts: it raises `Withdrawn` then.

    Whatever else cancels the task goes on as a cancel.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._cancels = 0
        self._reply: Response | None = None
        self._ended = False

    def end(self) -> None:
        """Interrupt the block, where it still runs."""
        if self._task is not None and not self._ended:
            self._ended = True
            self._task.cancel()

    async def withdraw(self, reply: Response) -> None:
        """Interrupt it, with an answer."""
        self._reply = reply
        self.end()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancels = self._task.cancelling()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        if task is None or not self._ended:
            return
        alone = task.uncancel() <= self._cancels
        if alone and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise Withdrawn(self._reply) from error


async def conclude(
    request: web.Request, stream: web.StreamResponse | None, last: bytes | None
) -> web.StreamResponse:
    """The end of what its client gets: `last` is written and the response is complete.

    `stream` is what was begun; None where nothing was. Who does not read is left.
    """
    response = stream or _whole(last)
    try:
        async with asyncio.timeout(PATIENCE):
            if stream is None:
                await response.prepare(request)
            elif last is not None:
                await response.write(last)
            await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    return response


def _whole(last: bytes | None) -> web.Response:
    """To every client 405 means that there is no stream."""
    if last is None:
        return web.Response(status=405, headers={"Allow": "POST"})
    return web.Response(body=last, content_type="application/json")
