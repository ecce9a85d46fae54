"""Tokens over HTTP: scopes, expiry, proxies, and what goes on to the server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support import puppet_server, scripted
from tests.support.identity import METADATA, RESOURCE, Idp, guarded, idp, policy
from tests.support.issuing import account_claims, claims, own_claims
from tests.support.processes import (
    ALLOW_ALL,
    Served,
    bridge,
    done,
    get,
    http_sidecar,
    patient,
    ticket_desk,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    Answer,
    Wire,
    call,
    dump,
    initialize,
    mirrors,
    modern,
    post,
    read_event,
    request,
)
from tests.support.scripted import Asked, Scripted

ANA = claims(sub="ana")
LISTEN = request("s", "subscriptions/listen", {"notifications": {"resourceSubscriptions": ["a:b"]}})
NEEDS_SCOPE = """
package mcp.custom

deny contains {
	"code": "scope_missing",
	"message": "Refunds need a scope.",
	"scope": "tickets:refund",
} if {
	input.target.name == "refund_ticket"
	not "tickets:refund" in object.get(input.actor, "scopes", [])
}
"""


def chains(audit: Path, what: str = "key") -> list[list[str]]:
    """Who was behind each call that was decided about."""
    records = [json.loads(line) for line in audit.read_text("utf-8").splitlines()]
    wanted = ("decision", "tools/call")
    found = [each for each in records if (each["type"], each.get("method")) == wanted]
    return [[principal[what] for principal in each["chain"]] for each in found]


def bearer(token: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {token}"


# ── Scopes ────────────────────────────────────────────────────────────────────────────────────────


def test_a_scope_that_the_policy_names_is_asked_for(tmp_path: Path, opa_bin: Path) -> None:
    refund = call(7, "refund_ticket", id=4711, amount=5)
    enough = {**ANA, "scope": "tickets:read tickets:refund"}
    with guarded(tmp_path, opa_bin, rego=NEEDS_SCOPE) as place:
        answer = place.post(modern(refund), place.issuer.token(ANA), *mirrors(refund))
        assert answer.status == 403
        assert answer.headers["www-authenticate"] == (
            'Bearer error="insufficient_scope", scope="tickets:refund", '
            f'resource_metadata="{METADATA}"'
        )
        error = answer.message["error"]
        assert (answer.message["id"], error["code"]) == (7, -31403)
        assert error["data"]["reasons"][0]["scope"] == "tickets:refund"
        denied = call(8, "delete_ticket", id=4711)
        answer = place.post(modern(denied), place.issuer.token(ANA), *mirrors(denied))
        assert (answer.status, "www-authenticate" in answer.headers) == (200, False)
        answer = place.post(modern(refund), place.issuer.token(enough), *mirrors(refund))
        assert "result" in answer.message
        assert done(place.log) == ["refund_ticket"]


def test_a_legacy_session_hears_of_a_scope_without_being_given_up(
    tmp_path: Path, opa_bin: Path
) -> None:
    """The denial is on the stream; the acknowledgement says what to ask for, and stays one."""
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        desk = stack.enter_context(ticket_desk(tmp_path / "log", transport="sse"))
        file = tmp_path / "sidecar.yaml"
        identity = {"jwt": [issuer.believed()], "resource": RESOURCE}
        file.write_text(json.dumps({"identity": identity}), "utf-8")
        options = ("--policy", policy(tmp_path, issuer.url, NEEDS_SCOPE), "--config", file)
        front = stack.enter_context(http_sidecar(desk.url, *options, env=patient(opa_bin)))
        ana = bearer(issuer.token(ANA))
        wire = stack.enter_context(Wire(front.url))
        wire.request(headers=(ana, ("Accept", "text/event-stream")), verb="GET")
        stream = wire.begin("GET")
        target = read_event(stream).decode().partition("data: ")[2].strip()
        greeting = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert post(front.url, initialize(), [ana], target=target).status == 202
        assert b"protocolVersion" in read_event(stream)
        assert post(front.url, greeting, [ana], target=target).status == 202
        refund = post(front.url, call(2, "refund_ticket", id=4711, amount=5), [ana], target=target)
        assert refund.status == 202
        assert refund.headers["www-authenticate"] == (
            'Bearer error="insufficient_scope", scope="tickets:refund", '
            f'resource_metadata="{METADATA}"'
        )
        assert b'"scope":"tickets:refund"' in read_event(stream)
        assert post(front.url, call(3, "get_ticket", id=4711), [ana], target=target).status == 202
        assert b"kettle" in read_event(stream)


# ── What goes on to the server ────────────────────────────────────────────────────────────────────


async def _streaming(
    server: Scripted, request: web.Request, asked: Asked
) -> web.StreamResponse | None:
    """A server whose streams stay open."""
    if asked.verb == "GET" or asked.method == "subscriptions/listen":
        response = await scripted.stream(request, scripted.event({"method": "notifications/x"}))
        await asyncio.Event().wait()
        return response
    return None


@contextmanager
def fronted(
    folder: Path, opa: Path, server: Scripted, issuer: Idp | None = None, **said: Any
) -> Iterator[Served]:
    """A sidecar that allows everything, in front of a server that remembers what it was asked."""
    identity = {"jwt": [issuer.believed()]} if issuer else {}
    identity |= said.pop("identity", {})
    document = {"identity": identity, "upstreams": [{"url": server.url}], **said}
    file = folder / "sidecar.yaml"
    file.write_text(json.dumps(document), encoding="utf-8")
    where = ("--policy", ALLOW_ALL, "--config", file)
    with http_sidecar("", *where, env=patient(opa)) as front:
        yield front


@pytest.mark.parametrize("forward", [None, True, False])
@pytest.mark.parametrize("verified", [True, False])
def test_a_token_goes_on_where_it_is_not_verified(
    tmp_path: Path, opa_bin: Path, verified: bool, forward: bool | None
) -> None:
    http: dict[str, Any] = {} if forward is None else {"forward_authorization": forward}
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        server = stack.enter_context(scripted.scripted(_streaming))
        believed = issuer if verified else None
        front = stack.enter_context(fronted(tmp_path, opa_bin, server, believed, http=http))
        token = issuer.token(ANA)
        assert post(front.url, initialize(), [bearer(token)]).status == 200
    seen = server.seen("initialize")[0].headers.get("authorization")
    goes = forward if forward is not None else not verified
    assert seen == (f"Bearer {token}" if goes else None)


def test_the_server_gets_a_token_of_its_own_from_a_file(tmp_path: Path, opa_bin: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("first\n", encoding="ascii")
    with idp() as issuer, scripted.scripted(_streaming) as server:
        upstreams = [{"url": server.url, "token_file": str(secret)}]
        with fronted(tmp_path, opa_bin, server, issuer, upstreams=upstreams) as front:

            def ask() -> Answer:
                return post(front.url, initialize(), [bearer(issuer.token(ANA))])

            assert ask().status == 200
            secret.write_text("second", encoding="ascii")
            assert ask().status == 200
            for bad in ("two words", "a\r\nX-Other: b", ""):
                secret.write_text(bad, encoding="ascii")
                assert ask().message["error"]["code"] == -31502, bad
            secret.unlink()
            assert ask().message["error"]["code"] == -31502
    seen = [each.headers["authorization"] for each in server.seen("initialize")]
    assert seen == ["Bearer first", "Bearer second"]


# ── Several servers, several issuers ──────────────────────────────────────────────────────────────


def test_each_server_is_a_resource_of_its_own(tmp_path: Path, opa_bin: Path) -> None:
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        server = stack.enter_context(scripted.scripted(_streaming))
        upstreams = [{"name": each, "path": f"/{each}", "url": server.url} for each in ("a", "b")]
        identity = {"resource": "https://mcp.example.com/desk/"}
        said: dict[str, Any] = {"upstreams": upstreams, "identity": identity}
        front = stack.enter_context(fronted(tmp_path, opa_bin, server, issuer, **said))
        base = front.url.rpartition("/")[0]
        for name in ("a", "b"):
            known = f"/.well-known/oauth-protected-resource/desk/{name}"
            told = post(f"{base}/{name}", initialize()).headers["www-authenticate"]
            assert told == f'Bearer resource_metadata="https://mcp.example.com{known}"'
            for path in (known, known.replace("/desk", "")):
                status, body = get(base + path)
                assert (status, json.loads(body)["resource"]) == (
                    200,
                    f"https://mcp.example.com/desk/{name}",
                )
        assert get(f"{base}/.well-known/oauth-protected-resource")[0] == 404


def test_a_pod_comes_with_the_token_of_its_service_account(tmp_path: Path, opa_bin: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    with ExitStack() as stack:
        cluster = stack.enter_context(idp())
        server = stack.enter_context(scripted.scripted(_streaming))
        kubernetes = {
            "issuer": cluster.url,
            "audiences": [RESOURCE],
            "jwks": {"url": f"{cluster.url}/keys"},
            "pod_required": True,
        }
        said: dict[str, Any] = {
            "identity": {
                "kubernetes": kubernetes,
                "types": [{"type": "agent", "source": "kubernetes", "subject": "agents/*"}],
            },
            "audit": {"path": str(audit)},
        }
        front = stack.enter_context(fronted(tmp_path, opa_bin, server, **said))
        message = call(1, "echo")
        for namespace in ("support", "agents"):
            token = bearer(cluster.token(account_claims(namespace), nbf=0))
            answer = post(front.url, modern(message), [*mirrors(message), token])
            assert answer.status == 200
        unbound = cluster.token(
            account_claims(bound={"namespace": "support", "serviceaccount": {"name": "bot"}})
        )
        refused = post(front.url, modern(message), [*mirrors(message), bearer(unbound)])
        assert refused.message["error"]["data"]["reasons"] == [{"code": "token_claims"}]
    assert chains(audit) == [[f"{cluster.url}|{each}/bot"] for each in ("support", "agents")]
    assert chains(audit, "type") == [["service"], ["agent"]]


# ── A trusted proxy ───────────────────────────────────────────────────────────────────────────────

EDGE = {"name": "edge", "id_header": "x-user", "groups_header": "x-groups"}
SAYS = [("X-User", "ana"), ("X-Groups", "support, ops"), ("X-Forwarded-For", "9.9.9.9, 192.0.2.7")]


@pytest.mark.parametrize("peers", [["127.0.0.0/8"], ["10.0.0.0/8"]])
def test_only_a_trusted_proxy_is_believed(tmp_path: Path, opa_bin: Path, peers: list[str]) -> None:
    trusted = peers == ["127.0.0.0/8"]
    audit = tmp_path / "audit.jsonl"
    identity = {
        "proxy": {**EDGE, "peers": peers},
        "types": [{"type": "human", "source": "proxy"}],
    }
    with scripted.scripted(_streaming) as server:
        more: dict[str, Any] = {"identity": identity, "audit": {"path": str(audit)}}
        with fronted(tmp_path, opa_bin, server, **more) as front:
            message = call(1, "echo")
            answer = post(front.url, modern(message), [*mirrors(message), *SAYS])
            assert answer.status == 200
            twice = post(front.url, modern(message), [*mirrors(message), *SAYS, SAYS[0]])
            assert twice.status == (401 if trusted else 200)
    headers = server.seen("tools/call")[0].headers
    assert {"x-user", "x-groups"} & set(headers) == set()
    assert chains(audit)[0] == ["edge|ana" if trusted else "none|anonymous"]


def test_an_agent_brings_its_token_through_a_proxy(tmp_path: Path, opa_bin: Path) -> None:
    """The proxy's word for whom, the token for who: the agent acts for ana."""
    audit = tmp_path / "audit.jsonl"
    identity = {"proxy": {**EDGE, "peers": ["127.0.0.1"]}}
    with idp() as issuer, scripted.scripted(_streaming) as server:
        more = {"audit": {"path": str(audit)}}
        with fronted(tmp_path, opa_bin, server, issuer, identity=identity, **more) as front:
            token = bearer(issuer.token(own_claims("support-bot")))
            message = call(1, "echo")
            post(front.url, modern(message), [*mirrors(message), *SAYS, token])
    assert chains(audit) == [[f"{issuer.url}|support-bot", "edge|ana"]]


# ── Expiry ends streams ───────────────────────────────────────────────────────────────────────────


LEEWAY = 1


def _rest(stream: HTTPResponse) -> list[bytes]:
    """What is left of a stream: read to its end, which has to be a clean one."""
    assert stream.status == 200
    return list(iter(lambda: read_event(stream), b""))


@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_a_stream_ends_with_its_token(tmp_path: Path, opa_bin: Path, verb: str) -> None:
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        server = stack.enter_context(scripted.scripted(_streaming))
        identity = {"jwt": [issuer.believed(leeway=LEEWAY)]}
        front = stack.enter_context(fronted(tmp_path, opa_bin, server, identity=identity))
        expires = time.time() + 2
        token = bearer(issuer.token(ANA, exp=expires))
        session = post(front.url, initialize(), [token]).headers["mcp-session-id"]
        wire = stack.enter_context(Wire(front.url))
        if verb == "GET":
            wire.request(headers=(*JSON_HEADERS, token, ("Mcp-Session-Id", session)), verb="GET")
        else:
            wire.request(dump(modern(LISTEN)), (*JSON_HEADERS, token, *mirrors(LISTEN)))
        told = _rest(wire.begin(verb))
        assert time.time() >= expires + LEEWAY - 0.1
        said = b"".join(told[-1:])
        assert (b"-31401" in said and b"credential_expired" in said) is (verb == "POST")
        name = "GET" if verb == "GET" else "subscriptions/listen"
        wait_until(lambda: server.closed == [name], "the server's stream is closed too")


# ── A command behind HTTP ─────────────────────────────────────────────────────────────────────────


def test_the_server_of_a_session_serves_its_owner(tmp_path: Path, opa_bin: Path) -> None:
    log = tmp_path / "log"
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        file = tmp_path / "sidecar.yaml"
        shared = {"bridge": {"shared": True}, "audit": {"path": str(tmp_path / "audit.jsonl")}}
        file.write_text(json.dumps({"identity": {"jwt": [issuer.believed()]}, **shared}), "utf-8")
        options = ("--policy", ALLOW_ALL, "--config", file)
        front = stack.enter_context(
            bridge(puppet_server.command(log), *options, env=patient(opa_bin))
        )
        tokens = {
            name: bearer(issuer.token(said))
            for name, said in {"ana": ANA, "bot": own_claims("support-bot")}.items()
        }
        opened = post(front.url, initialize(), [tokens["ana"]])
        session = ("Mcp-Session-Id", opened.headers["mcp-session-id"])
        greeting = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert post(front.url, greeting, [tokens["ana"], session]).status == 202
        message = call(1, "say")
        assert post(front.url, message, [tokens["ana"], session]).status == 200
        assert post(front.url, message, [tokens["bot"], session]).status == 404
        assert post(front.url, message, [session]).status == 401
        for token in tokens.values():
            answer = post(front.url, modern(message), [token, *mirrors(message)])
            assert "result" in answer.message
    found = [each.rpartition("|")[2] for [each] in chains(tmp_path / "audit.jsonl")]
    assert found == ["ana", "ana", "support-bot"]
    assert len(puppet_server.heard(log, "tools/call")) == 3


def test_the_stream_of_such_a_session_ends_with_its_token(tmp_path: Path, opa_bin: Path) -> None:
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        file = tmp_path / "sidecar.yaml"
        file.write_text(json.dumps({"identity": {"jwt": [issuer.believed(leeway=0)]}}), "utf-8")
        options = ("--policy", ALLOW_ALL, "--config", file)
        server = puppet_server.command(tmp_path / "log")
        front = stack.enter_context(bridge(server, *options, env=patient(opa_bin)))
        short, long = bearer(issuer.token(ANA, exp=time.time() + 2)), bearer(issuer.token(ANA))
        opened = post(front.url, initialize(), [short])
        session = ("Mcp-Session-Id", opened.headers["mcp-session-id"])
        wire = stack.enter_context(Wire(front.url))
        wire.request(headers=(*JSON_HEADERS, short, session), verb="GET")
        _rest(wire.begin("GET"))
        again = stack.enter_context(Wire(front.url))
        again.request(headers=(*JSON_HEADERS, long, session), verb="GET")
        assert again.begin("GET").status == 200  # the session is there, with another token


# ── Legacy HTTP+SSE ───────────────────────────────────────────────────────────────────────────────


def test_a_legacy_session_is_its_openers_and_ends_with_the_token(
    tmp_path: Path, opa_bin: Path
) -> None:
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        desk = stack.enter_context(ticket_desk(tmp_path / "log", transport="sse"))
        file = tmp_path / "sidecar.yaml"
        file.write_text(json.dumps({"identity": {"jwt": [issuer.believed(leeway=0)]}}), "utf-8")
        options = ("--policy", ALLOW_ALL, "--config", file)
        front = stack.enter_context(http_sidecar(desk.url, *options, env=patient(opa_bin)))
        ana = bearer(issuer.token(ANA, exp=time.time() + 3))
        wire = stack.enter_context(Wire(front.url))
        wire.request(headers=(ana, ("Accept", "text/event-stream")), verb="GET")
        stream = wire.begin("GET")
        target = read_event(stream).decode().partition("data: ")[2].strip()
        other = bearer(issuer.token(own_claims("support-bot")))
        for headers, status in (([ana], 202), ([other], 404), ([], 401)):
            assert post(front.url, initialize(), headers, target=target).status == status
        assert b"protocolVersion" in read_event(stream)
        _rest(stream)
        assert (
            post(front.url, initialize(), [bearer(issuer.token(ANA))], target=target).status == 404
        )
