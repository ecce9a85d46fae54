"""HTTP for MCP clients (Streamable HTTP, MCP 2025-03-26 and later; legacy HTTP+SSE).

POST carries one message, GET opens or resumes a session's stream, DELETE ends a session. Every
request is authenticated before its body is read; its message is checked, judged and handed to the
backend of its path; the server's side is there, and how its clients talk.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Hashable, Mapping
from contextlib import suppress
from ssl import SSLContext
from typing import Literal

from aiohttp import web
from multidict import CIMultiDict

from sidecar.config import Http, Limits, Listen
from sidecar.conversation import Call, Conversation, Origin, Stranger
from sidecar.errors import ProtocolError, Unauthenticated, UpstreamError
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import (
    INTERNAL,
    TRACE_CONTEXT,
    Drop,
    Forward,
    Reply,
    protocol_reply,
)
from sidecar.policy.identity import Actor
from sidecar.protocol.framing import FrameTooLarge
from sidecar.protocol.jsonrpc import Message, Request, Response, Strictness, decode, encode
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session, check_headers, is_modern
from sidecar.transport import headers as rules
from sidecar.transport.authentication import Authentication, insufficient
from sidecar.transport.callers import AUTHORIZATION, caller_of
from sidecar.transport.exchange import Exchange, Replier, Route
from sidecar.transport.metadata import Metadata

log = logging.getLogger("sidecar.transport.http")

ASSUMED_VERSION = "2025-03-26"
"""What a handshake client without the version header speaks (2025-06-18 transports)."""

FILES = 32_768
"""As many as `limits.streams` and the calls beside them need, and no more: children inherit it."""

CLIENT_GONE = 499
"""Never seen by anybody."""


class Unfinished(ProtocolError):
    """A request whose body does not come; what is left of it is not read."""

    code = "unfinished"
    status = 408


class HttpProxy:
    """The web application: one handler, a route a path."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        routes: Mapping[str, Route],
        metadata: Mapping[str, Metadata],
        table: MethodTable,
        authentication: Authentication,
        strictness: Strictness,
        limits: Limits,
        http: Http,
        listen: Listen,
    ) -> None:
        self._pipeline = pipeline
        self._routes = routes
        self._metadata = metadata
        self._table = table
        self._authentication = authentication
        self._strictness = strictness
        self._limits = limits
        self._http = http
        # Where tokens are verified, a second one is a bad credential, and not a bad header.
        ours = {"authorization"} if authentication.verifies else set()
        self._single = tuple(each for each in rules.SINGLE if each not in ours)
        self._authorization = http.forward_authorization
        if self._authorization is None:
            self._authorization = not authentication.verifies
        self._loopback = listen.loopback

    def application(self) -> web.Application:
        """The aiohttp application; start it with `handler_cancellation` and no decompression."""
        application = web.Application(client_max_size=0)
        application.router.add_route("*", "/{path:.*}", self.handle)
        application.on_response_prepare.append(self._retire)
        return application

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one HTTP request; the only place where an error becomes a response."""
        try:
            return await self._route(request)
        except ProtocolError as error:
            self._pipeline.malformed(error)
            return _refusal(error)
        except UpstreamError as error:
            log.warning("upstream: %s", error)
            return web.Response(status=502, text=f"{error}\n")
        except ConnectionError as error:
            if request.transport is not None and not request.transport.is_closing():
                raise
            # Nobody is there to be answered, and going away is no error of ours to be logged.
            log.debug("the client went away: %s", error)
            return web.Response(status=CLIENT_GONE)
        except Exception:
            log.exception("a request could not be handled")
            body = protocol_reply(None, INTERNAL, "internal error")
            return web.json_response(body=encode(body), status=500)

    async def _retire(self, request: web.Request, response: web.StreamResponse) -> None:
        """A client that lives long comes back with its newer certificate, before the old one ends.

        It notices nothing, where a request on a connection that has outlived it would be refused.
        """
        if self._authentication.outworn(request):
            response.force_close()
            response.headers["Connection"] = "close"

    async def _route(self, request: web.Request) -> web.StreamResponse:
        rules.refuse_duplicates(request.headers, self._single)
        rules.refuse_strangers(
            request.headers,
            loopback=self._loopback,
            hosts=self._http.hosts,
            origins=self._http.origins,
        )
        path = request.raw_path.partition("?")[0]
        if (metadata := self._metadata.get(path)) is not None:
            return await metadata.answer(request)
        if (route := self._routes.get(path)) is None:
            raise ProtocolError("there is nothing here", status=404)
        if request.method not in route.backend.verbs:
            return web.Response(status=405, headers={"Allow": ", ".join(route.backend.verbs)})
        try:
            actor = await self._authentication.actor(request)
        except Unauthenticated as error:
            return self._unauthenticated(error, request, route)
        match request.method:
            case "POST":
                return await self._post(request, route, actor)
            case "GET":
                return await self._get(request, route, actor)
            case _:
                return await self._delete(request, route, actor)

    def _unauthenticated(
        self, error: Unauthenticated, request: web.Request, route: Route
    ) -> web.Response:
        """401, without the id of the message: nobody makes us read one who may not send it."""
        self._pipeline.malformed(error)
        log.warning("a request was refused: %s", error.code)
        address = self._authentication.source_address(request)
        path = request.raw_path.partition("?")[0]
        self._pipeline.not_let_in(Stranger(error.code, "http", address, path))
        response = _refusal(error)
        response.headers.update(self._authentication.challenge(error, route.metadata))
        return response

    # -------------------------------------------------------------- POST

    async def _post(self, request: web.Request, route: Route, actor: Actor) -> web.StreamResponse:
        """Let a message through, or answer it: where its sender waits for an answer by its id."""
        reply = route.backend.replier(request, actor.keys)
        rules.refuse_other_content(request.headers)
        try:
            message = decode(await self._body(request), self._strictness)
            return await self._submit(request, route, actor, message, reply)
        except ProtocolError as error:
            if error.request_id is None:
                raise
            self._pipeline.malformed(error)
            return await reply(_reply_to(error), error.status)

    async def _submit(
        self, request: web.Request, route: Route, actor: Actor, message: Message, reply: Replier
    ) -> web.StreamResponse:
        if route.backend.by_headers:
            headers = {name.lower(): value for name, value in request.headers.items()}
            check_headers(message, headers, self._table)
        exchange = self._exchange(request, route, actor, message)
        route.backend.admit(exchange, message)
        outcome, exchange.ticket, exchange.call = await self._pipeline.from_client(
            exchange.conversation, message, exchange.origin, route.backend.asker(exchange)
        )
        match outcome:
            case Forward(permitted):
                return await route.backend.forward(exchange, permitted)
            case Reply(response, status):
                challenge = _insufficient_scope(exchange, route, response)
                answer = await reply(response, 403 if challenge else status)
                answer.headers.update(challenge)
                return answer
            case Drop():
                return web.Response(status=202)

    async def _body(self, request: web.Request) -> bytes:
        limit = self._limits.client_message
        too_large = FrameTooLarge(f"a message is larger than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body):
                async for part in request.content.iter_any():
                    body += part
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Unfinished(f"a body was not there within {self._limits.body:g} s") from None
        return bytes(body)

    def _exchange(
        self, request: web.Request, route: Route, actor: Actor, message: Message | None
    ) -> Exchange:
        modern = message is not None and is_modern(message)
        address = self._authentication.source_address(request)
        shown = rules.shown_to_policy(request.headers, self._http.unverified_headers)
        origin = Origin(actor, address, _trace_headers(request), shown)
        conversation = self._conversation(request, route, actor, modern)
        conversation.caller = self._caller(request, route, actor, conversation, message)

        def onward(call: Call | None) -> CIMultiDict[str]:
            return rules.to_upstream(
                request.headers,
                modern=modern and route.backend.by_headers,
                authorization=self._authorization is True,
                trace=call.trace.to_upstream if call else {},
                asserting=self._authentication.asserting,
            )

        return Exchange(request, origin, conversation, route.sessions, modern, onward)

    def _conversation(
        self, request: web.Request, route: Route, actor: Actor, modern: bool
    ) -> Conversation:
        """The session that the request names, or a conversation of its own.

        Raises:
            ProtocolError: 404, the session is unknown (also after a restart) or somebody else's.
        """
        session_id = route.backend.session_id(request, modern=modern)
        if session_id is None:
            claimed = request.headers.get(rules.VERSION, ASSUMED_VERSION)
            version = claimed if route.backend.by_headers and not modern else None
            session = Session(self._table, protocol_version=version)
            return Conversation(session, route.server, "http", lasting=False)
        conversation = route.sessions.find(session_id, actor.keys)
        if conversation is None:
            raise ProtocolError("Session not found", status=404)
        return conversation

    def _caller(
        self,
        request: web.Request,
        route: Route,
        actor: Actor,
        conversation: Conversation,
        message: Message | None,
    ) -> Hashable | None:
        """Whom its server may offer something else than others: a session, or one who calls."""
        if conversation.caller is not None:
            return conversation.caller
        names = route.credentials if self._authorization else route.credentials - {AUTHORIZATION}
        caller = caller_of(request.headers, names, actor if route.asserted else None)
        if caller is None:
            return None
        begins = conversation.lasting or _begins(message, route)
        return object() if begins else caller

    # -------------------------------------------------------------- GET and DELETE

    async def _get(self, request: web.Request, route: Route, actor: Actor) -> web.StreamResponse:
        exchange = self._exchange(request, route, actor, None)
        resumes = route.backend.by_headers and "Last-Event-ID" in request.headers
        action: Literal["open", "resume"] = "resume" if resumes else "open"
        # A policy that says no and too many streams are answered alike: to every client 405 means
        # that there is no stream, and it goes on without, where other statuses end some of them.
        with self._pipeline.load.stream():
            asking = self._pipeline.stream(exchange.conversation, action, exchange.origin)
            if await asking is not None:
                return web.Response(status=405, headers={"Allow": "POST"})
            return await route.backend.open_stream(exchange)

    async def _delete(self, request: web.Request, route: Route, actor: Actor) -> web.StreamResponse:
        exchange = self._exchange(request, route, actor, None)
        if await self._pipeline.stream(exchange.conversation, "close", exchange.origin) is not None:
            return web.Response(status=405, headers={"Allow": "POST, GET"})
        return await route.backend.end_session(exchange)

    def close_streams(self) -> None:
        """End every open stream, so that a shutdown does not wait for them."""
        for route in self._routes.values():
            route.backend.close_streams()

    def forget_sessions(self) -> None:
        """Nobody will come back to a session: what happened in it is recorded."""
        for route in self._routes.values():
            for conversation in route.sessions:
                self._pipeline.close(conversation)


def _begins(message: Message | None, route: Route) -> bool:
    """Whether a request may open a session, which is a caller of its own as long as it lasts."""
    if message is None:
        return not route.backend.by_headers
    return isinstance(message, Request) and message.method == "initialize"


def _insufficient_scope(exchange: Exchange, route: Route, response: Response) -> dict[str, str]:
    """The challenge to one whose token lacks a scope that the policy names; {} to others.

    Who is answered by a result that a model reads is told by the reasons alone. Who is answered on
    a stream has it with the acknowledgement: some clients give up a session whose POST is refused.
    """
    call = exchange.call
    if call is None or call.actor.token is None or response.error is None:
        return {}
    if call.verdict != "deny":
        return {}
    return insufficient(call.reasons, route.metadata)


def _reply_to(error: ProtocolError) -> Response:
    return protocol_reply(error.request_id, error.rpc_code, str(error), error.data)


def _refusal(error: ProtocolError) -> web.Response:
    response = web.json_response(body=encode(_reply_to(error)), status=error.status)
    if isinstance(error, FrameTooLarge | Unfinished):
        response.force_close()
    return response


def _trace_headers(request: web.Request) -> dict[str, str]:
    return {name: request.headers[name] for name in TRACE_CONTEXT if name in request.headers}


def _raise_file_limit() -> None:
    """A stream takes two connections, and the soft limit of many systems is 256 or 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with suppress(ValueError, OSError):  # some systems have another bound below the hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(
    proxy: HttpProxy, listen: Listen, drain: float, tls: SSLContext | None = None
) -> tuple[web.AppRunner, list[Listen]]:
    """Start to listen; the runner to be cleaned up, and the addresses that were bound.

    Raises:
        OSError: an address can not be had.
    """
    _raise_file_limit()
    runner = web.AppRunner(
        proxy.application(),
        auto_decompress=False,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=drain,
        handle_signals=False,
    )
    await runner.setup()
    port = listen.port
    try:
        for host in listen.hosts:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
            port = runner.addresses[0][1]
    except BaseException:
        await runner.cleanup()
        raise
    return runner, [Listen(*address[:2]) for address in runner.addresses]
