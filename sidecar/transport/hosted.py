"""One session of a handshake client, and the child that serves it alone.

Answers go to the request that they answer, progress to the one that it is about. The server's other
messages belong to no request by their bytes: they go to the only request that waits, else to the
session's own stream, else to the request that waits longest, else they are kept for a while.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from sidecar.config import Limits
from sidecar.conversation import Ask, Call, Conversation, Origin
from sidecar.errors import ProtocolError, UpstreamError
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import AnswerServer, Deliver, Drop, Permitted, taken_back
from sidecar.protocol.jsonrpc import Message, Notification, Request, Response, encode
from sidecar.rechecking import WITHDRAWN
from sidecar.transport.child import Child
from sidecar.transport.exchange import Exchange
from sidecar.transport.outlet import BOUND, Outlet, respond, stream
from sidecar.transport.tasks import Tasks

log = logging.getLogger("sidecar.transport.bridge")

CANCEL_GRACE = 1.0
"""Seconds that a server has for a last word about a request that its client took back."""

LAST_WORDS = 1.0
"""Seconds in which what a server has said is read, once it has ended."""

Key = tuple[type, object]


@dataclass(frozen=True, slots=True, eq=False)
class Post:
    """A request that waits for its answer, and where that goes."""

    call: Call
    outlet: Outlet


class HostedSession:
    """A child, its client, and what is on its way between them."""

    def __init__(
        self, pipeline: Pipeline, child: Child, conversation: Conversation, origin: Origin
    ) -> None:
        self.id = secrets.token_urlsafe(32)
        self.conversation = conversation
        self.ended = False
        self._pipeline = pipeline
        self._child = child
        self._origin = Origin(origin.actor, origin.source_address)
        self._posts: dict[Key, Post] = {}
        self._tokens: dict[Key, Post] = {}
        self._stream: Outlet | None = None
        self._kept: deque[tuple[Message, bytes]] = deque()
        self._outbound = Tasks(BOUND)
        self._ending = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether nobody reads what its server says: its client may well be gone."""
        return not self._posts and self._stream is None

    @property
    def ask(self) -> Ask:
        """A way to put the sidecar's own request to this session's server."""
        return self._child.ask

    # -------------------------------------------------------------- life

    async def live(self, limits: Limits, on_end: Callable[[], None]) -> None:
        """Read the server until it ends, or is ended; then bring it down."""
        loop = asyncio.get_running_loop()
        reading = loop.create_task(
            self._child.read(limits.server_message, self._take, self._pipeline.malformed)
        )
        exiting = loop.create_task(self._child.wait())
        ending = loop.create_task(self._ending.wait())
        try:
            await asyncio.wait({reading, exiting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                log.warning("the server of a session has ended, and so does the session")
                await asyncio.wait({reading}, timeout=LAST_WORDS)
                await self._outbound.settle(limits.drain)
        finally:
            self.end("the server has ended")
            on_end()
            for task in (reading, exiting, ending):
                task.cancel()
            await asyncio.gather(reading, exiting, ending, return_exceptions=True)
            await self._outbound.cancel()
            await self._child.stop()
            self._child.release()

    def end(self, why: str) -> None:
        """End the session: who waits for its server gets an answer, and its stream ends."""
        if self.ended:
            return
        self.ended = True
        error = UpstreamError(why, sent=True)
        self._child.fail_asked(error)
        for post in list(self._posts.values()):
            if post.call.outcome is not None:  # its client took it back, and expects no answer
                post.outlet.close()
                continue
            reply = self._pipeline.upstream_failed(self.conversation, post.call, error)
            if reply is not None:
                post.outlet.finish(encode(reply))
        self._pipeline.close(self.conversation)
        self.close_stream()
        self._ending.set()

    def close_stream(self) -> None:
        """End the session's own stream, so that a shutdown does not wait for it."""
        if self._stream is not None:
            self._stream.close()

    # -------------------------------------------------------------- client to server

    async def request(
        self, exchange: Exchange, permitted: Permitted, headers: dict[str, str] | None = None
    ) -> web.StreamResponse:
        """Send a request, and answer the POST with all that the server says about it.

        What is not answered when the client goes away is not taken back: it did not ask for that.
        """
        request, call = permitted.message, exchange.call
        assert isinstance(request, Request)
        assert call is not None
        # The same principals, and what they have shown last: groups and scopes may be others.
        self._origin = Origin(exchange.origin.actor, exchange.origin.source_address)
        post = Post(call, Outlet())
        token = _token((request.params or {}).get("_meta"))
        call.withdraw = partial(self._withdraw, post, permitted)
        try:
            self._send(permitted)
            self._posts[_key(request.id)] = post
            if token is not None:
                self._tokens[token] = post
            exchange.sent()
            self._flush()
            return await respond(post.outlet, exchange.request, headers)
        except UpstreamError as error:
            reply = self._pipeline.upstream_failed(self.conversation, call, error)
            assert reply is not None
            return web.json_response(body=encode(reply))
        finally:
            exchange.sent()
            post.outlet.abandon()
            _remove(self._posts, _key(request.id), post)
            _remove(self._tokens, token, post)
            if call.outcome is None:
                self._pipeline.abandon(self.conversation, call)

    async def _withdraw(self, post: Post, permitted: Permitted, reply: Response) -> None:
        """Answer a call in place of the server, which is told."""
        post.outlet.finish(encode(reply))
        with suppress(UpstreamError):
            self._send(taken_back(permitted, WITHDRAWN))
            await self._child.drain()

    async def tell(self, exchange: Exchange, permitted: Permitted) -> web.StreamResponse:
        """Send a notification, or an answer to the server's question.

        Raises:
            ProtocolError: 404, the session has ended meanwhile.
        """
        message = permitted.message
        try:
            self._send(permitted)
        except UpstreamError as error:
            raise ProtocolError("Session not found", status=404) from error
        finally:
            exchange.sent()
        if isinstance(message, Notification) and message.method == "notifications/cancelled":
            self._take_back((message.params or {}).get("requestId"))
        await self._child.drain()
        return web.Response(status=202)

    def _send(self, permitted: Permitted) -> None:
        if self.ended:
            raise UpstreamError("the session has ended", sent=False)
        self._child.send(permitted)

    def _take_back(self, request_id: object) -> None:
        """A server need not answer what was taken back: its response ends all the same."""
        post = self._posts.get(_key(request_id)) if isinstance(request_id, (str, int)) else None
        if post is not None:
            asyncio.get_running_loop().call_later(CANCEL_GRACE, post.outlet.close)

    # -------------------------------------------------------------- server to client

    async def open_stream(self, exchange: Exchange) -> web.StreamResponse:
        """The session's own stream, of which there is one.

        Raises:
            ProtocolError: 409, it is open already.
        """
        if self._stream is not None:
            raise ProtocolError("the stream of this session is open already", status=409)
        outlet = self._stream = Outlet()
        self.conversation.tell = partial(_tell, outlet)
        self._flush()
        held = self._pipeline.open.stream(
            self.conversation, exchange.opening, exchange.origin, outlet.close
        )
        try:
            with held:
                return await stream(outlet, exchange.request)
        finally:
            self._stream = self.conversation.tell = None
            outlet.abandon()

    async def _take(self, message: Message, frame: bytes) -> None:
        await self._outbound.spawn(self._from_server(message, frame))

    async def _from_server(self, message: Message, frame: bytes) -> None:
        try:
            delivery = await self._pipeline.from_server(self.conversation, message, self._origin)
        except ProtocolError as error:
            log.warning("dropped a message of the server: %s", error)
            self._pipeline.malformed(error)
            return
        match delivery:
            case Deliver(replaced):
                # A raw carriage return is white space in JSON, and ends a line of an event.
                if replaced is not None or b"\r" in frame:
                    frame = encode(message if replaced is None else replaced)
                await self._deliver(message, frame)
            case AnswerServer(permitted):
                with suppress(UpstreamError):
                    self._send(permitted)
            case Drop():
                pass

    async def _deliver(self, message: Message, frame: bytes) -> None:
        if isinstance(message, Response) and message.id is not None:
            post = self._posts.pop(_key(message.id), None)
            if post is not None:
                await post.outlet.put_answer(frame)
            return
        outlet = self._choose(message)
        if outlet is None:
            self._keep(message, frame)
        else:
            await outlet.put(frame)

    def _choose(self, message: Message) -> Outlet | None:
        """Where a message goes that answers nothing."""
        if isinstance(message, Notification) and message.method == "notifications/progress":
            post = self._tokens.get(_token(message.params) or _key(None))
            if post is not None:
                return post.outlet
        if len(self._posts) != 1 and self._stream is not None and not self._stream.ended:
            return self._stream
        first = next(iter(self._posts.values()), None)
        return None if first is None else first.outlet

    def _keep(self, message: Message, frame: bytes) -> None:
        """Keep a message until somebody reads; of too many, the oldest notification is let go."""
        self._kept.append((message, frame))
        if len(self._kept) > BOUND:
            passing = [each for each in self._kept if isinstance(each[0], Notification)]
            self._kept.remove(passing[0] if passing else self._kept[0])
            log.warning("dropped a message of the server that no client came for")

    def _flush(self) -> None:
        while self._kept:
            outlet = self._choose(self._kept[0][0])
            if outlet is None or not outlet.offer(self._kept[0][1]):
                return
            self._kept.popleft()


async def _tell(outlet: Outlet, message: Message) -> None:
    await outlet.put(encode(message))


def _key(value: object) -> Key:
    """`1` and `"1"` are two ids."""
    return type(value), value


def _token(params: object) -> Key | None:
    token = params.get("progressToken") if isinstance(params, dict) else None
    return _key(token) if isinstance(token, (str, int)) else None


def _remove(posts: dict[Key, Post], key: Key | None, post: Post) -> None:
    if key is not None and posts.get(key) is post:
        del posts[key]
