"""A ticket desk: a real MCP server, and a witness.

Whatever reaches it to be done is a line of JSON in its own log, before it is done: the tool (or
method), the arguments, and the trace that the call belongs to. One tool, `export_all`, is callable
and never listed; one method, `tickets/purge`, is in no revision of MCP. Both eras are served.

    python -m tests.support.ticket_desk --log FILE [--transport stdio|http|sse] [--port 0]

Over HTTP it says `listening on http://127.0.0.1:PORT/mcp` (`/sse` over HTTP+SSE) on stderr once
clients can come.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from mcp.server import MCPServer
from mcp.server.auth.provider import AccessToken, TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import (
    CallToolResult,
    EmptyResult,
    InputRequiredResult,
    RequestParams,
    Tool,
    ToolAnnotations,
)
from pydantic import AnyHttpUrl
from starlette.applications import Starlette
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

HIDDEN_TOOL = "export_all"
HIDDEN_METHOD = "tickets/purge"
TOKEN = "let-me-in"
LISTED = ["search_tickets", "get_ticket", "create_ticket", "refund_ticket", "delete_ticket"]


class Ticket(TypedDict):
    id: int
    title: str
    status: str
    refunded: float


class Found(TypedDict):
    tickets: list[Ticket]


class Desk:
    """The tickets of one desk, and what may be done with them."""

    def __init__(self) -> None:
        titles = {4711: "Refund for a broken kettle", 4712: "Where is my parcel?"}
        self._tickets = {number: _ticket(number, title) for number, title in titles.items()}

    def search(self, query: str) -> Found:
        found = [each for each in self._tickets.values() if query.lower() in each["title"].lower()]
        return {"tickets": found}

    def get(self, number: int) -> Ticket:
        if number not in self._tickets:
            raise ToolError(f"there is no ticket {number}")
        return self._tickets[number]

    def create(self, title: str) -> Ticket:
        number = max(self._tickets, default=4710) + 1
        self._tickets[number] = _ticket(number, title)
        return self._tickets[number]

    def refund(self, number: int, amount: float) -> Ticket:
        ticket = self.get(number)
        ticket["refunded"] += amount
        return ticket

    def delete(self, number: int) -> Ticket:
        ticket = self.get(number)
        del self._tickets[number]
        return ticket

    def export(self) -> Found:
        return {"tickets": list(self._tickets.values())}

    def purge(self) -> None:
        self._tickets.clear()


def _ticket(number: int, title: str) -> Ticket:
    return {"id": number, "title": title, "status": "open", "refunded": 0.0}


class Log:
    """What reached the desk, one JSON object a line; several processes may share the file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, name: str, arguments: dict[str, Any], meta: Any) -> None:
        traceparent = (meta or {}).get("traceparent")
        trace_id = traceparent.split("-")[1] if isinstance(traceparent, str) else None
        record = {"name": name, "arguments": arguments, "trace_id": trace_id, "pid": os.getpid()}
        os.write(self._file, (json.dumps(record) + "\n").encode())


class TicketServer(MCPServer[Any]):
    """The desk as an MCP server that hides a tool, and logs what is called."""

    def __init__(self, log: Log, hold: Path | None, resource: str | None) -> None:
        guard = {} if resource is None else guarded(resource)
        super().__init__("ticket-desk", version="1.0", log_level="WARNING", **guard)
        self._log, self._hold = log, hold

    async def list_tools(self) -> list[Tool]:
        return [each for each in await super().list_tools() if each.name != HIDDEN_TOOL]

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        meta = context.request_context.meta if context is not None else None
        self._log.write(name, arguments, meta)
        try:
            while self._hold is not None and self._hold.exists():
                await anyio.sleep(0.01)
        except anyio.get_cancelled_exc_class():
            self._log.write(f"cancelled {name}", arguments, meta)
            raise
        return await super().call_tool(name, arguments, context)


class OneToken(TokenVerifier):
    """Knows one token."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id="ana", scopes=[]) if token == TOKEN else None


def guarded(resource: str) -> dict[str, Any]:
    """What makes a server ask for `TOKEN`, and say of itself that it is `resource`."""
    issuer, itself = AnyHttpUrl("https://idp.example"), AnyHttpUrl(resource)
    settings = AuthSettings(
        issuer_url=issuer, resource_server_url=itself, validate_token_resource=False
    )
    return {"auth": settings, "token_verifier": OneToken()}


def build(log: Log, hold: Path | None = None, resource: str | None = None) -> TicketServer:
    """The server, with its tools. While the file `hold` exists, calls are not finished."""
    desk, server = Desk(), TicketServer(log, hold, resource)
    read = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    change = ToolAnnotations(read_only_hint=False, destructive_hint=False)
    destroy = ToolAnnotations(read_only_hint=False, destructive_hint=True)

    @server.tool(annotations=read)
    def search_tickets(query: str) -> Found:
        """Find tickets by a word of their title."""
        return desk.search(query)

    @server.tool(annotations=read)
    def get_ticket(id: int) -> Ticket:  # noqa: A002 - the argument's name on the wire
        """Read one ticket."""
        return desk.get(id)

    @server.tool(annotations=change)
    def create_ticket(title: str) -> Ticket:
        """Open a new ticket."""
        return desk.create(title)

    @server.tool(annotations=change)
    def refund_ticket(id: int, amount: float) -> Ticket:  # noqa: A002 - as above
        """Give money back."""
        return desk.refund(id, amount)

    @server.tool(annotations=destroy)
    def delete_ticket(id: int) -> Ticket:  # noqa: A002 - as above
        """Remove a ticket for good."""
        return desk.delete(id)

    @server.tool(annotations=read)
    def export_all() -> Found:
        """Every ticket there is; callable by those who know the name, and never listed."""
        return desk.export()

    async def purge(context: ServerRequestContext[Any], _: RequestParams | None) -> EmptyResult:
        log.write(HIDDEN_METHOD, {}, context.meta)
        desk.purge()
        return EmptyResult()

    server._lowlevel_server.add_request_handler(HIDDEN_METHOD, RequestParams, purge)
    return server


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


def serve_http(server: TicketServer, port: int, *, json_response: bool) -> None:
    """Serve Streamable HTTP on loopback until SIGTERM."""
    serve(server.streamable_http_app(json_response=json_response), port, "/mcp")


def serve(app: Starlette, port: int, path: str) -> None:
    """Serve an application, whose endpoint is at `path`, on loopback until SIGTERM."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, ws="none")
    with socket.create_server(("127.0.0.1", port)) as listener:
        _Announcing(config, path).run(sockets=[listener])


def export_spans(url: str) -> None:
    """Let the SDK's own spans go to a collector."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "ticket-desk"}))
    exporter = OTLPSpanExporter(f"{url.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=200))
    trace.set_tracer_provider(provider)


def main() -> None:
    parser = argparse.ArgumentParser(prog="ticket_desk")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE")
    parser.add_argument("--transport", choices=["stdio", "http", "sse"], default="stdio")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--hold", type=Path, metavar="FILE", help="no call ends while it exists")
    parser.add_argument("--resource", metavar="URL", help="ask for a token, for this resource")
    parser.add_argument("--json", action="store_true", help="answer JSON instead of SSE")
    parser.add_argument("--otlp", metavar="URL", help="export its own spans")
    options = parser.parse_args()
    if options.otlp:
        export_spans(options.otlp)
    server = build(Log(options.log), options.hold, options.resource)
    if options.transport == "stdio":
        server.run("stdio")
    elif options.transport == "sse":
        serve(server.sse_app(), options.port, "/sse")
    else:
        serve_http(server, options.port, json_response=options.json)


if __name__ == "__main__":
    main()
