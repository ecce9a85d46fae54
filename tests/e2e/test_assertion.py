"""A server that lets in what came through the sidecar, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web

from sidecar.policy import enforcement
from sidecar.protocol.jsonrpc import Request
from sidecar.transport.assertion import Assertions, KeyFile
from tests.support import client as clients
from tests.support.client import ERAS, LEGACY
from tests.support.guarded_desk import guarded_desk
from tests.support.issuing import signer
from tests.support.key_files import key_file
from tests.support.otlp import Sink
from tests.support.processes import (
    ALLOW_ALL,
    ROOT,
    Process,
    Served,
    done,
    get,
    http_sidecar,
    patient,
    sidecar,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    Answer,
    Wire,
    call,
    dump,
    free_port,
    initialize,
    mirrors,
    modern,
    post,
    request,
)
from tests.support.scripted import Asked, Scripted, scripted

HEADER = "MCP-Sidecar-Assertion"
NAME = "tickets"
ACTOR = {"static": {"type": "agent", "id": "bot", "on_behalf_of": {"type": "human", "id": "ana"}}}
OLD, NEW = signer("old"), signer("new", "EdDSA")
TICKET = {"id": 4711}
ASKED = modern(call(1, "get_ticket", **TICKET))
FORGED = [(HEADER, "forged"), ("mcp_sidecar_assertion", "forged"), (HEADER.upper(), "again")]


@contextmanager
def fronted(folder: Path, opa: Path, url: str, *more: str | Path, **said: Any) -> Iterator[Served]:
    """A sidecar that signs for what it sends to `url`."""
    with http_sidecar("", *configured(folder, url, **said), *more, env=patient(opa)) as front:
        yield front
        print(front.process.tail())  # shown when the test failed


def configured(folder: Path, url: str, **said: Any) -> tuple[str | Path, ...]:
    """The options of such a sidecar."""
    file = folder / "sidecar.yaml"
    document = {
        "identity": ACTOR,
        "upstreams": [{"name": NAME, "url": url}],
        "assertion": {"key": str(folder / "key.pem")},
        **said,
    }
    file.write_text(json.dumps(document), encoding="utf-8")
    return "--policy", ALLOW_ALL, "--config", file


def asked(url: str, *headers: tuple[str, str], body: object = ASKED) -> Answer:
    return post(url, body, [*mirrors(ASKED), *headers])


# ── Through the sidecar, and past it ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ERAS)
async def test_only_who_comes_through_the_sidecar_gets_in(
    tmp_path: Path, opa_bin: Path, mode: str
) -> None:
    """Sessions, their streams and their ends too: each request is signed for."""
    log, public = tmp_path / "desk.log", key_file(tmp_path / "key.pem")
    with guarded_desk(log, NAME, public) as desk:
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the SDK makes of a 403
            async with clients.over_http(desk.url, mode) as client:
                await client.call_tool("get_ticket", TICKET)
        with fronted(tmp_path, opa_bin, desk.url) as front:
            async with clients.over_http(front.url, mode) as client:
                assert "get_ticket" in await clients.tools_of(client)
                assert not (await client.call_tool("get_ticket", TICKET)).is_error
    assert done(log) == ["get_ticket"]


async def test_over_the_oldest_transport_too(tmp_path: Path, opa_bin: Path) -> None:
    log, public = tmp_path / "desk.log", key_file(tmp_path / "key.pem")
    with (
        guarded_desk(log, NAME, public, sse=True) as desk,
        fronted(tmp_path, opa_bin, desk.url) as front,
    ):
        with Wire(desk.url) as wire:
            wire.request(verb="GET")
            assert wire.begin("GET").status == 403
        async with clients.over_sse(front.url, LEGACY) as client:
            assert not (await client.call_tool("get_ticket", TICKET)).is_error
    assert done(log) == ["get_ticket"]


@pytest.mark.parametrize("sse", [False, True])
async def test_from_a_pipe_too(tmp_path: Path, opa_bin: Path, sse: bool) -> None:
    log, public = tmp_path / "desk.log", key_file(tmp_path / "key.pem")
    with guarded_desk(log, NAME, public, sse=sse) as desk:
        command = sidecar("stdio", *configured(tmp_path, desk.url))
        for mode in (LEGACY,) if sse else ERAS:
            async with clients.over_stdio(command, mode, env=patient(opa_bin)) as client:
                assert not (await client.call_tool("get_ticket", TICKET)).is_error
    assert set(done(log)) == {"get_ticket"}


def test_what_a_client_writes_into_the_header_is_replaced(tmp_path: Path, opa_bin: Path) -> None:
    log, public = tmp_path / "desk.log", key_file(tmp_path / "key.pem")
    with guarded_desk(log, NAME, public) as desk, fronted(tmp_path, opa_bin, desk.url) as front:
        assert asked(desk.url, *FORGED).status == 403
        assert "result" in asked(front.url, *FORGED).message
    assert done(log) == ["get_ticket"]


# ── What is captured is of no use ─────────────────────────────────────────────────────────────────


def signed(folder: Path, verb: str = "POST", body: bytes | None = None, **changes: Any) -> str:
    """An assertion as the sidecar makes it, but for what changes."""
    said = {"issuer": "mcp-opa-sidecar", "audience": NAME, "lifetime": 30, **changes}
    message = enforcement.for_catalog(Request(1, "tools/list", {}))
    made = Assertions(KeyFile(folder / "key.pem"), **said)
    return made.sign(verb, message, dump(ASKED) if body is None else body)


CAPTURED: dict[str, tuple[int, dict[str, Any]]] = {
    "for this very request": (200, {}),
    "for another body": (403, {"body": dump(modern(call(1, "delete_ticket", **TICKET)))}),
    "for the same JSON in other bytes": (403, {"body": dump(ASKED) + b" "}),
    "for no body": (403, {"body": b""}),
    "for another verb": (403, {"verb": "GET"}),
    "for another server": (403, {"audience": "billing"}),
    "expired": (403, {"now": lambda: time.time() - 36}),
    "from the future": (403, {"now": lambda: time.time() + 60}),
}


def test_a_captured_assertion_is_good_for_one_request_alone(tmp_path: Path) -> None:
    log, public = tmp_path / "desk.log", key_file(tmp_path / "key.pem")
    found: dict[str, int] = {}
    with guarded_desk(log, NAME, public) as desk:
        for name, (_, changes) in CAPTURED.items():
            found[name] = asked(desk.url, (HEADER, signed(tmp_path, **changes))).status
        others = tmp_path / "others"
        others.mkdir()
        key_file(others / "key.pem", signer("somebody else's"))
        stranger = signed(others)
        unsigned = f"{signed(tmp_path).rpartition('.')[0]}."
        none = jwt.encode({"aud": NAME, "exp": 4e9}, "", algorithm="none")
        for bad in (stranger, unsigned, none, "", "a.b.c"):
            assert asked(desk.url, (HEADER, bad)).status == 403, bad
    assert found == {name: status for name, (status, _) in CAPTURED.items()}
    assert done(log) == ["get_ticket"]


# ── What it says ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class Witness:
    """A server that keeps every request as it came, and every assertion, verified."""

    public: bytes
    tokens: list[str] = field(default_factory=list)
    seen: list[tuple[Asked, dict[str, Any]]] = field(default_factory=list)

    async def answer(
        self, _: Scripted, request: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        [token] = request.headers.getall(HEADER)
        assert not [each for each in request.headers if "_" in each]
        said = jwt.decode(token, self.public, ["ES256"], audience=NAME)
        assert said["digest"] == f"sha256:{hashlib.sha256(await request.read()).hexdigest()}"
        assert (said["htm"], said["exp"] - said["iat"]) == (request.method, 30)
        self.tokens.append(token)
        self.seen.append((asked, said))
        if asked.method == "tools/call":
            body = {"jsonrpc": "2.0", "id": asked.message["id"], "result": {"content": []}}
            return web.json_response(body, headers={HEADER: token})
        return None

    def said(self, method: str) -> list[dict[str, Any]]:
        return [said for asked, said in self.seen if asked.method == method]


def test_it_says_who_is_behind_a_request_and_what_was_decided(
    tmp_path: Path, opa_bin: Path
) -> None:
    witness = Witness(key_file(tmp_path / "key.pem").read_bytes())
    audit = tmp_path / "audit.jsonl"
    with (
        scripted(witness.answer) as server,
        fronted(tmp_path, opa_bin, server.url, "--audit", audit) as front,
    ):
        opened = post(front.url, initialize(), FORGED)
        session = ("Mcp-Session-Id", opened.headers["mcp-session-id"])
        greeting = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert post(front.url, greeting, [session]).status == 202
        assert post(front.url, request(3, "ping"), [session]).status == 200
        answer = post(front.url, call(2, "echo", text="ü"), [session])
        assert (answer.status, HEADER.lower() in answer.headers) == (200, False)
        for verb in ("GET", "DELETE"):
            with Wire(front.url) as wire:
                wire.request(headers=(*JSON_HEADERS, session), verb=verb)
                assert wire.answer(verb).status == 405
    records = [json.loads(line) for line in audit.read_text("utf-8").splitlines()]
    [decided] = [r for r in records if (r["type"], r["method"]) == ("decision", "tools/call")]
    [called] = witness.said("tools/call")
    assert called["jti"] == decided["decision_id"]
    assert called["policy_revision"] == decided["policy_revision"]
    assert called["targets"] == [{"type": "tool", "name": "echo"}]
    assert (called["iss"], called["method"]) == ("mcp-opa-sidecar", "tools/call")
    for method in ("initialize", "notifications/initialized", "ping", "tools/list", "tools/call"):
        [said] = witness.said(method)
        assert said["chain"] == [
            {"type": "agent", "key": "static|bot"},
            {"type": "human", "key": "static|ana"},
        ]
        assert said["sub"] == "static|bot"
    for verb in ("GET", "DELETE"):
        [said] = witness.said(verb)
        assert (said["sub"], said["chain"]) == ("mcp-opa-sidecar", [])
    assert len({said["jti"] for _, said in witness.seen}) == len(witness.seen)


def test_without_a_key_nothing_is_signed_and_nothing_is_let_through(
    tmp_path: Path, opa_bin: Path
) -> None:
    async def answer(_: Scripted, request: web.Request, __: Asked) -> web.StreamResponse | None:
        assert not [each for each in request.headers if "assertion" in each.lower()]
        return None

    with (
        scripted(answer) as server,
        http_sidecar(server.url, "--policy", ALLOW_ALL, env=patient(opa_bin)) as front,
    ):
        assert "result" in asked(front.url, *FORGED).message
        assert server.seen("tools/call")


def test_it_is_left_nowhere(tmp_path: Path, opa_bin: Path) -> None:
    """With a co-located OPA that logs every decision."""
    witness = Witness(key_file(tmp_path / "key.pem").read_bytes())
    audit, where = tmp_path / "audit.jsonl", f"http://127.0.0.1:{free_port()}"
    serving = (opa_bin, "run", "--server", "--addr", where.removeprefix("http://"))
    logging = ("--set", "decision_logs.console=true", "--log-level", "debug")
    with (
        Process((*serving, *logging, ROOT / "policies/mcp", ALLOW_ALL)) as opa,
        Sink() as sink,
        scripted(witness.answer) as server,
    ):
        *_, file = configured(tmp_path, server.url, log={"level": "debug"})
        options = ("--config", file, "--opa", where, "--audit", audit, "--otlp", sink.url)
        with http_sidecar("", *options, env=patient(opa_bin)) as front:
            assert "result" in asked(front.url, *FORGED).message
            assert asked(front.url, body=b"{").status == 400
            sink.wait_for(1, where=lambda span: span.name.startswith("tools/call"))
            metrics = get(f"{front.admin}/metrics")[1].decode()
            front.process.stop()
        left = {
            "log": "\n".join(front.process.lines),
            "audit": audit.read_text("utf-8"),
            "spans": repr(sink.spans),
            "OPA's log": "\n".join(opa.lines),
            "metrics": metrics,
        }
    assert all("get_ticket" in left[name] for name in ("audit", "spans", "OPA's log"))
    assert len(witness.tokens) == 2  # the call, and the sidecar's own listing
    secrets = {part for token in witness.tokens for part in token.split(".")} | {"forged"}
    for place, text in left.items():
        assert [each for each in secrets if each in text] == [], place


# ── Keys ──────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_rotated_while_it_runs(tmp_path: Path, opa_bin: Path) -> None:
    log, key = tmp_path / "desk.log", tmp_path / "key.pem"
    new, old = key_file(key, NEW), key_file(key, OLD)
    with (
        guarded_desk(log, NAME, old, new) as desk,
        guarded_desk(tmp_path / "behind.log", NAME, old) as behind,
    ):
        with fronted(tmp_path, opa_bin, desk.url) as front:

            def works() -> bool:
                return "result" in asked(front.url).message

            assert works()
            key_file(key, NEW)
            assert works()
            front.process.wait_for("assertion.key: .* is in force")
            key.write_bytes(b"half a key")
            assert works()
            front.process.wait_for("the earlier key stays in force")
            key.unlink()
            assert works()
            key_file(key, signer("unknown"))
            assert asked(front.url).status == 403
        with fronted(tmp_path, opa_bin, behind.url) as front:
            assert asked(front.url).status == 403
            key_file(key, OLD)
            wait_until(lambda: "result" in asked(front.url).message, "the old key is known there")
    assert done(log) == ["get_ticket"] * 4


@pytest.mark.parametrize("command", ["http", "stdio", "check"])
def test_without_its_key_it_does_not_start(tmp_path: Path, opa_bin: Path, command: str) -> None:
    options = configured(tmp_path, "http://127.0.0.1:1/mcp")
    where = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0") if command == "http" else ()
    for content, why in ((None, "No such file"), (b"secret", "must be a private key in PEM")):
        if content is not None:
            (tmp_path / "key.pem").write_bytes(content)
        with Process(sidecar(command, *where, *options), env=patient(opa_bin)) as process:
            assert process.wait(30) == 125
            assert re.search(rf"assertion\.key: .*key\.pem: {why}", process.tail())


def test_the_readme_shows_the_middleware() -> None:
    shown = (ROOT / "tests/support/only_by_sidecar.py").read_text("utf-8")
    assert f"```python\n{shown}```\n" in (ROOT / "README.md").read_text("utf-8")
