"""What somebody on call does in Jaeger, through its own HTTP API: search, open a trace, see who
calls whom. Everybody exports to a real Jaeger."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from mcp import MCPError

from tests.support.jaeger import Jaeger, elsewhere, jaeger
from tests.support.otlp import Span, tree
from tests.support.processes import ROOT, environment, wait_until
from tests.support.traced import AGENT, DESK, OPA, PLACES, SIDECAR, Caller, scene

DENIED_TO_AGENTS = {"actor.type": "agent", "authz.decision": "deny"}


@pytest.fixture(scope="module")
def collector(jaeger_bin: Path) -> Iterator[Jaeger]:
    with jaeger(jaeger_bin, environment(None, **elsewhere())) as started:
        yield started


def whole(collector: Jaeger, caller: Caller, count: int) -> list[Span]:
    """The caller's trace, once there are at least so many spans."""

    def look() -> list[Span]:
        found = collector.trace(caller.trace_id)
        return found if len(found) >= count else []

    return wait_until(look, f"{count} spans of {caller.trace_id} in Jaeger")


@pytest.mark.parametrize("place", PLACES, ids="-".join)
async def test_on_call_finds_what_agents_were_denied_and_follows_what_they_were_not(
    collector: Jaeger, place: tuple[str, str], tmp_path: Path, opa_bin: Path
) -> None:
    with scene(collector.otlp, tmp_path, place, opa_bin) as played:
        async with played.open() as client:
            await client.list_tools()
            allowed, _ = await played.call(client, "refund_ticket", id=4711, amount=20)
            denied, error = await played.call(client, "delete_ticket", id=4711)
            spans, refused = whole(collector, allowed, 7), whole(collector, denied, 5)

    # One tag search finds the denied call of this agent, and not the other one.
    found = collector.search(SIDECAR, DENIED_TO_AGENTS)
    assert denied.trace_id in found
    assert allowed.trace_id not in found
    assert isinstance(error, MCPError)
    by_id = {"authz.decision_id": error.data["decision_id"]}
    assert collector.search(SIDECAR, by_id) == {denied.trace_id}

    # It says who, for whom, which tool, on what, why, by which policy; and that nobody was called.
    (served,) = (span for span in refused if (span.service, span.kind) == (SIDECAR, "SERVER"))
    expected = {
        "actor.id": "support-bot",
        "actor.on_behalf_of": "ana",
        "gen_ai.tool.name": "delete_ticket",
        "authz.resource": "tool:delete_ticket",
        "authz.reason": "not_granted_to_principal",
        "authz.outcome": "denied",
        "authz.policy_revision": error.data["policy_revision"],
    }
    assert {name: served.attributes.get(name) for name in expected} == expected
    assert {span.service for span in refused} == {AGENT, SIDECAR, OPA}

    # The allowed call is one trace, from the agent to the server and to OPA.
    assert len(spans) == 7, tree(spans)
    above = [
        (SIDECAR, "SERVER", "tools/call refund_ticket"),
        (AGENT, "CLIENT", "MCP send tools/call refund_ticket"),
        (AGENT, "INTERNAL", "the agent thinks"),
    ]
    called, asked = "tools/call refund_ticket", "policy.evaluate mcp/authz"
    assert ancestors(spans, DESK) == [(SIDECAR, "CLIENT", called), *above]
    assert ancestors(spans, OPA) == [(SIDECAR, "CLIENT", asked), *above]

    # And the service graph has the way of it.
    assert {(AGENT, SIDECAR), (SIDECAR, OPA), (SIDECAR, DESK)} <= collector.calls()


def ancestors(spans: list[Span], service: str) -> list[tuple[str, str, str]]:
    """What the one span of a service is below: service, kind and name, from the nearest on."""
    (span,) = (each for each in spans if each.service == service)
    by_id, found = {each.span_id: each for each in spans}, []
    while span.parent_id is not None:
        span = by_id[span.parent_id]
        found.append((span.service, span.kind, span.name))
    return found


@pytest.mark.timeout(120)
def test_the_demo_says_where_its_denials_are(jaeger_bin: Path, opa_bin: Path) -> None:
    env = environment(opa_bin, **elsewhere())
    there = Jaeger.at(env)
    command = [sys.executable, "-m", "tests.demo", "--jaeger", str(jaeger_bin)]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdin is not None
        assert demo.stdout is not None
        try:
            said = list(takewhile(lambda line: "until you press Enter" not in line, demo.stdout))
            assert there.search(SIDECAR, DENIED_TO_AGENTS)
            demo.stdin.write("\n")
            demo.stdin.close()
            assert demo.wait(30) == 0, said
        finally:
            demo.send_signal(signal.SIGINT)  # it ends its Jaeger
    assert any(there.search_page(SIDECAR, DENIED_TO_AGENTS) in line for line in said)
    assert not there.answers
