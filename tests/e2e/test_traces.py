"""One trace for one action: the caller's span, the sidecar's, OPA's own, and the server's.

Everybody exports real OTLP to the same collector. The caller's context travels as the official
client sends it, in `_meta`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, MCPError
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanContext, SpanKind, format_span_id, format_trace_id

from tests.support import client as clients
from tests.support.client import LEGACY, MODERN, error_of
from tests.support.otlp import Sink, Span, tree
from tests.support.processes import (
    STARTER,
    desk,
    executed,
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
SIDECAR, OPA, DESK = "mcp-opa-sidecar", "opa", "ticket-desk"
PLACES = [
    pytest.param((transport, mode), id=f"{transport}-{era}")
    for transport in ("stdio", "http")
    for mode, era in ((LEGACY, "legacy"), (MODERN, "modern"))
]


@dataclass
class Traced:
    """A ticket desk behind a sidecar, both of which export to `sink`."""

    sink: Sink
    folder: Path
    transport: str
    mode: str
    env: dict[str, str]

    @asynccontextmanager
    async def open(self, *, all_export: bool = True) -> AsyncIterator[Client]:
        """The official client of an agent that acts for ana."""
        file = self.folder / "config.yaml"
        config = {"identity": {"static": BOT}, "server": {"name": "tickets"}}
        file.write_text(json.dumps(config), encoding="utf-8")
        arguments = ("--policy", str(STARTER), "--config", str(file), "--otlp", self.sink.url)
        log, otlp = self.folder / "log", ("--otlp", self.sink.url) if all_export else ()
        if self.transport == "stdio":
            command = [*sidecar("stdio", *arguments, "--"), *desk(log, *otlp)]
            errors = self.folder / "stderr"
            async with clients.over_stdio(
                command, self.mode, env=self.env, errors=errors
            ) as client:
                yield client
            return
        with ExitStack() as stack:
            server = stack.enter_context(ticket_desk(log, *otlp))
            started = http_sidecar(server.url, *arguments, env=self.env)
            served = stack.enter_context(started)
            async with clients.over_http(served.url, self.mode) as client:
                yield client

    async def call(self, client: Client, tool: str, **arguments: Any) -> tuple[Caller, object]:
        """Call a tool within a span of the caller's own; what came of it."""
        tracer = TracerProvider().get_tracer("caller")
        with tracer.start_as_current_span("the caller", kind=SpanKind.CLIENT) as span:
            caller = Caller(span.get_span_context())
            try:
                return caller, await client.call_tool(tool, arguments)
            except MCPError as error:
                return caller, error

    def trace(self, caller: Caller, count: int) -> dict[str, Span]:
        """The spans below the caller's by what they are; there must be exactly `count` of them.

        To be asked while everybody still runs: an OPA that is ended forgets what it has not sent.
        """
        self.sink.wait_for(count, where=lambda span: span.trace_id == caller.trace_id)
        spans = self.sink.trace(caller.trace_id)
        assert len(spans) == count, tree(spans)
        return {f"{span.service} {span.kind} {span.name}": span for span in spans}


@dataclass(frozen=True)
class Caller:
    """The caller's span, which it did not export."""

    context: SpanContext

    @property
    def trace_id(self) -> str:
        return format_trace_id(self.context.trace_id)

    @property
    def span_id(self) -> str:
        return format_span_id(self.context.span_id)


@pytest.fixture(params=PLACES)
def traced(request: pytest.FixtureRequest, tmp_path: Path, opa_bin: Path) -> Iterator[Traced]:
    transport, mode = request.param
    with Sink() as sink:
        env = patient(opa_bin) | {"OTEL_BSP_SCHEDULE_DELAY": "100"}
        yield Traced(sink, tmp_path, transport, mode, env)


async def test_an_allowed_call_is_one_trace_from_the_caller_to_the_server(traced: Traced) -> None:
    async with traced.open() as client:
        await client.list_tools()
        caller, _ = await traced.call(client, "refund_ticket", id=4711, amount=20)
        spans = traced.trace(caller, 5)
    served = spans[f"{SIDECAR} SERVER tools/call refund_ticket"]
    policy = spans[f"{SIDECAR} CLIENT policy.evaluate mcp/authz"]
    upstream = spans[f"{SIDECAR} CLIENT tools/call refund_ticket"]
    server = spans[f"{DESK} SERVER tools/call refund_ticket"]
    opa = next(span for span in spans.values() if span.service == OPA)
    parents = [each.parent_id for each in (served, policy, opa, upstream, server)]
    assert parents == [
        caller.span_id,
        served.span_id,
        policy.span_id,
        served.span_id,
        upstream.span_id,
    ]
    assert served.start <= policy.start <= policy.end <= upstream.start <= upstream.end
    assert upstream.end <= served.end
    assert {span.status for span in spans.values()} <= {"UNSET", "OK"}
    assert executed(traced.folder / "log")[-1]["trace_id"] == caller.trace_id

    expected = {
        "mcp.method.name": "tools/call",
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "refund_ticket",
        "mcp.protocol.version": "2025-11-25" if traced.mode == LEGACY else MODERN,
        "network.transport": "pipe" if traced.transport == "stdio" else "tcp",
        "actor.type": "agent",
        "actor.id": "support-bot",
        "actor.on_behalf_of": "ana",
        "actor.assurance": 1,
        "authz.decision": "allow",
        "authz.outcome": "success",
        "authz.mode": "enforce",
        "authz.rule": "bot-refund-up-to-50",
        "authz.owner": "finance-team",
        "authz.resource": "tool:refund_ticket",
    }
    assert said(served, expected) == expected
    assert {"authz.decision_id", "authz.policy_revision", "jsonrpc.request.id"} <= set(
        served.attributes
    )
    assert not {"authz.reason", "error.type", "gen_ai.tool.call.arguments"} & set(served.attributes)
    _policy_span_says_the_same(policy, served)
    assert upstream.attributes["gen_ai.tool.name"] == "refund_ticket"


async def test_a_denied_call_is_one_trace_that_ends_at_the_policy(traced: Traced) -> None:
    async with traced.open() as client:
        await client.list_tools()
        caller, error = await traced.call(client, "delete_ticket", id=4711)
        spans = traced.trace(caller, 3)
    assert isinstance(error, MCPError)
    served = spans[f"{SIDECAR} SERVER tools/call delete_ticket"]
    policy = spans[f"{SIDECAR} CLIENT policy.evaluate mcp/authz"]
    opa = next(span for span in spans.values() if span.service == OPA)
    parents = [each.parent_id for each in (served, policy, opa)]
    assert parents == [caller.span_id, served.span_id, policy.span_id]
    assert executed(traced.folder / "log") == []

    expected = {
        "actor.type": "agent",
        "actor.id": "support-bot",
        "actor.on_behalf_of": "ana",
        "authz.decision": "deny",
        "authz.outcome": "denied",
        "authz.mode": "enforce",
        "authz.reason": "not_granted_to_principal",
        "authz.resource": "tool:delete_ticket",
        "authz.decision_id": error.data["decision_id"],
        "authz.policy_revision": error.data["policy_revision"],
        "error.type": "-31403",
        "rpc.response.status_code": "-31403",
    }
    assert said(served, expected) == expected
    assert served.status == "ERROR"
    assert policy.status == "UNSET"  # to deny is what it is there for
    assert policy.attributes["authz.reasons"] == ["not_granted_to_principal"]
    _policy_span_says_the_same(policy, served)


def _policy_span_says_the_same(policy: Span, served: Span) -> None:
    """The decision, and beside it what only the policy span has."""
    names = (
        "actor.type",
        "actor.id",
        "actor.on_behalf_of",
        "actor.assurance",
        "authz.decision",
        "authz.mode",
        "authz.decision_id",
        "authz.policy_revision",
        "authz.resource",
    )
    assert said(policy, names) == said(served, names)
    assert len(said(policy, names)) == len(names)
    assert policy.attributes["security_rule.ruleset.name"] == "mcp/authz"
    assert policy.attributes["actor.chain"] == ["agent:static|support-bot", "human:static|ana"]


def said(span: Span, names: Any) -> dict[str, Any]:
    """Those of the attributes that the span has."""
    return {name: span.attributes[name] for name in names if name in span.attributes}


async def test_a_session_is_named_by_its_hash_alone(traced: Traced) -> None:
    async with traced.open() as client:
        await client.list_tools()
        caller, _ = await traced.call(client, "get_ticket", id=4711)
        served = traced.trace(caller, 5)[f"{SIDECAR} SERVER tools/call get_ticket"]
    if (traced.transport, traced.mode) == ("http", LEGACY):
        digest = served.attributes["mcp.session.id"]
        assert digest.startswith("sha256:")
        assert len(digest) == len("sha256:") + len(sha256().hexdigest())
    else:
        assert "mcp.session.id" not in served.attributes


async def test_denials_are_exported_where_allowed_calls_are_not(traced: Traced) -> None:
    traced.env["MCP_SIDECAR_TELEMETRY__RATIO"] = "0"
    async with traced.open() as client:
        await client.list_tools()
        allowed, _ = await traced.call(client, "get_ticket", id=4711)
        denied, _ = await traced.call(client, "delete_ticket", id=4711)
    spans = traced.trace(denied, 2)
    assert {span.service for span in spans.values()} == {SIDECAR}
    assert SIDECAR not in {span.service for span in traced.sink.trace(allowed.trace_id)}


async def test_a_dead_collector_costs_no_call(traced: Traced) -> None:
    traced.sink.mode = "dead"
    async with traced.open(all_export=False) as client:
        result = await client.call_tool("get_ticket", {"id": 4711})
        error = await error_of(client.call_tool("delete_ticket", {"id": 4711}))
    assert result.structured_content is not None
    assert error.code == -31403
