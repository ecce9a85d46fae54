from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from sidecar.conversation import Call, TraceContext
from sidecar.policy.decision import Decision, Reason, Scalar
from sidecar.policy.identity import UNKNOWN
from sidecar.policy.masking import Masking
from sidecar.protocol.methods import Direction, Era
from sidecar.protocol.session import Target
from sidecar.recording import Content
from sidecar.telemetry import attributes
from sidecar.telemetry.attributes import ATTRIBUTES, MAX_ITEMS, MAX_TEXT, OTHER, Names, Where
from sidecar.telemetry.spans import Ids
from tests.support import calls

TRACE = TraceContext(
    "4bf92f3577b34da6a3ce929d0e0e4736", state=Ids(None, (), "", "", "", True, "unix")
)
SESSION = "sha256:" + hashlib.sha256(b"s3cret").hexdigest()
WHO = {
    "actor.type": "agent",
    "actor.id": "bot",
    "actor.on_behalf_of": "alice",
    "actor.assurance": 1,
}
WHAT = {
    "mcp.method.name": "tools/call",
    "mcp.protocol.version": "2025-11-25",
    "mcp.session.id": SESSION,
    "jsonrpc.request.id": "7",
    "gen_ai.operation.name": "execute_tool",
    "gen_ai.tool.name": "get_ticket",
    "network.transport": "tcp",
    "network.protocol.name": "http",
}


def test_the_server_span_says_who_what_and_what_came_of_it() -> None:
    assert attributes.of(calls.allowed(TRACE), "server") == {
        **WHAT,
        **WHO,
        "client.address": "10.1.2.3",
        "authz.decision": "allow",
        "authz.outcome": "success",
        "authz.mode": "enforce",
        "authz.rule": "desk",
        "authz.owner": "support",
        "authz.resource": "tool:get_ticket",
        "authz.decision_id": "0190-1",
        "authz.policy_revision": "r7",
        "authz.x.risk": 3,
    }


def test_the_policy_span_says_who_asked_and_what_was_decided() -> None:
    assert attributes.of(calls.denied(TRACE), "policy") == {
        **WHO,
        "actor.chain": ("agent:static|bot", "human:static|alice"),
        "authz.decision": "deny",
        "authz.mode": "enforce",
        "authz.reason": "not_granted",
        "authz.reasons": ("not_granted", "second"),
        "authz.rule": "default",
        "authz.resource": "tool:get_ticket",
        "authz.decision_id": "0190-1",
        "authz.policy_revision": "r7",
        "network.transport": "unix",
        "security_rule.ruleset.name": "mcp/authz",
    }


def test_the_upstream_span_says_what_was_asked_for() -> None:
    where = {"server.address": "tickets", "server.port": 9000}
    assert attributes.of(calls.allowed(TRACE), "upstream") == {**WHAT, **where}


def test_no_span_has_arguments_messages_or_the_session() -> None:
    spans: tuple[Where, ...] = ("server", "policy", "upstream")
    for call in (calls.allowed(TRACE), calls.denied(TRACE), calls.undecided(TRACE)):
        said = repr([attributes.of(call, where) for where in spans])
        assert not [each for each in ("TOP-SECRET", "no grant", "s3cret") if each in said]


def with_content(content: Content, **changes: Any) -> Call:
    return calls.allowed(replace(TRACE, state=TRACE.state._replace(content=content)), **changes)


@pytest.mark.parametrize("where", ["server", "upstream"])
def test_content_is_there_masked_when_it_is_switched_on(where: Where) -> None:
    call = with_content(Content(True, True, Masking(("result.id",))), result={"id": 7, "to": "x"})
    found = attributes.of(call, where)
    assert found["gen_ai.tool.call.arguments"] == '{"id":"<string 10>"}'
    assert found["gen_ai.tool.call.result"] == '{"id":7,"to":"<string 1>"}'
    assert "gen_ai.tool.call.arguments" not in attributes.of(call, "policy")


def test_content_fits_and_is_of_tools_alone() -> None:
    params = {"name": "p", "arguments": {f"a{number}": "x" for number in range(500)}}
    call = with_content(Content(True, True), operation=calls.operation(params=params))
    whole = attributes.of(call, "server")["gen_ai.tool.call.arguments"]
    assert isinstance(whole, str)
    assert len(json.loads(whole)) > 10
    assert len(whole) <= MAX_TEXT
    prompt = calls.operation("prompts/get", Target("prompt", "p"), params=params)
    found = attributes.of(with_content(Content(True, True), operation=prompt), "server")
    assert not [name for name in found if name.startswith("gen_ai.tool")]


def test_the_table_has_each_attribute_of_a_span_once() -> None:
    rows = [(row.name, span) for row in ATTRIBUTES for span in row.spans]
    assert len(rows) == len(set(rows))
    assert all(row.spans and row.note for row in ATTRIBUTES)


@pytest.mark.parametrize(
    ("call", "error", "status"),
    [
        pytest.param(calls.allowed(), None, None, id="success"),
        pytest.param(calls.denied(), "-31403", "-31403", id="denied"),
        pytest.param(calls.denied(rpc_error=None), "tool_error", None, id="denied as a result"),
        pytest.param(calls.undecided(), "-31503", "-31503", id="no decision"),
        pytest.param(
            calls.undecided(rpc_error=None), "policy_error", None, id="no decision, no code"
        ),
        pytest.param(calls.unknown("x/y"), None, "-32601", id="unknown method"),
        pytest.param(calls.allowed(outcome="tool_error"), "tool_error", None, id="isError"),
        pytest.param(calls.allowed(outcome="cancelled"), None, None, id="cancelled"),
        pytest.param(
            calls.allowed(outcome="upstream_error", rpc_error=(-32602, "")),
            None,
            "-32602",
            id="the asker's mistake",
        ),
        pytest.param(
            calls.allowed(outcome="upstream_error", rpc_error=(-32603, "")),
            "-32603",
            "-32603",
            id="the server's fault",
        ),
        pytest.param(
            calls.denied(operation=calls.operation("notifications/progress"), rpc_error=None),
            None,
            None,
            id="a notification has no answer to fail",
        ),
    ],
)
def test_errors_of_the_server_span(call: Call, error: str | None, status: str | None) -> None:
    found = attributes.of(replace(call, trace=TRACE), "server")
    assert (found.get("error.type"), found.get("rpc.response.status_code")) == (error, status)


@pytest.mark.parametrize(
    ("changes", "error", "status"),
    [
        pytest.param({}, None, None, id="success"),
        pytest.param({"outcome": "tool_error"}, "tool_error", None, id="isError"),
        pytest.param(
            {"outcome": "upstream_error", "rpc_error": (-32602, "")},
            "-32602",
            "-32602",
            id="every code is an error",
        ),
        pytest.param(
            {"outcome": "upstream_error", "rpc_error": (-31502, "")},
            "upstream_failed",
            None,
            id="not reached",
        ),
        pytest.param(
            {"outcome": "upstream_error", "rpc_error": (-31504, "")},
            "upstream_timeout",
            None,
            id="late",
        ),
        pytest.param(
            {"outcome": "upstream_error", "rpc_error": None}, "upstream_failed", None, id="no code"
        ),
        pytest.param(
            {"outcome": "policy_error", "rpc_error": (-31503, "")},
            None,
            None,
            id="a page that could not be judged is no fault of the server's",
        ),
    ],
)
def test_errors_of_the_upstream_span(
    changes: dict[str, Any], error: str | None, status: str | None
) -> None:
    found = attributes.of(calls.allowed(TRACE, **changes), "upstream")
    assert (found.get("error.type"), found.get("rpc.response.status_code")) == (error, status)


def test_the_policy_span_says_why_there_is_no_decision() -> None:
    assert attributes.of(calls.undecided(TRACE), "policy")["error.type"] == "timeout"


def test_a_decision_that_could_not_be_written_down_is_none() -> None:
    unwritten = (Reason("audit_failed"),)
    call = calls.allowed(TRACE, verdict="error", reasons=unwritten, outcome="policy_error")
    assert attributes.of(call, "policy")["error.type"] == "audit_failed"


@pytest.mark.parametrize(
    ("method", "target", "params", "expected"),
    [
        pytest.param(
            "resources/read",
            Target("resource", "file:///a"),
            {"uri": "file:///a"},
            {"mcp.resource.uri": "file:///a", "authz.resource": "resource:file:///a"},
            id="resource",
        ),
        pytest.param(
            "prompts/get",
            Target("prompt", "brief"),
            {"name": "brief"},
            {"gen_ai.prompt.name": "brief", "authz.resource": "prompt:brief"},
            id="prompt",
        ),
        pytest.param("ping", None, None, {}, id="nothing"),
        pytest.param("resources/read", None, {"uri": 5}, {}, id="a URI that is none"),
    ],
)
def test_what_a_method_acts_on(
    method: str, target: Target | None, params: dict[str, Any] | None, expected: dict[str, str]
) -> None:
    call = calls.allowed(TRACE, operation=calls.operation(method, target, params=params))
    found = attributes.of(call, "server")
    names = ("mcp.resource.uri", "gen_ai.prompt.name", "gen_ai.tool.name", "authz.resource")
    assert {name: found[name] for name in names if name in found} == expected


def test_the_session_is_hashed_and_modern_messages_have_none() -> None:
    legacy = calls.allowed(TRACE)
    modern = calls.allowed(TRACE, operation=calls.operation(era=Era.MODERN, session_id="s3cret"))
    assert attributes.of(legacy, "server")["mcp.session.id"] == SESSION
    assert "mcp.session.id" not in attributes.of(modern, "server")


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("client", ["stdio", "http"])
@pytest.mark.parametrize("address", [None, ("tickets", 9000)])
def test_each_span_says_how_its_own_other_end_is_reached(
    direction: Direction, client: str, address: tuple[str, int] | None
) -> None:
    operation = calls.operation("ping", None, direction=direction)
    call = calls.passed(TRACE, operation=operation, transport=client, server_address=address)
    with_client = ("pipe", None) if client == "stdio" else ("tcp", "http")
    with_server = ("pipe", None) if address is None else ("tcp", "http")
    spans: tuple[Where, Where] = ("server", "upstream")
    ends = [with_client, with_server]
    if direction is Direction.FROM_SERVER:
        ends.reverse()
    for where, end in zip(spans, ends, strict=True):
        found = attributes.of(call, where)
        assert (found["network.transport"], found.get("network.protocol.name")) == end


def test_a_client_that_is_asked_has_no_address() -> None:
    asked = calls.operation("roots/list", Target("roots", "-"), direction=Direction.FROM_SERVER)
    found = attributes.of(calls.allowed(TRACE, operation=asked), "upstream")
    assert not {"server.address", "server.port"} & set(found)


@pytest.mark.parametrize(
    ("changes", "answered"),
    [
        pytest.param({}, True, id="a result"),
        pytest.param({"outcome": "tool_error"}, True, id="a failure of its own"),
        pytest.param({"outcome": "upstream_error", "rpc_error": (-32603, "")}, True, id="an error"),
        pytest.param({"outcome": "upstream_error", "rpc_error": (-31502, "")}, False, id="gone"),
        pytest.param({"outcome": "upstream_error", "rpc_error": (-31504, "")}, False, id="late"),
        pytest.param({"outcome": "upstream_error", "rpc_error": (-31429, "")}, True, id="no room"),
        pytest.param({"outcome": "cancelled"}, None, id="nobody waited"),
        pytest.param({"forwarded": 0}, None, id="not asked"),
    ],
)
def test_whether_the_server_answered(changes: dict[str, Any], answered: bool | None) -> None:
    assert attributes.answered(calls.allowed(**changes)) is answered


def test_a_servers_question_has_no_client_address() -> None:
    asked = calls.operation("roots/list", Target("roots", "-"), direction=Direction.FROM_SERVER)
    assert "client.address" not in attributes.of(calls.allowed(TRACE, operation=asked), "server")


def test_an_actor_that_acts_for_itself_is_on_nobodys_behalf() -> None:
    found = attributes.of(calls.allowed(TRACE, actor=UNKNOWN), "server")
    assert found["actor.type"] == "unknown"
    assert "actor.on_behalf_of" not in found


def test_values_are_short_utf8_and_of_64_bits() -> None:
    remarks: dict[str, Scalar] = {
        "long": "x" * 5000,
        "half": "\ud800",
        "big": 2**63,
        "small": -(2**63),
        "flag": True,
        "ratio": 0.5,
        "n" * 500: 1,
    }
    targets = tuple(Target("subscription", "u" * 500) for _ in range(100))
    call = calls.allowed(
        TRACE,
        decision=Decision(True, attributes=remarks),
        operation=calls.operation(targets=targets),
    )
    found = attributes.of(call, "policy")
    assert found["authz.x.long"] == "x" * (MAX_TEXT - 1) + "…"
    assert found["authz.x.half"] == "?"
    assert "authz.x.big" not in found
    assert (found["authz.x.small"], found["authz.x.flag"]) == (-(2**63), True)
    assert found["authz.x.ratio"] == 0.5
    assert len(str(found["authz.resource"])) == MAX_TEXT
    assert max(map(len, found)) < 200
    assert attributes.clean(("a",) * 100) == ("a",) * MAX_ITEMS
    assert attributes.clean(()) is None


@pytest.mark.parametrize("pinned", [True, False])
def test_both_spans_say_what_is_acted_on_and_whether_the_tool_is_pinned(pinned: bool) -> None:
    call = replace(calls.allowed(TRACE), resource="ticket:4711", tool_pinned=pinned)
    for where in ("server", "policy"):
        found = attributes.of(call, where)
        assert (found["authz.resource"], found["authz.pinned"]) == ("ticket:4711", pinned)
    assert "authz.pinned" not in attributes.of(calls.allowed(TRACE), "server")


def test_names_are_bounded_in_number_and_length() -> None:
    names = Names(2)
    assert [names.bound(each) for each in ("a", "x" * 500, "b", "c", "a")] == [
        "a",
        OTHER,
        "b",
        OTHER,
        "a",
    ]


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        pytest.param(calls.allowed(), "get_ticket", id="listed"),
        pytest.param(calls.denied(), "get_ticket", id="listed and denied"),
        pytest.param(calls.allowed(tool_known=None), "get_ticket", id="vouched for by policy"),
        pytest.param(calls.denied(tool_known=None), OTHER, id="nobody knows it"),
        pytest.param(calls.denied(tool_known=False), OTHER, id="not listed"),
        pytest.param(calls.allowed(tool_known=False), OTHER, id="not listed and allowed"),
        pytest.param(calls.passed(), None, id="no tool"),
    ],
)
def test_a_tools_name_is_shown_when_it_is_no_invention_of_the_caller(
    call: Call, shown: str | None
) -> None:
    assert Names().tool(call) == shown


def test_a_prompts_name_is_shown_when_policy_vouches_for_it() -> None:
    asked = calls.operation("prompts/get", Target("prompt", "brief"))
    assert Names().prompt(calls.allowed(operation=asked)) == "brief"
    assert Names().prompt(calls.denied(operation=asked)) == OTHER
    assert Names().prompt(calls.allowed()) is None


def test_a_method_of_no_table_is_other() -> None:
    assert attributes.method(calls.unknown("tools/destroy")) == OTHER
    assert attributes.method(calls.allowed()) == "tools/call"
