"""Issuers of the tests: keys, key sets and tokens of any kind, also what no library would make."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

from sidecar.policy import tokens
from sidecar.policy.identity import Actor
from sidecar.policy.issuers import Issuer, KeySource
from sidecar.policy.jwks import read_keys
from sidecar.policy.tokens import Token

NOW = 1_795_341_600.0
IDP = "https://idp.example.com"
PARTNER = "https://partner.example.net"
CLUSTER = "https://kubernetes.default.svc"
AUDIENCE = "https://tickets.example.com/mcp"
KEYS_URL = "https://idp.example.com/keys"

DOMAIN = "spiffe://prod.example.com"
PLACES = {IDP: "", CLUSTER: "cluster|", PARTNER: "partner|", DOMAIN: ""}

DROP = object()
"""In `claims` and `header`: leave this one out."""


@dataclass(frozen=True)
class Signer:
    """One key pair."""

    id: str | None
    algorithm: str
    private: Any

    def jwk(self, **changes: Any) -> dict[str, Any]:
        """Its public half as it stands in a key set."""
        library = get_default_algorithms()[self.algorithm]
        public = library.to_jwk(self.private.public_key(), as_dict=True)
        jwk = {"kid": self.id, "use": "sig", "alg": self.algorithm, **public, **changes}
        return {name: value for name, value in jwk.items() if value is not DROP}

    def sign(self, payload: Mapping[str, Any] | bytes, **header: Any) -> str:
        """A compact JWS over claims, or over any bytes."""
        fields = {"alg": self.algorithm, "typ": "JWT", "kid": self.id, **header}
        head = {name: value for name, value in fields.items() if value is not DROP}
        return self.sign_raw(json.dumps(head).encode(), payload)

    def sign_raw(self, head: bytes, payload: Mapping[str, Any] | bytes) -> str:
        """A compact JWS whose header is any bytes."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        signed = f"{b64(head)}.{b64(body)}"
        signature = get_default_algorithms()[self.algorithm].sign(signed.encode(), self.private)
        return f"{signed}.{b64(signature)}"

    def public_pem(self) -> bytes:
        """What an attacker knows."""
        pem: bytes = self.private.public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )
        return pem


def b64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


@cache
def signer(name: str | None = "key-1", algorithm: str = "ES256", bits: int = 2048) -> Signer:
    """The same key pair for the same name, in one run."""
    return Signer(name, algorithm, _private(algorithm, bits))


def _private(algorithm: str, bits: int) -> Any:
    curves: dict[str, ec.EllipticCurve] = {
        "ES256": ec.SECP256R1(),
        "ES384": ec.SECP384R1(),
        "ES512": ec.SECP521R1(),
    }
    if algorithm in curves:
        return ec.generate_private_key(curves[algorithm])
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, bits)


def key_set(*keys: Signer | Mapping[str, Any]) -> bytes:
    """A JWK set."""
    entries = [each.jwk() if isinstance(each, Signer) else each for each in keys]
    return json.dumps({"keys": entries}).encode()


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token of `IDP` says: a person at the desk's web client."""
    good = {
        "iss": IDP,
        "sub": "u-1042",
        "aud": AUDIENCE,
        "exp": NOW + 3600,
        "iat": NOW - 60,
        "jti": "t-1",
        "client_id": "desk-web",
        "scope": "tickets:read tickets:write",
        "groups": ["support"],
        "email": "ana@example.com",
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not DROP}


def own_claims(client: str = "billing", **changes: Any) -> dict[str, Any]:
    """What a client's own token says."""
    return claims(**{"sub": client, "client_id": client, "groups": DROP, "email": DROP, **changes})


def account_claims(
    namespace: str = "support", name: str = "bot", *, bound: Any = None, **changes: Any
) -> dict[str, Any]:
    """What a projected service-account token says; `bound` is what it says it is bound to."""
    full = {
        "namespace": namespace,
        "serviceaccount": {"name": name, "uid": "5c1f"},
        "pod": {"name": f"{name}-7c9", "uid": "77aa"},
        "node": {"name": "node-1", "uid": "9d"},
    }
    good = {
        "iss": CLUSTER,
        "sub": f"system:serviceaccount:{namespace}:{name}",
        "aud": [AUDIENCE],
        "exp": NOW + 3600,
        "iat": NOW - 60,
        "nbf": NOW - 60,
        "jti": "k-1",
        "kubernetes.io": full if bound is None else bound,
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not DROP}


def nested(*ids: str, **innermost: Any) -> dict[str, Any]:
    """An `act` of these, the outermost first."""
    act: dict[str, Any] | None = dict(innermost) or None
    for each in reversed(ids):
        act = {"sub": each} if act is None else {"sub": each, "act": act}
    assert act is not None
    return act


def issuer(name: str = IDP, **changes: Any) -> Issuer:
    """`IDP` as the tests configure it."""
    good: dict[str, Any] = {
        "audiences": (AUDIENCE,),
        "keys": KeySource(url=KEYS_URL),
        "agents": ("support-bot",),
        "interactive": ("desk-web", "desk-cli"),
    }
    return Issuer(name, **{**good, **changes})


def cluster(**changes: Any) -> Issuer:
    """A cluster as the tests configure it."""
    return Issuer(CLUSTER, (AUDIENCE,), kind="kubernetes", **changes)


def verified(said: dict[str, Any], by: Issuer | None = None) -> Token:
    """Signed, and verified: the only way there is to a token."""
    if by is None:
        by = cluster() if said["iss"] == CLUSTER else issuer(said["iss"])
    [public] = read_keys(key_set(signer()))
    return tokens.verify(tokens.look(signer().sign(said)), by, public, NOW)


def shown(actor: Actor) -> list[str]:
    """The chain in short: type, issuer where it is not the usual one, id."""
    return [
        f"{each.type} {PLACES.get(each.issuer, each.issuer + '|')}{each.id}" for each in actor.chain
    ]
