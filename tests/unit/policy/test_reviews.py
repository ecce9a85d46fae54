"""What a cluster says of a token, case by case: the actor that comes of it, or the refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sidecar.errors import Unauthenticated
from sidecar.policy import reviews, tokens
from sidecar.policy.actors import TypeRule, identify
from sidecar.policy.identity import Actor
from sidecar.policy.issuers import Issuer, Review
from tests.support.api_server import EXTRA, changed, refused, taken
from tests.support.issuing import (
    AUDIENCE,
    DROP,
    NOW,
    account_claims,
    cluster,
    shown,
    signer,
    verified,
)

POD = {
    "namespace": "support",
    "service_account": "bot",
    "pod": "bot-7c9",
    "pod_uid": "77aa",
    "node": "node-1",
}
UNBOUND = {"namespace": "support", "serviceaccount": {"name": "bot", "uid": "5c1f"}}
GOOD = taken(account_claims(), [AUDIENCE])
USER, TOLD = GOOD["user"], GOOD["user"]["extra"]


def asked(**changes: Any) -> Issuer:
    return cluster(review=Review(), **changes)


def actor(
    said: dict[str, Any], answer: Any, by: Issuer | None = None, rules: tuple[TypeRule, ...] = ()
) -> Actor:
    """As the authenticator does it; nobody looks at the signature but the cluster."""
    token = signer("nobody knows it").sign(said)
    claimed = tokens.claimed(tokens.look(token), by or asked(), NOW)
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return identify(rules, token=reviews.read(body, claimed))


def review(status: Any, **more: Any) -> dict[str, Any]:
    """The whole object, as it comes."""
    kind = {"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1"}
    return {**kind, "metadata": {"creationTimestamp": None}, "spec": {}, "status": status, **more}


def user(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "user": changed(USER, **changes)}


def extra(**changes: Any) -> dict[str, Any]:
    named = {f"{EXTRA}{name.replace('_', '-')}": value for name, value in changes.items()}
    return user(extra=changed(TOLD, **named))


def test_the_question_names_our_audiences() -> None:
    assert reviews.question("t", cluster(review=Review())) == {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": "t", "audiences": [AUDIENCE]},
    }


def test_the_actor_is_the_one_that_keys_give() -> None:
    found = actor(account_claims(), review(GOOD))
    assert found == identify(token=verified(account_claims(), cluster()))
    assert shown(found) == ["service cluster|support/bot"]
    assert (found.assurance, found.sources) == (2, ("kubernetes",))
    assert found.principal.claims == POD
    assert found.token is not None
    assert (found.token.id, found.token.expires_at) == ("k-1", NOW + 3600)


GOOD_CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "as it comes": (account_claims(), review(GOOD)),
    "one audience of several": (account_claims(), review({**GOOD, "audiences": ["x", AUDIENCE]})),
    "a cluster that tells no nodes": (
        account_claims(),
        review(extra(node_name=DROP, node_uid=DROP, credential_id=DROP)),
    ),
    "bound to no pod": (
        account_claims(bound=UNBOUND),
        review(taken(account_claims(bound=UNBOUND), [AUDIENCE])),
    ),
    "with something that is not known yet": (
        account_claims(),
        review({**GOOD, "new": 1}, new={"a": []}),
    ),
}


@pytest.mark.parametrize("name", GOOD_CASES)
def test_a_good_review_is_believed(name: str) -> None:
    assert shown(actor(*GOOD_CASES[name])) == ["service cluster|support/bot"]


def test_rules_make_agents_of_accounts() -> None:
    rules = (TypeRule("agent", source="kubernetes", subject="support/*"),)
    assert shown(actor(account_claims(), review(GOOD), rules=rules)) == [
        "agent cluster|support/bot"
    ]


BAD_CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    # What the cluster says.
    "not taken": ("token_rejected", account_claims(), review(refused())),
    "expressly not": ("token_rejected", account_claims(), review({**GOOD, "authenticated": False})),
    "a text": ("token_rejected", account_claims(), review({**GOOD, "authenticated": "true"})),
    "nothing at all": ("token_rejected", account_claims(), review({})),
    "of other audiences": (
        "token_audience",
        account_claims(),
        review({**GOOD, "audiences": ["https://kubernetes.default.svc"]}),
    ),
    "of no audience": ("token_audience", account_claims(), review({**GOOD, "audiences": []})),
    "by one who knows no audiences": (
        "token_audience",
        account_claims(),
        review(changed(GOOD, audiences=DROP)),
    ),
    "audiences that are a text": (
        "token_audience",
        account_claims(),
        review({**GOOD, "audiences": AUDIENCE}),
    ),
    "audiences that are no texts": (
        "token_audience",
        account_claims(),
        review({**GOOD, "audiences": [[AUDIENCE], 1]}),
    ),
    "no user": ("token_claims", account_claims(), review(changed(GOOD, user=DROP))),
    "another user": (
        "token_claims",
        account_claims(),
        review(user(username="system:serviceaccount:support:admin")),
    ),
    "no name": ("token_claims", account_claims(), review(user(username=DROP))),
    "a person": (
        "token_claims",
        account_claims(sub="ana"),
        review(user(username="ana")),
    ),
    "a node": (
        "token_claims",
        account_claims(sub="system:node:n1"),
        review(user(username="system:node:n1")),
    ),
    "another pod": ("token_claims", account_claims(), review(extra(pod_name=["else"]))),
    "another pod of that name": ("token_claims", account_claims(), review(extra(pod_uid=["1"]))),
    "two pods": ("token_claims", account_claims(), review(extra(pod_name=["bot-7c9", "else"]))),
    "a pod that is not confirmed": (
        "token_claims",
        account_claims(),
        review(extra(pod_name=DROP, pod_uid=DROP)),
    ),
    "a pod that the token does not name": (
        "token_claims",
        account_claims(bound=UNBOUND),
        review(GOOD),
    ),
    "another node": ("token_claims", account_claims(), review(extra(node_name=["n9"]))),
    "an extra that is a list": ("token_claims", account_claims(), review(user(extra=["x"]))),
    # What is no answer.
    "not JSON": ("review_unavailable", account_claims(), b"<html>"),
    "two answers in one": (
        "review_unavailable",
        account_claims(),
        b'{"kind":"TokenReview","status":{},"status":{"authenticated":true}}',
    ),
    "another kind": (
        "review_unavailable",
        account_claims(),
        review(GOOD, kind="SelfSubjectReview"),
    ),
    "a failure": ("review_unavailable", account_claims(), review("Failure", kind="Status")),
    "a list": ("review_unavailable", account_claims(), [review(GOOD)]),
    # What the token says: nobody asks about it then.
    "for somebody else": ("token_audience", account_claims(aud=["https://else"]), review(GOOD)),
    "expired": ("token_expired", account_claims(exp=NOW - 31), review(GOOD)),
    "not yet": ("token_not_yet_valid", account_claims(nbf=NOW + 31), review(GOOD)),
    "that never expires": ("token_claims", account_claims(exp=DROP), review(GOOD)),
    "of another cluster": (
        "token_issuer",
        account_claims(iss="https://else.example"),
        review(GOOD),
    ),
    "bound to a key": ("token_binding", account_claims(cnf={"jkt": "x"}), review(GOOD)),
    "with an actor": ("chain_malformed", account_claims(act={"sub": "x"}), review(GOOD)),
    "not bound at all": ("token_claims", account_claims(bound=DROP), review(GOOD)),
    "bound to another account": (
        "token_claims",
        account_claims(bound={**UNBOUND, "serviceaccount": {"name": "admin"}}),
        review(taken(account_claims(bound=UNBOUND), [AUDIENCE])),
    ),
}


@pytest.mark.parametrize("name", BAD_CASES)
def test_a_bad_one_is_refused(name: str) -> None:
    code, said, answer = BAD_CASES[name]
    with pytest.raises(Unauthenticated) as caught:
        actor(said, answer)
    assert caught.value.code == code
    assert caught.value.retryable is (code == "review_unavailable")


def test_a_pod_may_be_required() -> None:
    said = account_claims(bound=UNBOUND)
    with pytest.raises(Unauthenticated, match="no pod"):
        actor(said, review(taken(said, [AUDIENCE])), asked(pod_required=True))
