"""A server of the legacy HTTP+SSE transport as the peer of a pipe (MCP 2024-11-05).

The session is opened for the first message. It is one stream, and can not be had again: when that
ends, whoever waits learns it, and the pipe ends too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from multidict import CIMultiDict

from sidecar.conversation import Call
from sidecar.errors import MalformedMessage, UpstreamError
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.framing import Event
from sidecar.protocol.jsonrpc import FROM_SERVER, Response, decode, encode
from sidecar.transport.channel import EVENTS, Channel, connect
from sidecar.transport.peer import Ended, Hearer
from sidecar.transport.upstream import HttpUpstream
from sidecar.transport.withdrawal import Withdrawable, Withdrawn

log = logging.getLogger("sidecar.transport.sse")

ACKNOWLEDGED = 2.0
"""Seconds that the next message waits until the server has acknowledged the one before."""


class SsePeer:
    """A `Peer` at one server; `patience` is the time, in seconds, that it has to let us in."""

    sees_the_end = False

    def __init__(self, upstream: HttpUpstream, patience: float) -> None:
        self._upstream = upstream
        self._patience = patience
        self._wanted = asyncio.Event()
        self._channel: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self._session: asyncio.Task[None] | None = None
        self._ended = Ended(0, "the conversation is over")

    @property
    def gone(self) -> bool:
        """Whether the session is over."""
        return self._session is not None and self._session.done()

    async def read(self, hearer: Hearer) -> None:
        """Open the session when it is wanted; let `hearer` hear everything, until it ends."""
        self._session = asyncio.get_running_loop().create_task(self._converse(hearer))
        try:
            await asyncio.wait({self._session})
        finally:
            self._session.cancel()
        if not self._session.cancelled():
            self._session.result()

    async def stop(self) -> Ended:
        """Close the stream."""
        if self._session is not None:
            self._session.cancel()
            await asyncio.wait({self._session})
        return self._ended

    async def send(self, permitted: Permitted, call: Call | None, sent: Callable[[], None]) -> None:
        """POST a permitted message; an answer will be heard.

        Raises:
            UpstreamError: there is no session, or the server does not take it.
        """
        waiting = asyncio.get_running_loop().call_later(ACKNOWLEDGED, sent)
        try:
            channel = await self._open()
            async with channel.post(permitted, _headers(call), _nothing) as response:
                if response.status >= 400:
                    raise UpstreamError(f"the server answered {response.status}", sent=True)
        except UpstreamError as error:
            if call is None or call.outcome is not None:  # nobody waits for an answer any more
                log.warning("a message was not taken: %s", error)
                return
            raise
        finally:
            waiting.cancel()
            sent()

    async def ask(self, permitted: Permitted) -> Response:
        """Put the sidecar's own request to the server.

        Raises:
            UpstreamError: there will be no answer.
        """
        return await (await self._open()).ask(permitted, _headers(None))

    def fail_asked(self, error: UpstreamError) -> None:
        """The sidecar's own questions will not be answered."""
        if self._channel.done() and self._channel.exception() is None:
            self._channel.result().fail_asked(error)

    # -------------------------------------------------------------- the session

    async def _open(self) -> Channel:
        self._wanted.set()
        return await asyncio.shield(self._channel)

    async def _converse(self, hearer: Hearer) -> None:
        try:
            await self._wanted.wait()
            if not await hearer.admits("open"):
                raise UpstreamError("the stream may not be opened", sent=False)
            async with connect(self._upstream, _stream_headers(), self._patience) as channel:
                if channel.refused:
                    status = channel.response.status
                    raise UpstreamError(f"the server answered {status}", sent=False)
                self._channel.set_result(channel)
                await self._follow(channel, hearer)
        except UpstreamError as error:
            log.error("the session is over: %s", error)
            self._ended = Ended(1, str(error))
            if not self._channel.done():
                self._channel.set_exception(error)
                self._channel.exception()  # it is no loss when nobody waits for it

    async def _follow(self, channel: Channel, hearer: Hearer) -> None:
        """Take in what comes, until the server or the policy ends it: then this raises."""
        try:
            with Withdrawable() as stream, hearer.holding("open", stream.end):
                async for event in channel.events():
                    await self._take(event, channel, hearer)
        except Withdrawn as error:
            raise UpstreamError(str(error), sent=True) from error
        raise UpstreamError("the server has ended the session", sent=True)

    async def _take(self, event: Event, channel: Channel, hearer: Hearer) -> None:
        if not event.data:
            return
        frame = event.data.encode("utf-8", "surrogateescape")
        try:
            message = decode(frame, FROM_SERVER)
        except MalformedMessage as error:
            log.warning("dropped an event of the server that is no message: %s", error)
            hearer.malformed(error)
            return
        if channel.takes(message):
            return
        one_line = not (b"\n" in frame or b"\r" in frame)
        await hearer.heard(message, frame if one_line else encode(message))


def _headers(call: Call | None) -> CIMultiDict[str]:
    headers = CIMultiDict({"Accept": "*/*", "Accept-Encoding": "identity"})
    if call is not None:
        headers.update(call.trace.to_upstream)
    return headers


def _stream_headers() -> CIMultiDict[str]:
    return CIMultiDict({"Accept": EVENTS, "Accept-Encoding": "identity"})


def _nothing() -> None:
    """The acknowledgement is waited for."""
