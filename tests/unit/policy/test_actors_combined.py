"""Evidence of several kinds as data: combined into one actor, and typed by the rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import Unauthenticated
from sidecar.policy.actors import Asserted, TypeRule, identify
from sidecar.policy.identity import MAX_CHAIN, PRINCIPAL_TYPES, UNKNOWN, Actor
from sidecar.policy.spiffe import Workload, workload
from tests.support.issuing import (
    CLUSTER,
    DOMAIN,
    DROP,
    IDP,
    NOW,
    PARTNER,
    account_claims,
    claims,
    issuer,
    nested,
    own_claims,
    shown,
)
from tests.support.issuing import (
    verified as token,
)

ANA = "human u-1042"
BOT_SPIFFE = f"{DOMAIN}/ns/support/sa/bot"
BOT = workload(BOT_SPIFFE)
GATEWAY = workload(f"{DOMAIN}/gateway")
TOLD = workload(BOT_SPIFFE, asserted=True)

# ── Evidence together ─────────────────────────────────────────────────────────────────────────────

SERVICE, PERSON = Asserted("billing", "edge"), Asserted("ana", "edge", ("support",))
SPIFFE = f"service {BOT_SPIFFE}"

TOGETHER: dict[str, tuple[dict[str, Any], list[str], int, tuple[str, ...]]] = {
    "nothing": ({}, ["unknown none|anonymous"], 0, ()),
    "workload": ({"workload": BOT}, [SPIFFE], 3, ("mtls",)),
    "workload-with-a-token": (
        {"workload": BOT, "token": claims()},
        [SPIFFE, ANA],
        3,
        ("mtls", "jwt"),
    ),
    "workload-with-an-agents-token": (
        {"workload": GATEWAY, "token": claims(client_id="support-bot")},
        [f"service {DOMAIN}/gateway", "agent support-bot", "unknown u-1042"],
        3,
        ("mtls", "jwt"),
    ),
    "workload-with-a-chain": (
        {"workload": GATEWAY, "token": claims(act=nested("a", "support-bot"))},
        [f"service {DOMAIN}/gateway", "unknown a", "agent support-bot", ANA],
        3,
        ("mtls", "jwt"),
    ),
    "workload-that-is-the-tokens-actor": (
        {"workload": BOT, "token": claims(act={"sub": BOT_SPIFFE})},
        [SPIFFE, ANA],
        3,
        ("mtls", "jwt"),
    ),
    "workload-that-is-the-outermost-actor": (
        {"workload": BOT, "token": claims(act=nested(BOT_SPIFFE, "support-bot"))},
        [SPIFFE, "agent support-bot", ANA],
        3,
        ("mtls", "jwt"),
    ),
    "workload-that-is-an-inner-actor": (
        {"workload": BOT, "token": claims(act=nested("support-bot", BOT_SPIFFE))},
        [SPIFFE, "agent support-bot", f"unknown {BOT_SPIFFE}", ANA],
        3,
        ("mtls", "jwt"),
    ),
    "workload-with-its-own-token": (
        {"workload": BOT, "token": own_claims(BOT_SPIFFE)},
        [f"service {BOT_SPIFFE}"],
        3,
        ("mtls", "jwt"),
    ),
    "workload-with-another-workloads-token": (
        {"workload": BOT, "token": own_claims(BOT_SPIFFE + "-2")},
        [SPIFFE, f"service {BOT_SPIFFE}-2"],
        3,
        ("mtls", "jwt"),
    ),
    "workload-that-a-token-calls-an-agent": (
        {
            "workload": BOT,
            "token": token(claims(act={"sub": BOT_SPIFFE}), issuer(agents=(BOT_SPIFFE,))),
        },
        [f"agent {BOT_SPIFFE}", ANA],
        3,
        ("mtls", "jwt"),
    ),
    "workload-behind-a-proxy": ({"workload": TOLD}, [SPIFFE], 1, ("proxy",)),
    "workload-behind-a-proxy-with-a-token": (
        {"workload": TOLD, "token": claims()},
        [SPIFFE, ANA],
        1,
        ("proxy", "jwt"),
    ),
    "workload-and-person-behind-a-proxy": (
        {"workload": TOLD, "asserted": PERSON},
        [SPIFFE, "unknown edge|ana"],
        1,
        ("proxy",),
    ),
    "account-with-a-token": (
        {"account": account_claims(), "token": claims()},
        ["service cluster|support/bot", ANA],
        2,
        ("kubernetes", "jwt"),
    ),
    "workload-account-and-token": (
        {"workload": BOT, "account": account_claims(), "token": claims()},
        [SPIFFE, "service cluster|support/bot", ANA],
        3,
        ("mtls", "kubernetes", "jwt"),
    ),
    "proxy": ({"asserted": PERSON}, ["unknown edge|ana"], 1, ("proxy",)),
    "proxy-behind-a-workload": (
        {"workload": GATEWAY, "asserted": PERSON},
        [f"service {DOMAIN}/gateway", "unknown edge|ana"],
        1,
        ("mtls", "proxy"),
    ),
    "proxy-behind-an-account": (
        {"token": account_claims(), "asserted": PERSON},
        ["service cluster|support/bot", "unknown edge|ana"],
        1,
        ("kubernetes", "proxy"),
    ),
    "proxy-with-its-own-token": (
        {"token": own_claims("edge"), "asserted": PERSON},
        ["service edge", "unknown edge|ana"],
        1,
        ("jwt", "proxy"),
    ),
    "proxy-beside-a-persons-token": (
        {"token": claims(), "asserted": Asserted("root", "edge")},
        [ANA],
        2,
        ("jwt",),
    ),
    "proxy-beside-an-unknown-subjects-token": (
        {"token": claims(client_id=DROP), "asserted": Asserted("root", "edge")},
        ["unknown u-1042"],
        2,
        ("jwt",),
    ),
}


def combined(evidence: dict[str, Any], *rules: TypeRule) -> Actor:
    made: dict[str, Any] = {
        key: token(each) if isinstance(each, dict) else each for key, each in evidence.items()
    }
    return identify(rules, **made)


@pytest.mark.parametrize(
    ("evidence", "chain", "assurance", "sources"), TOGETHER.values(), ids=TOGETHER
)
def test_evidence_is_combined(
    evidence: dict[str, Any], chain: list[str], assurance: int, sources: tuple[str, ...]
) -> None:
    actor = combined(evidence)
    assert shown(actor) == chain
    assert (actor.assurance, actor.sources) == (assurance, sources)


def test_without_evidence_nobody_acts() -> None:
    assert identify() is UNKNOWN


def test_what_a_proven_workload_takes_from_a_token_of_another_issuer_is_its_scopes() -> None:
    own = combined({"workload": BOT, "token": own_claims(BOT_SPIFFE, groups=["admins"])})
    assert own.principal.issuer == DOMAIN
    assert own.principal.scopes == ("tickets:read", "tickets:write")
    assert own.principal.groups == ()


def test_a_workload_at_its_tokens_own_issuer_keeps_what_the_token_says() -> None:
    workload = Workload("billing", IDP)
    own = combined({"workload": workload, "token": own_claims(groups=["payments"])})
    assert shown(own) == ["service billing"]
    assert (own.principal.groups, own.assurance) == (("payments",), 3)


def test_what_the_proxy_says_of_groups_stays_with_whom_it_says_it_of() -> None:
    actor = combined({"workload": GATEWAY, "asserted": PERSON})
    assert [each.groups for each in actor.chain] == [(), ("support",)]


def test_a_workload_counts_in_the_chain() -> None:
    seven = claims(act=nested(*"abcdefg"))
    assert len(combined({"token": seven}).chain) == MAX_CHAIN
    with pytest.raises(Unauthenticated) as caught:
        combined({"workload": BOT, "token": seven})
    assert caught.value.code == "chain_too_long"


LEEWAY = issuer().leeway


@pytest.mark.parametrize(
    ("ends", "told", "expires_at"),
    [
        (None, None, None),
        (NOW + 60, None, NOW + 60),
        (None, claims(), NOW + 3600 + LEEWAY),
        (NOW + 60, claims(), NOW + 60),
        (NOW + 7200, claims(), NOW + 3600 + LEEWAY),
    ],
)
def test_evidence_lasts_as_long_as_each_of_its_pieces(
    ends: float | None, told: dict[str, Any] | None, expires_at: float | None
) -> None:
    said = {"workload": workload(BOT_SPIFFE, expires_at=ends)}
    assert combined({**said, **({"token": told} if told else {})}).expires_at == expires_at


# ── Types by rule ─────────────────────────────────────────────────────────────────────────────────

AGENTS = TypeRule("agent", subject="support/*")
PEOPLE = TypeRule("human", claim="email")
STAFF = TypeRule("human", claim="groups", equals="support")

TYPED: dict[str, tuple[list[TypeRule], dict[str, Any], list[str]]] = {
    "account-that-a-rule-makes-an-agent": (
        [AGENTS],
        {"token": account_claims()},
        ["agent cluster|support/bot"],
    ),
    "account-of-another-namespace": (
        [AGENTS],
        {"token": account_claims("billing")},
        ["service cluster|billing/bot"],
    ),
    "account-by-its-claims": (
        [TypeRule("agent", claim="namespace", equals="support")],
        {"token": account_claims()},
        ["agent cluster|support/bot"],
    ),
    "account-is-never-human": (
        [TypeRule("human", issuer=CLUSTER)],
        {"token": account_claims()},
        ["service cluster|support/bot"],
    ),
    "own-token-is-never-human": (
        [TypeRule("human", issuer=IDP)],
        {"token": own_claims()},
        ["service billing"],
    ),
    "own-token-that-a-rule-makes-an-agent": (
        [TypeRule("agent", subject="bill*")],
        {"token": own_claims()},
        ["agent billing"],
    ),
    "a-later-rule-after-one-that-may-not": (
        [TypeRule("human", issuer=IDP), TypeRule("agent", issuer=IDP)],
        {"token": own_claims()},
        ["agent billing"],
    ),
    "claim-present": ([PEOPLE], {"token": claims(client_id=DROP)}, [ANA]),
    "claim-absent": (
        [PEOPLE],
        {"token": claims(client_id=DROP, email=DROP)},
        ["unknown u-1042"],
    ),
    "claim-null-is-absent": (
        [PEOPLE],
        {"token": claims(client_id=DROP, email=None)},
        ["unknown u-1042"],
    ),
    "item-of-a-list": ([STAFF], {"token": claims(client_id=DROP)}, [ANA]),
    "no-item-of-a-list": (
        [STAFF],
        {"token": claims(client_id=DROP, groups=["supporters"])},
        ["unknown u-1042"],
    ),
    "glob": (
        [TypeRule("human", claim="email", glob="*@example.com")],
        {"token": claims(client_id=DROP)},
        [ANA],
    ),
    "glob-takes-all-of-it": (
        [TypeRule("human", claim="email", glob="*@example.com")],
        {"token": claims(client_id=DROP, email="ana@example.com.evil.example")},
        ["unknown u-1042"],
    ),
    "glob-means-its-dots": (
        [TypeRule("human", claim="email", glob="*@example.com")],
        {"token": claims(client_id=DROP, email="ana@exampleXcom")},
        ["unknown u-1042"],
    ),
    "glob-of-a-number": (
        [TypeRule("human", claim="level", glob="*")],
        {"token": claims(client_id=DROP, level=3)},
        ["unknown u-1042"],
    ),
    "true-is-not-one": (
        [TypeRule("human", claim="staff", equals=True)],
        {"token": claims(client_id=DROP, staff=1)},
        ["unknown u-1042"],
    ),
    "true": (
        [TypeRule("human", claim="staff", equals=True)],
        {"token": claims(client_id=DROP, staff=True)},
        [ANA],
    ),
    "false-is-a-value": (
        [TypeRule("human", claim="robot", equals=False)],
        {"token": claims(client_id=DROP, robot=False)},
        [ANA],
    ),
    "first-rule-wins": (
        [TypeRule("unknown", subject="u-1042"), PEOPLE],
        {"token": claims()},
        ["unknown u-1042"],
    ),
    "all-of-a-rule": (
        [TypeRule("human", issuer=PARTNER, claim="email")],
        {"token": claims(client_id=DROP)},
        ["unknown u-1042"],
    ),
    "rules-read-the-actors-own-object": (
        [TypeRule("agent", claim="robot", equals=True)],
        {"token": claims(act={"sub": "x", "robot": True})},
        ["agent x", ANA],
    ),
    "the-subjects-claims-are-not-its-actors": (
        [PEOPLE],
        {"token": claims(act={"sub": "x"})},
        ["unknown x", ANA],
    ),
    "spiffe-pattern": (
        [TypeRule("agent", subject=f"{DOMAIN}/ns/*/sa/bot")],
        {"workload": BOT},
        [f"agent {BOT_SPIFFE}"],
    ),
    "star-stops-at-a-slash": (
        [TypeRule("agent", subject=f"{DOMAIN}/*")],
        {"workload": BOT},
        [SPIFFE],
    ),
    "two-stars-do-not": (
        [TypeRule("agent", subject=f"{DOMAIN}/**")],
        {"workload": BOT},
        [f"agent {BOT_SPIFFE}"],
    ),
    "question-mark": (
        [TypeRule("agent", subject=f"{DOMAIN}/ns/support/sa/b?t")],
        {"workload": BOT},
        [f"agent {BOT_SPIFFE}"],
    ),
    "trust-domain": (
        [TypeRule("human", issuer="spiffe://prod.example.com")],
        {"workload": BOT},
        [f"human {BOT_SPIFFE}"],
    ),
    "source": (
        [TypeRule("agent", source="mtls")],
        {"workload": BOT, "token": claims()},
        [f"agent {BOT_SPIFFE}", ANA],
    ),
    "proxied-workloads": (
        [TypeRule("human", source="mtls"), TypeRule("agent", source="proxy")],
        {"workload": TOLD},
        [f"agent {BOT_SPIFFE}"],
    ),
    "a-workload-that-is-nothing": (
        [TypeRule("unknown", subject=BOT_SPIFFE)],
        {"workload": BOT},
        [f"unknown {BOT_SPIFFE}"],
    ),
    "proxied-people": (
        [TypeRule("human", source="proxy", issuer="edge")],
        {"asserted": PERSON},
        ["human edge|ana"],
    ),
    "proxied-services": (
        [TypeRule("service", source="proxy", subject="bill*")],
        {"asserted": SERVICE},
        ["service edge|billing"],
    ),
    "proven-type-stays": (
        [TypeRule("agent", source="mtls")],
        {"workload": BOT, "token": own_claims(BOT_SPIFFE)},
        [f"agent {BOT_SPIFFE}"],
    ),
}


@pytest.mark.parametrize(("rules", "evidence", "chain"), TYPED.values(), ids=TYPED)
def test_rules_say_what_a_principal_is(
    rules: list[TypeRule], evidence: dict[str, Any], chain: list[str]
) -> None:
    assert shown(combined(evidence, *rules)) == chain


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        pytest.param({}, "everybody", id="no-condition"),
        pytest.param({"equals": "x"}, "claim", id="value-of-nothing"),
        pytest.param({"glob": "x"}, "claim", id="pattern-of-nothing"),
        pytest.param({"claim": "a", "equals": "x", "glob": "x"}, "both", id="two-values"),
        pytest.param({"claim": "azp", "equals": "bot"}, "agents", id="collapses-azp"),
        pytest.param({"claim": "client_id"}, "agents", id="collapses-client"),
    ],
)
def test_a_rule_that_would_do_harm_is_refused(rule: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TypeRule("agent", **rule)


# ── Properties ────────────────────────────────────────────────────────────────────────────────────

VALUES = (
    st.none() | st.integers() | st.sampled_from(["a", "support-bot", "desk-web", IDP, BOT_SPIFFE])
)
ACT = st.recursive(
    VALUES,
    lambda inner: st.fixed_dictionaries({"sub": VALUES}, optional={"act": inner, "iss": VALUES}),
    max_leaves=12,
)
CLAIMS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("sub", "client_id", "azp", "gty", "groups", "scope"), VALUES),
        "act": ACT | st.integers(1, 12).map(lambda n: nested(*"abcdefghijkl"[:n])),
    },
)
RULES = st.lists(
    st.builds(
        TypeRule,
        st.sampled_from(PRINCIPAL_TYPES),
        issuer=st.just("**"),
        subject=st.none() | st.sampled_from(["*", "a", "support-*"]),
    ),
    max_size=2,
)


@given(CLAIMS, RULES, st.sampled_from([None, BOT, GATEWAY]), st.sampled_from([None, PERSON]))
def test_evidence_is_one_actor_with_a_bounded_chain_or_refused(
    said: dict[str, Any],
    rules: list[TypeRule],
    workload: Workload | None,
    asserted: Asserted | None,
) -> None:
    verified = replace(BASE, claims={"iss": IDP, **said})
    try:
        actor = identify(rules, workload=workload, token=verified, asserted=asserted)
    except Unauthenticated:
        return
    assert 1 <= len(actor.chain) <= MAX_CHAIN
    assert workload is None or actor.principal.id == workload.id
    assert actor.assurance == (1 if "proxy" in actor.sources else 3 if workload else 2)


@given(CLAIMS)
def test_nobody_is_human_without_an_interactive_client_or_a_rule(said: dict[str, Any]) -> None:
    verified = replace(BASE, claims={"iss": IDP, **said}, issuer=issuer(interactive=()))
    try:
        chain = identify(token=verified).chain
    except Unauthenticated:
        return
    assert "human" not in [each.type for each in chain]


BASE = token(claims())
