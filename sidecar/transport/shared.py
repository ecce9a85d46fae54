"""One child for all clients of the stateless revision: who is meant is told apart by ids.

Each request gets an id of its own, which is its progress token as well; what names one of them is
mapped back to the request's client. Whatever else the server says is nobody's: its questions are
refused, since nobody can say whom they are for, and its other notifications are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from aiohttp import web

from sidecar.config import Limits
from sidecar.conversation import Call, Conversation, Origin, Server
from sidecar.errors import ConfigError, HeaderMismatch, ProtocolError, UpstreamError
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import AnswerServer, Deliver, Permitted, readdressed, taken_back
from sidecar.policy.identity import UNKNOWN
from sidecar.protocol.jsonrpc import (
    JsonObject,
    Message,
    Notification,
    Request,
    RequestId,
    Response,
    encode,
)
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.mirror import contradicted
from sidecar.protocol.session import Session
from sidecar.transport.child import Child, Start
from sidecar.transport.exchange import Exchange
from sidecar.transport.outlet import BOUND, Outlet, respond
from sidecar.transport.tasks import Tasks

log = logging.getLogger("sidecar.transport.bridge")

LAST_WORDS = 1.0
"""Seconds in which what a server has said is read, once it has ended."""

SUBSCRIPTION = "io.modelcontextprotocol/subscriptionId"
STATUS = {
    **dict.fromkeys((-32700, -32600, -32602, -32020, -32021, -32022), 400),
    -32601: 404,
}
"""The HTTP status of an answer that is a protocol error (MCP 2026-07-28, streamable-http)."""

NAMES = {
    "notifications/progress": "progressToken",
    "notifications/cancelled": "requestId",
}
"""Where a notification says which request it is about."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A client's request: as its client knows it, and as the server does."""

    exchange: Exchange
    call: Call
    request_id: RequestId
    token: object
    sent: Permitted
    outlet: Outlet = field(default_factory=Outlet)


class SharedChild:
    """One child, and who waits for it."""

    def __init__(self, pipeline: Pipeline, child: Child, server: Server) -> None:
        self.child = child
        self._pipeline = pipeline
        self._nobody = Conversation(Session(MethodTable.of()), server, "http", lasting=False)
        self._waiting: dict[RequestId, Waiting] = {}
        self._prefix, self._numbers = os.urandom(8).hex(), count(1)
        self._outbound = Tasks(BOUND)

    async def live(self, limits: Limits) -> None:
        """Read the server until it ends; then, or when this is cancelled, bring it down."""
        loop = asyncio.get_running_loop()
        reading = loop.create_task(
            self.child.read(limits.server_message, self._take, self._pipeline.malformed)
        )
        exiting = loop.create_task(self.child.wait())
        try:
            await asyncio.wait({reading, exiting}, return_when=asyncio.FIRST_COMPLETED)
            log.warning("the shared server has ended")
            await asyncio.wait({reading}, timeout=LAST_WORDS)
            await self._outbound.settle(limits.drain)
        finally:
            self.fail_waiting(UpstreamError("the server has ended", sent=True))
            for task in (reading, exiting):
                task.cancel()
            await asyncio.gather(reading, exiting, return_exceptions=True)
            await self._outbound.cancel()
            await self.child.stop()
            self.child.release()

    def close_streams(self) -> None:
        """End the subscriptions, so that a shutdown does not wait for them."""
        for each in self._waiting.values():
            if each.exchange.endless:
                each.outlet.close()

    def fail_waiting(self, error: UpstreamError) -> None:
        """The child is done with: answer for it whom it has not answered."""
        self.child.gone = True
        self.child.fail_asked(error)
        for each in self._waiting.values():
            reply = self._pipeline.upstream_failed(each.exchange.conversation, each.call, error)
            if reply is not None:
                each.outlet.finish(encode(reply))
        self._waiting.clear()

    # -------------------------------------------------------------- client to server

    async def request(self, exchange: Exchange, permitted: Permitted) -> web.StreamResponse:
        """Send a request under an id of its own. A client that goes away takes its request back.

        Raises:
            UpstreamError: the server is gone; nothing was sent.
        """
        request, call = permitted.message, exchange.call
        assert isinstance(request, Request)
        assert call is not None
        own_id = f"{self._prefix}-{next(self._numbers)}"
        token = _meta(request.params).get("progressToken")
        waiting = Waiting(exchange, call, request.id, token, readdressed(permitted, own_id))
        self.child.send(waiting.sent)
        self._waiting[own_id] = waiting

        async def withdraw(reply: Response) -> None:
            waiting.outlet.finish(encode(reply))  # and then the request is taken back

        call.withdraw, call.tell = withdraw, partial(_tell, waiting)
        try:
            exchange.sent()
            response = await respond(waiting.outlet, exchange.request)
            if call.rpc_error is not None and not response.prepared:
                response.set_status(STATUS.get(call.rpc_error[0], 200))
            return response
        finally:
            waiting.outlet.abandon()
            if self._waiting.pop(own_id, None) is not None:
                with suppress(UpstreamError):
                    self.child.send(taken_back(waiting.sent, "the client has gone"))

    # -------------------------------------------------------------- server to client

    async def _take(self, message: Message, _: bytes) -> None:
        await self._outbound.spawn(self._from_server(message))

    async def _from_server(self, message: Message) -> None:
        waiting, mapped = self._attribute(message)
        try:
            await self._judge(waiting, mapped)
        finally:
            if waiting is not None and isinstance(message, Response):
                waiting.outlet.close()  # it has the answer by now, or there is none

    async def _judge(self, waiting: Waiting | None, mapped: Message) -> None:
        if waiting is None:
            conversation, origin = self._nobody, Origin(UNKNOWN)
        else:
            conversation, origin = waiting.exchange.conversation, waiting.exchange.answering
        try:
            delivery = await self._pipeline.from_server(conversation, mapped, origin)
        except ProtocolError as error:
            log.warning("dropped a message of the server: %s", error)
            self._pipeline.malformed(error)
            return
        match delivery:
            case Deliver(replaced) if waiting is not None:
                _deliver(waiting, mapped if replaced is None else replaced)
            case AnswerServer(permitted):
                with suppress(UpstreamError):
                    self.child.send(permitted)
            case _:
                log.debug("dropped a message of the shared server that is nobody's")

    def _attribute(self, message: Message) -> tuple[Waiting | None, Message]:
        """Whose message it is, and the message as its client knows it."""
        if isinstance(message, Response):
            waiting = None if message.id is None else self._waiting.pop(message.id, None)
            return waiting, message if waiting is None else _as_asked(message, waiting)
        if isinstance(message, Request) or message.params is None:
            return None, message
        params, meta = message.params, _meta(message.params)
        name = NAMES.get(message.method)
        waiting = self._find(meta.get(SUBSCRIPTION) if name is None else params.get(name))
        if waiting is None:
            return None, message
        if name is not None:
            known = waiting.token if name == "progressToken" else waiting.request_id
            params = {**params, name: known}
        if SUBSCRIPTION in meta:
            params = {**params, "_meta": {**meta, SUBSCRIPTION: waiting.request_id}}
        return waiting, Notification(message.method, params)

    def _find(self, own_id: object) -> Waiting | None:
        return self._waiting.get(own_id) if isinstance(own_id, str) else None


class SharedServer:
    """The child of the moment: started when it is needed, and anew when it has ended."""

    def __init__(self, pipeline: Pipeline, start: Start, server: Server, limits: Limits) -> None:
        self._pipeline = pipeline
        self._start = start
        self._server = server
        self._limits = limits
        self._current: SharedChild | None = None
        self._starting = asyncio.Lock()
        self._lives: set[asyncio.Task[None]] = set()

    async def forward(self, exchange: Exchange, permitted: Permitted) -> web.StreamResponse:
        """Send what is permitted, and bring the answer back.

        HTTP has no notification for a client of this revision to send: one is taken, and dropped.
        """
        call = exchange.call
        try:
            if call is None or not exchange.answers:
                return web.Response(status=202)
            self._check_mirrors(exchange, permitted)
            return await (await self._running()).request(exchange, permitted)
        except UpstreamError as error:
            assert call is not None
            reply = self._pipeline.upstream_failed(exchange.conversation, call, error)
            assert reply is not None
            return web.json_response(body=encode(reply))
        finally:
            exchange.sent()
            if call is not None and call.outcome is None:
                self._pipeline.abandon(exchange.conversation, call)
            self._pipeline.close(exchange.conversation)

    def _check_mirrors(self, exchange: Exchange, permitted: Permitted) -> None:
        """Refuse a call whose headers contradict its arguments: nobody behind a pipe sees them.

        Raises:
            HeaderMismatch: a header that an argument's schema asks for is missing or differs.
        """
        request = permitted.message
        if not isinstance(request, Request) or request.method != "tools/call":
            return
        params, headers = request.params or {}, exchange.request.headers
        tool = self._server.catalog.look_up(str(params.get("name"))).tool
        mirrors = () if tool is None else tool.mirrors
        name = contradicted(
            mirrors, params.get("arguments"), lambda header: headers.getall(header, [])
        )
        if name is not None:
            raise HeaderMismatch(f"header {name} does not match the body", request_id=request.id)

    async def ask(self, permitted: Permitted) -> Response:
        """Put the sidecar's own request to the server."""
        return await (await self._running()).child.ask(permitted)

    async def _running(self) -> SharedChild:
        async with self._starting:
            if self._current is None or self._current.child.gone:
                try:
                    child = await self._start()
                except ConfigError as error:
                    raise UpstreamError(str(error), sent=False) from error
                self._current = SharedChild(self._pipeline, child, self._server)
                life = asyncio.get_running_loop().create_task(self._current.live(self._limits))
                self._lives.add(life)
                life.add_done_callback(self._lives.discard)
            return self._current

    def close_streams(self) -> None:
        """End the subscriptions, so that a shutdown does not wait for them."""
        if self._current is not None:
            self._current.close_streams()

    def fail_waiting(self, error: UpstreamError) -> None:
        """Answer whoever waits for the child."""
        if self._current is not None:
            self._current.fail_waiting(error)

    async def stop(self) -> None:
        """Bring the child down."""
        for life in self._lives:
            life.cancel()
        if self._lives:
            await asyncio.wait(set(self._lives))


def _as_asked(response: Response, waiting: Waiting) -> Response:
    """The answer under the client's id; the answer that ends a subscription names it once more."""
    result, meta = response.result, _meta(response.result)
    if SUBSCRIPTION in meta:
        result = {**result, "_meta": {**meta, SUBSCRIPTION: waiting.request_id}}
    return replace(response, id=waiting.request_id, result=result)


def _deliver(waiting: Waiting, message: Message) -> None:
    """Hand a message on. A client that does not read loses notifications, and holds up nobody."""
    if isinstance(message, Response):
        waiting.outlet.finish(encode(message))
    elif not waiting.outlet.offer(encode(message)):
        log.debug("dropped a notification for a client that does not read")


async def _tell(waiting: Waiting, message: Message) -> None:
    _deliver(waiting, message)


def _meta(value: object) -> JsonObject:
    meta = value.get("_meta") if isinstance(value, dict) else None
    return meta if isinstance(meta, dict) else {}
