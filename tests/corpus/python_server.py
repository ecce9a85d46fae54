"""A server on the official Python SDK that writes down whatever it is made to do.

    python -m tests.corpus.python_server --log FILE [--transport stdio|http|sse] [--stateless]

Over HTTP it says `listening on http://127.0.0.1:PORT/…` on stderr once clients can come.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from mcp import types
from mcp.server import MCPServer
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

Context = ServerRequestContext[Any]
TOOLS = [
    types.Tool(name=name, description=name, input_schema={"type": "object"})
    for name in ("echo", "danger")
]


class Witness:
    """What was executed, a line of JSON each, before it is answered."""

    def __init__(self, path: Path) -> None:
        self._log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def saw(self, method: str, name: object, more: object = None) -> None:
        record = {"what": "message", "method": method, "name": str(name), "arguments": more}
        os.write(self._log, (json.dumps(record) + "\n").encode())


class Acting:
    """Handlers of all that acts, each of which says so to the witness."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    async def call_tool(self, _: Context, of: types.CallToolRequestParams) -> types.CallToolResult:
        self._witness.saw("tools/call", of.name, of.arguments)
        return types.CallToolResult(content=[types.TextContent(type="text", text="done")])

    async def read(
        self, _: Context, of: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        self._witness.saw("resources/read", of.uri)
        content = types.TextResourceContents(uri=of.uri, text="read")
        return types.ReadResourceResult(contents=[content])

    async def prompt(self, _: Context, of: types.GetPromptRequestParams) -> types.GetPromptResult:
        self._witness.saw("prompts/get", of.name)
        return types.GetPromptResult(messages=[])

    async def complete(self, _: Context, of: types.CompleteRequestParams) -> types.CompleteResult:
        self._witness.saw("completion/complete", of.ref)
        return types.CompleteResult(completion=types.Completion(values=[]))

    def other(self, method: str) -> Callable[[Context, Any], Awaitable[types.EmptyResult]]:
        """A handler of a method that has no result to speak of."""

        async def handle(_: Context, of: Any) -> types.EmptyResult:
            self._witness.saw(method, of)
            return types.EmptyResult()

        return handle


async def list_tools(_: Context, __: object) -> types.ListToolsResult:
    return types.ListToolsResult(tools=TOOLS)


def build(witness: Witness) -> Server[Any]:
    """The server: everything that acts has a handler, and every handler a witness."""
    acting = Acting(witness)
    server: Server[Any] = Server(
        "corpus",
        version="1.0",
        on_list_tools=list_tools,
        on_call_tool=acting.call_tool,
        on_read_resource=acting.read,
        on_get_prompt=acting.prompt,
        on_completion=acting.complete,
        on_subscribe_resource=acting.other("resources/subscribe"),
        on_unsubscribe_resource=acting.other("resources/unsubscribe"),
    )
    for method in ("tasks/get", "tasks/result", "tasks/cancel", "tasks/update", "vendor/danger"):
        server.add_request_handler(method, types.RequestParams, acting.other(method))
    return server


class _Announcing(uvicorn.Server):
    """Says where it listens as soon as it does."""

    path = "/mcp"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            print(f"listening on http://{host}:{port}{self.path}", file=sys.stderr, flush=True)


def serve(app: Any, path: str) -> None:
    """Serve on loopback until SIGTERM."""
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, ws="none")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        announcing = _Announcing(config)
        announcing.path = path
        announcing.run(sockets=[listener])


async def over_stdio(server: Server[Any]) -> None:
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python_server")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE")
    parser.add_argument("--transport", choices=["stdio", "http", "sse"], default="stdio")
    parser.add_argument("--stateless", action="store_true", help="no sessions")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    server = build(Witness(options.log))
    match options.transport:
        case "stdio":
            anyio.run(over_stdio, server)
        case "http":
            serve(server.streamable_http_app(stateless_http=options.stateless), "/mcp")
        case _:
            front: MCPServer[Any] = MCPServer("corpus", log_level="CRITICAL")
            front._lowlevel_server = server
            serve(front.sse_app(), "/sse")


if __name__ == "__main__":
    main()
