"""Who sent a request: which evidence is read, which is refused, and what the refused are told."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from sidecar.config import Identity, Proxy
from sidecar.errors import Unauthenticated
from sidecar.policy.actors import Asserted, TypeRule
from sidecar.policy.decision import Reason
from sidecar.policy.identity import UNKNOWN, Principal, static
from sidecar.policy.tokens import Token
from sidecar.transport.authentication import (
    Authentication,
    Peers,
    PipeAuthentication,
    TokenActors,
    asserted_by,
    bearer,
    insufficient,
)
from tests.support.issuing import claims, issuer, own_claims, shown, verified

EDGE = Proxy("edge", ("10.1.0.0/16", "::1"), "x-user", "x-groups")
TOKENS = {"ana": verified(claims(sub="ana")), "bot": verified(own_claims("support-bot"))}


async def verify(text: str) -> Token:
    if text not in TOKENS:
        raise Unauthenticated("token_signature", "no")
    return TOKENS[text]


def asked(remote: str | None = "10.1.2.3", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = make_mocked_request("POST", "/mcp", headers=CIMultiDict(named))
    return request.clone(remote=remote) if remote else request


# ── The header ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("said", ["Bearer a.b-c_~+/==", "bearer  x", "BEARER x", " Bearer x\t"])
def test_one_bearer_token_is_read(said: str) -> None:
    assert bearer(CIMultiDict(Authorization=said)) == said.split()[1]


@pytest.mark.parametrize(
    "said",
    [
        *(("",), ("Bearer",), ("Bearer ",), ("Basic x",), ("x",), ("Bearer a b",), ("Bearer a,b",)),
        *(("Bearer\ta",), ("Bearer é",), ("Bearer a", "Bearer a"), ("Bearer a", "")),
    ],
)
def test_anything_else_is_refused_and_not_taken_for_nothing(said: tuple[str, ...]) -> None:
    headers = CIMultiDict([("Authorization", each) for each in said])
    with pytest.raises(Unauthenticated) as caught:
        bearer(headers)
    assert caught.value.code == "token_malformed"


def test_no_header_is_no_token() -> None:
    assert bearer(CIMultiDict(Cookie="Bearer x")) is None


# ── What is combined ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("remote", "headers", "chain"),
    [
        pytest.param("9.9.9.9", {"Authorization": "Bearer ana"}, ["human ana"], id="token"),
        pytest.param("10.1.2.3", {"X_User": "eve"}, ["unknown edge|eve"], id="proxy"),
        pytest.param(
            "10.1.2.3",
            {"X_User": "eve", "Authorization": "Bearer bot"},
            ["agent support-bot", "unknown edge|eve"],
            id="an agent and whom the proxy names",
        ),
        pytest.param(
            "10.1.2.3",
            {"X_User": "eve", "Authorization": "Bearer ana"},
            ["human ana"],
            id="a token with a subject is more than a header",
        ),
        pytest.param(
            "9.9.9.9",
            {"X_User": "eve", "Authorization": "Bearer ana"},
            ["human ana"],
            id="not a proxy",
        ),
    ],
)
async def test_evidence_makes_the_actor(
    remote: str, headers: dict[str, str], chain: list[str]
) -> None:
    authentication = Authentication(Identity(issuers=(issuer(),), proxy=EDGE), verify)
    assert shown(await authentication.actor(asked(remote, **headers))) == chain


@pytest.mark.parametrize(
    ("required", "issuers", "demanded"),
    [(None, 1, True), (None, 0, False), (True, 0, True), (False, 1, False)],
)
async def test_who_shows_nothing_is_unknown_or_refused(
    required: bool | None, issuers: int, demanded: bool
) -> None:
    identity = Identity(issuers=(issuer(),) * issuers, proxy=EDGE, required=required)
    authentication = Authentication(identity, verify if issuers else None)
    for request in (asked(), asked("9.9.9.9", X_User="eve")):
        if not demanded:
            assert await authentication.actor(request) is UNKNOWN
            continue
        with pytest.raises(Unauthenticated) as caught:
            await authentication.actor(request)
        assert caught.value.code == "credentials_missing"


async def test_a_bad_token_is_refused_also_where_none_is_needed() -> None:
    identity = Identity(issuers=(issuer(),), proxy=EDGE, required=False)
    for more in ({}, {"X_User": "eve"}):
        with pytest.raises(Unauthenticated):
            await Authentication(identity, verify).actor(
                asked("10.1.2.3", Authorization="Bearer eve", **more)
            )


async def test_a_token_that_nobody_verifies_here_is_not_read() -> None:
    ana = static(Principal("human", "ana", "static"))
    authentication = Authentication(Identity(ana))
    assert await authentication.actor(asked(Authorization="Basic x")) is ana
    assert not authentication.verifies


async def test_the_actor_of_a_token_is_kept_and_a_proxys_word_is_not() -> None:
    actors = TokenActors(verify, ())
    assert await actors.actor("ana") is await actors.actor("ana")
    assert shown(await actors.actor("bot", Asserted("eve", "edge"))) != shown(
        await actors.actor("bot")
    )
    assert shown(await actors.actor("ana")) == ["human ana"]


async def test_rules_say_what_a_proxy_names() -> None:
    rule = TypeRule("human", source="proxy")
    authentication = Authentication(Identity(types=(rule,), proxy=EDGE))
    actor = await authentication.actor(asked(X_User="ana", X_Groups="a, b,,c d"))
    assert (shown(actor), actor.assurance) == (["human edge|ana"], 1)
    assert actor.principal.groups == ("a", "b", "c d")
    assert authentication.asserting == {"x-user", "x-groups", "x-forwarded-client-cert"}


@pytest.mark.parametrize(
    "headers",
    [
        [("x-user", "")],
        [("x-user", "a\x07")],
        [("x-user", "a" * 1025)],
        [("x-user", "a"), ("x-user", "b")],
        [("x-groups", "a")],
        [("x-user", "a"), ("x-groups", "a"), ("x-groups", "b")],
    ],
)
def test_a_proxy_names_one_principal(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        asserted_by(EDGE, CIMultiDict(headers))
    assert caught.value.code == "proxy_malformed"


async def test_a_pipe_is_asked_for_its_token_each_time() -> None:
    said: list[str | None] = [None, "ana", "eve", "bot"]
    pipe = PipeAuthentication(Identity(issuers=(issuer(),)), verify, lambda: said.pop(0))
    found = []
    for _ in range(4):
        try:
            found.append(shown(await pipe.actor())[0])
        except Unauthenticated as error:
            found.append(error.code)
    assert found == ["credentials_missing", "human ana", "token_signature", "agent support-bot"]
    free = PipeAuthentication(Identity(required=False), verify, lambda: None)
    assert await free.actor() is UNKNOWN


# ── Addresses ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("remote", "forwarded", "address"),
    [
        ("9.9.9.9", "", "9.9.9.9"),
        ("9.9.9.9", "1.1.1.1", "9.9.9.9"),
        ("10.1.2.3", "", "10.1.2.3"),
        ("10.1.2.3", "1.1.1.1", "1.1.1.1"),
        ("10.1.2.3", "1.1.1.1, 2.2.2.2", "2.2.2.2"),
        ("10.1.2.3", "1.1.1.1, 2.2.2.2, 10.1.9.9", "2.2.2.2"),
        ("10.1.2.3", "10.1.7.7, 10.1.9.9", "10.1.7.7"),
        ("10.1.2.3", "1.1.1.1, nonsense", "10.1.2.3"),
        ("10.1.2.3", "1.1.1.1, nonsense, 10.1.9.9", "10.1.9.9"),
        ("10.1.2.3", "2001:db8::7", "2001:db8::7"),
        ("::ffff:10.1.2.3", "1.1.1.1", "1.1.1.1"),
        ("::1", "1.1.1.1", "1.1.1.1"),
        (None, "1.1.1.1", None),
        ("/run/socket", "1.1.1.1", "/run/socket"),
    ],
)
def test_the_source_is_the_last_hop_that_is_not_believed(
    remote: str | None, forwarded: str, address: str | None
) -> None:
    assert Peers(EDGE.peers).behind(remote, forwarded) == address


def test_without_a_proxy_nobody_is_believed_about_addresses() -> None:
    authentication = Authentication(Identity())
    assert authentication.source_address(asked("9.9.9.9", X_Forwarded_For="1.1.1.1")) == "9.9.9.9"


# ── What the refused are told ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("code", "scopes", "metadata", "said"),
    [
        ("credentials_missing", (), None, "Bearer"),
        (
            "credentials_missing",
            ("a", "b"),
            "https://x",
            'scope="a b", resource_metadata="https://x"',
        ),
        ("token_expired", ("a",), None, 'error="invalid_token", error_description="token_expired"'),
    ],
)
def test_the_challenge(code: Any, scopes: tuple[str, ...], metadata: str | None, said: str) -> None:
    authentication = Authentication(Identity(scopes=scopes))
    found = authentication.challenge(Unauthenticated(code, "the token is … "), metadata)
    assert found == {"WWW-Authenticate": said if said == "Bearer" else f"Bearer {said}"}


def test_only_scopes_that_can_stand_in_a_header_are_asked_for() -> None:
    reasons = [
        *(Reason("a"), Reason("b", scope="read"), Reason("c", scope="write read")),
        *(Reason("d", scope='x"y'), Reason("e", scope="a\r\nb"), Reason("f", scope="é")),
    ]
    assert insufficient(reasons, None) == {
        "WWW-Authenticate": 'Bearer error="insufficient_scope", scope="read write a b"'
    }
    assert insufficient(reasons[:1], "https://x") == {}
