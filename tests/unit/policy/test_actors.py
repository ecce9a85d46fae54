"""Tokens as data: who acts by them, for whom and of what type; or why they are refused."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.errors import Unauthenticated
from sidecar.policy.actors import identify
from sidecar.policy.identity import TokenFacts
from sidecar.policy.tokens import check_times
from tests.support.issuing import (
    CLUSTER,
    DROP,
    IDP,
    NOW,
    PARTNER,
    account_claims,
    claims,
    cluster,
    issuer,
    nested,
    own_claims,
    shown,
)
from tests.support.issuing import (
    verified as token,
)

ANA = "human u-1042"

# ── Tokens alone ──────────────────────────────────────────────────────────────────────────────────

FROM_TOKENS = {
    # whose token it is, by the client it was given to
    "interactive-client": (claims(), [ANA]),
    "interactive-client-by-azp": (claims(client_id=DROP, azp="desk-cli"), [ANA]),
    "interactive-client-by-both": (claims(azp="desk-web"), [ANA]),
    "interactive-by-one-name-only": (claims(azp="unlisted"), ["unknown u-1042"]),
    "client-not-listed": (claims(client_id="unlisted"), ["unknown u-1042"]),
    "client-not-named": (claims(client_id=DROP), ["unknown u-1042"]),
    "subject-with-a-bar": (claims(sub="auth0|7"), ["human auth0|7"]),
    "subject-named-as-another": (claims(iss=PARTNER), ["human partner|u-1042"]),
    # a client's own
    "own-by-subject": (own_claims(), ["service billing"]),
    "own-by-azp": (own_claims(client_id=DROP, azp="billing"), ["service billing"]),
    "own-without-subject": (own_claims(sub=DROP), ["service billing"]),
    "own-with-two-names": (own_claims(azp="other"), ["service billing"]),
    "own-by-gty": (
        own_claims(sub="billing@clients", gty="client-credentials"),
        ["service billing"],
    ),
    "own-by-grant-type": (
        own_claims(sub="5d-11", grant_type="client_credentials"),
        ["service billing"],
    ),
    "own-by-idtyp": (own_claims(sub="5d-11", idtyp="app"), ["service billing"]),
    "own-by-hint-without-client": (
        own_claims(sub="5d-11", client_id=DROP, idtyp="app"),
        ["service 5d-11"],
    ),
    "own-of-an-interactive-client": (own_claims("desk-web"), ["service desk-web"]),
    "own-of-an-agent": (own_claims("support-bot"), ["agent support-bot"]),
    "own-of-an-agent-by-gty": (
        own_claims("support-bot", sub="support-bot@clients", gty="client-credentials"),
        ["agent support-bot"],
    ),
    "a-user-grant-is-not-own": (claims(gty="password"), [ANA]),
    # a client that is an agent acts, also without `act`
    "agent-without-act": (
        claims(client_id="support-bot"),
        ["agent support-bot", "unknown u-1042"],
    ),
    "agent-by-azp": (
        claims(client_id=DROP, azp="support-bot"),
        ["agent support-bot", "unknown u-1042"],
    ),
    "agent-by-azp-behind-an-interactive-client": (
        claims(azp="support-bot"),
        ["agent support-bot", "unknown u-1042"],
    ),
    "agent-of-another-issuer-is-none-here": (
        claims(iss=PARTNER, client_id="partner-bot"),
        ["unknown partner|u-1042"],
    ),
    # `act`: the outermost acts, and the subject is whom it acts for
    "act": (claims(act={"sub": "support-bot"}), ["agent support-bot", ANA]),
    "act-not-listed": (claims(act={"sub": "gateway"}), ["unknown gateway", ANA]),
    "act-nested": (
        claims(act=nested("gateway", "support-bot")),
        ["unknown gateway", "agent support-bot", ANA],
    ),
    "act-and-its-own-client": (
        claims(act={"sub": "support-bot"}, client_id="support-bot"),
        ["agent support-bot", "unknown u-1042"],
    ),
    "act-and-another-agent-as-client": (
        claims(act={"sub": "gateway"}, client_id="support-bot"),
        ["unknown gateway", "agent support-bot", "unknown u-1042"],
    ),
    "act-and-its-issuer": (
        claims(act={"sub": "support-bot", "iss": IDP}),
        ["agent support-bot", ANA],
    ),
    "act-for-a-service": (
        own_claims(act={"sub": "support-bot"}),
        ["agent support-bot", "service billing"],
    ),
    "act-as-long-as-may-be": (
        claims(act=nested(*(f"hop-{n}" for n in range(7)))),
        [*(f"unknown hop-{n}" for n in range(7)), ANA],
    ),
    "may-act-is-no-act": (claims(may_act={"sub": "support-bot"}), [ANA]),
    # Kubernetes
    "account": (account_claims(), ["service cluster|support/bot"]),
    "account-without-pod": (
        account_claims(bound={"namespace": "support", "serviceaccount": {"name": "bot"}}),
        ["service cluster|support/bot"],
    ),
}


@pytest.mark.parametrize(("said", "chain"), FROM_TOKENS.values(), ids=FROM_TOKENS)
def test_a_token_says_who_acts_and_for_whom(said: dict[str, Any], chain: list[str]) -> None:
    actor = identify(token=token(said))
    assert shown(actor) == chain
    assert actor.assurance == 2
    assert actor.sources == (("kubernetes",) if said["iss"] == CLUSTER else ("jwt",))


REFUSED = {
    "act-a-string": (claims(act="support-bot"), "chain_malformed"),
    "act-null": (claims(act=None), "chain_malformed"),
    "act-a-list": (claims(act=[{"sub": "support-bot"}]), "chain_malformed"),
    "act-empty": (claims(act={}), "chain_malformed"),
    "act-false": (claims(act=False), "chain_malformed"),
    "act-with-a-client-alone": (claims(act={"client_id": "support-bot"}), "chain_malformed"),
    "act-sub-a-number": (claims(act={"sub": 7}), "chain_malformed"),
    "act-sub-null": (claims(act={"sub": None}), "chain_malformed"),
    "act-sub-empty": (claims(act={"sub": ""}), "chain_malformed"),
    "act-sub-with-a-newline": (claims(act={"sub": "a\nb"}), "chain_malformed"),
    "act-of-a-foreign-issuer": (claims(act={"sub": "bot", "iss": PARTNER}), "chain_malformed"),
    "act-of-the-cluster": (claims(act={"sub": "a/b", "iss": CLUSTER}), "chain_malformed"),
    "act-issuer-null": (claims(act={"sub": "bot", "iss": None}), "chain_malformed"),
    "act-issuer-a-list": (claims(act={"sub": "bot", "iss": [IDP]}), "chain_malformed"),
    "nested-act-a-string": (claims(act={"sub": "a", "act": "b"}), "chain_malformed"),
    "nested-act-a-list": (claims(act={"sub": "a", "act": []}), "chain_malformed"),
    "nested-act-null": (claims(act={"sub": "a", "act": None}), "chain_malformed"),
    "nested-act-sub-a-list": (claims(act={"sub": "a", "act": {"sub": []}}), "chain_malformed"),
    "chain-of-nine": (claims(act=nested(*"abcdefgh")), "chain_too_long"),
    "chain-of-forty": (claims(act=nested(*"abcdefgh" * 5)), "chain_too_long"),
    "chain-of-nine-by-its-client": (
        claims(act=nested(*"abcdefg"), client_id="support-bot"),
        "chain_too_long",
    ),
    "neither-subject-nor-client": (claims(sub=DROP, client_id=DROP), "token_claims"),
    "client-a-number": (claims(client_id=7), "token_claims"),
    "client-null": (claims(client_id=None), "token_claims"),
    "azp-a-list": (claims(azp=["support-bot"]), "token_claims"),
    "client-empty": (claims(client_id=""), "token_claims"),
    "account-no-account": (account_claims(sub="system:node:node-1"), "token_claims"),
    "account-a-person": (account_claims(sub="ana"), "token_claims"),
    "account-with-a-colon-more": (
        account_claims(sub="system:serviceaccount:support:bot:x"),
        "token_claims",
    ),
    "account-with-a-slash": (account_claims("support/x", "bot"), "token_claims"),
    "account-without-subject": (account_claims(sub=DROP), "token_claims"),
    "account-unbound": (account_claims(bound=DROP), "token_claims"),
    "account-bound-to-a-string": (account_claims(bound="support"), "token_claims"),
    "account-of-two-namespaces": (
        account_claims(sub="system:serviceaccount:admin:bot"),
        "token_claims",
    ),
    "account-of-two-names": (account_claims(sub="system:serviceaccount:support:x"), "token_claims"),
    "account-with-an-act": (account_claims(act={"sub": "support-bot"}), "chain_malformed"),
}


@pytest.mark.parametrize(("said", "code"), REFUSED.values(), ids=REFUSED)
def test_a_token_that_says_nothing_clear_is_refused(said: dict[str, Any], code: str) -> None:
    verified = token(said)
    with pytest.raises(Unauthenticated) as caught:
        identify(token=verified)
    assert caught.value.code == code


def test_the_same_name_at_two_issuers_is_two_principals() -> None:
    one, other = (identify(token=token(claims(iss=each))) for each in (IDP, PARTNER))
    assert one.principal.id == other.principal.id
    assert one.principal.key != other.principal.key


def test_a_foreign_actor_may_be_named_where_the_settings_say_so() -> None:
    by = issuer(actor_issuers=(PARTNER,), agents=("support-bot", "partner-bot"))
    actor = identify(token=token(claims(act={"sub": "partner-bot", "iss": PARTNER}), by))
    assert shown(actor) == ["unknown partner|partner-bot", ANA]


def test_an_agent_where_people_sign_in_acts_for_a_human() -> None:
    by = issuer(interactive=("support-bot",))
    actor = identify(token=token(claims(client_id="support-bot"), by))
    assert shown(actor) == ["agent support-bot", ANA]


def test_an_agent_is_one_principal_alone_and_for_somebody() -> None:
    alone = identify(
        token=token(own_claims("support-bot", sub="support-bot@clients", gty="client-credentials"))
    )
    for_ana = identify(token=token(claims(client_id="support-bot")))
    assert alone.principal.key == for_ana.principal.key


# ── What a principal carries ──────────────────────────────────────────────────────────────────────


def test_groups_scopes_and_claims_belong_to_the_subject() -> None:
    by = issuer(claims=("email", "team"))
    said = claims(act={"sub": "support-bot", "groups": ["bots"], "scope": "all"}, private="x")
    bot, ana = identify(token=token(said, by)).chain
    assert (bot.groups, bot.scopes, bot.claims) == (("bots",), (), {})
    assert (ana.groups, ana.scopes) == (("support",), ("tickets:read", "tickets:write"))
    assert ana.claims == {"email": "ana@example.com"}


@pytest.mark.parametrize(
    ("path", "said", "groups"),
    [
        pytest.param("groups", {"groups": ["a", "b"]}, ("a", "b"), id="list"),
        pytest.param("groups", {"groups": "a b"}, ("a", "b"), id="words"),
        pytest.param("groups", {"groups": DROP}, (), id="absent"),
        pytest.param("groups", {"groups": ["a", 7]}, (), id="not-all-strings"),
        pytest.param("groups", {"groups": {"a": True}}, (), id="object"),
        pytest.param(
            "realm_access.roles", {"realm_access": {"roles": ["a"]}}, ("a",), id="dotted-path"
        ),
        pytest.param("realm_access.roles", {"realm_access": ["roles"]}, (), id="no-such-path"),
        pytest.param(
            "https://example.com/roles", {"https://example.com/roles": ["a"]}, ("a",), id="url"
        ),
    ],
)
def test_groups_come_from_the_configured_claim(
    path: str, said: dict[str, Any], groups: tuple[str, ...]
) -> None:
    actor = identify(token=token(claims(**said), issuer(groups=path)))
    assert actor.principal.groups == groups


@pytest.mark.parametrize(
    ("said", "scopes"),
    [
        pytest.param({"scope": "a b"}, ("a", "b"), id="scope"),
        pytest.param({"scope": DROP, "scp": ["a", "b"]}, ("a", "b"), id="scp-list"),
        pytest.param({"scope": DROP, "scp": "a b"}, ("a", "b"), id="scp-words"),
        pytest.param({"scope": "", "scp": ["a"]}, (), id="scope-wins"),
        pytest.param({"scope": 7}, (), id="number"),
        pytest.param({"scope": DROP}, (), id="absent"),
    ],
)
def test_scopes_come_from_scope_or_scp(said: dict[str, Any], scopes: tuple[str, ...]) -> None:
    assert identify(token=token(claims(**said))).principal.scopes == scopes


def test_a_service_account_carries_its_pod() -> None:
    assert identify(token=token(account_claims())).principal.claims == {
        "namespace": "support",
        "service_account": "bot",
        "pod": "bot-7c9",
        "pod_uid": "77aa",
        "node": "node-1",
    }


@pytest.mark.parametrize(
    ("bound", "good"),
    [
        pytest.param({"pod": {"name": "bot-7c9", "uid": "77aa"}}, True, id="bound"),
        pytest.param({}, False, id="unbound"),
        pytest.param({"pod": {"name": "bot-7c9"}}, False, id="without-uid"),
        pytest.param({"pod": "bot-7c9"}, False, id="a-string"),
    ],
)
def test_a_bound_pod_is_required_where_configured(bound: dict[str, Any], good: bool) -> None:
    parts = {"namespace": "support", "serviceaccount": {"name": "bot"}, **bound}
    verified = token(account_claims(bound=parts), cluster(pod_required=True))
    if good:
        assert identify(token=verified).principal.id == "support/bot"
    else:
        with pytest.raises(Unauthenticated, match="no pod"):
            identify(token=verified)


def test_the_actor_tells_of_its_token_what_may_be_told() -> None:
    by = issuer(purpose="ctx.purpose")
    actor = identify(token=token(claims(ctx={"purpose": "refund"}), by))
    assert actor.token == TokenFacts(NOW + 3600, "t-1", NOW - 60)
    assert actor.purpose == "refund"


@pytest.mark.parametrize("said", [{}, {"purpose": 7}, {"purpose": ["refund"]}])
def test_a_purpose_is_a_string_or_absent(said: dict[str, Any]) -> None:
    assert identify(token=token(claims(**said), issuer(purpose="purpose"))).purpose is None


def test_of_two_tokens_the_evidence_ends_with_the_first_to_expire() -> None:
    account = token(account_claims(exp=NOW + 60))
    actor = identify(account=account, token=token(claims()))
    assert actor.token == TokenFacts(NOW + 60, "t-1", NOW - 60)


@pytest.mark.parametrize("leeway", [0.0, 30.0])
def test_what_a_token_opens_lasts_until_it_is_refused(leeway: float) -> None:
    verified = token(claims(exp=NOW + 60), issuer(leeway=leeway))
    ends = identify(token=verified).expires_at
    assert ends is not None
    assert ends == NOW + 60 + leeway
    check_times(verified, ends - 0.001)
    with pytest.raises(Unauthenticated, match="expired"):
        check_times(verified, ends)
