"""stdin and stdout in front of a server that is our child (MCP stdio transport).

Client lines go through the pipeline and, permitted, to the child's stdin; the child's lines come
back the same way. Each message is a task of its own, so that one slow decision holds up nobody
else; the pipeline keeps the order of what is forwarded. The child's stderr is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import suppress

from sidecar.config import Limits
from sidecar.conversation import Call, Conversation, Origin, Server
from sidecar.errors import ConfigError, MalformedMessage, ProtocolError, UpstreamError
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
)
from sidecar.policy.identity import Actor
from sidecar.protocol.framing import FrameTooLarge, LineDecoder, refuse_raw_returns
from sidecar.protocol.jsonrpc import (
    FROM_SERVER,
    Message,
    Request,
    RequestId,
    Response,
    Strictness,
    decode,
    encode,
)
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session
from sidecar.transport.pipes import CHUNK, Reader, Writer
from sidecar.transport.tasks import Tasks

log = logging.getLogger("sidecar.transport.stdio")

MAX_TASKS = 1024
STOP_GRACE = 5.0
TERM_GRACE = 2.0


class Child:
    """The wrapped server: started, written to, and brought down."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self.stdout = process.stdout
        self.gone = False

    @classmethod
    async def start(cls, command: tuple[str, ...]) -> Child:
        """Start `command`.

        Raises:
            ConfigError: there is no such command, or it may not be executed.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=CHUNK,
            )
        except OSError as error:
            raise ConfigError(f"COMMAND {command[0]!r} can not be started: {error}") from error
        return cls(process)

    def send(self, permitted: Permitted) -> None:
        """Write a permitted message.

        Raises:
            UpstreamError: the server is gone; nothing was sent.
        """
        if self.gone or self._stdin.is_closing():
            raise UpstreamError("the server is not running", sent=False)
        self._stdin.write(permitted.frame + b"\n")

    async def drain(self) -> None:
        """Wait until the server has read enough. A server that is gone reads no more."""
        with suppress(ConnectionError):
            await self._stdin.drain()

    async def stop(self) -> int:
        """Close its stdin, wait, then SIGTERM, then SIGKILL (MCP lifecycle, stdio shutdown).

        Returns its exit code, as a shell would give it.
        """
        self._stdin.close()
        for patience, signum in ((STOP_GRACE, signal.SIGTERM), (TERM_GRACE, signal.SIGKILL)):
            try:
                return _exit_code(await asyncio.wait_for(self._process.wait(), patience))
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self._process.send_signal(signum)
        return _exit_code(await self._process.wait())

    def kill(self) -> None:
        """End a server that broke the protocol."""
        with suppress(ProcessLookupError):
            self._process.kill()


class StdioProxy:
    """One client on our stdin and stdout, one child, one conversation."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        child: Child,
        server: Server,
        table: MethodTable,
        actor: Actor,
        strictness: Strictness,
        limits: Limits,
        stdin: Reader,
        stdout: Writer,
    ) -> None:
        self._pipeline = pipeline
        self._child = child
        self._conversation = Conversation(Session(table), server, "stdio")
        self._origin = Origin(actor)
        self._strictness = strictness
        self._limits = limits
        self._stdin = stdin
        self._stdout = stdout
        # A pool for each direction: messages that wait for a server which does not read must not
        # keep what it says from being read.
        self._inbound, self._outbound = Tasks(MAX_TASKS), Tasks(MAX_TASKS)
        self._own: dict[RequestId, asyncio.Future[Response]] = {}
        self._delivered = asyncio.Event()

    async def run(self, stopping: asyncio.Event) -> int:
        """Serve until the client, the server or `stopping` ends it; the server's exit code."""
        loop = asyncio.get_running_loop()
        reading = loop.create_task(self._read_client())
        serving = loop.create_task(self._read_server())
        stop = loop.create_task(stopping.wait())
        try:
            await asyncio.wait({reading, serving, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._finish(reading, answers_too=stop.done())
            return await self._end_child(serving)
        finally:
            for task in (reading, serving, stop):
                task.cancel()
            await asyncio.gather(reading, serving, stop, return_exceptions=True)
            await self._inbound.cancel()
            await self._outbound.cancel()
            self._pipeline.close(self._conversation)

    async def _finish(self, reading: asyncio.Task[None], *, answers_too: bool) -> None:
        """Take no more messages, and judge and forward those that came.

        The server's answers are waited for when it is we who end the conversation.
        """
        reading.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain):
                await self._inbound.settle(self._limits.drain)
                while answers_too and len(self._conversation.calls) and not self._child.gone:
                    self._delivered.clear()
                    await self._delivered.wait()

    async def _end_child(self, serving: asyncio.Task[None]) -> int:
        """Bring the server down, pass on what it still says, and answer for it what it did not."""
        code = await self._child.stop()
        await asyncio.wait({serving}, timeout=TERM_GRACE)
        await self._outbound.settle(self._limits.drain)
        self._fail_waiting(UpstreamError(f"the server exited with {code}", sent=True))
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(TERM_GRACE):
                await self._stdout.drain()
        return code

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
        await self._inbound.spawn(self._from_client(message))

    def _refuse(self, error: ProtocolError) -> None:
        self._pipeline.malformed(error)
        self._to_client(protocol_reply(error.request_id, error.rpc_code, str(error)))

    async def _from_client(self, message: Message) -> None:
        try:
            outcome, ticket, call = await self._pipeline.from_client(
                self._conversation, message, self._origin, self._ask
            )
        except ProtocolError as error:
            self._refuse(error)
            return
        except Exception:
            # Nothing was let through; whoever waits for an answer gets one.
            if isinstance(message, Request):
                self._to_client(protocol_reply(message.id, INTERNAL, "internal error"))
            raise
        match outcome:
            case Forward(permitted):
                try:
                    self._send(permitted, call)
                finally:
                    if ticket is not None:
                        ticket.release()
                await self._child.drain()
            case Reply(response):
                self._to_client(response)
                await self._let_client_read()
            case Drop():
                pass

    async def _let_client_read(self) -> None:
        """Who does not read our refusals is not read on: they would fill the memory."""
        with suppress(ConnectionError):
            await self._stdout.drain()

    def _send(self, permitted: Permitted, call: Call | None) -> None:
        try:
            self._child.send(permitted)
        except UpstreamError as error:
            if call is None:
                return
            response = self._pipeline.upstream_failed(self._conversation, call, error)
            if response is not None:
                self._to_client(response)

    async def _ask(self, permitted: Permitted) -> Response:
        """Put the sidecar's own request to the server."""
        assert isinstance(permitted.message, Request)
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._own[permitted.message.id] = answer
        try:
            self._child.send(permitted)
            return await answer
        finally:
            self._own.pop(permitted.message.id, None)

    # -------------------------------------------------------------- server to client

    async def _read_server(self) -> None:
        lines = LineDecoder(self._limits.server_message)
        try:
            while data := await self._child.stdout.read(CHUNK):
                for frame in lines.feed(data):
                    await self._take_from_server(frame)
                await self._stdout.drain()
        except FrameTooLarge as error:
            log.error("ending the server: %s", error)
            self._child.kill()
        except ConnectionError as error:
            log.info("the client is gone: %s", error)
        finally:
            self._child.gone = True

    async def _take_from_server(self, frame: bytes) -> None:
        try:
            message = decode(frame, FROM_SERVER)
        except MalformedMessage as error:
            log.warning("dropped a line of the server's stdout that is no message: %s", error)
            self._pipeline.malformed(error)
            return
        if isinstance(message, Response) and message.id in self._own:
            own = self._own.pop(message.id)
            if not own.done():
                own.set_result(message)
            return
        await self._outbound.spawn(self._from_server(message, frame))

    async def _from_server(self, message: Message, frame: bytes) -> None:
        try:
            delivery = await self._pipeline.from_server(self._conversation, message, self._origin)
        except ProtocolError as error:
            log.warning("dropped a message of the server: %s", error)
            self._pipeline.malformed(error)
            return
        match delivery:
            case Deliver(replaced):
                self._stdout.write((frame if replaced is None else encode(replaced)) + b"\n")
            case AnswerServer(permitted):
                self._send(permitted, None)
            case Drop():
                pass
        self._delivered.set()

    def _to_client(self, message: Message) -> None:
        self._stdout.write(encode(message) + b"\n")

    def _fail_waiting(self, error: UpstreamError) -> None:
        """Whoever still waits for the server gets an answer from us."""
        for future in self._own.values():
            if not future.done():
                future.set_exception(error)
        for call in self._conversation.calls.drain():
            response = self._pipeline.upstream_failed(self._conversation, call, error)
            if response is not None:
                with suppress(ConnectionError):
                    self._to_client(response)


def _exit_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode
