"""The server of the tour: the conformance fixture, and what a tour needs besides.

    python -m tests.clients.server [--transport stdio|http|sse] [--port 0]

Its list of tools has pages. A call of `hold` ends when it is cancelled or released, and `fate`
tells how it ended: the server itself is the witness.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Context
from mcp.shared.message import ServerMessageMetadata
from mcp.types import (
    ListRootsRequest,
    ListRootsResult,
    ListToolsResult,
    PaginatedRequestParams,
)

from tests.conformance import fixture

PAGE = 12
LONGEST = 20.0
MODERN = "2026-07-28"


class Fates:
    """How calls ended, by a key that the caller chose."""

    def __init__(self) -> None:
        self._released: defaultdict[str, anyio.Event] = defaultdict(anyio.Event)
        self._ended: defaultdict[str, anyio.Event] = defaultdict(anyio.Event)
        self._how: dict[str, str] = {}

    @contextmanager
    def watching(self, key: str) -> Iterator[None]:
        """Note how the block ends."""
        self._how[key] = "cancelled"
        try:
            yield
            self._how[key] = "finished"
        finally:
            self._ended[key].set()

    async def released(self, key: str) -> None:
        """Wait for as long as somebody wants it."""
        with anyio.move_on_after(LONGEST):
            await self._released[key].wait()

    def release(self, key: str) -> None:
        """Let the call with this key finish."""
        self._released[key].set()

    async def of(self, key: str) -> str:
        """How the call with this key ended."""
        if key not in self._how:
            return "never began"
        with anyio.move_on_after(LONGEST / 2):
            await self._ended[key].wait()
            return self._how[key]
        return "runs on"


def build() -> MCPServer[Any]:
    """The fixture with more tools, and with pages."""
    server, fates = fixture.build(), Fates()

    @server.tool(structured_output=False)
    async def hold(key: str, context: Context[Any, Any], named: bool = False) -> str:
        """Reports three steps, with who has called it if that is wanted, and does not end."""
        with fates.watching(key):
            for step in (1, 2, 3):
                message = _caller(context) if named else f"step {step}"
                await context.report_progress(step, 3, message)
            await fates.released(key)
        return "nobody cancelled it"

    @server.tool(structured_output=False)
    async def release(key: str) -> str:
        """Lets the call of `hold` with that key finish."""
        fates.release(key)
        return "released"

    @server.tool(structured_output=False)
    async def fate(key: str) -> str:
        """Tells how the call of `hold` with that key ended."""
        return await fates.of(key)

    @server.tool(structured_output=False)
    async def touch(uri: str, context: Context[Any, Any]) -> str:
        """Says that a resource has changed, and that the tools have."""
        if context.protocol_version == MODERN:
            await context.notify_resource_updated(uri)
            await context.notify_tools_changed()
        else:
            await context.session.send_resource_updated(uri)
            await context.session.send_tool_list_changed()
        return "touched"

    @server.tool(structured_output=False)
    async def ask_roots(context: Context[Any, Any]) -> str:
        """Asks for the client's roots while it runs, which a stateless client can not be asked."""
        answer = await context.session.send_request(
            ListRootsRequest(),
            ListRootsResult,
            metadata=ServerMessageMetadata(related_request_id=context.request_id),
        )
        return f"Roots: {', '.join(str(root.uri) for root in answer.roots)}"

    _add_pages(server)
    return server


def _caller(context: Context[Any, Any]) -> str:
    """The port at the other end of the connection, where there is one."""
    request = context.request_context.request
    return "" if request is None else str(request.client.port)


def _add_pages(server: MCPServer[Any]) -> None:
    async def page(
        context: ServerRequestContext[Any], params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        tools = await server.list_tools()
        start = int((params and params.cursor) or 0)
        end = start + PAGE
        return ListToolsResult(
            tools=tools[start:end], next_cursor=str(end) if end < len(tools) else None
        )

    server._lowlevel_server.add_request_handler("tools/list", PaginatedRequestParams, page)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tour-server")
    parser.add_argument("--transport", choices=["stdio", "http", "sse"], default="stdio")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # tools and prompts fail here, as they should
    warnings.simplefilter("ignore")  # and what is deprecated is used
    server = build()
    match options.transport:
        case "stdio":
            server.run("stdio")
        case "http":
            fixture.serve_http(server, options.port)
        case _:
            fixture.serve(server.sse_app(), options.port, "/sse")


if __name__ == "__main__":
    main()
