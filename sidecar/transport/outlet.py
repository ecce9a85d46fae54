"""What waits to be written to one HTTP response: messages in order, and an end.

Whoever reads the server puts messages in, the handler of the HTTP request takes them out. The bound
between them is how a client that does not read slows the server down, and nobody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from aiohttp import web

from sidecar.protocol.framing import encode_event

BOUND = 64
KEEP_ALIVE = 15.0
"""Seconds of silence after which a stream says that it is still there."""

COMMENT = b": keep-alive\n\n"


class Outlet:
    """The messages for one response. After `finish` or `close` nothing more is taken in."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._room = asyncio.Semaphore(BOUND)
        self._news = asyncio.Event()
        self.ended = False
        self._answered = False

    async def put(self, frame: bytes) -> None:
        """Add a message; waits for room, in order of arrival."""
        await self._room.acquire()
        if self.ended:
            self._room.release()
        else:
            self._add(frame)

    async def put_answer(self, frame: bytes) -> None:
        """Add the last message, the answer; waits for room, behind those that came before."""
        try:
            await self._room.acquire()
        finally:
            self.finish(frame)

    def offer(self, frame: bytes) -> bool:
        """Add a message if there is room for it, at once; whether there was."""
        if self.ended or len(self._frames) >= BOUND:
            return False
        self._add(frame)
        return True

    def finish(self, frame: bytes) -> None:
        """Add the last message, the answer, at once."""
        if not self.ended:
            self._answered = True
            self._add(frame)
            self.close()

    def close(self) -> None:
        """No more messages; those that are in are still written."""
        self.ended = True
        self._news.set()
        self._room.release()  # one who waits for room sees the end, and lets the next one see it

    def abandon(self) -> None:
        """Nobody reads any more."""
        self._frames.clear()
        self.close()

    async def next(self) -> tuple[bytes, bool] | None:
        """The next message, and whether it is the answer; None at the end.

        Raises:
            TimeoutError: there was none for a while.
        """
        async with asyncio.timeout(KEEP_ALIVE):
            while not self._frames:
                if self.ended:
                    return None
                self._news.clear()
                await self._news.wait()
        frame = self._frames.popleft()
        self._room.release()
        return frame, self._answered and not self._frames

    def _add(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._news.set()


async def respond(
    outlet: Outlet, request: web.Request, session: dict[str, str] | None = None
) -> web.StreamResponse:
    """Answer a POST: JSON when the answer is the first that there is to say, else a stream.

    `session` are headers of the response.
    """
    first = None
    with suppress(TimeoutError):
        first = await outlet.next()
        if first is not None and first[1]:
            return web.Response(body=first[0], content_type="application/json", headers=session)
    return await stream(outlet, request, session, first[0] if first else None)


async def stream(
    outlet: Outlet,
    request: web.Request,
    session: dict[str, str] | None = None,
    first: bytes | None = None,
) -> web.StreamResponse:
    """Write events as long as there are any, with comments where there is silence."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache, no-transform",
            "X-Accel-Buffering": "no",
            **(session or {}),
        }
    )
    with suppress(ConnectionError):  # the client is gone, which is how streams end
        await response.prepare(request)
        if first is not None:
            await response.write(encode_event(first))
        await _write(outlet, response)
        await response.write_eof()
    return response


async def _write(outlet: Outlet, response: web.StreamResponse) -> None:
    ended = False
    while not ended:
        try:
            found = await outlet.next()
        except TimeoutError:
            await response.write(COMMENT)
            continue
        ended = found is None or found[1]
        if found is not None:
            await response.write(encode_event(found[0]))
