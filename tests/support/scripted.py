"""An HTTP server that says what the test tells it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support.processes import wait_until
from tests.support.raw import beside

Object = dict[str, Any]
SESSION = {"Mcp-Session-Id": "the-session"}
EVENTS = {"Content-Type": "text/event-stream"}


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request."""

    verb: str
    headers: dict[str, str]
    message: Object = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The method of its message; what has none is known by its verb."""
        return str(self.message.get("method", self.verb))


Answer = Callable[["Scripted", web.Request, Asked], Awaitable[web.StreamResponse | None]]


class Scripted:
    """Answers by a script; what the script gives None for, it answers as a plain server would."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[Asked] = []
        self.closed: list[str] = []
        self.url = ""

    def seen(self, method: str) -> list[Asked]:
        """The requests with that method or verb."""
        return [each for each in list(self.asked) if each.method == method]

    def wait_for(self, method: str, count: int = 1) -> Asked:
        """Until it was asked that, so many times; the latest."""
        wait_until(lambda: len(self.seen(method)) >= count, f"{method} was asked {count} times")
        return self.seen(method)[count - 1]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = Asked(request.method, headers, json.loads(body) if body else {})
        self.asked.append(asked)
        try:
            return await self._answer(self, request, asked) or plain(asked)
        except asyncio.CancelledError:
            self.closed.append(asked.method)
            raise


def plain(asked: Asked) -> web.Response:
    """A server with a session and without streams."""
    if asked.verb != "POST":
        return web.Response(status=405)
    if "id" not in asked.message or "method" not in asked.message:
        return web.Response(status=202)
    match asked.method:
        case "initialize":
            version = asked.message["params"]["protocolVersion"]
            info = {"name": "scripted", "version": "1"}
            greeting = {"protocolVersion": version, "capabilities": {}, "serverInfo": info}
            return result(asked, greeting, SESSION)
        case "tools/list":
            return result(asked, {"tools": [tool("echo")]})
        case _:
            return result(asked, {"content": [{"type": "text", "text": "done"}]})


def tool(name: str, **properties: Object) -> Object:
    return {"name": name, "inputSchema": {"type": "object", "properties": properties}}


def result(asked: Asked, value: Object, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer; what the stateless revision wants in it is added."""
    if "_meta" in asked.message.get("params", {}):
        value = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private", **value}
    body = {"jsonrpc": "2.0", "id": asked.message["id"], "result": value}
    return web.json_response(body, headers=headers)


async def stream(request: web.Request, *events: str) -> web.StreamResponse:
    """An event stream that is still open after these events."""
    response = web.StreamResponse(headers=EVENTS)
    await response.prepare(request)
    for event in events:
        await response.write(event.encode() + b"\n\n")
    return response


def event(message: Object, number: str | None = None) -> str:
    lines = [f"data: {json.dumps({'jsonrpc': '2.0', **message})}"]
    return "\n".join(lines if number is None else [f"id: {number}", *lines])


@asynccontextmanager
async def _serving(server: Scripted) -> AsyncIterator[Scripted]:
    application = web.Application()
    application.router.add_route("*", "/mcp", server.handle)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}/mcp"
    try:
        yield server
    finally:
        await runner.cleanup()


@contextmanager
def scripted(answer: Answer) -> Iterator[Scripted]:
    """The server, in a thread of its own."""
    with beside(_serving(Scripted(answer))) as server:
        yield server
