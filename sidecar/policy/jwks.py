"""An issuer's public keys: a JWK set (RFC 7517) read, and the one key a token asks for.

What can not verify is left out, not an error: a set may hold keys for other uses. Symmetric keys
and private material are left out too, so that nothing published can ever serve to sign. The
libraries behind it load with the first set, since most runs of a stdio wrapper verify nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidecar.errors import MalformedMessage, Unauthenticated
from sidecar.protocol.jsonrpc import FROM_SERVER, JsonObject, dump_json, parse_json

ALGORITHMS: Mapping[str, str] = {
    "RS256": "RSA",
    "RS384": "RSA",
    "RS512": "RSA",
    "PS256": "RSA",
    "PS384": "RSA",
    "PS512": "RSA",
    "ES256": "P-256",
    "ES384": "P-384",
    "ES512": "P-521",
    "EdDSA": "OKP",
}
"""The algorithms there are, and the kind of key that each needs. No `none`, and no HMAC: with it,
whoever knows the public key could sign."""

MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
MAX_KEYS = 100
_OKP_CURVES = ("Ed25519", "Ed448")
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One key of a set. Two are the same key when everything but the library's object is."""

    id: str | None  # `kid`
    kind: str  # RSA, P-256, P-384, P-521, OKP
    algorithm: str | None  # `alg`: the only one it is for
    digest: str  # of its numbers
    key: Any = field(compare=False, repr=False)

    def fits(self, algorithm: str) -> bool:
        """Whether it is a key for this algorithm."""
        return ALGORITHMS.get(algorithm) == self.kind and self.algorithm in (None, algorithm)


def read_keys(content: bytes) -> tuple[PublicKey, ...]:
    """The keys of a JWK set that can verify.

    Raises:
        MalformedMessage: it is not a JWK set, or has more than `MAX_KEYS`.
    """
    value = parse_json(content, FROM_SERVER)
    entries = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise MalformedMessage("a key set is an object with a list of keys")
    if len(entries) > MAX_KEYS:
        raise MalformedMessage(f"a key set has at most {MAX_KEYS} keys")
    keys = (_key(each) for each in entries if isinstance(each, dict))
    return tuple(each for each in keys if each is not None)


def select(keys: Sequence[PublicKey], key_id: str | None, algorithm: str) -> PublicKey | None:
    """The key that a token names; None when this set has none by that name.

    A token that names no key gets the only one that fits.

    Raises:
        Unauthenticated: the key by that name is none for the algorithm, or several fit.
    """
    named = [each for each in keys if key_id is None or each.id == key_id]
    fitting = [each for each in named if each.fits(algorithm)]
    if len(fitting) > 1:
        raise Unauthenticated("token_key_unknown", "the token does not say which key signed it")
    if named and not fitting and key_id is not None:
        raise Unauthenticated("token_algorithm", "the token's key is not one for its algorithm")
    return fitting[0] if fitting else None


def _key(jwk: JsonObject) -> PublicKey | None:
    operations = jwk.get("key_ops", ["verify"])
    if _PRIVATE & jwk.keys() or jwk.get("use", "sig") != "sig":
        return None
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    key_id, algorithm = jwk.get("kid"), jwk.get("alg")
    if not _text_or_none(key_id) or not _text_or_none(algorithm):
        return None
    read = _READERS.get(str(jwk.get("kty")))
    kind_and_key = read(jwk) if read else None
    if kind_and_key is None:
        return None
    numbers = {name: jwk.get(name) for name in ("kty", "crv", "n", "e", "x", "y")}
    digest = hashlib.sha256(dump_json(numbers)).hexdigest()
    return PublicKey(key_id, kind_and_key[0], algorithm, digest, kind_and_key[1])


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _rsa(jwk: JsonObject) -> tuple[str, Any] | None:
    from jwt.algorithms import RSAAlgorithm

    key = _loaded(RSAAlgorithm.from_jwk, jwk)
    if key is None or not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        return None
    return "RSA", key


def _ec(jwk: JsonObject) -> tuple[str, Any] | None:
    from jwt.algorithms import ECAlgorithm

    curve = jwk.get("crv")
    key = _loaded(ECAlgorithm.from_jwk, jwk)
    return (curve, key) if key is not None and curve in ("P-256", "P-384", "P-521") else None


def _okp(jwk: JsonObject) -> tuple[str, Any] | None:
    from jwt.algorithms import OKPAlgorithm

    key = _loaded(OKPAlgorithm.from_jwk, jwk) if jwk.get("crv") in _OKP_CURVES else None
    return None if key is None else ("OKP", key)


_READERS: Mapping[str, Callable[[JsonObject], tuple[str, Any] | None]] = {
    "RSA": _rsa,
    "EC": _ec,
    "OKP": _okp,
}


def _loaded(load: Callable[[JsonObject], Any], jwk: JsonObject) -> Any | None:
    """The library's key; None for numbers that make none, whatever it says of them."""
    try:
        return load(jwk)
    except Exception:
        return None
