"""Who is calling, by tokens of a real issuer: what each may do, and who is not let in at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jwt
import pytest
from mcp import Client, MCPError

from tests.demo.story import (
    ACTORS,
    ALLOWED,
    ANA,
    BOT_FOR_ANA,
    EXPECTED,
    NOBODY,
    RESOURCES,
    STEPS,
    TYPES,
    VISIBLE,
    Actor,
    Cell,
    Step,
    written,
)
from tests.support import client as clients
from tests.support.client import LEGACY, MODERN, ask, codes, tools_of
from tests.support.identity import METADATA, Idp, Place, guarded, policy
from tests.support.issuing import DROP, b64, claims, key_set, nested, signer
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

# The demo's actors, others that are one of them by another kind of token, and who only looks so.
UNKNOWN_ANA = Actor("unknown", "ana", claims(sub="ana", groups=DROP, client_id="else"))
MATRIX = {
    **{each.title: (each, EXPECTED[each], VISIBLE[each]) for each in ACTORS},
    "agent for ana, by act": (
        replace(BOT_FOR_ANA, claims=claims(sub="ana", groups=DROP, act=nested("support-bot"))),
        EXPECTED[BOT_FOR_ANA],
        VISIBLE[BOT_FOR_ANA],
    ),
    "agent for a stranger": (
        Actor("agent", "support-bot", claims(sub="ben", client_id="support-bot"), "ben"),
        (
            *["not_granted_to_principal"] * 2,
            "not_granted",
            "not_granted_to_principal",
            "argument_not_allowed",
            "not_granted_to_principal",
            "unknown_tool",
            "unknown_tool",
            "unknown_method",
        ),
        (),
    ),
    "a service's name for a human": (
        Actor("human", "reporting", claims(sub="reporting")),
        (*["not_granted"] * 6, "unknown_tool", "unknown_tool", "unknown_method"),
        (),
    ),
    "a client that is not listed": (UNKNOWN_ANA, EXPECTED[NOBODY], ()),
}
HUMAN = {"sub": "ana", "groups": DROP}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, opa_bin: Path) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("identity")
    more = {"resources": RESOURCES}
    with guarded(folder, opa_bin, more=more, types=TYPES, scopes=["tickets:read"]) as place:
        yield place


@pytest.fixture
def alone(tmp_path: Path, opa_bin: Path) -> Iterator[Place]:
    """A place whose issuer may change."""
    with guarded(tmp_path, opa_bin) as place:
        yield place


# ── The matrix ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [LEGACY, MODERN])
@pytest.mark.parametrize("name", MATRIX)
async def test_each_actor_does_exactly_what_is_granted(place: Place, name: str, mode: str) -> None:
    (actor, outcomes, visible), before = MATRIX[name], len(done(place.log))
    records, spans = len(place.records()), len(place.sink.spans)
    headers = {"Authorization": f"Bearer {place.issuer.token(dict(actor.claims))}"}
    async with clients.over_http(place.url, mode, headers=headers) as client:
        assert await tools_of(client) == list(visible)
        assert [await _outcome(client, step) for step in STEPS[1:]] == list(outcomes)
    expected = [written(actor, *each) for each in zip(STEPS[1:], outcomes, strict=True)]
    assert done(place.log)[before:] == [cell.tool for cell in expected if cell.decision == "allow"]
    await asyncio.to_thread(_is_written_down, place, actor, expected, records, spans)


async def _outcome(client: Client, step: Step) -> str:
    try:
        if step.tool is None:
            await ask(client, step.method)
        else:
            await client.call_tool(step.tool, dict(step.arguments))
    except MCPError as error:
        return codes(error)[0]
    return ALLOWED


def _is_written_down(
    place: Place, actor: Actor, expected: list[Cell], records: int, spans: int
) -> None:
    """Audit and spans of every cell name actor, principal, tool, resource and reason."""
    chain = [f"{place.issuer.url}|{each}" for each in (actor.id, actor.on_behalf_of) if each]
    methods = {step.method for step in STEPS[1:]}
    decisions = [
        (each["decision"], each.get("resource"), [principal["key"] for principal in each["chain"]])
        for each in place.records()[records:]
        if each["type"] == "decision" and each["method"] in methods
    ]
    mapped = [cell.resource if cell.resource.startswith("ticket:") else None for cell in expected]
    told = zip(expected, mapped, strict=True)
    assert decisions == [(cell.decision, resource, chain) for cell, resource in told]

    def ours(span: Span) -> bool:
        said = span.attributes.get("mcp.method.name")
        return span.kind == "SERVER" and said in methods and "authz.decision" in span.attributes

    place.sink.wait_for(len(expected) + sum(map(ours, place.sink.spans[:spans])), where=ours)
    found = sorted(filter(ours, place.sink.spans[spans:]), key=lambda span: span.start)
    assert [Cell.of(each.attributes) for each in found] == expected


# ── Who is not let in ─────────────────────────────────────────────────────────────────────────────


def _confused(issuer: Idp) -> str:
    """Signed by HMAC with what everybody knows: the public key."""
    head = {"alg": "HS256", "typ": "JWT", "kid": "key-1"}
    said = claims(**HUMAN, iss=issuer.url)
    signed = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(said).encode())}"
    hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    return f"{signed}.{b64(hmac.sign(signed.encode(), signer().public_pem()))}"


def _unsigned(issuer: Idp) -> str:
    said = claims(**HUMAN, iss=issuer.url)
    return ".".join((b64(b'{"alg": "none"}'), b64(json.dumps(said).encode()), ""))


BAD: dict[str, tuple[str, Callable[[Idp], str]]] = {
    "another audience": ("token_audience", lambda idp: idp.token(claims(**HUMAN, aud="https://x"))),
    "expired": ("token_expired", lambda idp: idp.token(claims(**HUMAN), iat=1, exp=1_700_000_000)),
    "not yet": ("token_not_yet_valid", lambda idp: idp.token(claims(**HUMAN, nbf=4_000_000_000))),
    "unknown key": ("token_key_unknown", lambda idp: idp.token(claims(**HUMAN), signer("key-9"))),
    "another issuer": ("token_issuer", lambda idp: idp.token(claims(**HUMAN), iss="https://x")),
    "no issuer": ("token_issuer", lambda idp: idp.token(claims(**HUMAN), iss=DROP)),
    "HMAC": ("token_algorithm", _confused),
    "unsigned": ("token_algorithm", _unsigned),
    "changed": ("token_signature", lambda idp: _changed(idp.token(claims(**HUMAN)))),
    "not a JWT": ("token_malformed", lambda idp: "opaque"),
    "an actor that is a text": (
        "chain_malformed",
        lambda idp: idp.token(claims(**HUMAN, act="support-bot")),
    ),
    "nine in a chain": (
        "chain_too_long",
        lambda idp: idp.token(claims(**HUMAN, act=nested(*map(str, range(8))))),
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
    refused = [each for each in place.records() if each["type"] == "refused"]
    told = {(each["reason"], each["source_address"], each["path"]) for each in refused}
    assert (code, "127.0.0.1", "/mcp") in told


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
    good = ("Authorization", f"Bearer {place.issuer.token(claims(**HUMAN))}")
    assert post(place.url, initialize(), [good]).status == 200
    _refused(post(place.url, initialize(), [good, good]), "token_malformed")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_has_no_case(place: Place, scheme: str) -> None:
    given = [("Authorization", f"{scheme} {place.issuer.token(claims(**HUMAN))}")]
    assert post(place.url, initialize(), given).status == 200


def test_who_shows_nothing_is_told_what_to_ask_for(place: Place) -> None:
    token = place.issuer.token(claims(**HUMAN))
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
    tokens = {name: place.issuer.token(dict(who.claims)) for name, (who, *_) in MATRIX.items()}
    opened = place.post(initialize(), tokens["human ana"])
    session = ("Mcp-Session-Id", opened.headers["mcp-session-id"])
    greeted = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    assert place.post(greeted, tokens["human ana"], session).status == 202
    asked = call(2, "get_ticket", id=4711)
    the_same = {"human ana", "a client that is not listed"}  # ana again, who is judged anew
    for name, token in tokens.items():
        status = place.post(asked, token, session).status
        assert status == (200 if name in the_same else 404), name
    renewed = place.issuer.token(dict(ANA.claims), jti="t-2")
    assert place.post(asked, renewed, session).status == 200
    with Wire(place.url) as wire:
        bearer = ("Authorization", f"Bearer {tokens['service reporting']}")
        wire.request(headers=(*JSON_HEADERS, bearer, session), verb="DELETE")
        assert wire.answer("DELETE").status == 404
    assert place.post(asked, tokens["human ana"], session).status == 200


def test_keys_are_rotated_while_it_runs(alone: Place) -> None:
    first = alone.issuer.token(claims(**HUMAN))
    assert alone.post(initialize(), first).status == 200
    alone.issuer.server.keys = key_set(signer("key-2"))
    second = alone.issuer.token(claims(**HUMAN), signer("key-2"))
    wait_until(lambda: alone.post(initialize(), second).status == 200, "the new key is known")
    metrics = get(f"{alone.front.admin}/metrics")[1].decode()
    for result in ('authz_result="success"} 2.0', 'authz_result="failure"} 0.0'):
        assert f'authz_keys_refreshes_total{{authz_issuer="{alone.issuer.url}",{result}' in metrics
    assert f'authz_keys_age_seconds{{authz_issuer="{alone.issuer.url}"}}' in metrics
    _refused(alone.post(initialize(), first), "token_key_unknown")


def test_known_keys_are_good_while_the_issuer_is_down(alone: Place) -> None:
    assert alone.post(initialize(), alone.issuer.token(claims(**HUMAN))).status == 200
    alone.issuer.stop()
    assert alone.post(initialize(), alone.issuer.token(claims(**HUMAN, jti="t-2"))).status == 200
    unknown = alone.issuer.token(claims(**HUMAN), signer("key-2"))
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
        for who, *_ in MATRIX.values():
            place.post(modern(message), place.issuer.token(dict(who.claims)), *mirrors(message))
        for _, make in BAD.values():
            token = make(place.issuer)
            place.issuer.issued.append(token)
            assert place.post(request(1, "ping"), token).status == 401
        place.sink.wait_for(len(MATRIX), where=lambda span: span.kind == "SERVER")
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
    assert len(secrets) > len(MATRIX) + len(BAD)
    for where, text in left.items():
        assert [secret for secret in secrets - {"opaque"} if secret in text] == [], where
        assert "ana@example.com" not in text, where


def _policies(folder: Path) -> tuple[str, str]:
    from tests.support.processes import ROOT

    return str(ROOT / "policies" / "mcp"), str(folder)
