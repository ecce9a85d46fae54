"""A bearer token: looked at, and verified (RFC 7519, RFC 8725).

`look` reads a compact JWS without believing it: enough to know whose key to ask for. `verify` says
whether that key signed it, and whether it is for us, now. Only the configured issuer decides which
key and which algorithms are tried; nothing in the header brings its own (`jku`, `jwk`, `x5u`).

There is one spelling of every token: three base64url parts without padding or spare bits, and JSON
that every parser reads alike. So no two texts are the same token, and a digest can stand for it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sidecar.errors import MalformedMessage, Unauthenticated
from sidecar.policy.issuers import Issuer
from sidecar.policy.jwks import ALGORITHMS, PublicKey
from sidecar.protocol.jsonrpc import JsonObject, Strictness, parse_json

MAX_TOKEN = 16 * 1024
MAX_TEXT = 1024
"""Characters of a `sub`, a `jti`, a client's or a key's id."""

_STRICT = Strictness(nesting=64)
_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
_LAST_SECOND = 253_402_300_799  # of the year 9999


@dataclass(frozen=True, slots=True)
class Unverified:
    """What a token says of itself. Nothing of it is believed yet."""

    issuer: str
    key_id: str | None
    algorithm: str
    claims: JsonObject
    signed: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Token:
    """A verified token: what it says is what its issuer says."""

    issuer: Issuer
    claims: Mapping[str, Any]
    expires_at: float
    id: str | None = None
    issued_at: float | None = None
    not_before: float | None = None

    @property
    def ends_at(self) -> float:
        """When it is refused: a while after it expires, since clocks may differ."""
        return self.expires_at + self.issuer.leeway


def look(token: str) -> Unverified:
    """Take a token apart.

    Raises:
        Unauthenticated: `token_malformed`, `token_algorithm` or `token_issuer`.
    """
    if len(token) > MAX_TOKEN:
        raise Unauthenticated("token_malformed", f"the token is longer than {MAX_TOKEN} characters")
    parts = token.split(".")
    if len(parts) != 3 or not all(parts[:2]):
        raise Unauthenticated("token_malformed", "the token is not a compact JWS")
    header, claims = _object(parts[0]), _object(parts[1])
    algorithm = _algorithm(header)
    issuer = claims.get("iss")
    if not isinstance(issuer, str):
        raise Unauthenticated("token_issuer", "the token names no issuer")
    return Unverified(
        issuer=issuer,
        key_id=_text(header, "kid"),
        algorithm=algorithm,
        claims=claims,
        signed=f"{parts[0]}.{parts[1]}".encode("ascii"),
        signature=_bytes(parts[2]),
    )


def verify(unverified: Unverified, issuer: Issuer, key: PublicKey, now: float) -> Token:
    """The token, when this key of its issuer signed it, and it is for us, at `now` (Unix time).

    Raises:
        Unauthenticated: any `token_…`.
    """
    if unverified.issuer != issuer.name:
        raise Unauthenticated("token_issuer", "the token is another issuer's")
    if unverified.algorithm not in issuer.algorithms or not key.fits(unverified.algorithm):
        raise Unauthenticated("token_algorithm", "the token's algorithm is not accepted")
    if not _signed_by(unverified, key):
        raise Unauthenticated("token_signature", "the token's signature is wrong")
    return _believed(unverified.claims, issuer, now)


def claimed(unverified: Unverified, issuer: Issuer, now: float) -> Token:
    """What a token says of itself, when that would do. Nobody has vouched for it yet.

    It is for those alone who ask its issuer whether it is true (`sidecar.policy.reviews`).

    Raises:
        Unauthenticated: any `token_…` but those of the signature.
    """
    if unverified.issuer != issuer.name:
        raise Unauthenticated("token_issuer", "the token is another issuer's")
    return _believed(unverified.claims, issuer, now)


def check_times(token: Token, now: float) -> None:
    """Refuse a token before and after its time.

    Raises:
        Unauthenticated: `token_expired` or `token_not_yet_valid`.
    """
    if now >= token.ends_at:
        raise Unauthenticated("token_expired", "the token has expired")
    for start in (token.not_before, token.issued_at):
        if start is not None and now < start - token.issuer.leeway:
            raise Unauthenticated("token_not_yet_valid", "the token is not valid yet")


def text(claims: Mapping[str, Any], name: str) -> str | None:
    """A claim that names something; None when it is absent.

    Raises:
        Unauthenticated: `token_claims`: it is no string that can name anything.
    """
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable():
        return value
    raise Unauthenticated("token_claims", f"the token's {name} is not a usable string")


def _believed(claims: JsonObject, issuer: Issuer, now: float) -> Token:
    _check_audience(claims, issuer)
    if "cnf" in claims:
        raise Unauthenticated("token_binding", "the token is bound to a key that is not checked")
    expires_at, issued_at = _time(claims, "exp"), _time(claims, "iat")
    if expires_at is None:
        raise Unauthenticated("token_claims", "the token never expires")
    if issued_at is not None and issued_at > expires_at:
        raise Unauthenticated("token_claims", "the token expired before it was issued")
    text(claims, "sub")
    token = Token(
        issuer=issuer,
        claims=claims,
        expires_at=expires_at,
        id=text(claims, "jti"),
        issued_at=issued_at,
        not_before=_time(claims, "nbf"),
    )
    check_times(token, now)
    return token


def _check_audience(claims: JsonObject, issuer: Issuer) -> None:
    audience = claims.get("aud", [])
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not all(isinstance(each, str) for each in audiences):
        raise Unauthenticated("token_claims", "the token's aud is neither a string nor a list")
    if not set(audiences) & set(issuer.audiences):
        raise Unauthenticated("token_audience", "the token is for somebody else")


def _time(claims: JsonObject, name: str) -> float | None:
    """A NumericDate (RFC 7519 §2): a number, which `true` and `"1"` are not."""
    if name not in claims:
        return None
    value = claims[name]
    if type(value) in (int, float) and 0 <= value <= _LAST_SECOND:
        return float(value)
    raise Unauthenticated("token_claims", f"the token's {name} is not a time")


def _algorithm(header: JsonObject) -> str:
    if "crit" in header:
        raise Unauthenticated("token_malformed", "the token wants an extension to be understood")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise Unauthenticated("token_malformed", "the token is of another type")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise Unauthenticated("token_algorithm", "the token's algorithm is not accepted")
    return algorithm


def _text(header: JsonObject, name: str) -> str | None:
    value = header.get(name)
    if name not in header or (isinstance(value, str) and len(value) <= MAX_TEXT):
        return value
    raise Unauthenticated("token_malformed", f"the token's {name} is not a string")


def _object(part: str) -> JsonObject:
    try:
        value = parse_json(_bytes(part), _STRICT)
    except MalformedMessage as error:
        raise Unauthenticated("token_malformed", "a part of the token is not JSON") from error
    if not isinstance(value, dict):
        raise Unauthenticated("token_malformed", "a part of the token is not a JSON object")
    return value


def _bytes(part: str) -> bytes:
    """Base64url without padding, in its one spelling: what encodes to the same text again."""
    try:
        value = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unauthenticated("token_malformed", "a part of the token is not base64url") from error
    if base64.urlsafe_b64encode(value).rstrip(b"=") != part.encode():
        raise Unauthenticated("token_malformed", "a part of the token is not base64url")
    return value


def _signed_by(unverified: Unverified, key: PublicKey) -> bool:
    algorithm = _algorithms()[unverified.algorithm]
    return bool(algorithm.verify(unverified.signed, key.key, unverified.signature))


@cache
def _algorithms() -> Mapping[str, Any]:
    """The library's, loaded with the first token: it takes longer than the sidecar's start."""
    from jwt.algorithms import get_default_algorithms

    known = get_default_algorithms()
    return {name: known[name] for name in ALGORITHMS}
