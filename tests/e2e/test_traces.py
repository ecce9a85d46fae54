"""One trace for one action: the agent's span, the client's, the sidecar's, OPA's, the server's.

Everybody exports real OTLP to the same collector. The client's and the server's spans are those of
the official SDK, and the context travels as the official client sends it, in `_meta`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from mcp import MCPError

from tests.support.client import LEGACY, MODERN, error_of
from tests.support.otlp import Sink, Span, tree
from tests.support.processes import executed
from tests.support.traced import AGENT, DESK, OPA, PLACES, SIDECAR, Caller, Scene, scene


@dataclass(frozen=True)
class Traced:
    """A scene, and the collector that everybody in it exports to."""

    scene: Scene
    sink: Sink

    def trace(self, caller: Caller, count: int) -> dict[str, Span]:
        """The spans of the caller's trace by what they are; there must be exactly `count` of them.

        To be asked while everybody still runs: an OPA that is ended forgets what it has not sent.
        """
        self.sink.wait_for(count, where=lambda span: span.trace_id == caller.trace_id)
        spans = self.sink.trace(caller.trace_id)
        assert len(spans) == count, tree(spans)
        return {f"{span.service} {span.kind} {span.name}": span for span in spans}


def opas(spans: dict[str, Span]) -> Span:
    """OPA's own span, whatever it calls it."""
    (found,) = (span for span in spans.values() if span.service == OPA)
    return found


@pytest.fixture(params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Transport and revision."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def traced(place: tuple[str, str], tmp_path: Path, opa_bin: Path) -> Iterator[Traced]:
    with Sink() as sink, scene(sink.url, tmp_path, place, opa_bin) as made:
        yield Traced(made, sink)


async def test_an_allowed_call_is_one_trace_from_the_caller_to_the_server(traced: Traced) -> None:
    scene = traced.scene
    async with scene.open() as client:
        await client.list_tools()
        caller, _ = await scene.call(client, "refund_ticket", id=4711, amount=20)
        spans = traced.trace(caller, 7)
    asked = spans[f"{AGENT} CLIENT MCP send tools/call refund_ticket"]
    served = spans[f"{SIDECAR} SERVER tools/call refund_ticket"]
    policy = spans[f"{SIDECAR} CLIENT policy.evaluate mcp/authz"]
    upstream = spans[f"{SIDECAR} CLIENT tools/call refund_ticket"]
    server = spans[f"{DESK} SERVER tools/call refund_ticket"]
    chain = (asked, served, policy, opas(spans), upstream, server)
    assert [each.parent_id for each in chain] == [
        caller.span_id,
        asked.span_id,
        served.span_id,
        policy.span_id,
        served.span_id,
        upstream.span_id,
    ]
    assert served.start <= policy.start <= policy.end <= upstream.start <= upstream.end
    assert upstream.end <= served.end
    assert {span.status for span in spans.values()} <= {"UNSET", "OK"}
    assert executed(scene.folder / "log")[-1]["trace_id"] == caller.trace_id

    expected = {
        "mcp.method.name": "tools/call",
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "refund_ticket",
        "mcp.protocol.version": "2025-11-25" if scene.mode == LEGACY else MODERN,
        "network.transport": "pipe" if scene.transport == "stdio" else "tcp",
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
    scene = traced.scene
    async with scene.open() as client:
        await client.list_tools()
        caller, error = await scene.call(client, "delete_ticket", id=4711)
        spans = traced.trace(caller, 5)
    assert isinstance(error, MCPError)
    served = spans[f"{SIDECAR} SERVER tools/call delete_ticket"]
    policy = spans[f"{SIDECAR} CLIENT policy.evaluate mcp/authz"]
    asked = spans[f"{AGENT} CLIENT MCP send tools/call delete_ticket"]
    parents = [each.parent_id for each in (asked, served, policy, opas(spans))]
    assert parents == [caller.span_id, asked.span_id, served.span_id, policy.span_id]
    assert executed(scene.folder / "log") == []

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
    scene = traced.scene
    async with scene.open() as client:
        await client.list_tools()
        caller, _ = await scene.call(client, "get_ticket", id=4711)
        served = traced.trace(caller, 7)[f"{SIDECAR} SERVER tools/call get_ticket"]
    if (scene.transport, scene.mode) == ("http", LEGACY):
        digest = served.attributes["mcp.session.id"]
        assert digest.startswith("sha256:")
        assert len(digest) == len("sha256:") + len(sha256().hexdigest())
    else:
        assert "mcp.session.id" not in served.attributes


async def test_denials_are_exported_where_allowed_calls_are_not(traced: Traced) -> None:
    """Of a denial there are our spans alone: OPA and the server are not told to export."""
    scene = traced.scene
    scene.env["MCP_SIDECAR_TELEMETRY__RATIO"] = "0"
    async with scene.open() as client:
        await client.list_tools()
        allowed, _ = await scene.call(client, "get_ticket", id=4711)
        denied, _ = await scene.call(client, "delete_ticket", id=4711)
        spans = traced.trace(denied, 4)
    assert {span.service for span in spans.values()} == {AGENT, SIDECAR}
    assert {span.service for span in traced.sink.trace(allowed.trace_id)} == {AGENT}


async def test_a_dead_collector_costs_no_call(
    place: tuple[str, str], tmp_path: Path, opa_bin: Path
) -> None:
    with (
        Sink("dead") as sink,
        scene(sink.url, tmp_path, place, opa_bin, exports=False) as made,
    ):
        async with made.open(all_export=False) as client:
            result = await client.call_tool("get_ticket", {"id": 4711})
            error = await error_of(client.call_tool("delete_ticket", {"id": 4711}))
    assert result.structured_content is not None
    assert error.code == -31403
