"""Streamable HTTP in front of a stdio server (MCP 2025-03-26 and later).

Every session of a handshake client has a child of its own (`hosted`). Clients of the stateless
revision have no sessions: they share one child if the configuration says so (`shared`), and else
learn which revisions there are, so that they may shake hands instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from functools import partial

from aiohttp import web

from sidecar.config import Limits
from sidecar.conversation import Ask
from sidecar.errors import (
    ConfigError,
    HeaderMismatch,
    MalformedMessage,
    Overloaded,
    ProtocolError,
    UnsupportedVersion,
    UpstreamError,
)
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.jsonrpc import Message, Request, Response, encode
from sidecar.protocol.methods import LEGACY_REVISIONS, REVISIONS
from sidecar.protocol.session import envelope_version
from sidecar.rechecking import WITHDRAWN
from sidecar.transport import headers as rules
from sidecar.transport.child import Start
from sidecar.transport.exchange import Exchange, Sessions, Streamable
from sidecar.transport.hosted import HostedSession
from sidecar.transport.shared import SharedServer

log = logging.getLogger("sidecar.transport.bridge")

JSON, EVENTS = "application/json", "text/event-stream"
STOPPING = "the sidecar is stopping"
PATIENCE = 0.8
"""The part of a shutdown's time that calls have to end by themselves."""


class StdioBridge(Streamable):
    """A `Backend` of what `start` starts, at most `limits.children` times at once."""

    def __init__(
        self,
        pipeline: Pipeline,
        start: Start,
        limits: Limits,
        shared: SharedServer | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._start_child = start
        self._limits = limits
        self._shared = shared
        self._sessions: OrderedDict[str, HostedSession] = OrderedDict()
        self._lives: set[asyncio.Task[None]] = set()
        self._most = min(limits.children, limits.sessions)
        self._starting = 0

    def admit(self, exchange: Exchange, message: Message) -> None:
        """Refuse what belongs to no session, and revisions that are not served.

        Raises:
            ProtocolError: 400 or 406.
        """
        rules.refuse_other_readers(exchange.request.headers, JSON, EVENTS)
        request_id = message.id if isinstance(message, Request) else None
        if exchange.modern:
            version = str(envelope_version(message))
            if self._shared is None:
                raise UnsupportedVersion(version, sorted(LEGACY_REVISIONS), request_id=request_id)
            claimed = exchange.request.headers.get(rules.VERSION, version)
            if version not in REVISIONS and claimed != version:
                # Real clients may get the header of a probe wrong, but not with a revision that
                # nobody knows; the server behind a pipe sees no headers, and can not say so.
                raise HeaderMismatch(
                    f"header {rules.VERSION} does not match the body", request_id=request_id
                )
        elif not exchange.conversation.lasting and not _opens(message):
            raise MalformedMessage(f"{rules.SESSION} is missing", request_id=request_id)

    async def forward(self, exchange: Exchange, permitted: Permitted) -> web.StreamResponse:
        """Send what is permitted to the child of its session, and bring the answer back."""
        if exchange.modern:
            assert self._shared is not None
            return await self._shared.forward(exchange, permitted)
        if not exchange.conversation.lasting:
            return await self._open(exchange, permitted)
        session = self._session(exchange)
        if isinstance(permitted.message, Request):
            return await session.request(exchange, permitted)
        return await session.tell(exchange, permitted)

    def _session(self, exchange: Exchange) -> HostedSession:
        """The session of an exchange, used just now.

        Raises:
            ProtocolError: 404, it has ended meanwhile.
        """
        session = self._sessions.get(exchange.conversation.session.id or "")
        if session is None:
            exchange.sent()
            raise ProtocolError("Session not found", status=404)
        self._sessions.move_to_end(session.id)
        return session

    # -------------------------------------------------------------- sessions begin and end

    async def _open(self, exchange: Exchange, permitted: Permitted) -> web.StreamResponse:
        """Start a child and shake hands with it; the session is there if that went well."""
        call = exchange.call
        assert call is not None
        try:
            session = await self._start(exchange)
        except (UpstreamError, Overloaded) as error:
            exchange.sent()
            reply = self._pipeline.upstream_failed(exchange.conversation, call, error)
            assert reply is not None
            return web.json_response(body=encode(reply))
        response = None
        try:
            response = await session.request(exchange, permitted, {rules.SESSION: session.id})
        finally:
            if call.outcome != "success":
                session.end("the handshake failed")
                if response is not None and not response.prepared:
                    del response.headers[rules.SESSION]
        return response

    async def _start(self, exchange: Exchange) -> HostedSession:
        """A session with a child of its own.

        Raises:
            Overloaded: there are as many children as there may be, and all have clients.
            UpstreamError: none can be started.
        """
        await self._make_room()
        self._starting += 1
        try:
            child = await self._start_child()
        except ConfigError as error:
            raise UpstreamError(str(error), sent=False) from error
        finally:
            self._starting -= 1
        session = HostedSession(self._pipeline, child, exchange.conversation, exchange.origin)
        self._sessions[session.id] = session
        exchange.sessions.open(session.id, exchange.conversation, exchange.origin.actor.keys)
        forget = partial(self._forget, session, exchange.sessions)
        exchange.conversation.end = partial(self._withdraw, session, exchange.sessions)
        life = asyncio.get_running_loop().create_task(session.live(self._limits, forget))
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)
        return session

    async def _make_room(self) -> None:
        """Wait until one child more may be started; a session that nobody uses gives way."""
        while len(self._lives) + self._starting >= self._most:
            if len(self._lives) <= len(self._sessions):
                unused = next((each for each in self._sessions.values() if each.idle), None)
                if unused is None:
                    raise Overloaded("too many sessions")
                log.info("ending the session that was unused for longest: there are too many")
                self._sessions.pop(unused.id)
                unused.end("the session gave way to another")
            await asyncio.wait(set(self._lives), return_when=asyncio.FIRST_COMPLETED)

    def _forget(self, session: HostedSession, sessions: Sessions) -> None:
        self._sessions.pop(session.id, None)
        sessions.forget(session.conversation)

    def _withdraw(self, session: HostedSession, sessions: Sessions) -> None:
        self._forget(session, sessions)
        session.end(WITHDRAWN)

    async def open_stream(self, exchange: Exchange) -> web.StreamResponse:
        """GET: the session's own stream. Nothing is sent a second time, so nothing is resumed."""
        if not exchange.conversation.lasting:
            return _without_session(exchange.request)
        rules.refuse_other_readers(exchange.request.headers, EVENTS)
        return await self._session(exchange).open_stream(exchange)

    async def end_session(self, exchange: Exchange) -> web.StreamResponse:
        """DELETE: the session is over, and its child is brought down."""
        if not exchange.conversation.lasting:
            return _without_session(exchange.request)
        session = self._session(exchange)
        self._forget(session, exchange.sessions)
        session.end("the client ended the session")
        return web.Response(status=204)

    def asker(self, exchange: Exchange) -> Ask:
        """A way to put the sidecar's own request to the server of the exchange."""
        if exchange.modern and self._shared is not None:
            return self._shared.ask
        session = self._sessions.get(exchange.conversation.session.id or "")
        return _nobody if session is None else session.ask

    def close_streams(self) -> None:
        """End every open stream, so that a shutdown does not wait for them.

        Calls may go on for as long as a shutdown waits, less what it takes to answer for them.
        """
        for session in self._sessions.values():
            session.close_stream()
        if self._shared is not None:
            self._shared.close_streams()
        asyncio.get_running_loop().call_later(self._limits.drain * PATIENCE, self._give_up)

    def _give_up(self) -> None:
        for session in list(self._sessions.values()):
            session.end(STOPPING)
        if self._shared is not None:
            self._shared.fail_waiting(UpstreamError(STOPPING, sent=True))

    async def stop(self) -> None:
        """Bring every child down, all at once."""
        self._give_up()
        if self._lives:
            await asyncio.wait(set(self._lives))
        if self._shared is not None:
            await self._shared.stop()


def _opens(message: Message) -> bool:
    return isinstance(message, Request) and message.method == "initialize"


def _without_session(request: web.Request) -> web.Response:
    """GET and DELETE are there for sessions only, and not at all for the stateless revision."""
    if request.headers.get(rules.VERSION, "") in {"", *LEGACY_REVISIONS}:
        raise MalformedMessage(f"{rules.SESSION} is missing")
    return web.Response(status=405, headers={"Allow": "POST"})


async def _nobody(permitted: Permitted) -> Response:
    raise UpstreamError("there is no server yet", sent=False)
