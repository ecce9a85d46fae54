"""Streamable HTTP in front of an HTTP server (MCP 2025-03-26 and later).

POST carries one message and is answered by JSON or by a stream of events; GET opens or resumes a
session's stream; DELETE ends a session. Every message, in either direction and in any wrapping,
goes through the pipeline; events are passed on one by one, never collected. A client that goes away
ends the request upstream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from aiohttp import ClientResponse, web
from multidict import CIMultiDict

from sidecar.config import Http, Limits, Listen
from sidecar.conversation import Ask, Call, Conversation, Origin, Server, Ticket
from sidecar.errors import (
    MalformedMessage,
    ProtocolError,
    UpstreamError,
)
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import (
    INTERNAL,
    TRACE_CONTEXT,
    AnswerServer,
    Deliver,
    Drop,
    Forward,
    Permitted,
    Reply,
    protocol_reply,
)
from sidecar.policy.identity import Actor
from sidecar.protocol.framing import Event, FrameTooLarge, encode_event
from sidecar.protocol.jsonrpc import (
    FROM_SERVER,
    Message,
    Request,
    Response,
    Strictness,
    decode,
    encode,
)
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Bounded, Session, check_headers, envelope_version
from sidecar.transport import headers as rules
from sidecar.transport.upstream import HttpUpstream

log = logging.getLogger("sidecar.transport.http")

SESSION = "Mcp-Session-Id"
VERSION = "MCP-Protocol-Version"
ASSUMED_VERSION = "2025-03-26"
"""What a handshake client without the version header speaks (2025-06-18 transports)."""

MAX_ERROR_BODY = 64 * 1024


@dataclass(slots=True)
class Exchange:
    """One HTTP request: where it came from and the conversation that it belongs to."""

    request: web.Request
    origin: Origin
    conversation: Conversation
    modern: bool
    onward: Callable[[Call | None], CIMultiDict[str]]
    call: Call | None = None
    ticket: Ticket | None = None

    def sent(self) -> None:
        """The bytes have left: the next message of the conversation may follow."""
        if self.ticket is not None:
            self.ticket.release()


@dataclass(slots=True)
class Route:
    """One upstream behind one path, and its sessions."""

    upstream: HttpUpstream
    server: Server
    sessions: Bounded[str, tuple[Conversation, tuple[str, ...]]]


class HttpProxy:
    """The web application: one handler, a route a path."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        routes: dict[str, Route],
        table: MethodTable,
        actor: Actor,
        strictness: Strictness,
        limits: Limits,
        http: Http,
        listen: Listen,
    ) -> None:
        self._pipeline = pipeline
        self._routes = routes
        self._table = table
        self._actor = actor
        self._strictness = strictness
        self._limits = limits
        self._http = http
        self._loopback = listen.loopback
        self._streams: set[web.StreamResponse] = set()

    def application(self) -> web.Application:
        """The aiohttp application; start it with `handler_cancellation` and no decompression."""
        application = web.Application(client_max_size=0)
        application.router.add_route("*", "/{path:.*}", self.handle)
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
        except ConnectionError:
            raise
        except Exception:
            log.exception("a request could not be handled")
            body = protocol_reply(None, INTERNAL, "internal error")
            return web.json_response(body=encode(body), status=500)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        route = self._routes.get(path)
        if route is None:
            raise ProtocolError("there is nothing here", status=404)
        rules.refuse_duplicates(request.headers)
        rules.refuse_strangers(
            request.headers,
            loopback=self._loopback,
            hosts=self._http.hosts,
            origins=self._http.origins,
        )
        match request.method:
            case "POST":
                return await self._post(request, route)
            case "GET":
                return await self._get(request, route)
            case "DELETE":
                return await self._delete(request, route)
            case _:
                return web.Response(status=405, headers={"Allow": "POST, GET, DELETE"})

    # -------------------------------------------------------------- POST

    async def _post(self, request: web.Request, route: Route) -> web.StreamResponse:
        rules.refuse_other_content(request.headers)
        message = decode(await self._body(request), self._strictness)
        headers = {name.lower(): value for name, value in request.headers.items()}
        check_headers(message, headers, self._table)
        exchange = self._exchange(request, route, message)
        outcome, exchange.ticket, exchange.call = await self._pipeline.from_client(
            exchange.conversation, message, exchange.origin, self._asker(route, exchange)
        )
        match outcome:
            case Forward(permitted):
                return await self._forward(route, exchange, permitted)
            case Reply(response, status):
                return web.json_response(body=encode(response), status=status)
            case Drop():
                return web.Response(status=202)

    async def _body(self, request: web.Request) -> bytes:
        limit = self._limits.client_message
        too_large = FrameTooLarge(f"a message is larger than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        body = bytearray()
        async for part in request.content.iter_any():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _exchange(self, request: web.Request, route: Route, message: Message | None) -> Exchange:
        modern = message is not None and envelope_version(message) is not None
        origin = Origin(self._actor, request.remote, _trace_headers(request))
        conversation = self._conversation(request, route, modern)

        def onward(call: Call | None) -> CIMultiDict[str]:
            return rules.to_upstream(
                request.headers,
                modern=modern,
                authorization=self._http.forward_authorization,
                trace=call.trace.to_upstream if call else {},
            )

        return Exchange(request, origin, conversation, modern, onward)

    def _conversation(self, request: web.Request, route: Route, modern: bool) -> Conversation:
        """The session that the request names, or a conversation of its own.

        Raises:
            ProtocolError: 404, the session is unknown (also after a restart) or somebody else's.
        """
        session_id = None if modern else request.headers.get(SESSION)
        if session_id is None:
            version = None if modern else request.headers.get(VERSION, ASSUMED_VERSION)
            session = Session(self._table, protocol_version=version)
            return Conversation(session, route.server, "http", lasting=False)
        conversation, owner = route.sessions.get(session_id) or (None, ())
        if conversation is None or owner != self._actor.keys:
            raise ProtocolError("Session not found", status=404)
        return conversation

    async def _forward(
        self, route: Route, exchange: Exchange, permitted: Permitted
    ) -> web.StreamResponse:
        """Send what is permitted, and bring the answer back."""
        try:
            async with route.upstream.send(
                permitted, exchange.onward(exchange.call), exchange.sent
            ) as response:
                return await self._relay(route, exchange, response)
        except UpstreamError as error:
            return self._failed(exchange, error)
        finally:
            exchange.sent()
            self._end(exchange)

    def _failed(self, exchange: Exchange, error: UpstreamError) -> web.StreamResponse:
        reply = None
        if exchange.call is not None:
            reply = self._pipeline.upstream_failed(exchange.conversation, exchange.call, error)
        if reply is None:
            raise error
        return web.json_response(body=encode(reply))

    def _end(self, exchange: Exchange) -> None:
        """The exchange is over: what has no answer by now was cancelled, or broken off."""
        if exchange.call is not None and exchange.call.outcome is None:
            self._pipeline.abandon(exchange.conversation, exchange.call)
        if not exchange.conversation.lasting:
            self._pipeline.close(exchange.conversation)

    async def _relay(
        self, route: Route, exchange: Exchange, response: ClientResponse
    ) -> web.StreamResponse:
        self._adopt_session(route, exchange, response)
        if 300 <= response.status < 400:
            raise UpstreamError("the server redirects, which is not followed", sent=True)
        match _media_type(response):
            case "text/event-stream":
                return await self._relay_events(route, exchange, response)
            case "application/json":
                return await self._relay_json(route, exchange, response)
            case _:
                return await self._relay_other(route, exchange, response)

    def _adopt_session(self, route: Route, exchange: Exchange, response: ClientResponse) -> None:
        """Remember a session that the server opens with its answer to `initialize`.

        One that it no longer knows (404) is forgotten.
        """
        call, session_id = exchange.call, response.headers.get(SESSION)
        opening = call is not None and call.operation.method.name == "initialize"
        if opening and response.status < 300 and session_id and not exchange.conversation.lasting:
            exchange.conversation.lasting = True
            exchange.conversation.session.id = session_id
            route.sessions.remember(session_id, (exchange.conversation, self._actor.keys))
        if response.status == 404 and exchange.conversation.lasting:
            self._forget_session(route, exchange.conversation)

    def _forget_session(self, route: Route, conversation: Conversation) -> None:
        if conversation.session.id is not None:
            route.sessions.pop(conversation.session.id, None)
        self._pipeline.close(conversation)

    async def _relay_json(
        self, route: Route, exchange: Exchange, response: ClientResponse
    ) -> web.StreamResponse:
        body = await route.upstream.read(response)
        if not body and not _answers(exchange):
            return _copy(response, body)
        try:
            message = decode(body, FROM_SERVER)
        except MalformedMessage as error:
            if response.status >= 400 and len(body) <= MAX_ERROR_BODY:
                self._end_failed(exchange, response)
                return _copy(response, body)
            raise UpstreamError(f"the server's answer is no message: {error}", sent=True) from error
        delivery = await self._pipeline.from_server(exchange.conversation, message, exchange.origin)
        if not isinstance(delivery, Deliver):
            raise UpstreamError("the server answered something else", sent=True)
        self._end_failed(exchange, response)
        if delivery.replaced is None:
            return _copy(response, body)
        return _copy(response, encode(delivery.replaced), status=200)

    def _end_failed(self, exchange: Exchange, response: ClientResponse) -> None:
        """A failure that names no request is the end of the one that it answers."""
        call = exchange.call
        if call is not None and call.request_id is not None and call.outcome is None:
            error = UpstreamError(f"the server answered {response.status}", sent=True)
            self._pipeline.upstream_failed(exchange.conversation, call, error)

    async def _relay_events(
        self, route: Route, exchange: Exchange, response: ClientResponse
    ) -> web.StreamResponse:
        """Pass events on as they come, each judged for itself."""
        stream = web.StreamResponse(
            status=response.status, headers=rules.to_client(response.headers)
        )
        await stream.prepare(exchange.request)
        self._streams.add(stream)
        try:
            async for event in route.upstream.events(response):
                written = await self._judge_event(route, exchange, event)
                if written:
                    await stream.write(written)
            await self._close_unanswered(exchange, stream, None)
        except UpstreamError as error:
            await self._close_unanswered(exchange, stream, error)
        finally:
            self._streams.discard(stream)
        await stream.write_eof()
        return stream

    async def _close_unanswered(
        self, exchange: Exchange, stream: web.StreamResponse, error: UpstreamError | None
    ) -> None:
        """A stream without sessions that ends before its answer gets one: nothing can resume it."""
        call = exchange.call
        if call is None or call.outcome is not None or exchange.conversation.lasting:
            return
        error = error or UpstreamError("the server ended the stream without an answer", sent=True)
        reply = self._pipeline.upstream_failed(exchange.conversation, call, error)
        if reply is not None:
            await stream.write(encode_event(encode(reply)))

    async def _judge_event(self, route: Route, exchange: Exchange, event: Event) -> bytes:
        """The bytes that the client gets for an event; none when it is dropped."""
        if not event.data:
            return event.raw
        try:
            message = decode(event.data.encode("utf-8", "surrogateescape"), FROM_SERVER)
            delivery = await self._pipeline.from_server(
                exchange.conversation, message, exchange.origin
            )
        except ProtocolError as error:
            log.warning("dropped an event of the server that is no message: %s", error)
            self._pipeline.malformed(error)
            return b""
        match delivery:
            case Deliver(None):
                return event.raw
            case Deliver(replaced) if replaced is not None:
                return encode_event(encode(replaced), event)
            case AnswerServer(permitted):
                await self._answer_server(route, exchange, permitted)
                return b""
            case _:
                return b""

    async def _answer_server(self, route: Route, exchange: Exchange, permitted: Permitted) -> None:
        """Post our refusal of the server's question, as its client would post an answer."""
        headers = exchange.onward(None)
        headers["Accept"] = "application/json, text/event-stream"
        with suppress(UpstreamError):
            async with route.upstream.send(permitted, headers, lambda: None) as response:
                await route.upstream.read(response)

    async def _relay_other(
        self, route: Route, exchange: Exchange, response: ClientResponse
    ) -> web.StreamResponse:
        """Acknowledgements without a body, and errors that are no messages."""
        body = await route.upstream.read(response)
        if len(body) > MAX_ERROR_BODY or (body and response.status < 400 and _answers(exchange)):
            raise UpstreamError("the server answered with no message", sent=True)
        self._end_failed(exchange, response)
        return _copy(response, body)

    # -------------------------------------------------------------- GET and DELETE

    async def _get(self, request: web.Request, route: Route) -> web.StreamResponse:
        exchange = self._exchange(request, route, None)
        action: Literal["open", "resume"] = (
            "resume" if "Last-Event-ID" in request.headers else "open"
        )
        if await self._pipeline.stream(exchange.conversation, action, exchange.origin) is not None:
            return web.Response(status=405, headers={"Allow": "POST"})
        try:
            async with route.upstream.open("GET", exchange.onward(None)) as response:
                return await self._relay(route, exchange, response)
        finally:
            self._end(exchange)

    async def _delete(self, request: web.Request, route: Route) -> web.StreamResponse:
        exchange = self._exchange(request, route, None)
        if await self._pipeline.stream(exchange.conversation, "close", exchange.origin) is not None:
            return web.Response(status=405, headers={"Allow": "POST, GET"})
        async with route.upstream.open("DELETE", exchange.onward(None)) as response:
            if response.status < 300:
                self._forget_session(route, exchange.conversation)
            return await self._relay_other(route, exchange, response)

    def close_streams(self) -> None:
        """End every open stream, so that a shutdown does not wait for them."""
        for stream in self._streams:
            stream.force_close()
            if stream.task is not None:
                stream.task.cancel()

    # -------------------------------------------------------------- the sidecar's own requests

    def _asker(self, route: Route, exchange: Exchange) -> Ask:
        async def ask(permitted: Permitted) -> Response:
            request = permitted.message
            assert isinstance(request, Request)
            headers = exchange.onward(None)
            for name in [each for each in headers if each.lower().startswith("mcp-param-")]:
                del headers[name]
            headers.popall("Mcp-Name", None)
            if exchange.modern:
                headers["Mcp-Method"] = request.method
            async with route.upstream.send(permitted, headers, lambda: None) as response:
                return await _answer_to(route.upstream, response, request)

        return ask


async def _answer_to(
    upstream: HttpUpstream, response: ClientResponse, request: Request
) -> Response:
    """The answer to our own request, from a JSON body or from a stream."""
    try:
        if _media_type(response) == "text/event-stream":
            async for event in upstream.events(response):
                if event.data:
                    message = decode(event.data.encode("utf-8", "surrogateescape"), FROM_SERVER)
                    if isinstance(message, Response) and message.id == request.id:
                        return message
        else:
            message = decode(await upstream.read(response), FROM_SERVER)
            if isinstance(message, Response) and message.id in (request.id, None):
                return message
    except MalformedMessage as error:
        raise UpstreamError(f"the server's answer is no message: {error}", sent=True) from error
    raise UpstreamError("the server did not answer", sent=True)


def _answers(exchange: Exchange) -> bool:
    """Whether the client waits for an answer with an id."""
    return exchange.call is not None and exchange.call.request_id is not None


def _refusal(error: ProtocolError) -> web.Response:
    body = encode(protocol_reply(error.request_id, error.rpc_code, str(error)))
    response = web.json_response(body=body, status=error.status)
    if isinstance(error, FrameTooLarge):
        response.force_close()
    return response


def _copy(response: ClientResponse, body: bytes, status: int | None = None) -> web.Response:
    headers = rules.to_client(response.headers)
    return web.Response(status=status or response.status, body=body, headers=headers)


def _media_type(response: ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _trace_headers(request: web.Request) -> dict[str, str]:
    return {name: request.headers[name] for name in TRACE_CONTEXT if name in request.headers}


async def serve(
    proxy: HttpProxy, listen: Listen, drain: float
) -> tuple[web.AppRunner, tuple[str, int]]:
    """Start to listen; the runner to be cleaned up, and the address that was bound.

    Raises:
        OSError: the address can not be had.
    """
    runner = web.AppRunner(
        proxy.application(),
        auto_decompress=False,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=drain,
        handle_signals=False,
    )
    await runner.setup()
    site = web.TCPSite(runner, listen.host, listen.port)
    try:
        await site.start()
    except BaseException:
        await runner.cleanup()
        raise
    host, port = runner.addresses[0][:2]
    return runner, (host, port)
