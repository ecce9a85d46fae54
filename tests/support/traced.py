"""An agent, a sidecar with an OPA of its own, and a ticket desk, all of which export their spans.

The agent is the official client; the client's and the server's spans are the SDK's own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp import Client, MCPError
from mcp.shared import _otel as sdk
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, Tracer, format_span_id, format_trace_id

from tests.support import client as clients
from tests.support.client import LEGACY, MODERN
from tests.support.processes import (
    STARTER,
    desk,
    http_sidecar,
    patient,
    sidecar,
    ticket_desk,
)

BOT = {
    "type": "agent",
    "id": "support-bot",
    "on_behalf_of": {"type": "human", "id": "ana"},
}
AGENT, SIDECAR, OPA, DESK = "an-agent", "mcp-opa-sidecar", "opa", "ticket-desk"
PLACES = tuple((transport, mode) for transport in ("stdio", "http") for mode in (LEGACY, MODERN))


@dataclass(frozen=True)
class Caller:
    """The agent's own span, within which it called."""

    context: SpanContext

    @property
    def trace_id(self) -> str:
        return format_trace_id(self.context.trace_id)

    @property
    def span_id(self) -> str:
        return format_span_id(self.context.span_id)


@dataclass(frozen=True)
class Scene:
    """Who talks how, and to which collector (`otlp`) everybody exports."""

    otlp: str
    folder: Path
    transport: str
    mode: str
    env: dict[str, str]
    tracer: Tracer
    decider: tuple[str, str] = ("--policy", str(STARTER))

    @asynccontextmanager
    async def open(self, *, all_export: bool = True, **more: Any) -> AsyncIterator[Client]:
        """The official client of an agent that acts for ana."""
        file = self.folder / "config.yaml"
        config = {"identity": {"static": BOT}, "server": {"name": "tickets"}}
        file.write_text(json.dumps(config), encoding="utf-8")
        arguments = (*self.decider, "--config", str(file), "--otlp", self.otlp)
        log, otlp = self.folder / "log", ("--otlp", self.otlp) if all_export else ()
        if self.transport == "stdio":
            command = [*sidecar("stdio", *arguments, "--"), *desk(log, *otlp)]
            errors = self.folder / "stderr"
            async with clients.over_stdio(
                command, self.mode, env=self.env, errors=errors, **more
            ) as client:
                yield client
            return
        with ExitStack() as stack:
            server = stack.enter_context(ticket_desk(log, *otlp))
            served = stack.enter_context(http_sidecar(server.url, *arguments, env=self.env))
            async with clients.over_http(served.url, self.mode, **more) as client:
                yield client

    async def call(self, client: Client, tool: str, **arguments: Any) -> tuple[Caller, object]:
        """Call a tool within a span of the agent's own; what came of it."""
        with self.tracer.start_as_current_span("the agent thinks") as span:
            caller = Caller(span.get_span_context())
            try:
                return caller, await client.call_tool(tool, arguments)
            except MCPError as error:
                return caller, error


@contextmanager
def scene(
    otlp: str, folder: Path, place: tuple[str, str], opa: Path, *, exports: bool = True
) -> Iterator[Scene]:
    """The scene, and an agent that exports its spans, those of the official client among them."""
    provider = TracerProvider(resource=Resource.create({"service.name": AGENT}))
    if exports:
        exporter = OTLPSpanExporter(f"{otlp}/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=100))
    before, sdk._tracer = sdk._tracer, provider.get_tracer("mcp-python-sdk")
    try:
        env = patient(opa) | {"OTEL_BSP_SCHEDULE_DELAY": "100"}
        yield Scene(otlp, folder, *place, env, provider.get_tracer(AGENT))
    finally:
        sdk._tracer = before
        provider.shutdown()
