"""A server that speaks on a pipe: started, written to, read, asked, and brought down (MCP stdio).

`send` takes a `Permitted` and nothing else. The answers to the sidecar's own questions (`ask`) end
here; every other message goes to whoever reads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from sidecar.errors import MalformedMessage, ProtocolError, UpstreamError
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.framing import FrameTooLarge, LineDecoder
from sidecar.protocol.jsonrpc import FROM_SERVER, Message, Request, RequestId, Response, decode
from sidecar.transport.pipes import CHUNK
from sidecar.transport.wrapped import Connection, Process, Wrapped

log = logging.getLogger("sidecar.transport.child")

MAX_UNREAD = 64 * 1024 * 1024
"""Bytes that wait for a server which does not read; who sends more is told that it does not."""

Start = Callable[[], Awaitable["Child"]]
"""How one more is had; a `ConfigError` says why there is none."""

Take = Callable[[Message, bytes], Awaitable[None]]
"""Who gets a message of the server, and the bytes that it came as."""


class Child:
    """The wrapped server. `gone` says that it reads and writes no more."""

    def __init__(self, server: Wrapped) -> None:
        self._server = server
        self._stdin, self._stdout = server.stdin, server.stdout
        self._own: dict[RequestId, asyncio.Future[Response]] = {}
        self.gone = False

    @classmethod
    async def start(cls, command: tuple[str, ...]) -> Child:
        """Start `command`.

        Raises:
            ConfigError: there is no such command, or it may not be executed.
        """
        return cls(await Process.start(command))

    @classmethod
    async def connect(cls, path: Path) -> Child:
        """Have the shim at `path` start one.

        Raises:
            ConfigError: there is no shim.
        """
        return cls(await Connection.open(path))

    def send(self, permitted: Permitted) -> None:
        """Write a permitted message.

        Raises:
            UpstreamError: the server is gone, or does not read; nothing was sent.
        """
        if self.gone or self._stdin.is_closing():
            raise UpstreamError("the server is not running", sent=False)
        if self._stdin.transport.get_write_buffer_size() > MAX_UNREAD:
            raise UpstreamError("the server does not read", sent=False)
        self._stdin.write(permitted.frame + b"\n")

    async def drain(self) -> None:
        """Wait until the server has read enough. A server that is gone reads no more."""
        with suppress(ConnectionError):
            await self._stdin.drain()

    async def ask(self, permitted: Permitted) -> Response:
        """Put the sidecar's own request to the server.

        Raises:
            UpstreamError: the server is gone, or goes before it answers.
        """
        assert isinstance(permitted.message, Request)
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._own[permitted.message.id] = answer
        try:
            self.send(permitted)
            return await answer
        finally:
            self._own.pop(permitted.message.id, None)

    async def read(
        self, limit: int, take: Take, malformed: Callable[[ProtocolError], None]
    ) -> None:
        """Give every message to `take` until the server has no more to say.

        A server whose message is larger than `limit` is ended: the rest can not be read.
        """
        lines = LineDecoder(limit)
        try:
            while data := await self._stdout.read(CHUNK):
                for frame in lines.feed(data):
                    await self._read_frame(frame, take, malformed)
        except FrameTooLarge as error:
            log.error("ending the server: %s", error)
            self._server.kill()
        except ConnectionError as error:
            log.debug("the connection to the server broke: %s", error)
        finally:
            self.gone = True

    async def _read_frame(
        self, frame: bytes, take: Take, malformed: Callable[[ProtocolError], None]
    ) -> None:
        try:
            message = decode(frame, FROM_SERVER)
        except MalformedMessage as error:
            log.warning("dropped a line of the server's stdout that is no message: %s", error)
            malformed(error)
            return
        if isinstance(message, Response) and message.id in self._own:
            own = self._own.pop(message.id)
            if not own.done():
                own.set_result(message)
            return
        await take(message, frame)

    def fail_asked(self, error: UpstreamError) -> None:
        """The sidecar's own questions will not be answered."""
        for future in self._own.values():
            if not future.done():
                future.set_exception(error)

    async def wait(self) -> int:
        """Until it has ended; its exit code, as a shell would give it."""
        return await self._server.wait()

    async def stop(self) -> int:
        """Close its stdin, and end it if that does not; its exit code, as a shell would give it."""
        return await self._server.stop()

    def release(self) -> None:
        """Let go of its pipes, also of one that a process of its own still holds."""
        self._server.release()
