"""OPA's own decision log, masked by the shipped policy: what a real OPA writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sidecar.config import Opa
from sidecar.opa import OpaTracing, question
from tests.support.opa import eventually, write
from tests.support.own_opa import running

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "policies" / "schemas" / "input.schema.json").read_text("utf-8"))
OBLIGING = """package mcp.custom

allow contains {"rule": "all", "any": true}

obligations contains {"type": "set_arguments", "arguments": input.tool.arguments}
"""


@pytest.fixture
def settings(opa_bin: Path, tmp_path: Path) -> Opa:
    policy = write(tmp_path / "policy", {"custom.rego": OBLIGING})
    return Opa(policy=policy, binary=str(opa_bin), decision_log="console")


def principal(kind: str, name: str) -> dict[str, Any]:
    who = {"type": kind, "id": name, "issuer": "idp", "key": f"idp|{name}"}
    return {**who, "groups": [], "scopes": [], "claims": {"mail": f"HIDDEN-claim-{name}"}}


def asked(target: str, **objects: Mapping[str, Any]) -> dict[str, Any]:
    """A question that holds a secret wherever one can be."""
    bot, ana = principal("agent", "bot"), principal("human", "ana")
    token = {"id": "HIDDEN-token", "expires_at": 1}
    document = question(enforcer_version="0", server="tickets", transport="http")
    for key in ("canary", "listing"):
        del document[key]
    document |= {
        "actor": {**bot, "assurance": 2, "sources": ["jwt"], "chain": [bot, ana],
                  "on_behalf_of": ana, "token": token},
        "target": {"type": target, "name": f"SEEN-{target}"},
        **objects,
    }  # fmt: skip
    document["context"]["unverified"] = {"headers": {"x-tenant": "HIDDEN-header"}}
    jsonschema.validate(document, SCHEMA)
    return document


ARGUMENTS = {"password": "HIDDEN-argument", "deep": [{"id": "HIDDEN"}]}
TOOL = {"name": "SEEN-tool", "arguments": ARGUMENTS, "annotations": {}}
QUESTIONS = [
    asked("tool", tool=TOOL, round={"n": 2, "input_responses": {"a": {"pin": "HIDDEN-answer"}}}),
    asked("prompt", prompt={"name": "SEEN", "arguments": {"key": "HIDDEN-argument"}}),
    asked("completion", completion={
        "ref": {"type": "ref/prompt", "name": "SEEN"}, "argument": {"name": "n", "value": "HIDDEN"},
        "context": {"arguments": {"pin": "HIDDEN"}}}),
    asked("elicitation", elicitation={"mode": "url", "url": "https://x/?code=HIDDEN",
                                      "message_digest": "sha256:" + "0" * 64}),
    asked("method", method={"params": {"secret": "HIDDEN-params"}}),
]  # fmt: skip


@pytest.mark.parametrize(
    "tracing", [None, OpaTracing("127.0.0.1:1")], ids=["alone", "with tracing"]
)
async def test_what_opa_writes_holds_no_secret(
    settings: Opa, tracing: OpaTracing | None, capfd: pytest.CaptureFixture[str]
) -> None:
    written = ""

    def logged() -> list[dict[str, Any]]:
        nonlocal written
        written += capfd.readouterr().err
        whole = written[: written.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines() if "Decision Log" in line]

    async with running(settings, tracing=tracing) as it:
        for document in QUESTIONS:
            decision = await it.client.decide(document, deadline=5, headers={})
            assert decision.opa_id
        await eventually(lambda: len(logged()) >= len(QUESTIONS), within=5)
    records = [each for each in logged() if each["path"] == "mcp/authz/decision"]
    assert len(records) == len(QUESTIONS), "one each, and none for the canary"
    assert [each["input"]["target"]["name"] for each in records] == [
        each["target"]["name"] for each in QUESTIONS
    ]
    assert all(each["input"]["actor"]["chain"][1]["id"] == "ana" for each in records)
    assert "HIDDEN" not in written


async def test_it_is_off_unless_it_is_asked_for(
    settings: Opa, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(replace(settings, decision_log="off")) as it:
        assert (await it.client.decide(QUESTIONS[0], deadline=5, headers={})).opa_id is None
    assert capfd.readouterr() == ("", "")
