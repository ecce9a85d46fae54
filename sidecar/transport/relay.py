"""The way to an HTTP server and back: answers in JSON or as a stream of events, each judged.

Events are passed on one by one, never collected. A client that goes away ends the request upstream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from aiohttp import ClientResponse, web
from multidict import CIMultiDict

from sidecar.conversation import Ask, Conversation
from sidecar.errors import MalformedMessage, UpstreamError
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import Deliver, Delivery, Permitted, taken_back
from sidecar.protocol.framing import Event, encode_event, encode_line
from sidecar.protocol.jsonrpc import FROM_SERVER, Message, Request, Response, decode, encode
from sidecar.rechecking import WITHDRAWN
from sidecar.transport import headers as rules
from sidecar.transport.exchange import Exchange, Frame, Sessions, Streamable
from sidecar.transport.judged import judged
from sidecar.transport.upstream import HttpUpstream, announces
from sidecar.transport.withdrawal import Withdrawable, Withdrawn, conclude

log = logging.getLogger("sidecar.transport.relay")

MAX_ERROR_BODY = 64 * 1024

FAREWELLS, FAREWELL = 64, 5.0
"""So many servers' sessions are ended at once, and so many seconds that may take."""

SHOWN = ("Authorization", "Cookie", "X-Api-Key")
"""What a server may know the client of a session by."""


class HttpRelay(Streamable):
    """A `Backend` in front of one MCP endpoint."""

    def __init__(self, pipeline: Pipeline, upstream: HttpUpstream) -> None:
        self._pipeline = pipeline
        self._upstream = upstream
        self._streams: set[web.StreamResponse] = set()
        self._farewells: set[asyncio.Task[None]] = set()

    def admit(self, exchange: Exchange, message: Message) -> None:
        """Whatever it is, the server will say whether it wants it."""

    async def forward(self, exchange: Exchange, permitted: Permitted) -> web.StreamResponse:
        """Send what is permitted, and bring the answer back."""
        withdrawable = Withdrawable()
        if exchange.call is not None:
            exchange.call.withdraw = withdrawable.withdraw
        try:
            with withdrawable:
                async with self._upstream.send(
                    permitted, exchange.onward(exchange.call), exchange.sent
                ) as response:
                    return await self._relay(exchange, response)
        except Withdrawn as withdrawn:
            return await self._withdrawn(exchange, permitted, withdrawn)
        except UpstreamError as error:
            return self._failed(exchange, error)
        finally:
            exchange.sent()
            self._end(exchange)

    async def _withdrawn(
        self, exchange: Exchange, permitted: Permitted, withdrawn: Withdrawn
    ) -> web.StreamResponse:
        """The client gets its answer from us. In a session its server is told, which else knows."""
        assert withdrawn.reply is not None
        frame, reply = exchange.frame, encode(withdrawn.reply)
        last = reply if frame is None else frame(reply, None)
        response = await conclude(exchange.request, exchange.stream, last)
        if exchange.conversation.lasting:
            await self._post(exchange, taken_back(permitted, WITHDRAWN))
        return response

    def _failed(self, exchange: Exchange, error: UpstreamError) -> web.StreamResponse:
        reply = None
        if exchange.call is not None:
            reply = self._pipeline.upstream_failed(exchange.conversation, exchange.call, error)
        if reply is None:
            raise error
        return web.json_response(body=encode(reply))

    def _end(self, exchange: Exchange) -> None:
        """The exchange is over: what has no answer by now was cancelled, or goes on elsewhere."""
        if exchange.call is not None and exchange.call.outcome is None:
            over = self._pipeline.suspend if exchange.resumable else self._pipeline.abandon
            over(exchange.conversation, exchange.call)
        if not exchange.conversation.lasting:
            self._pipeline.close(exchange.conversation)

    async def _relay(self, exchange: Exchange, response: ClientResponse) -> web.StreamResponse:
        self._adopt_session(exchange, response)
        if 300 <= response.status < 400:
            raise UpstreamError("the server redirects, which is not followed", sent=True)
        match _media_type(response):
            case "text/event-stream":
                events = self._upstream.events(response)
                return await self._relay_stream(exchange, response, events, encode_event)
            case "application/json":
                return await self._relay_json(exchange, response)
            case _:
                return await self._relay_other(exchange, response)

    def _adopt_session(self, exchange: Exchange, response: ClientResponse) -> None:
        """Remember a session that the server opens with its answer to `initialize`.

        One that it no longer knows (404) is forgotten.
        """
        call, session_id = exchange.call, response.headers.get(rules.SESSION)
        opening = call is not None and call.operation.method.name == "initialize"
        if opening and response.status < 300 and session_id and not exchange.conversation.lasting:
            owner = exchange.origin.actor.keys
            forgotten = exchange.sessions.open(session_id, exchange.conversation, owner)
            if forgotten is not None:
                self._pipeline.forget(forgotten)
            exchange.conversation.end = self._ender(exchange, session_id)
        if response.status == 404 and exchange.conversation.lasting:
            self._forget_session(exchange.sessions, exchange.conversation)

    def _ender(self, exchange: Exchange, session_id: str) -> Callable[[], None]:
        """What ends a session that is refused now: it is forgotten here, and its server told."""
        sessions, conversation, onward = exchange.sessions, exchange.conversation, exchange.onward
        known = onward(None)
        headers = CIMultiDict({name: known[name] for name in SHOWN if name in known})
        headers[rules.SESSION] = session_id

        def end() -> None:
            self._forget_session(sessions, conversation)
            if len(self._farewells) >= FAREWELLS:
                log.warning("a server is not told of the end of a session: too many end at once")
                return
            if conversation.session.protocol_version is not None:
                headers[rules.VERSION] = conversation.session.protocol_version
            task = asyncio.get_running_loop().create_task(self._bid_farewell(headers))
            self._farewells.add(task)
            task.add_done_callback(self._farewells.discard)

        return end

    async def _bid_farewell(self, headers: CIMultiDict[str]) -> None:
        """DELETE, whatever comes of it: the server may know no such thing."""
        with suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(FAREWELL), self._upstream.open("DELETE", headers):
                pass

    def _forget_session(self, sessions: Sessions, conversation: Conversation) -> None:
        sessions.forget(conversation)
        self._pipeline.close(conversation)

    async def _relay_json(self, exchange: Exchange, response: ClientResponse) -> web.StreamResponse:
        """Pass on one message, or, where the body is a message a line, each as it comes."""
        head = await self._upstream.begin(response)
        if announces(head):
            lines = self._upstream.lines(response, head)
            return await self._relay_stream(exchange, response, lines, encode_line)
        body = await self._upstream.read(response, head)
        if not body and not exchange.answers:
            return _copy(response, body)
        try:
            message = decode(body, FROM_SERVER)
        except MalformedMessage as error:
            if response.status >= 400 and len(body) <= MAX_ERROR_BODY:
                self._end_failed(exchange, response)
                return _copy(response, body)
            raise UpstreamError(f"the server's answer is no message: {error}", sent=True) from error
        delivery = await self._pipeline.from_server(
            exchange.conversation, message, exchange.answering
        )
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

    async def _relay_stream(
        self,
        exchange: Exchange,
        response: ClientResponse,
        events: AsyncIterator[Event],
        frame: Frame,
    ) -> web.StreamResponse:
        """Pass events on as they come, each judged for itself."""
        stream = web.StreamResponse(
            status=response.status, headers=rules.to_client(response.headers)
        )
        await stream.prepare(exchange.request)
        exchange.stream, exchange.frame = stream, frame
        if exchange.endless:
            self._streams.add(stream)
        try:
            with _telling(exchange, stream, frame):
                await self._pass_on(exchange, stream, events, frame)
            await self._close_unanswered(exchange, stream, frame, None)
        except UpstreamError as error:
            await self._close_unanswered(exchange, stream, frame, error)
        finally:
            self._streams.discard(stream)
        await stream.write_eof()
        return stream

    async def _pass_on(
        self,
        exchange: Exchange,
        stream: web.StreamResponse,
        events: AsyncIterator[Event],
        frame: Frame,
    ) -> None:
        async for event in events:
            exchange.resumable = exchange.resumable or bool(event.id)
            written = await self._judge_event(exchange, event, frame)
            if written:
                await stream.write(written)
                await asyncio.sleep(0)  # a flood waits its turn behind everybody else

    async def _close_unanswered(
        self,
        exchange: Exchange,
        stream: web.StreamResponse,
        frame: Frame,
        error: UpstreamError | None,
    ) -> None:
        """A stream without sessions that ends before its answer gets one: nothing can resume it."""
        call = exchange.call
        if call is None or call.outcome is not None or exchange.conversation.lasting:
            return
        error = error or UpstreamError("the server ended the stream without an answer", sent=True)
        reply = self._pipeline.upstream_failed(exchange.conversation, call, error)
        if reply is not None:
            await stream.write(frame(encode(reply), None))

    async def _judge_event(self, exchange: Exchange, event: Event, frame: Frame) -> bytes:
        """The bytes that the client gets for an event; none when it is dropped."""

        async def hear(message: Message) -> Delivery:
            return await self._pipeline.from_server(
                exchange.conversation, message, exchange.answering
            )

        answer = partial(self._post, exchange)
        return await judged(event, self._pipeline, hear, answer, frame)

    async def _post(self, exchange: Exchange, permitted: Permitted) -> None:
        """Post what needs no answer, as its client would: a refusal of ours, or a cancel."""
        headers = exchange.onward(None)
        headers["Accept"] = "application/json, text/event-stream"
        with suppress(UpstreamError):
            async with self._upstream.send(permitted, headers, lambda: None) as response:
                await self._upstream.read(response)

    async def _relay_other(
        self, exchange: Exchange, response: ClientResponse
    ) -> web.StreamResponse:
        """Acknowledgements without a body, and errors that are no messages."""
        body = await self._upstream.read(response)
        if len(body) > MAX_ERROR_BODY or (body and response.status < 400 and exchange.answers):
            raise UpstreamError("the server answered with no message", sent=True)
        self._end_failed(exchange, response)
        return _copy(response, body)

    async def open_stream(self, exchange: Exchange) -> web.StreamResponse:
        """GET: relay the session's stream."""
        withdrawable = Withdrawable()
        held = self._pipeline.open.stream(
            exchange.conversation, exchange.opening, exchange.origin, withdrawable.end
        )
        try:
            with withdrawable, held:
                async with self._upstream.open("GET", exchange.onward(None)) as response:
                    return await self._relay(exchange, response)
        except Withdrawn:
            return await conclude(exchange.request, exchange.stream, None)
        finally:
            self._end(exchange)

    async def end_session(self, exchange: Exchange) -> web.StreamResponse:
        """DELETE: end the session there, and here when it was ended there."""
        async with self._upstream.open("DELETE", exchange.onward(None)) as response:
            if response.status < 300:
                self._forget_session(exchange.sessions, exchange.conversation)
            return await self._relay_other(exchange, response)

    def asker(self, exchange: Exchange) -> Ask:
        """Ask as its caller, with its headers less those that mirror its message."""

        async def ask(permitted: Permitted) -> Response:
            request = permitted.message
            assert isinstance(request, Request)
            headers = exchange.onward(None)
            for name in [each for each in headers if each.lower().startswith("mcp-param-")]:
                del headers[name]
            headers.popall("Mcp-Name", None)
            if exchange.modern:
                headers["Mcp-Method"] = request.method
            async with self._upstream.send(permitted, headers, lambda: None) as response:
                return await _answer_to(self._upstream, response, request)

        return ask

    def close_streams(self) -> None:
        """End every open stream."""
        for stream in self._streams:
            stream.force_close()
            if stream.task is not None:
                stream.task.cancel()


@contextmanager
def _telling(exchange: Exchange, stream: web.StreamResponse, frame: Frame) -> Iterator[None]:
    """While a subscription, or a session's own stream, is open its client can be told things."""

    async def tell(message: Message) -> None:
        await stream.write(frame(encode(message), None))

    holder = exchange.call or exchange.conversation
    if not exchange.endless:
        yield
        return
    holder.tell = tell
    try:
        yield
    finally:
        if holder.tell is tell:
            holder.tell = None


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


def _copy(response: ClientResponse, body: bytes, status: int | None = None) -> web.Response:
    headers = rules.to_client(response.headers)
    return web.Response(status=status or response.status, body=body, headers=headers)


def _media_type(response: ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
