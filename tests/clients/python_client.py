"""The tour with the official Python client; `tours` says what goes in and what comes out.

    python -m tests.clients.python_client MODE < ways

MODE is a revision of the protocol, or `auto`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import httpx2
import mcp.client.session
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import (
    CreateMessageRequestParams,
    CreateMessageResult,
    ElicitRequestParams,
    ElicitResult,
    ListRootsResult,
    LoggingMessageNotificationParams,
    PromptReference,
    Root,
    ServerNotification,
    TextContent,
)
from pydantic import BaseModel, FileUrl

MODERN = "2026-07-28"
PATIENCE = 30.0
EVENTS = ("notifications/resources/updated", "notifications/tools/list_changed")

Object = dict[str, Any]
Step = Callable[[], Awaitable[Any]]

LEGACY_QUESTIONS: dict[str, Object] = {
    "test_sampling": {"prompt": "well?"},
    "test_elicitation": {"message": "who?"},
    "ask_roots": {},
}
MODERN_QUESTIONS: dict[str, Object] = {
    "test_input_required_result_multiple_inputs": {},
    "test_input_required_result_multi_round": {},
    "test_missing_capability": {},
}


def plain(value: Any) -> Any:
    """A value of the SDK as it is on the wire, without what differs from call to call."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    return value


class Tourist:
    """One client at one address, and what it saw there."""

    def __init__(self, way: Object, mode: str) -> None:
        self._way, self._mode = way, mode
        self._key = uuid.uuid4().hex
        self._session: str | None = None
        self._asked: list[Any] = []
        self._logged: list[Any] = []
        self._events: dict[str, Any] = {}
        self.seen: Object = {}

    async def travel(self) -> Object:
        """Connect, take the tour, close, and connect again."""
        if await self._step("connects", self._all()):
            self.seen["session"] = await self._session_status()
            await self._step("connects again", self._again())
        return dict(json.loads(json.dumps(self.seen).replace(self._key, "KEY")))

    async def _step(self, name: str, doing: Awaitable[Any]) -> bool:
        """Write down what comes of a step, a failure too."""
        try:
            self.seen[name] = plain(await doing)
        except Exception as error:
            self.seen[name] = _failure(error)
            return False
        return True

    async def _all(self) -> Any:
        async with self._connected() as client:
            modern = client.protocol_version == MODERN
            self.seen["revision"] = client.protocol_version
            for name, step in self._steps(client, modern).items():
                with anyio.move_on_after(PATIENCE) as bound:
                    await self._step(name, step())
                if bound.cancelled_caught:
                    self.seen[name] = {"raises": "too late"}
            return self._introduction(client)

    async def _again(self) -> Any:
        async with self._connected() as client:
            said = await client.call_tool("test_simple_text", {})
            return [client.protocol_version, self._introduction(client), plain(said)]

    def _introduction(self, client: Client) -> Object:
        return {
            "server": plain(client.server_info),
            "capabilities": plain(client.server_capabilities),
            "instructions": client.instructions,
        }

    # ── The steps ─────────────────────────────────────────────────────────────────────────────────

    def _steps(self, client: Client, modern: bool) -> dict[str, Step]:
        def call(name: str, arguments: Object | None = None) -> Step:
            return lambda: client.call_tool(name, arguments or {})

        questions = MODERN_QUESTIONS if modern else LEGACY_QUESTIONS
        asking = {name: call(name, arguments) for name, arguments in questions.items()}
        if modern:
            asking["a prompt"] = lambda: client.get_prompt("test_input_required_result_prompt")
        return {
            "tools": lambda: self._pages(client),
            "prompts": client.list_prompts,
            "resources": client.list_resources,
            "templates": client.list_resource_templates,
            "call": call("test_multiple_content_types"),
            "error": call("test_error_handling"),
            "unknown tool": call("no_such_tool"),
            "prompt": lambda: client.get_prompt(
                "test_prompt_with_arguments", {"arg1": "ä", "arg2": "\u2028"}
            ),
            "unknown prompt": lambda: client.get_prompt("no_such_prompt"),
            "resource": lambda: client.read_resource("test://template/7/data"),
            "unknown resource": lambda: client.read_resource("test://no-such"),
            "completion": lambda: client.complete(
                PromptReference(name="test_prompt_with_arguments"),
                {"name": "arg1", "value": "par"},
            ),
            "progress": lambda: self._progress(client),
            "log": lambda: self._log(client, modern),
            "cancel": lambda: self._cancel(client),
            "events": lambda: self._changes(client, modern),
            "polling": call("test_reconnection"),
            **{f"asked by {name}": partial(self._questions, step) for name, step in asking.items()},
        }

    async def _pages(self, client: Client) -> list[Any]:
        page = await client.list_tools()
        pages = [plain(page)]
        while page.next_cursor is not None:
            page = await client.list_tools(cursor=page.next_cursor)
            pages.append(plain(page))
        return pages

    async def _progress(self, client: Client) -> list[Any]:
        """A call that ends when its progress was seen: what comes at once is not all told."""
        seen: list[Any] = []
        key = f"{self._key} steps"

        async def note(progress: float, total: float | None, message: str | None) -> None:
            seen.append([progress, total, message])

        async def release() -> None:
            await _until(lambda: len(seen) >= 3)
            await client.call_tool("release", {"key": key})

        said, _ = await asyncio.gather(
            client.call_tool("hold", {"key": key}, progress_callback=note), release()
        )
        return [plain(said), seen]

    async def _log(self, client: Client, modern: bool) -> list[Any]:
        if not modern:
            await client.session.set_logging_level("info")
        said = await client.call_tool("test_tool_with_logging", {})
        await _until(lambda: len(self._logged) >= 3)
        return [plain(said), self._logged]

    async def _cancel(self, client: Client) -> Any:
        with anyio.CancelScope() as held:

            async def leave(progress: float, total: float | None, message: str | None) -> None:
                held.cancel()

            await client.call_tool("hold", {"key": self._key}, progress_callback=leave)
        return await client.call_tool("fate", {"key": self._key})

    async def _changes(self, client: Client, modern: bool) -> Object:
        """Both kinds of change, however often they have to happen until they are seen."""
        uri = f"test://watched/{self._key}"
        if not modern:
            await client.session.subscribe_resource(uri)
            await self._touch(client, uri)
            await client.session.unsubscribe_resource(uri)
            return self._events
        async with client.listen(
            tools_list_changed=True, resource_subscriptions=[uri]
        ) as listening:
            await self._touch(client, uri)
            return {**self._events, "honored": plain(listening.honored)}

    async def _touch(self, client: Client, uri: str) -> None:
        while not self._events.keys() >= set(EVENTS):
            await client.call_tool("touch", {"uri": uri})
            await _until(lambda: self._events.keys() >= set(EVENTS), 0.5)

    async def _questions(self, calling: Step) -> list[Any]:
        """What came of it, and what the client was asked meanwhile."""
        self._asked.clear()
        try:
            return [plain(await calling()), list(self._asked)]
        except MCPError as error:
            return [_failure(error), list(self._asked)]

    # ── What the server may want ──────────────────────────────────────────────────────────────────

    async def _on_sampling(
        self, context: object, params: CreateMessageRequestParams
    ) -> CreateMessageResult:
        self._asked.append(plain(params))
        content = TextContent(type="text", text="Paris")
        return CreateMessageResult(role="assistant", content=content, model="none")

    async def _on_elicitation(self, context: object, params: ElicitRequestParams) -> ElicitResult:
        asked = plain(params)
        self._asked.append(asked)
        fields = asked["requestedSchema"]["properties"]
        return ElicitResult(action="accept", content={name: f"my {name}" for name in fields})

    async def _on_roots(self, context: object) -> ListRootsResult:
        self._asked.append("roots")
        return ListRootsResult(roots=[Root(uri=FileUrl("file:///home"), name="home")])

    async def _on_log(self, params: LoggingMessageNotificationParams) -> None:
        self._logged.append(plain(params))

    async def _on_message(self, message: object) -> None:
        if isinstance(message, ServerNotification) and message.method in EVENTS:
            self._events.setdefault(message.method, _untagged(plain(message)))

    # ── Transports ────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
        options: Object = {
            "mode": self._mode,
            "read_timeout_seconds": PATIENCE,
            "sampling_callback": self._on_sampling,
            "elicitation_callback": self._on_elicitation,
            "list_roots_callback": self._on_roots,
            "logging_callback": self._on_log,
            "message_handler": self._on_message,
            "log_level": "info",
        }
        async with self._transport() as transport, Client(transport, **options) as client:
            yield client

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        if "command" in self._way:
            command, *arguments = self._way["command"]
            server = StdioServerParameters(command=command, args=arguments, env=dict(os.environ))
            yield stdio_client(server)
        elif "sse" in self._way:
            yield sse_client(self._way["sse"])
        else:
            timeout = httpx2.Timeout(30, read=300)
            hooks = {"response": [self._note_session]}
            async with httpx2.AsyncClient(
                trust_env=False, timeout=timeout, event_hooks=hooks
            ) as http:
                yield streamable_http_client(self._way["url"], http_client=http)

    async def _note_session(self, response: httpx2.Response) -> None:
        self._session = response.headers.get("mcp-session-id", self._session)

    async def _session_status(self) -> int | None:
        """The answer to who comes with the session that the client has ended."""
        if self._session is None:
            return None
        ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        headers = {
            "Accept": "application/json, text/event-stream",
            "Mcp-Session-Id": self._session,
        }
        async with httpx2.AsyncClient(trust_env=False) as http:
            return (await http.post(self._way["url"], json=ping, headers=headers)).status_code


def _failure(error: Exception) -> Object:
    """An error as it is, not in the groups of the SDK's tasks."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, MCPError):
        return {"error": {"code": error.code, "message": error.message, "data": error.data}}
    return {"raises": f"{type(error).__name__}: {error}"}


def _untagged(event: Object) -> Object:
    """An event without the id of the request that subscribed to it."""
    event.get("params", {}).pop("_meta", None)
    return event


async def _until(condition: Callable[[], bool], bound: float = 5.0) -> None:
    with anyio.move_on_after(bound):
        while not condition():
            await anyio.sleep(0.01)


async def tours(ways: dict[str, Object], mode: str) -> dict[str, Object]:
    """Every way at once: `url`, `sse` or `command` by name, and what was seen by the same name."""
    seen = await asyncio.gather(*(Tourist(way, mode).travel() for way in ways.values()))
    return dict(zip(ways, seen, strict=True))


def main(mode: str) -> None:
    warnings.simplefilter("ignore")  # what old revisions know is deprecated
    if mode not in ("auto", MODERN):
        vars(mcp.client.session)["LATEST_HANDSHAKE_VERSION"] = mode  # there is no option for it
        mode = "legacy"
    print(json.dumps(asyncio.run(tours(json.load(sys.stdin), mode))))


if __name__ == "__main__":
    main(sys.argv[1])
