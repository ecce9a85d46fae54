"""A session with a server of the legacy HTTP+SSE transport (MCP 2024-11-05), as its client.

All that the server says comes on one stream; its first event names the endpoint that messages are
posted to. The endpoint belongs to the server that was dialled, or there is no session: messages
must not be led elsewhere. When the stream ends, so does the session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from aiohttp import ClientResponse
from multidict import CIMultiDict

from sidecar.errors import UpstreamError, UpstreamTimeout
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.framing import Event
from sidecar.protocol.jsonrpc import Message, Request, RequestId, Response
from sidecar.transport.upstream import HttpUpstream

log = logging.getLogger("sidecar.transport.sse")

ENDPOINT: Final = "endpoint"
EVENTS: Final = "text/event-stream"


class Channel:
    """The stream, and the endpoint. A server that refuses the stream (4xx, 5xx) names none."""

    def __init__(self, upstream: HttpUpstream, response: ClientResponse) -> None:
        self.response = response
        self._upstream = upstream
        self._events = upstream.events(response)
        self._endpoint: HttpUpstream | None = None
        self._asked: dict[RequestId, asyncio.Future[Response]] = {}
        self._over: UpstreamError | None = None

    @property
    def refused(self) -> bool:
        """Whether the server lets nobody in; `response` says why."""
        return self.response.status >= 400

    async def begin(self) -> None:
        """Wait for the endpoint.

        Raises:
            UpstreamError: there is no stream, no endpoint, or one of somebody else's.
        """
        if self.response.status != 200 or self.response.content_type != EVENTS:
            raise UpstreamError("the server has no stream of events there", sent=True)
        async for event in self._events:
            if event.name == ENDPOINT and event.data:
                self._endpoint = self._upstream.sibling(event.data)
                return
            if event.data:
                log.warning("dropped what the server said before it named its endpoint")
        raise UpstreamError("the server ended the stream and named no endpoint", sent=True)

    async def events(self) -> AsyncIterator[Event]:
        """What the server says from then on; another endpoint is none.

        Raises:
            UpstreamError: the stream broke.
        """
        async for event in self._events:
            if event.name == ENDPOINT:
                log.warning("dropped another endpoint of the server")
            else:
                yield event

    @asynccontextmanager
    async def post(
        self, permitted: Permitted, headers: CIMultiDict[str], on_sent: Callable[[], None]
    ) -> AsyncIterator[ClientResponse]:
        """POST a permitted message to the endpoint.

        Raises:
            UpstreamError: the session is over, the server was not reached, or it redirects.
        """
        if self._over is not None:
            raise UpstreamError(str(self._over), sent=False)
        assert self._endpoint is not None
        async with self._endpoint.send(permitted, headers, on_sent) as response:
            if 300 <= response.status < 400:
                raise UpstreamError("the server redirects, which is not followed", sent=True)
            yield response

    async def ask(self, permitted: Permitted, headers: CIMultiDict[str]) -> Response:
        """Put the sidecar's own request to the server, whose answer comes on the stream.

        Raises:
            UpstreamError: there will be no answer.
        """
        request = permitted.message
        assert isinstance(request, Request)
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._asked[request.id] = answer
        try:
            async with self.post(permitted, headers, _nothing) as response:
                if response.status >= 400:
                    raise UpstreamError(f"the server answered {response.status}", sent=True)
            return await answer
        finally:
            self._asked.pop(request.id, None)

    def takes(self, message: Message) -> bool:
        """Whether it answers a question of the sidecar's own; then nobody else hears of it."""
        if not isinstance(message, Response) or message.id is None:
            return False
        own = self._asked.pop(message.id, None)
        if own is not None and not own.done():
            own.set_result(message)
        return own is not None

    def end(self, error: UpstreamError) -> None:
        """The session is over: nothing is posted any more, and the own questions are lost."""
        self._over = self._over or error
        self.fail_asked(error)

    def fail_asked(self, error: UpstreamError) -> None:
        """The sidecar's own questions will not be answered."""
        for own in self._asked.values():
            if not own.done():
                own.set_exception(error)

    async def close(self) -> None:
        """Let go of the stream."""
        self.end(UpstreamError("the session has ended", sent=True))
        await self._events.aclose()


@asynccontextmanager
async def connect(
    upstream: HttpUpstream, headers: CIMultiDict[str], patience: float
) -> AsyncIterator[Channel]:
    """Open a session; the server has `patience` seconds to name its endpoint.

    Raises:
        UpstreamError: there is no session to be had.
    """
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(patience):
                response = await stack.enter_async_context(upstream.open("GET", headers))
                channel = Channel(upstream, response)
                stack.push_async_callback(channel.close)
                if not channel.refused:
                    await channel.begin()
        except TimeoutError as error:
            raise UpstreamTimeout("the server did not name its endpoint", sent=True) from error
        yield channel


def _nothing() -> None:
    """Nobody waits for it."""
