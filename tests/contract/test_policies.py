"""The policy library as the sidecar meets it: a real OPA, asked over HTTP, strict about errors.

The cases are data (`cases/*.yaml`). Every question is held to the input schema and every answer to
the decision schema.
"""

from __future__ import annotations

import copy
import http.client
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.bench.policy_cost import opa_binary

POLICIES = Path(__file__).parents[2] / "policies"
CASES = Path(__file__).parent / "cases"
DELETE = "~delete"
WANTS = {"allow", "code", "rule", "visible", "revision", "watermark", "error"}

Json = dict[str, Any]


def schema(name: str) -> jsonschema.Draft7Validator:
    document = json.loads((POLICIES / "schemas" / name).read_text())
    jsonschema.Draft7Validator.check_schema(document)
    return jsonschema.Draft7Validator(document)


INPUT = schema("input.schema.json")
DECISION = schema("decision.schema.json")


def laid_over(base: Any, patch: Any) -> Any:
    """`patch` over `base`, key by key."""
    if not isinstance(base, dict) or not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = {key: value for key, value in base.items() if patch.get(key) != DELETE}
    for key, value in patch.items():
        if value != DELETE:
            merged[key] = laid_over(base.get(key), value)
    return merged


def load_cases() -> Iterator[Any]:
    for path in sorted(CASES.glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        for case in content["cases"]:
            if not set(case.get("want") or {}) or set(case["want"]) - WANTS:
                raise ValueError(f"{path.name}: case {case['note']!r} has no good `want`")
            question = laid_over(content["base"]["input"], case.get("input", {}))
            data = laid_over(content["base"]["data"], case.get("data", {}))
            name = f"{path.stem}: {case['note']}"
            yield pytest.param(question, data, case.get("custom"), case["want"], id=name)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


class Opa:
    """A running OPA with the library, whose data and custom rules a test sets."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def send(self, method: str, path: str, body: str = "") -> tuple[int, Any]:
        connection = _Connection(self._path)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        return response.status, json.loads(content) if content else None

    def load(self, data: Json, custom: str | None = None) -> None:
        """Put a policy's data and rules in the place of those before."""
        self.send("DELETE", "/v1/policies/custom")
        for name in ("default_issuer", "grants", "revision"):
            self._put(f"/v1/data/mcp/{name}", data.get(name))
        self._put("/v1/data/mcp_revoked", data.get("revoked"))
        if custom is not None:
            status, answer = self.send(
                "PUT", "/v1/policies/custom", f"package mcp.custom\n\n{custom}"
            )
            assert status == 200, answer

    def _put(self, path: str, value: Any) -> None:
        if value is None:
            status, _ = self.send("DELETE", path)
            assert status in {204, 404}
        else:
            status, _ = self.send("PUT", path, json.dumps(value))
            assert status == 204

    def ask(self, question: Json) -> tuple[int, Any]:
        path = "/v1/data/mcp/authz/decision?strict-builtin-errors=true"
        return self.send("POST", path, json.dumps({"input": question}))

    def decide(self, question: Json) -> Json:
        INPUT.validate(question)
        status, answer = self.ask(question)
        assert status == 200, answer
        DECISION.validate(answer["result"])
        result: Json = answer["result"]
        return result


@pytest.fixture(scope="module")
def binary() -> str:
    try:
        return opa_binary()
    except SystemExit as error:
        if os.environ.get("REQUIRE_OPA"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def opa(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opa]:
    path = tmp_path_factory.mktemp("opa") / "s"
    command = [binary, "run", "--server", "--addr", f"unix://{path}", "--log-level", "error"]
    command += ["--skip-version-check", "--ignore", "*_test.rego", str(POLICIES / "mcp")]
    process = subprocess.Popen(command)
    running = Opa(path)
    try:
        wait_until_up(running, process)
        yield running
    finally:
        process.terminate()
        process.wait(10)


def wait_until_up(running: Opa, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if running.send("GET", "/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.02)
    pytest.fail("OPA did not come up")


@pytest.mark.parametrize(("question", "data", "custom", "want"), list(load_cases()))
def test_case(opa: Opa, question: Json, data: Json, custom: str | None, want: Json) -> None:
    opa.load(data, custom)
    if want.get("error"):
        status, answer = opa.ask(question)
        assert status == 500
        assert answer["errors"][0]["code"].startswith("eval_")
        return
    decision = opa.decide(question)
    assert told(decision, want) == want


def told(decision: Json, want: Json) -> Json:
    """What the decision says of what a case asks for."""
    visible = decision.get("visible")
    answers = {
        "allow": decision["allow"],
        "code": (decision.get("reasons") or [{}])[0].get("code"),
        "rule": decision.get("rule"),
        "visible": sorted(visible) if visible is not None else None,
        "revision": decision.get("revision"),
        "watermark": re.fullmatch("[0-9a-f]{64}", decision.get("watermark", "")) is not None,
    }
    return {key: answers[key] for key in want}


NAMES = ["a", "a.b", "a/b", "get_a", "get_b", "x_get", "A", "[ab]", "a,b", "è", "*", "a b"]
PATTERNS = ["*", "a", "a*", "a.*", "get_?", "*_get", "[ab]", "{a,get_b}", "a,*", "**", r"\*", "?"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_listing_shows_exactly_what_a_call_is_allowed(opa: Opa, pattern: str) -> None:
    base = yaml.safe_load((CASES / "grants.yaml").read_text())["base"]["input"]
    constrained = {"tools": ["A"], "arguments": {"id": {"type": "number", "optional": True}}}
    own = {"one": {"tools": [pattern]}, "two": constrained}
    opa.load({"grants": {"humans": {"principals": {"ana": own}}}})
    called = {name for name in NAMES if opa.decide(call(base, name))["allow"]}
    assert set(opa.decide(listing(base, NAMES))["visible"]) == called


def call(base: Json, name: str) -> Json:
    return laid_over(base, {"target": {"name": name}, "tool": {"name": name, "arguments": {}}})  # type: ignore[no-any-return]


def listing(base: Json, names: list[str]) -> Json:
    items = [{"target": {"type": "tool", "name": name}} for name in names]
    patch = {
        "tool": DELETE,
        "target": {"type": "listing", "name": "tools"},
        "listing": {"kind": "tools", "items": items},
    }
    return laid_over(base, patch)  # type: ignore[no-any-return]


def check(binary: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    file = POLICIES / "schemas" / "input.schema.json"
    command = [binary, "check", "--strict", "--schema", str(file), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("overlay", [None, "starter", "allow_all", "deny_all"])
def test_policies_pass_the_check(binary: str, overlay: str | None) -> None:
    paths = [POLICIES / "mcp"] + ([POLICIES / overlay] if overlay else [])
    result = check(binary, *paths)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "typo", ["input.actor.typ", "input.contxt.time", "input.tool.argument", "input.target.nam"]
)
def test_a_planted_typo_fails_the_check(binary: str, tmp_path: Path, typo: str) -> None:
    (tmp_path / "custom.rego").write_text(
        f'package mcp.custom\n\ndeny contains {{"code": "x"}} if {typo} == "x"\n'
    )
    result = check(binary, POLICIES / "mcp", tmp_path)
    assert result.returncode != 0
    assert typo.rpartition(".")[2] in result.stderr or "contxt" in result.stderr


@pytest.mark.parametrize(
    "rule",
    [
        'deny if input.actor.type == "human"',
        'deny contains "no"',
        'deny contains {"code": "x", "message": "y"}',
        'deny := {"code": "x", "message": "y"}',
        "allow := true",
        'allow contains "x"',
        'allow contains {"rule": "x", "owner": "y"}',
        'mode := "shadow"',
        'obligations contains {"type": "x"}',
    ],
)
def test_custom_rules_of_any_shape_compile(binary: str, tmp_path: Path, rule: str) -> None:
    (tmp_path / "custom.rego").write_text(f"package mcp.custom\n\n{rule}\n")
    result = check(binary, POLICIES / "mcp", tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_readme_names_every_reason_code_and_no_other() -> None:
    sources = [path for path in (POLICIES / "mcp").rglob("*.rego") if "_test" not in path.name]
    text = "\n".join(path.read_text() for path in sources)
    codes = set(re.findall(r'"code": "([a-z_]+)"', text))
    codes |= set(re.findall(r'"(not_granted\w*)"', text))
    readme = (POLICIES / "README.md").read_text()
    table = readme.partition("| code | means |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)) == codes
