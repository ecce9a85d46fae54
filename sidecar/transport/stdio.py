"""stdin and stdout in front of a server (MCP stdio transport).

Client lines go through the pipeline and, permitted, to a `Peer`: a child of ours, or a server
behind HTTP. What it says comes back the same way, a line each. Each message is a task of its own,
so that one slow decision holds up nobody else; the pipeline keeps the order of what is forwarded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import Literal

from sidecar.config import Limits
from sidecar.conversation import Call, Conversation, Origin, Server, Stranger
from sidecar.errors import MalformedMessage, ProtocolError, Unauthenticated, UpstreamError
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import (
    INTERNAL,
    AnswerServer,
    Deliver,
    Drop,
    Forward,
    Permitted,
    Reply,
    protocol_reply,
    taken_back,
)
from sidecar.policy.identity import UNKNOWN, Actor
from sidecar.protocol.framing import FrameTooLarge, LineDecoder, refuse_raw_returns
from sidecar.protocol.jsonrpc import (
    Message,
    Notification,
    Request,
    RequestId,
    Response,
    Strictness,
    decode,
    encode,
)
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session, is_modern
from sidecar.rechecking import WITHDRAWN
from sidecar.transport.peer import Peer
from sidecar.transport.pipes import CHUNK, Reader, Writer
from sidecar.transport.tasks import Tasks

log = logging.getLogger("sidecar.transport.stdio")

MAX_TASKS = 1024

LAST_WORDS = 2.0
"""Seconds that the end of the server's messages, and our last ones, are waited for."""


class StdioProxy:
    """One client on our stdin and stdout, one server, one conversation."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        peer: Peer,
        server: Server,
        table: MethodTable,
        who: Callable[[], Awaitable[Actor]],
        strictness: Strictness,
        limits: Limits,
        stdin: Reader,
        stdout: Writer,
    ) -> None:
        self._pipeline = pipeline
        self._peer = peer
        self._conversation = Conversation(Session(table), server, "stdio")
        self._who, self._origin, self._until = who, Origin(UNKNOWN), math.inf
        self._strictness = strictness
        self._limits = limits
        self._stdin = stdin
        self._stdout = stdout
        # A pool for each direction: messages that wait for a server which does not read must not
        # keep what it says from being read.
        self._inbound, self._outbound = Tasks(MAX_TASKS), Tasks(MAX_TASKS)
        self._delivered, self._withdrawn = asyncio.Event(), asyncio.Event()
        self._conversation.end, self._conversation.tell = self._withdrawn.set, self._tell

    async def run(self, stopping: asyncio.Event) -> int:
        """Serve until the client, the server or `stopping` ends it; the server's exit code."""
        loop = asyncio.get_running_loop()
        reading = loop.create_task(self._read_client())
        serving = loop.create_task(self._read_server())
        stop = loop.create_task(_either(stopping, self._withdrawn))
        try:
            await asyncio.wait({reading, serving, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._finish(reading, stop)
            return await self._end_server(serving)
        finally:
            for task in (reading, serving, stop):
                task.cancel()
            await asyncio.gather(reading, serving, stop, return_exceptions=True)
            await self._inbound.cancel()
            await self._outbound.cancel()
            self._pipeline.close(self._conversation)

    async def _finish(self, reading: asyncio.Task[None], stop: asyncio.Task[None]) -> None:
        """Take no more messages, and judge and forward those that came.

        The server's answers are waited for when it is we who end the conversation, and when the
        server can not know that its client has: then until somebody is in a hurry.
        """
        reading.cancel()
        answers_too, hurried = stop.done() or not self._peer.sees_the_end, stop.done()
        stop.add_done_callback(lambda _: self._delivered.set())
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain):
                await self._inbound.settle(self._limits.drain)
                while answers_too and self._answers_are_due() and stop.done() is hurried:
                    self._delivered.clear()
                    await self._delivered.wait()

    def _answers_are_due(self) -> bool:
        """A subscription is not answered before it ends."""
        due = (each.operation.method.target != "subscription" for each in self._conversation.calls)
        return any(due) and not self._peer.gone

    async def _end_server(self, serving: asyncio.Task[None]) -> int:
        """Bring the server down, pass on what it still says, and answer for it what it did not."""
        ended = await self._peer.stop()
        await asyncio.wait({serving}, timeout=LAST_WORDS)
        await self._outbound.settle(self._limits.drain)
        self._fail_waiting(ended.why)
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self._stdout.drain()
        return ended.code

    # -------------------------------------------------------------- client to server

    async def _read_client(self) -> None:
        lines = LineDecoder(self._limits.client_message)
        while data := await self._stdin.read(CHUNK):
            try:
                for frame in lines.feed(data):
                    await self._take(frame)
            except FrameTooLarge as error:
                # What the rest of such a line is nobody can say: the pipe is closed, so that its
                # sender does not wait for an answer that can not come.
                self._refuse(error)
                log.error("closing the client's pipe: %s", error)
                return
        if (rest := lines.finish()) is not None:
            await self._take(rest)

    async def _take(self, frame: bytes) -> None:
        try:
            message = decode(refuse_raw_returns(frame), self._strictness)
        except MalformedMessage as error:
            self._refuse(error)
            await self._let_client_read()
            return
        if await self._authenticate(message):
            await self._inbound.spawn(self._from_client(message, self._origin))

    async def _authenticate(self, message: Message) -> bool:
        """Whether its sender is known, or need not be; one after the other, as messages came."""
        error = await self._recognise()
        if error is None:
            return True
        log.warning("a message was refused: %s", error.code)
        self._pipeline.not_let_in(Stranger(error.code, "stdio"))
        if isinstance(message, Request):
            error.request_id = message.id
            self._refuse(error)
            await self._let_client_read()
        else:
            self._pipeline.malformed(error)
        return False

    async def _recognise(self) -> Unauthenticated | None:
        """Take over who the client is by what is there now; why it is nobody, if so.

        A token on a pipe is replaced under way, so that nothing ends with the one that opened it:
        what the server says by itself is kept back while there is no good one.
        """
        try:
            actor = await self._who()
        except Unauthenticated as error:
            self._origin, self._until = Origin(UNKNOWN), 0.0
            return error
        self._until = math.inf if actor.expires_at is None else actor.expires_at
        self._origin = Origin(replace(actor, expires_at=None))
        return None

    async def _is_known(self) -> bool:
        return time.time() < self._until or await self._recognise() is None

    def _refuse(self, error: ProtocolError) -> None:
        self._pipeline.malformed(error)
        reply = protocol_reply(error.request_id, error.rpc_code, str(error), error.data)
        self._to_client(reply)

    async def _from_client(self, message: Message, origin: Origin) -> None:
        try:
            outcome, ticket, call = await self._pipeline.from_client(
                self._conversation, message, origin, self._peer.ask
            )
        except ProtocolError as error:
            self._refuse(error)
            await self._let_client_read()
            return
        except Exception:
            # Nothing was let through; whoever waits for an answer gets one.
            if isinstance(message, Request):
                self._to_client(protocol_reply(message.id, INTERNAL, "internal error"))
            raise
        match outcome:
            case Forward(permitted):
                if not isinstance(message, Response) and is_modern(message):
                    self._pipeline.open.hold_pipe(self._conversation, origin)
                await self._send(permitted, call, ticket.release if ticket else _nothing)
            case Reply(response):
                self._to_client(response)
                await self._let_client_read()
            case Drop():
                pass

    async def _let_client_read(self) -> None:
        """Who does not read our refusals is not read on: they would fill the memory."""
        with suppress(ConnectionError):
            await self._stdout.drain()

    async def _send(
        self, permitted: Permitted, call: Call | None, sent: Callable[[], None]
    ) -> None:
        if call is not None:
            call.withdraw = partial(self._withdraw, permitted)
        try:
            await self._peer.send(permitted, call, sent)
        except UpstreamError as error:
            if call is not None:
                self._fail(call, error)

    async def _withdraw(self, permitted: Permitted, reply: Response) -> None:
        """Answer a call in place of the server, which is told."""
        self._to_client(reply)
        self._delivered.set()
        await self._send(taken_back(permitted, WITHDRAWN), None, _nothing)

    def _fail(self, call: Call, error: UpstreamError) -> None:
        response = self._pipeline.upstream_failed(self._conversation, call, error)
        if response is not None:
            with suppress(ConnectionError):
                self._to_client(response)

    # -------------------------------------------------------------- server to client

    async def _read_server(self) -> None:
        try:
            await self._peer.read(self)
        except ConnectionError as error:
            log.info("the client is gone: %s", error)

    async def heard(self, message: Message, frame: bytes) -> None:
        """Judge what the server said, beside what it says next."""
        await self._outbound.spawn(self._from_server(message, frame))
        await self._stdout.drain()

    async def lost(self, request_id: RequestId, error: UpstreamError) -> None:
        """The client gets an answer from us, behind all that the server said before."""

        async def answer() -> None:
            if (call := self._conversation.calls.get(request_id)) is not None:
                self._fail(call, error)
            self._delivered.set()

        await self._outbound.spawn(answer())

    def malformed(self, error: ProtocolError) -> None:
        """The server said something that is no message: it goes nowhere."""
        self._pipeline.malformed(error)

    async def admits(self, action: Literal["open", "resume", "close"]) -> bool:
        """Streams are actions of the client's, though it does not know that there are any."""
        known = await self._is_known()
        return known and (
            await self._pipeline.stream(self._conversation, action, self._origin) is None
        )

    def holding(
        self, action: Literal["open", "resume"], end: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """They end when the policy would not let them begin any more."""
        return self._pipeline.open.stream(self._conversation, action, self._origin, end)

    async def _from_server(self, message: Message, frame: bytes) -> None:
        known = isinstance(message, Response) or await self._is_known()
        try:
            delivery = await self._pipeline.from_server(self._conversation, message, self._origin)
        except ProtocolError as error:
            log.warning("dropped a message of the server: %s", error)
            self._pipeline.malformed(error)
            return
        match delivery:
            case Deliver(replaced) if known or not isinstance(message, Notification):
                self._stdout.write((frame if replaced is None else encode(replaced)) + b"\n")
            case AnswerServer(permitted):
                await self._send(permitted, None, _nothing)
            case _:
                pass
        self._delivered.set()

    async def _tell(self, message: Message) -> None:
        self._to_client(message)
        await self._stdout.drain()

    def _to_client(self, message: Message) -> None:
        self._stdout.write(encode(message) + b"\n")

    def _fail_waiting(self, why: str) -> None:
        """Whoever still waits for the server gets an answer from us."""
        self._peer.fail_asked(UpstreamError(why, sent=True))
        for call in self._conversation.calls.drain():
            self._fail(call, UpstreamError(why, sent=bool(call.forwarded)))


async def _either(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    waiting = [asyncio.get_running_loop().create_task(each.wait()) for each in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


def _nothing() -> None:
    """Nobody waits for it."""
