"""A server that never stops talking when it is told so, and counts what it could get rid of.

The tools are `echo`, `flood` (progress without end), `huge` (one event, or line, without end),
`crumbs` (one event of short lines without end) and `told` (the bytes that left it so far, over
HTTP). GET and `subscriptions/listen` open streams, on which there is an event every two seconds;
those of a client that calls itself `flood` are as that tool.

    python -m tests.support.stream_server http|stdio

Over HTTP it says `listening on http://127.0.0.1:PORT/mcp` on stderr once clients can come.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

Object = dict[str, Any]

EVENTS, JSON = "text/event-stream", "application/json"
PIECE = 16 * 1024
PERIOD = 2.0


def command(transport: str) -> list[str]:
    """Its command line."""
    return [sys.executable, "-m", "tests.support.stream_server", transport]


def dump(message: Object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", **message}).encode()


def event(message: Object) -> bytes:
    return b"data: " + dump(message) + b"\n\n"


def tick(number: int) -> Object:
    """The events of a stream, which are numbered from 1."""
    params = {"uri": f"tick://{number}"}
    return {"method": "notifications/resources/updated", "params": params}


def progress() -> Object:
    params = {"progressToken": "t", "progress": 1, "message": "x" * PIECE}
    return {"method": "notifications/progress", "params": params}


def text(request: Object, said: str) -> Object:
    """The answer to a call."""
    result = {"resultType": "complete", "content": [{"type": "text", "text": said}]}
    return {"id": request["id"], "result": result}


def greeting(request: Object) -> Object:
    result = {
        "protocolVersion": request["params"]["protocolVersion"],
        "capabilities": {"tools": {}, "resources": {"subscribe": True}},
        "serverInfo": {"name": "streams", "version": "1"},
    }
    return {"id": request["id"], "result": result}


def listing(request: Object) -> Object:
    names = ("echo", "flood", "huge", "crumbs", "told")
    tools = [{"name": each, "inputSchema": {"type": "object"}} for each in names]
    fresh = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
    return {"id": request["id"], "result": {"tools": tools, **fresh}}


def noise(name: str) -> Iterator[bytes]:
    """What a tool says without end, in pieces; nothing for one that answers."""
    if name == "flood":
        while True:
            yield event(progress())
    if name == "huge":
        yield b"data: "
        while True:
            yield b"x" * PIECE
    if name == "crumbs":
        while True:
            yield b"data:xy\n" * (PIECE // 8)


def named(message: Object) -> str:
    params: Object = message.get("params", {})
    return str(params.get("name", "-")) if message["method"] == "tools/call" else "-"


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────


class Http:
    """Streamable HTTP, a connection at a time and as little of it as will do."""

    def __init__(self) -> None:
        self._told = 0
        self._sessions = count(1)
        self._ticking: dict[asyncio.StreamWriter, Iterator[int]] = {}

    async def run(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=2000)
        port = server.sockets[0].getsockname()[1]
        print(f"listening on http://127.0.0.1:{port}/mcp", file=sys.stderr, flush=True)
        await self._tick()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            for writer, numbers in list(self._ticking.items()):
                self._chunk(writer, event(tick(next(numbers))))

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lines = head.lower().split("\r\n")
                headers = dict(each.split(": ", 1) for each in lines[1:] if each)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                message = json.loads(body) if body else {"method": "GET"}
                await self._answer(reader, writer, message, headers)
        self._ticking.pop(writer, None)
        writer.close()

    async def _answer(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        message: Object,
        headers: dict[str, str],
    ) -> None:
        match message["method"]:
            case "GET":
                await self._stream(reader, writer, b": open\n\n", headers["mcp-session-id"])
            case "subscriptions/listen":
                key = {"io.modelcontextprotocol/subscriptionId": message["id"]}
                params = {"notifications": message["params"]["notifications"], "_meta": key}
                method = "notifications/subscriptions/acknowledged"
                await self._stream(reader, writer, event({"method": method, "params": params}))
            case "initialize":
                name = f"{message['params']['clientInfo']['name']}-{next(self._sessions)}"
                self._send(writer, dump(greeting(message)), f"Mcp-Session-Id: {name}\r\n")
            case "tools/list":
                self._send(writer, dump(listing(message)))
            case "tools/call":
                await self._call(writer, message)
            case _:
                writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")

    async def _call(self, writer: asyncio.StreamWriter, message: Object) -> None:
        name = named(message)
        if name in ("flood", "huge", "crumbs"):
            self._begin(writer, EVENTS)
            await self._pour(writer, name)
        else:
            said = str(self._told) if name == "told" else json.dumps(message["params"])
            self._send(writer, dump(text(message, said)))

    async def _pour(self, writer: asyncio.StreamWriter, name: str) -> None:
        for piece in noise(name):
            self._chunk(writer, piece)
            await writer.drain()
            await asyncio.sleep(0)  # others' calls are answered meanwhile
            self._told += len(piece)

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: bytes,
        session: str = "",
    ) -> None:
        self._begin(writer, EVENTS)
        self._chunk(writer, first)
        if session.startswith("flood"):
            await self._pour(writer, "flood")
        self._ticking[writer] = count(1)
        await reader.read()
        raise ConnectionResetError

    def _begin(self, writer: asyncio.StreamWriter, media: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {media}\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode())

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _send(self, writer: asyncio.StreamWriter, body: bytes, more: str = "") -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n"
        writer.write((head + more + "\r\n").encode() + body)


# ── stdio ─────────────────────────────────────────────────────────────────────────────────────────


class Stdio:
    """Lines in, lines out; what has no end is said beside what has."""

    def __init__(self) -> None:
        self._turn, self._told = threading.Lock(), 0

    def run(self) -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "id" not in message or "method" not in message:
                continue
            name = named(message)
            if name in ("flood", "huge"):
                threading.Thread(target=self._pour, args=(name,), daemon=True).start()
                continue
            answer = {"initialize": greeting, "tools/list": listing}.get(message["method"])
            said = (
                text(message, json.dumps(message["params"])) if answer is None else answer(message)
            )
            self._write(dump(said) + b"\n")

    def _pour(self, name: str) -> None:
        while name == "flood":
            self._write(dump(progress()) + b"\n")
        with self._turn:
            while True:
                os.write(1, b"x" * PIECE)

    def _write(self, line: bytes) -> None:
        with self._turn:
            view = memoryview(line)
            while view:
                view = view[os.write(1, view) :]


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if sys.argv[1] == "http":
        asyncio.run(Http().run())
    else:
        Stdio().run()
