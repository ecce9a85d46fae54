"""OPA for tests: a real server in front of a folder, and servers that only claim to be one.

>>> async with real_opa(binary, folder) as url: ...
>>> async with fake_opa(EMPTY) as fake: ...fake.url, fake.questions
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ALLOW_ALL = """package mcp.authz

decision := {"allow": true, "rule": "all"}
"""

# A policy of its own, so that a test says what it relies on: data decides who may do what.
CALLERS = """package mcp.authz

default allow := false

allow if input.target.name in data.callers[input.actor.id]

reasons contains {"code": "not_granted", "message": "No."} if not allow

decision := {"allow": allow, "reasons": reasons, "revision": data.mcp.revision}
"""


def answer(body: bytes | object, *, status: str = "200 OK") -> bytes:
    """A whole HTTP/1.1 response; a body that is not bytes is written as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


HUNG: bytes | None = None
EMPTY = answer({})
NULL = answer({"result": None})
FAILING = answer({"code": "internal_error", "message": "x"}, status="500 Internal Server Error")
GARBAGE = b"\x16\x03\x01 this is no HTTP\r\n\r\n"
NO_JSON = answer(b"<html>")
ALLOWED = answer({"result": True})
CLOSED = b""


@dataclass
class FakeOpa:
    """What it answers (None: never), and the requests that it got: request line, headers, body.

    With `lives` it closes the connection after so many answers, as a server that restarts does.
    """

    url: str
    answer: bytes | None
    lives: int | None = None
    questions: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        answered = 0
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while self.lives is None or answered < self.lives:
                await self._question(reader)
                if self.answer is None:
                    await reader.read()  # until the client gives up
                    break
                writer.write(self.answer)
                if self.answer == CLOSED:
                    break
                await writer.drain()
                answered += 1
        writer.close()

    async def _question(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.questions.append((head[0], headers, json.loads(body)))


@asynccontextmanager
async def fake_opa(
    answer: bytes | None, *, lives: int | None = None, path: Path | None = None
) -> AsyncIterator[FakeOpa]:
    """Serve on a unix socket, at `path` if given."""
    folder = Path(tempfile.mkdtemp(prefix="fake-opa-"))
    socket = path or folder / "opa.sock"
    fake = FakeOpa(f"unix://{socket}", answer, lives)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await fake.serve(reader, writer)
        tasks.discard(task)

    server = await asyncio.start_unix_server(serve, socket)
    try:
        yield fake
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        shutil.rmtree(folder)


@dataclass
class RealOpa:
    """A real OPA; its folder is read at its start."""

    url: str
    process: asyncio.subprocess.Process


@asynccontextmanager
async def real_opa(
    binary: Path, folder: Path, *options: str, socket: Path | None = None
) -> AsyncIterator[RealOpa]:
    """Run `opa run --server` over `folder` on a unix socket, at `socket` if given."""
    private = Path(tempfile.mkdtemp(prefix="real-opa-"))
    path = socket or private / "opa.sock"
    process = await asyncio.create_subprocess_exec(
        str(binary), "run", "--server", f"--addr=unix://{path}", "--skip-version-check",
        "--log-level=error", *options, str(folder),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await eventually(lambda: accepts(path), within=10)
        yield RealOpa(f"unix://{path}", process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        shutil.rmtree(private)


async def accepts(path: Path) -> bool:
    """Whether something listens on the socket."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def eventually(condition: Callable[[], Any], *, within: float) -> float:
    """Poll until `condition()`, or what it returns when awaited, is true; the seconds it took."""
    began = time.monotonic()
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        took = time.monotonic() - began
        if value:
            return took
        assert took < within, f"not so within {within} s"
        await asyncio.sleep(0.005)


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write `files`, relative name to text, below `folder`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def open_files() -> int:
    """How many file descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))
