"""Who is calling, by tokens of a real issuer: what each may do, and who is not let in at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from mcp import MCPError

from tests.support import client as clients
from tests.support.client import LEGACY, MODERN, codes, tools_of
from tests.support.identity import METADATA, Idp, Place, guarded, policy
from tests.support.issuing import DROP, b64, claims, key_set, nested, own_claims, signer
from tests.support.otlp import Span
from tests.support.processes import Process, done, get, wait_until
from tests.support.raw import (
    JSON_HEADERS,
    Answer,
    Wire,
    call,
    free_port,
    initialize,
    mirrors,
    modern,
    post,
    request,
)
from tests.support.ticket_desk import LISTED

READ: dict[str, dict[str, Any]] = {
    "search_tickets": {"query": "kettle"},
    "get_ticket": {"id": 4711},
}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, arguments) for name, arguments in READ.items()},
    "create_ticket": ("create_ticket", {"title": "x"}),
    "refund 40": ("refund_ticket", {"id": 4711, "amount": 40}),
    "refund 80": ("refund_ticket", {"id": 4711, "amount": 80}),
    "delete_ticket": ("delete_ticket", {"id": 1}),
}


@dataclass(frozen=True)
class Who:
    """Somebody: what the token says, what the policy allows, and what is written down."""

    claims: dict[str, Any]
    allowed: set[str]
    type: str
    id: str
    on_behalf_of: str | None = None


ANA = {"sub": "ana", "groups": DROP}
FOR_ANA = ({*READ, "refund 40"}, "agent", "support-bot", "ana")
WHO = {
    "human": Who(claims(**ANA), {*READ, "create_ticket", "refund 40", "refund 80"}, "human", "ana"),
    "service": Who(own_claims("reporting"), {*READ}, "service", "reporting"),
    "agent": Who(own_claims("support-bot"), {*READ, "delete_ticket"}, "agent", "support-bot"),
    "agent for ana, by act": Who(claims(**ANA, act=nested("support-bot")), *FOR_ANA),
    "agent for ana, by client": Who(claims(**{**ANA, "client_id": "support-bot"}), *FOR_ANA),
    "agent for a stranger": Who(
        claims(sub="eve", client_id="support-bot"), set(), "agent", "support-bot", "eve"
    ),
    "a service's name for a human": Who(claims(sub="reporting"), set(), "human", "reporting"),
    "a client that is not listed": Who(
        claims(**{**ANA, "client_id": "else"}), set(), "unknown", "ana"
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, opa_bin: Path) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("identity")
    with guarded(folder, opa_bin, scopes=["tickets:read"]) as place:
        yield place


@pytest.fixture
def alone(tmp_path: Path, opa_bin: Path) -> Iterator[Place]:
    """A place whose issuer may change."""
    with guarded(tmp_path, opa_bin) as place:
        yield place


# ── The matrix ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [LEGACY, MODERN])
@pytest.mark.parametrize("name", WHO)
async def test_each_actor_does_exactly_what_is_granted(place: Place, name: str, mode: str) -> None:
    who, before = WHO[name], len(done(place.log))
    records, spans = len(place.records()), len(place.sink.spans)
    headers = {"Authorization": f"Bearer {place.issuer.token(who.claims)}"}
    reasons: dict[str, str] = {}
    async with clients.over_http(place.url, mode, headers=headers) as client:
        visible = {CELLS[cell][0] for cell in who.allowed}
        assert await tools_of(client) == [each for each in LISTED if each in visible]
        for cell, (tool, arguments) in CELLS.items():
            try:
                await client.call_tool(tool, arguments)
            except MCPError as error:
                reasons[cell] = codes(error)[0]
    allowed = [cell for cell in CELLS if cell not in reasons]
    assert set(allowed) == who.allowed
    assert done(place.log)[before:] == [CELLS[cell][0] for cell in allowed]
    await asyncio.to_thread(_is_written_down, place, who, reasons, records, spans)


def _is_written_down(
    place: Place, who: Who, reasons: dict[str, str], records: int, spans: int
) -> None:
    """Audit and spans of every cell name actor, principal, tool and reason."""
    written = [each for each in place.records()[records:] if each["method"] == "tools/call"]
    decisions = [each for each in written if each["type"] == "decision"]
    chain = [f"{place.issuer.url}|{each}" for each in (who.id, who.on_behalf_of) if each]
    assert [
        (each["targets"][0]["name"], each["decision"], [p["key"] for p in each["chain"]])
        for each in decisions
    ] == [(CELLS[c][0], "deny" if c in reasons else "allow", chain) for c in CELLS]

    def ours(span: Span) -> bool:
        return span.kind == "SERVER" and span.name.startswith("tools/call")

    place.sink.wait_for(len(CELLS) + sum(map(ours, place.sink.spans[:spans])), where=ours)
    found = sorted(filter(ours, place.sink.spans[spans:]), key=lambda span: span.start)
    told = ("actor.type", "actor.id", "actor.on_behalf_of", "authz.reason")
    assert [[each.attributes.get(name) for name in told] for each in found] == [
        [who.type, who.id, who.on_behalf_of, reasons.get(cell)] for cell in CELLS
    ]
    assert [each.attributes["gen_ai.tool.name"] for each in found] == [c[0] for c in CELLS.values()]


# ── Who is not let in ─────────────────────────────────────────────────────────────────────────────


def _confused(issuer: Idp) -> str:
    """Signed by HMAC with what everybody knows: the public key."""
    head = {"alg": "HS256", "typ": "JWT", "kid": "key-1"}
    said = claims(**ANA, iss=issuer.url)
    signed = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(said).encode())}"
    hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    return f"{signed}.{b64(hmac.sign(signed.encode(), signer().public_pem()))}"


def _unsigned(issuer: Idp) -> str:
    said = claims(**ANA, iss=issuer.url)
    return ".".join((b64(b'{"alg": "none"}'), b64(json.dumps(said).encode()), ""))


BAD: dict[str, tuple[str, Callable[[Idp], str]]] = {
    "another audience": ("token_audience", lambda idp: idp.token(claims(**ANA, aud="https://x"))),
    "expired": ("token_expired", lambda idp: idp.token(claims(**ANA), iat=1, exp=1_700_000_000)),
    "not yet": ("token_not_yet_valid", lambda idp: idp.token(claims(**ANA, nbf=4_000_000_000))),
    "unknown key": ("token_key_unknown", lambda idp: idp.token(claims(**ANA), signer("key-9"))),
    "another issuer": ("token_issuer", lambda idp: idp.token(claims(**ANA), iss="https://x")),
    "no issuer": ("token_issuer", lambda idp: idp.token(claims(**ANA), iss=DROP)),
    "HMAC": ("token_algorithm", _confused),
    "unsigned": ("token_algorithm", _unsigned),
    "changed": ("token_signature", lambda idp: _changed(idp.token(claims(**ANA)))),
    "not a JWT": ("token_malformed", lambda idp: "opaque"),
    "an actor that is a text": (
        "chain_malformed",
        lambda idp: idp.token(claims(**ANA, act="support-bot")),
    ),
    "nine in a chain": (
        "chain_too_long",
        lambda idp: idp.token(claims(**ANA, act=nested(*map(str, range(8))))),
    ),
}


def _changed(token: str) -> str:
    return ".".join((*token.split(".")[:2], b64(bytes(64))))


def _refused(answer: Answer, code: str) -> None:
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == (
        f'Bearer error="invalid_token", error_description="{code}", resource_metadata="{METADATA}"'
    )
    error = answer.message["error"]
    assert (answer.message["id"], error["code"]) == (None, -31401)
    assert error["data"] == {"reasons": [{"code": code}], "retryable": False}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_token_executes_nothing(place: Place, name: str) -> None:
    code, make = BAD[name]
    token, before = make(place.issuer), done(place.log)
    message = call(1, "get_ticket", id=4711)
    _refused(place.post(modern(message), token, *mirrors(message)), code)
    _refused(place.post(initialize(), token), code)
    with Wire(place.url) as wire:
        wire.request(headers=(*JSON_HEADERS, ("Authorization", f"Bearer {token}")), verb="GET")
        _refused(wire.answer("GET"), code)
    assert done(place.log) == before


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(("Basic YW5hOnB3",), id="another scheme"),
        pytest.param(("Bearer",), id="no token"),
        pytest.param(("Bearer a b",), id="two words"),
        pytest.param(("Bearer a, Bearer b",), id="two in one"),
        pytest.param(("",), id="empty"),
    ],
)
def test_the_header_is_one_bearer_token(place: Place, given: tuple[str, ...]) -> None:
    headers = [("Authorization", each) for each in given]
    _refused(post(place.url, initialize(), headers), "token_malformed")


def test_two_headers_are_not_one(place: Place) -> None:
    good = ("Authorization", f"Bearer {place.issuer.token(claims(**ANA))}")
    assert post(place.url, initialize(), [good]).status == 200
    _refused(post(place.url, initialize(), [good, good]), "token_malformed")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_has_no_case(place: Place, scheme: str) -> None:
    given = [("Authorization", f"{scheme} {place.issuer.token(claims(**ANA))}")]
    assert post(place.url, initialize(), given).status == 200


def test_who_shows_nothing_is_told_what_to_ask_for(place: Place) -> None:
    token = place.issuer.token(claims(**ANA))
    for target in (None, f"/mcp?access_token={token}"):
        answer = post(place.url, initialize(), target=target)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == (
            f'Bearer scope="tickets:read", resource_metadata="{METADATA}"'
        )
        assert answer.message["error"]["data"]["reasons"] == [{"code": "credentials_missing"}]


def test_nobody_makes_us_read_a_message_without_a_token(place: Place) -> None:
    with Wire(place.url) as wire:
        wire.request(b"{", length=4_000_000)
        assert wire.begin().status == 401


def test_the_metadata_is_the_sidecars_own_and_for_everybody(place: Place) -> None:
    known = "/.well-known/oauth-protected-resource"
    for path in (known, f"{known}/mcp"):
        status, body = get(place.url.removesuffix("/mcp") + path)
        assert (status, json.loads(body)) == (
            200,
            {
                "resource": "https://tickets.example.com/mcp",
                "authorization_servers": [place.issuer.url],
                "scopes_supported": ["tickets:read"],
                "bearer_methods_supported": ["header"],
            },
        )


# ── Sessions, keys, and what is left behind ───────────────────────────────────────────────────────


def test_nobody_uses_the_session_of_another(place: Place) -> None:
    tokens = {name: place.issuer.token(who.claims) for name, who in WHO.items()}
    opened = place.post(initialize(), tokens["human"])
    session = ("Mcp-Session-Id", opened.headers["mcp-session-id"])
    asked = call(2, "get_ticket", id=4711)
    the_same = {"human", "a client that is not listed"}  # ana again, who is judged anew
    for name, token in tokens.items():
        status = place.post(asked, token, session).status
        assert status == (200 if name in the_same else 404), name
    renewed = place.issuer.token(WHO["human"].claims, jti="t-2")
    assert place.post(asked, renewed, session).status == 200
    with Wire(place.url) as wire:
        bearer = ("Authorization", f"Bearer {tokens['service']}")
        wire.request(headers=(*JSON_HEADERS, bearer, session), verb="DELETE")
        assert wire.answer("DELETE").status == 404
    assert place.post(asked, tokens["human"], session).status == 200


def test_keys_are_rotated_while_it_runs(alone: Place) -> None:
    first = alone.issuer.token(claims(**ANA))
    assert alone.post(initialize(), first).status == 200
    alone.issuer.server.keys = key_set(signer("key-2"))
    second = alone.issuer.token(claims(**ANA), signer("key-2"))
    wait_until(lambda: alone.post(initialize(), second).status == 200, "the new key is known")
    _refused(alone.post(initialize(), first), "token_key_unknown")


def test_known_keys_are_good_while_the_issuer_is_down(alone: Place) -> None:
    assert alone.post(initialize(), alone.issuer.token(claims(**ANA))).status == 200
    alone.issuer.stop()
    assert alone.post(initialize(), alone.issuer.token(claims(**ANA, jti="t-2"))).status == 200
    unknown = alone.issuer.token(claims(**ANA), signer("key-2"))
    _refused(alone.post(initialize(), unknown), "token_key_unknown")


def test_no_token_is_left_anywhere(tmp_path: Path, opa_bin: Path) -> None:
    """With a co-located OPA that logs every decision."""
    url = f"http://127.0.0.1:{free_port()}"
    folder = policy(tmp_path, "https://idp.example.com")
    serving = ("run", "--server", "--addr", url.removeprefix("http://"))
    logging = ("--set", "decision_logs.console=true", "--log-level", "debug")
    library = folder.parent / "policy"
    command = (opa_bin, *serving, *logging, *_policies(library))
    with Process(command) as opa, guarded(tmp_path, opa_bin, options=("--opa", url)) as place:
        message = call(1, "get_ticket", id=4711)
        for who in WHO.values():
            place.post(modern(message), place.issuer.token(who.claims), *mirrors(message))
        for _, make in BAD.values():
            token = make(place.issuer)
            place.issuer.issued.append(token)
            assert place.post(request(1, "ping"), token).status == 401
        place.sink.wait_for(len(WHO), where=lambda span: span.kind == "SERVER")
        metrics = get(f"{place.front.admin}/metrics")[1].decode()
        place.front.process.stop()
        left = {
            "log": "\n".join(place.front.process.lines),
            "audit": place.audit.read_text("utf-8"),
            "spans": repr(place.sink.spans),
            "OPA's log": "\n".join(opa.lines),
            "metrics": metrics,
        }
    assert all("support-bot" in left[name] for name in ("audit", "spans", "OPA's log"))
    assert "token_signature" in left["log"]
    assert "token_signature" in left["metrics"]
    secrets = {part for token in place.issuer.issued for part in token.split(".")[1:] if part}
    assert len(secrets) > len(WHO) + len(BAD)
    for where, text in left.items():
        assert [secret for secret in secrets - {"opaque"} if secret in text] == [], where
        assert "ana@example.com" not in text, where


def _policies(folder: Path) -> tuple[str, str]:
    from tests.support.processes import ROOT

    return str(ROOT / "policies" / "mcp"), str(folder)
