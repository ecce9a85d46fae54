"""What a call acts on, in the policy, the trace and the record; and whether its arguments fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.changing_server import ID, Tools, tool
from tests.support.otlp import Sink
from tests.support.processes import STARTER, patient
from tests.support.raw import call, stdio_sidecar

RULE = """package mcp.custom

deny contains {"code": "not_this_one", "message": "Hands off."} if {
	input.target.type == "tool"
	input.tool.resource == "ticket:4711"
}

deny contains {"code": "which_one", "message": "Say which one."} if {
	input.target.type == "tool"
	not input.tool.resource
}
"""
DECLARED = {"evaluation": {"resource": {"type": "ticket", "id": "$params.arguments.id"}}}


@pytest.fixture(params=["configured", "declared"])
def tools(request: pytest.FixtureRequest, tmp_path: Path) -> Tools:
    tools = Tools(tmp_path)
    configured = request.param == "configured"
    schema = ID if configured else {**ID, "x-authzen-mapping": DECLARED}
    tools.set(get=tool("get_ticket", inputSchema=schema))
    said = {"resources": {"get_ticket": "ticket:{id}"}} if configured else {}
    tools.file.with_name("sidecar.yaml").write_text(json.dumps(said), encoding="utf-8")
    return tools


def test_a_policy_judges_by_the_resource_and_everybody_writes_it_down(
    tools: Tools, tmp_path: Path, opa_bin: Path
) -> None:
    policy, audit = tmp_path / "policy", tmp_path / "audit"
    policy.mkdir()
    shutil.copy(STARTER / "data.yaml", policy)
    (policy / "custom.rego").write_text(RULE, encoding="utf-8")
    options = ("--policy", policy, "--config", tmp_path / "sidecar.yaml", "--audit", audit)

    def outcome(answer: Any) -> str:
        error = answer.get("error")
        return error["data"]["reasons"][0]["code"] if error else "done"

    with Sink() as sink:
        more = ("--actor", "human:ana", "--otlp", sink.url)
        with stdio_sidecar(tools.command(), *options, *more, env=patient(opa_bin)) as pipe:
            pipe.greet()
            cases: list[tuple[Any, str, str | None]] = [
                (4711, "not_this_one", "ticket:4711"),
                ("4711", "not_this_one", "ticket:4711"),
                (4712, "done", "ticket:4712"),
                ("4712/../4711", "done", "ticket:4712%2F..%2F4711"),
                ([4711], "which_one", None),
                (None, "which_one", None),
            ]
            for number, (value, code, _) in enumerate(cases):
                assert outcome(pipe.ask(call(number, "get_ticket", id=value))) == code, value
            assert outcome(pipe.ask(call("none", "get_ticket"))) == "which_one"
        records = [json.loads(line) for line in audit.read_text("utf-8").splitlines()]
        calls = [each for each in records if each["method"] == "tools/call"]
        wanted = [resource for _, _, resource in cases for _ in ("decision", "outcome")]
        assert [each.get("resource") for each in calls][: len(wanted)] == wanted
        spans = [each for each in sink.spans if each.name == "tools/call get_ticket"]
        served = {each.attributes["authz.resource"] for each in spans if each.kind == "SERVER"}
        assert served >= {"ticket:4711", "ticket:4712", "ticket:4712%2F..%2F4711"}
    assert tools.called() == ["get_ticket"] * 2


def test_arguments_that_do_not_fit_the_schema_are_denied(tmp_path: Path, opa_bin: Path) -> None:
    tools = Tools(tmp_path)
    odd = {**ID, "properties": {"id": {"type": "string", "pattern": "(a+)+$"}}}
    tools.set(get=tool("get_ticket"), search=tool("search_tickets", inputSchema=odd))
    file = tmp_path / "sidecar.yaml"
    file.write_text("catalog: {validate: true}", encoding="utf-8")
    options = ("--policy", STARTER, "--actor", "human:ana", "--config", file)
    with stdio_sidecar(tools.command(), *options, env=patient(opa_bin)) as pipe:
        pipe.greet()
        assert "result" in pipe.ask(call(1, "get_ticket", id=4711))
        refused = pipe.ask(call(2, "get_ticket", id="4711"))["error"]
        assert refused["data"]["reasons"][0]["code"] == "arguments_invalid"
        assert "result" in pipe.ask(call(3, "search_tickets", id="a" * 40 + "!"))
    assert tools.called() == ["get_ticket", "search_tickets"]
