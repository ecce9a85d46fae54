"""A stdio server as two streams: those of a process of ours, or of a connection to a shim.

What they have in common is all that `Child` knows: where to write, where to read, and how it ends.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from sidecar.errors import ConfigError
from sidecar.transport.pipes import CHUNK

STOP_GRACE = 5.0
TERM_GRACE = 2.0

LAST_WORDS = 2.0
"""Seconds more that a shim has, which brings its server down by the same rule."""


class Wrapped(Protocol):
    """A server's stdin and stdout, and how it is brought down."""

    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader

    async def wait(self) -> int:
        """Until it has ended; its exit code, as a shell would give it."""

    async def stop(self) -> int:
        """Close its stdin, wait, and end it if that does not; its exit code."""

    def kill(self) -> None:
        """End it now."""

    def release(self) -> None:
        """Let go of its streams, also of those that a process of its own still holds."""


class Process:
    """A server that we have started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self.stdin, self.stdout = process.stdin, process.stdout

    @classmethod
    async def start(cls, command: tuple[str, ...]) -> Process:
        """Start `command`; its stderr is ours.

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

    async def wait(self) -> int:
        """Until the process has ended."""
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def stop(self) -> int:
        """Close its stdin, wait, then SIGTERM, then SIGKILL (MCP lifecycle, stdio shutdown)."""
        self.stdin.close()
        for patience, signum in ((STOP_GRACE, signal.SIGTERM), (TERM_GRACE, signal.SIGKILL)):
            try:
                return await asyncio.wait_for(self.wait(), patience)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self._process.send_signal(signum)
        return await self.wait()

    def kill(self) -> None:
        """End it now."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def release(self) -> None:
        """Let go of its pipes."""
        self._process._transport.close()  # type: ignore[attr-defined]


class Connection:
    """A server that a shim has started for us. How it has ended is not told: that counts as 0."""

    def __init__(
        self, stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader, ended: asyncio.Event
    ) -> None:
        self.stdin, self.stdout, self._ended = stdin, stdout, ended

    @classmethod
    async def open(cls, path: Path) -> Connection:
        """Connect to a shim.

        Raises:
            ConfigError: there is none.
        """
        try:
            client = connect(path)
        except OSError as error:
            raise ConfigError(f"no stdio server can be had at {path}: {error.strerror}") from error
        stdout, ended = asyncio.StreamReader(limit=CHUNK), asyncio.Event()
        transport, protocol = await asyncio.get_running_loop().create_unix_connection(
            lambda: _Streams(stdout, ended), sock=client
        )
        stdin = asyncio.StreamWriter(transport, protocol, None, asyncio.get_running_loop())
        return cls(stdin, stdout, ended)

    async def wait(self) -> int:
        """Until the shim says no more."""
        await self._ended.wait()
        return 0

    async def stop(self) -> int:
        """Say that there is no more to say: the shim ends its server, and then the connection."""
        with suppress(OSError, RuntimeError):  # the connection has ended
            self.stdin.write_eof()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE + TERM_GRACE + LAST_WORDS):
                await self.wait()
        return 0

    def kill(self) -> None:
        """Go away: the shim ends its server."""
        self.stdin.transport.abort()

    release = kill


class _Streams(asyncio.StreamReaderProtocol):
    """Sets `ended` as soon as nothing more comes."""

    def __init__(self, reader: asyncio.StreamReader, ended: asyncio.Event) -> None:
        super().__init__(reader)
        self._ended = ended

    def eof_received(self) -> bool:
        """The shim says no more, and may still listen."""
        self._ended.set()
        super().eof_received()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The shim has gone."""
        self._ended.set()
        super().connection_lost(exc)


def connect(path: Path) -> socket.socket:
    """A connection to a socket, and to nothing else that somebody may have put in its place.

    The server's container can write where the socket is. A link there would be followed in our own
    files, and lead to a socket that is ours alone.

    Raises:
        OSError: there is no socket, or nobody listens.
    """
    file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(file).st_mode):
            raise OSError(errno.ENOTSOCK, "not a socket")
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            client.connect(f"/proc/self/fd/{file}")
        except OSError:
            client.close()
            raise
        return client
    finally:
        os.close(file)


def absence(path: Path) -> str | None:
    """Why no server can be had at a socket; None where one can. To ask costs the shim no server."""
    try:
        connect(path).close()
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
