"""The legacy HTTP+SSE transport (MCP 2024-11-05) in front of a server that speaks it.

GET opens a session: its stream carries all that the server says, and its first event names the
endpoint for POSTs. That is the sidecar's own, with a token; the server's stays inside. A POST is
only acknowledged, so whatever a client is to be told goes on the stream, between two events.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from functools import partial
from typing import Final

from aiohttp import ClientResponse, web
from multidict import CIMultiDict

from sidecar.config import Limits
from sidecar.conversation import Ask, Origin
from sidecar.errors import ProtocolError, UpstreamError
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import Delivery, Drop, Permitted, taken_back
from sidecar.protocol.framing import Event, encode_event
from sidecar.protocol.jsonrpc import Message, Response, encode
from sidecar.rechecking import WITHDRAWN
from sidecar.transport import headers as rules
from sidecar.transport.channel import ENDPOINT, EVENTS, Channel, connect
from sidecar.transport.exchange import Exchange, Replier, Sessions
from sidecar.transport.judged import judged
from sidecar.transport.tasks import Tasks
from sidecar.transport.upstream import HttpUpstream

log = logging.getLogger("sidecar.transport.sse")

QUERY: Final = "session_id"
JSON: Final = "application/json"
STOPPING: Final = "the sidecar is stopping"
BOUND = 16
"""Events of one server that are judged, or wait to be written, at once."""

UNREAD = 1000
"""Answers of ours that one client has not read; one that reads none is told no more."""

MAX_ERROR_BODY = 64 * 1024
PATIENCE = 0.8
"""The part of a shutdown's time that calls have to end by themselves."""


class SseSession:
    """One client, and the server's stream to it, which only whole events are written to."""

    def __init__(self, pipeline: Pipeline, channel: Channel, exchange: Exchange) -> None:
        self.id = secrets.token_urlsafe(32)
        self.conversation = exchange.conversation
        self.channel = channel
        self.unread = 0
        self._pipeline = pipeline
        self._origin = Origin(exchange.origin.actor, exchange.origin.source_address)
        self._request = exchange.request
        self._headers = _without_resumption(exchange)
        self._stream = web.StreamResponse(headers=rules.to_client(channel.response.headers))
        self._whole = asyncio.Lock()
        self._outbound = Tasks(BOUND)
        self._reading: asyncio.Task[None] | None = None
        self._why = "the server has ended the session"
        self._stopping = self._closed = False

    # -------------------------------------------------------------- life

    async def live(self, patience: float) -> web.StreamResponse:
        """Pass on what the server says until it ends, or is ended; then answer who still waits."""
        await self._stream.prepare(self._request)
        await self._stream.write(_endpoint(self._request, self.id))
        self._reading = asyncio.get_running_loop().create_task(self._read())
        end, self.conversation.tell = partial(self.end, WITHDRAWN), self.inject
        try:
            with self._pipeline.open.stream(self.conversation, "open", self._origin, end):
                await asyncio.wait({self._reading})
            self.channel.end(UpstreamError(self._why, sent=True))
            await self._outbound.settle(patience)
            await self._answer_who_waits()
        finally:
            self._closed = True
            self._reading.cancel()
            await asyncio.wait({self._reading})
            await self._outbound.cancel()
            self._pipeline.close(self.conversation)
        with suppress(ConnectionError):
            await self._stream.write_eof()
        return self._stream

    async def _read(self) -> None:
        try:
            async for event in self.channel.events():
                await self._outbound.spawn(self._pass_on(event))
        except UpstreamError as error:
            self._why = str(error)
            log.warning("a session has ended: %s", error)

    async def _answer_who_waits(self) -> None:
        async with self._whole:
            self._closed = True
            for call in self.conversation.calls.drain():
                error = UpstreamError(self._why, sent=bool(call.forwarded))
                reply = self._pipeline.upstream_failed(self.conversation, call, error)
                if reply is not None:
                    await self._write(encode_event(encode(reply)))

    def stop(self) -> None:
        """End once nobody waits for an answer; a subscription is not answered before it ends."""
        self._stopping = True
        waiting = (each.operation.method.target for each in self.conversation.calls)
        if all(target == "subscription" for target in waiting):
            self.end(STOPPING)

    def end(self, why: str) -> None:
        """End now."""
        if self._reading is not None and not self._reading.done():
            self._why = why
            self._reading.cancel()

    # -------------------------------------------------------------- to the client

    async def inject(self, message: Message) -> None:
        """Tell the client something in place of its server; waits until it reads.

        Raises:
            ProtocolError: 404, the session has ended.
        """
        self.unread += 1
        try:
            async with self._whole:
                if self._closed:
                    raise ProtocolError("Session not found", status=404)
                await self._write(encode_event(encode(message)))
        finally:
            self.unread -= 1

    async def withdraw(self, permitted: Permitted, reply: Response) -> None:
        """End a call in place of its server, which is told."""
        tell = self._post(taken_back(permitted, WITHDRAWN))
        with suppress(ProtocolError):
            await asyncio.gather(tell, self.inject(reply))

    async def _pass_on(self, event: Event) -> None:
        written = await judged(event, self._pipeline, self._hear, self._post)
        if written:
            async with self._whole:
                await self._write(written)
        if self._stopping:
            self.stop()

    async def _hear(self, message: Message) -> Delivery:
        if self.channel.takes(message):
            return Drop()
        return await self._pipeline.from_server(self.conversation, message, self._origin)

    async def _post(self, permitted: Permitted) -> None:
        """Post what needs no answer, as its client would: a refusal of ours, or a cancel."""
        with suppress(UpstreamError):
            async with self.channel.post(permitted, self._headers, lambda: None):
                pass

    async def _write(self, data: bytes) -> None:
        with suppress(ConnectionError):  # the client is gone, which ends the session anyway
            await self._stream.write(data)


class SseRelay:
    """A `Backend` in front of one server."""

    verbs = ("GET", "POST")
    by_headers = False

    def __init__(
        self, pipeline: Pipeline, upstream: HttpUpstream, sessions: Sessions, limits: Limits
    ) -> None:
        self._pipeline = pipeline
        self._upstream = upstream
        self._sessions = sessions
        self._limits = limits
        self._live: dict[str, SseSession] = {}

    # -------------------------------------------------------------- whose session it is

    def session_id(self, request: web.Request, *, modern: bool) -> str | None:
        """The token in the query of a POST; GET opens a session."""
        return None if request.method == "GET" else _token(request)

    def replier(self, request: web.Request, owner: tuple[str, ...]) -> Replier:
        """On the stream of the session; the POST itself is acknowledged.

        Raises:
            ProtocolError: 404, the session is unknown (also after a restart) or somebody else's.
        """
        token = _token(request)
        if self._sessions.find(token, owner) is None or token not in self._live:
            raise ProtocolError("Session not found", status=404)
        session = self._live[token]

        async def reply(response: Response, status: int) -> web.StreamResponse:
            await session.inject(response)
            return web.Response(status=202)

        return reply

    def _session(self, exchange: Exchange) -> SseSession:
        session = self._live.get(exchange.conversation.session.id or "")
        if session is None:
            exchange.sent()
            raise ProtocolError("Session not found", status=404)
        return session

    # -------------------------------------------------------------- GET

    async def open_stream(self, exchange: Exchange) -> web.StreamResponse:
        """Open a session there, and one here that lasts as long.

        Raises:
            ProtocolError: 503, there are as many sessions as there may be.
            UpstreamError: the server opens none.
        """
        headers = _without_resumption(exchange)
        async with connect(self._upstream, headers, self._limits.connect) as channel:
            if channel.refused:
                return await self._copy(channel.response)
            if len(self._live) >= self._limits.sessions:
                raise ProtocolError("too many sessions", status=503)
            session = SseSession(self._pipeline, channel, exchange)
            self._live[session.id] = session
            self._sessions.open(session.id, exchange.conversation, exchange.origin.actor.keys)
            try:
                return await session.live(self._limits.drain)
            finally:
                del self._live[session.id]
                self._sessions.forget(exchange.conversation)

    async def end_session(self, exchange: Exchange) -> web.StreamResponse:
        """There is no such verb: a session ends with its stream."""
        return web.Response(status=405, headers={"Allow": ", ".join(self.verbs)})

    def close_streams(self) -> None:
        """End every session, those first that wait for nothing.

        Calls may go on for as long as a shutdown waits, less what it takes to answer for them.
        """
        for session in self._live.values():
            session.stop()
        asyncio.get_running_loop().call_later(self._limits.drain * PATIENCE, self._give_up)

    def _give_up(self) -> None:
        for session in self._live.values():
            session.end(STOPPING)

    # -------------------------------------------------------------- POST

    def admit(self, exchange: Exchange, message: Message) -> None:
        """Refuse the messages of a client that does not read what it is answered.

        Raises:
            ProtocolError: 503.
        """
        if self._session(exchange).unread >= UNREAD:
            raise ProtocolError("the stream of this session is not read", status=503)

    async def forward(self, exchange: Exchange, permitted: Permitted) -> web.StreamResponse:
        """Post what is permitted, and bring the acknowledgement back."""
        session, call = self._session(exchange), exchange.call
        if call is not None:
            call.withdraw = partial(session.withdraw, permitted)
        try:
            headers = exchange.onward(call)
            async with session.channel.post(permitted, headers, exchange.sent) as response:
                if response.status >= 400:
                    self._fail(exchange, f"the server answered {response.status}")
                return await self._copy(response)
        except UpstreamError as error:
            if not exchange.answers:
                raise
            if (reply := self._fail(exchange, str(error), error)) is not None:
                await session.inject(reply)
            return web.Response(status=202)
        except asyncio.CancelledError:  # the POST was given up; its answer may come all the same
            if call is not None:
                self._pipeline.suspend(exchange.conversation, call)
            raise
        finally:
            exchange.sent()

    def _fail(
        self, exchange: Exchange, why: str, error: UpstreamError | None = None
    ) -> Response | None:
        """The call ends here, if its answer has not come; what its client is to be told."""
        call = exchange.call
        if call is None or call.outcome is not None:
            return None
        error = error or UpstreamError(why, sent=True)
        return self._pipeline.upstream_failed(exchange.conversation, call, error)

    async def _copy(self, response: ClientResponse) -> web.Response:
        """A refusal as it is, an acknowledgement without anything that could be a message."""
        body = b""
        said = response.content_type
        if said != EVENTS and (response.status >= 400 or said != JSON):
            body = await self._upstream.read(response)
        if len(body) > MAX_ERROR_BODY:
            body = b""
        headers = rules.to_client(response.headers)
        return web.Response(status=response.status, body=body, headers=headers)

    def asker(self, exchange: Exchange) -> Ask:
        """Ask in the session, with the headers of the exchange."""
        channel, headers = self._session(exchange).channel, exchange.onward(None)

        async def ask(permitted: Permitted) -> Response:
            return await channel.ask(permitted, headers)

        return ask


def _token(request: web.Request) -> str:
    tokens = request.query.getall(QUERY, [])
    return tokens[0] if len(tokens) == 1 else ""


def _endpoint(request: web.Request, token: str) -> bytes:
    """The event that leads a client's messages to where it came in."""
    path = request.raw_path.partition("?")[0]
    return encode_event(f"{path}?{QUERY}={token}".encode(), Event(b"", name=ENDPOINT))


def _without_resumption(exchange: Exchange) -> CIMultiDict[str]:
    """A stream that ended took its session along, so there is nothing to go on with."""
    headers = exchange.onward(None)
    headers.popall("Last-Event-ID", None)
    return headers
