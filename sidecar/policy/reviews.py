"""A token that Kubernetes itself looks at (TokenReview, `authentication.k8s.io/v1`).

The API server is asked in place of its keys: it also knows whether the pod, the service account and
what else a token is bound to are still there. Its word counts, and what the token says of itself
has to agree with it, so that the actor is the same as by the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from sidecar.errors import MalformedMessage, Unauthenticated
from sidecar.policy.issuers import Issuer
from sidecar.policy.tokens import Token
from sidecar.protocol.jsonrpc import FROM_SERVER, JsonObject, parse_json

VERSION: Final = "authentication.k8s.io/v1"
PATH: Final = f"/apis/{VERSION}/tokenreviews"

_BOUND: Final = {
    "authentication.kubernetes.io/pod-name": ("pod", "name"),
    "authentication.kubernetes.io/pod-uid": ("pod", "uid"),
    "authentication.kubernetes.io/node-name": ("node", "name"),
    "authentication.kubernetes.io/node-uid": ("node", "uid"),
}
"""What a review tells in `extra`, and where the token says the same. Old clusters tell no nodes."""


def question(token: str, issuer: Issuer) -> JsonObject:
    """Whether this token is good for us."""
    spec = {"token": token, "audiences": [*issuer.audiences]}
    return {"apiVersion": VERSION, "kind": "TokenReview", "spec": spec}


def read(answer: bytes, claimed: Token) -> Token:
    """The token, when the answer says that it is what it claims to be.

    Raises:
        Unauthenticated: `token_rejected`, `token_audience`, `token_claims`; `review_unavailable`
            when it is no answer.
    """
    status = _status(answer)
    if status.get("authenticated") is not True:
        raise Unauthenticated("token_rejected", "the cluster does not take the token for good")
    audiences = status.get("audiences")
    if not isinstance(audiences, list) or not set(claimed.issuer.audiences).intersection(
        each for each in audiences if isinstance(each, str)
    ):
        raise Unauthenticated("token_audience", "the token is for somebody else")
    user = status.get("user")
    if not isinstance(user, dict) or not _agrees(user, claimed.claims):
        raise Unauthenticated("token_claims", "the token and its review name two accounts")
    return claimed


def _status(answer: bytes) -> JsonObject:
    with suppress(MalformedMessage):
        review = parse_json(answer, FROM_SERVER)
        if isinstance(review, dict) and review.get("kind") == "TokenReview":
            status = review.get("status")
            if isinstance(status, dict):
                return status
    raise Unauthenticated("review_unavailable", "the cluster's answer is no review")


def _agrees(user: JsonObject, claims: Mapping[str, Any]) -> bool:
    """Whether both speak of one account in one pod."""
    extra = user.get("extra") or {}
    bound = claims.get("kubernetes.io")
    if user.get("username") != claims.get("sub") or not isinstance(bound, dict):
        return False
    if not isinstance(extra, dict):
        return False
    for name, (what, key) in _BOUND.items():
        thing = bound.get(what)
        said = thing.get(key) if isinstance(thing, dict) else None
        told = extra.get(name)
        if told != [said] and not (told is None and (said is None or what == "node")):
            return False
    return True
