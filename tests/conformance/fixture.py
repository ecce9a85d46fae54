"""A server on the official SDK that offers what the conformance suite calls, by the suite's names.

    python -m tests.conformance.fixture [--transport stdio|http] [--port 0]

Over HTTP it says `listening on http://127.0.0.1:PORT/mcp` on stderr once clients can come; they may
also call it localhost. Both eras are served, sessions can be resumed, and streams can be polled.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from dataclasses import dataclass
from typing import Any

import uvicorn
from mcp.server import MCPServer
from mcp.server.context import ServerRequestContext
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp.types import Completion as Completed
from mcp.types import (
    CompletionArgument,
    CompletionContext,
    EmptyResult,
    JSONRPCMessage,
    PromptReference,
    ResourceTemplateReference,
    SetLevelRequestParams,
    SubscribeRequestParams,
    UnsubscribeRequestParams,
)
from starlette.applications import Starlette

from tests.conformance import content, questions, rounds

RETRY_MS = 100
WORDS = ("paris", "park", "party", "test")


@dataclass(frozen=True, slots=True)
class Stored:
    """An event of a stream, in the order of all streams; the priming one has no message."""

    stream: str
    message: JSONRPCMessage | None


class Events(EventStore):
    """Every event of this process, so that a client may come back for what it missed."""

    def __init__(self) -> None:
        self._events: list[Stored] = []

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        self._events.append(Stored(stream_id, message))
        return str(len(self._events))

    async def replay_events_after(
        self, last_event_id: str, send_callback: EventCallback
    ) -> str | None:
        last = int(last_event_id) if last_event_id.isdecimal() else 0
        if not 0 < last <= len(self._events):
            return None
        stream = self._events[last - 1].stream
        for number, event in enumerate(self._events[last:], last + 1):
            if event.stream == stream and event.message is not None:
                await send_callback(EventMessage(event.message, str(number)))
        return stream


def build() -> MCPServer[Any]:
    """The server, with everything that the suite asks for."""
    server: MCPServer[Any] = MCPServer("conformance", version="1.0", log_level="ERROR")
    content.add(server)
    questions.add(server)
    rounds.add(server)
    _add_completion(server)
    _add_legacy_requests(server)
    return server


def _add_completion(server: MCPServer[Any]) -> None:
    @server.completion()  # type: ignore[no-untyped-call]
    async def complete(
        ref: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        context: CompletionContext | None,
    ) -> Completed:
        values = [word for word in WORDS if word.startswith(argument.value)]
        return Completed(values=values, total=len(values), has_more=False)


def _add_legacy_requests(server: MCPServer[Any]) -> None:
    """What only the handshake revisions know; the SDK answers -32601 to it in the later ones."""

    async def accept(context: ServerRequestContext[Any], params: object) -> EmptyResult:
        return EmptyResult()

    low = server._lowlevel_server
    low.add_request_handler("logging/setLevel", SetLevelRequestParams, accept)
    low.add_request_handler("resources/subscribe", SubscribeRequestParams, accept)
    low.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, accept)


class _Announcing(uvicorn.Server):
    """Says where it listens as soon as it does."""

    def __init__(self, config: uvicorn.Config, path: str) -> None:
        super().__init__(config)
        self._path = path

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            print(f"listening on http://{host}:{port}{self._path}", file=sys.stderr, flush=True)


def serve_http(server: MCPServer[Any], port: int) -> None:
    """Serve Streamable HTTP on loopback until SIGTERM."""
    app = server.streamable_http_app(event_store=Events(), retry_interval=RETRY_MS)
    serve(app, port, "/mcp")


def serve(app: Starlette, port: int, path: str) -> None:
    """Serve an application, whose endpoint is at `path`, on loopback until SIGTERM."""
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2, ws="none")
    with socket.create_server(("127.0.0.1", port)) as listener:
        _Announcing(config, path).run(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(prog="conformance-fixture")
    parser.add_argument("--transport", choices=["stdio", "http"], default="http")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.transport == "stdio":
        build().run("stdio")
    else:
        serve_http(build(), options.port)


if __name__ == "__main__":
    main()
