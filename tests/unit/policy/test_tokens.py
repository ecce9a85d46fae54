"""Tokens as data: the good ones, and each way of being bad with the code of its refusal."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import Unauthenticated
from sidecar.policy import tokens
from sidecar.policy.issuers import Issuer
from sidecar.policy.jwks import ALGORITHMS, PublicKey, read_keys, select
from sidecar.policy.tokens import MAX_TEXT, MAX_TOKEN, Token
from tests.support.issuing import (
    AUDIENCE,
    CLUSTER,
    DROP,
    IDP,
    NOW,
    PARTNER,
    Signer,
    account_claims,
    b64,
    claims,
    issuer,
    key_set,
    signer,
)

KEY = signer("key-1", "ES256")
RSA = signer("rsa-1", "RS256")
ISSUER = issuer()
KEYS = {
    IDP: read_keys(key_set(*(signer(f"{each}-key", each) for each in ALGORITHMS), KEY, RSA)),
    PARTNER: read_keys(key_set(signer("partner", "ES256"))),
}


def verified(token: str, by: Issuer = ISSUER, now: float = NOW) -> Token:
    """As the authenticator does it, with keys that are there."""
    unverified = tokens.look(token)
    key = select(KEYS[by.name], unverified.key_id, unverified.algorithm)
    assert key is not None
    return tokens.verify(unverified, by, key, now)


def refusal(token: str, by: Issuer = ISSUER, now: float = NOW) -> str:
    with pytest.raises(Unauthenticated) as caught:
        verified(token, by, now)
    error = caught.value
    assert (error.rpc_code, error.status, error.retryable) == (-31401, 401, False)
    assert error.data == {"reasons": [{"code": error.code}], "retryable": False}
    return error.code


def signed(**changes: Any) -> str:
    return KEY.sign(claims(**changes))


def headed(**header: Any) -> str:
    return KEY.sign(claims(), **header)


def spelled(old: str, new: str) -> str:
    """Claims whose JSON is put differently, and signed so."""
    return KEY.sign(json.dumps(claims()).replace(old, new, 1).encode())


# ── Good ones ─────────────────────────────────────────────────────────────────────────────────────

GOOD = {
    **{f"algorithm-{each}": signer(f"{each}-key", each).sign(claims()) for each in ALGORITHMS},
    "type-access-token": headed(typ="at+jwt"),
    "type-spelled-out": headed(typ="application/AT+JWT"),
    "type-lower-case": headed(typ="jwt"),
    "type-absent": headed(typ=DROP),
    "audience-a-list": signed(aud=["https://other.example", AUDIENCE]),
    "expires-at-a-fraction": signed(exp=NOW + 0.5),
    "expired-within-the-leeway": signed(exp=NOW - 29, iat=NOW - 90),
    "not-yet-valid-within-the-leeway": signed(nbf=NOW + 29),
    "issued-ahead-within-the-leeway": signed(iat=NOW + 29),
    "issued-never": signed(iat=DROP),
    "no-id": signed(jti=DROP),
    "no-subject": signed(sub=DROP),
    "subject-with-a-bar": signed(sub="auth0|123"),
    "subject-in-another-script": signed(sub="анна"),
    "unknown-claims": signed(extra={"deep": [1, {"a": None}]}),
    "header-brings-keys-that-nobody-uses": headed(
        jku="https://evil.example/keys", x5u="https://evil.example/c", jwk={"kty": "oct"}
    ),
}


@pytest.mark.parametrize("token", GOOD.values(), ids=GOOD)
def test_a_good_token_is_what_its_issuer_says(token: str) -> None:
    assert verified(token).claims["iss"] == IDP


def test_a_verified_token_tells_its_times_and_its_id() -> None:
    token = verified(signed(nbf=NOW - 5))
    assert (token.issuer, token.id) == (ISSUER, "t-1")
    assert (token.expires_at, token.issued_at, token.not_before) == (NOW + 3600, NOW - 60, NOW - 5)
    assert token.claims["sub"] == "u-1042"


# ── Bad ones ──────────────────────────────────────────────────────────────────────────────────────


def unsigned(token: str, signature: str = "") -> str:
    return token.rpartition(".")[0] + "." + signature


def with_hmac(secret: bytes, algorithm: str = "HS256", **header: Any) -> str:
    """The classic: the public key, which everybody has, as the secret."""
    head = b64(json.dumps({"alg": algorithm, "typ": "JWT", **header}).encode())
    body = f"{head}.{b64(json.dumps(claims()).encode())}"
    return f"{body}.{b64(hmac.digest(secret, body.encode(), hashlib.sha256))}"


def lying(by: Signer, algorithm: str) -> str:
    """Signed by a key in its own way, with a header that says another algorithm."""
    return by.sign(claims(), alg=algorithm)


BAD_SHAPE = {
    "empty": "",
    "a-word": "token",
    "one-part": "e30",
    "two-parts": "e30.e30",
    "four-parts": signed() + ".e30",
    "encrypted-five-parts": "e30.e30.e30.e30.e30",
    "only-dots": "..",
    "no-payload": "e30..AAAA",
    "spaces-around": " " + signed(),
    "newline-after": signed() + "\n",
    "with-its-scheme": "Bearer " + signed(),
    "padded": signed() + "=",
    "standard-base64": KEY.sign(claims(sub="~~~???")).replace("_", "/").replace("-", "+") + "+/==",
    "header-no-base64": "!!!." + signed().partition(".")[2],
    "header-no-json": KEY.sign_raw(b"alg: ES256", claims()),
    "header-a-list": KEY.sign_raw(b'["ES256"]', claims()),
    "header-key-twice": KEY.sign_raw(b'{"alg":"ES256","alg":"none"}', claims()),
    "header-not-utf8": KEY.sign_raw(b'{"alg":"ES256","x":"\xff"}', claims()),
    "header-crit": headed(crit=["exp"]),
    "header-crit-empty": headed(crit=[]),
    "header-type-of-a-logout": headed(typ="logout+jwt"),
    "header-type-of-a-proof": headed(typ="dpop+jwt"),
    "header-type-a-number": headed(typ=7),
    "header-type-null": headed(typ=None),
    "key-id-a-number": headed(kid=7),
    "key-id-null": headed(kid=None),
    "key-id-huge": headed(kid="k" * (MAX_TEXT + 1)),
    "payload-a-list": KEY.sign(b"[]"),
    "payload-a-string": KEY.sign(b'"iss"'),
    "payload-empty": KEY.sign(b"x"),
    "payload-claim-twice": spelled('"sub"', '"sub": "root", "sub"'),
    "payload-nested-claim-twice": spelled('"groups"', '"act": {"sub": "a", "sub": "b"}, "groups"'),
    "payload-nan": spelled(str(NOW + 3600), "NaN"),
    "payload-infinite": spelled(str(NOW + 3600), "1e999"),
    "payload-integer-beyond-a-double": spelled(str(NOW + 3600), "9007199254740993"),
    "payload-byte-order-mark": KEY.sign(b"\xef\xbb\xbf" + json.dumps(claims()).encode()),
    "payload-utf16": KEY.sign(json.dumps(claims()).encode("utf-16")),
    "payload-half-a-surrogate": signed(sub="\ud800"),
    "payload-too-deep": KEY.sign(b'{"iss":' + b"[" * 500 + b"]" * 500 + b"}"),
    "huge": signed(extra="x" * MAX_TOKEN),
}

BAD_ALGORITHM = {
    "none": unsigned(headed(alg="none")),
    "none-in-capitals": unsigned(headed(alg="NONE")),
    "none-with-a-signature": headed(alg="none"),
    "hmac-with-the-public-key": with_hmac(RSA.public_pem(), kid="rsa-1"),
    "hmac-without-a-key-id": with_hmac(RSA.public_pem()),
    "hmac-with-an-ec-key": with_hmac(KEY.public_pem(), kid="key-1"),
    "hmac-with-nothing": with_hmac(b"", kid="key-1"),
    "hmac-512": with_hmac(RSA.public_pem(), "HS512", kid="rsa-1"),
    "absent": headed(alg=DROP),
    "null": headed(alg=None),
    "a-list": headed(alg=["ES256"]),
    "lower-case": headed(alg="es256"),
    "one-that-nobody-knows": headed(alg="ES256K"),
    "ec-token-with-an-rsa-key": KEY.sign(claims(), kid="rsa-1"),
    "rsa-token-with-an-ec-key": RSA.sign(claims(), kid="key-1"),
    "ec-header-over-an-rsa-signature": lying(RSA, "ES256"),
    "rsa-header-over-an-ec-signature": lying(KEY, "RS256"),
    "other-hash-than-the-key-is-for": signer("rsa-1", "RS256").sign(claims(), alg="RS512"),
    "other-padding-than-the-key-is-for": signer("PS256-key", "PS256").sign(claims(), alg="RS256"),
    "other-curve-than-the-key-is-on": signer("ES384-key", "ES384").sign(claims(), alg="ES256"),
}

STRANGER = signer("stranger", "ES256")

BAD_SIGNATURE = {
    "none-at-all": unsigned(signed()),
    "zeros": unsigned(signed(), b64(b"\0" * 64)),
    "too-short": unsigned(signed(), b64(b"\1" * 63)),
    "too-long": unsigned(signed(), b64(b"\1" * 65)),
    "another-tokens": unsigned(signed(sub="root"), signed().rpartition(".")[2]),
    "a-strangers-by-our-key-id": STRANGER.sign(claims(), kid="key-1"),
    "a-strangers-that-brings-its-key": STRANGER.sign(claims(), kid="key-1", jwk=STRANGER.jwk()),
    "rsa-empty": unsigned(RSA.sign(claims())),
    "rsa-zeros": unsigned(RSA.sign(claims()), b64(b"\0" * 256)),
}

BAD_ISSUER = {
    "absent": signed(iss=DROP),
    "null": signed(iss=None),
    "a-list": signed(iss=[IDP]),
    "another": signed(iss=PARTNER),
    "with-a-slash": signed(iss=IDP + "/"),
    "in-capitals": signed(iss=IDP.upper()),
    "of-another-cluster": KEY.sign(account_claims(iss=CLUSTER + ".other")),
}

BAD_AUDIENCE = {
    "absent": signed(aud=DROP),
    "empty": signed(aud=""),
    "an-empty-list": signed(aud=[]),
    "another": signed(aud="https://other.example/mcp"),
    "a-longer-one": signed(aud=AUDIENCE + "/"),
    "a-part-of-it": signed(aud=AUDIENCE[:-1]),
}

BAD_TIME = {
    "token_expired": {
        "exactly-at-the-leeway": signed(exp=NOW - 30, iat=NOW - 90),
        "long-ago": signed(exp=1, iat=0),
        "at-the-epoch": signed(exp=0, iat=DROP),
    },
    "token_not_yet_valid": {
        "after-the-leeway": signed(nbf=NOW + 31),
        "issued-in-the-future": signed(iat=NOW + 31),
        "issued-in-the-far-future": signed(iat=NOW + 10**6, exp=NOW + 10**7),
    },
}

BAD_CLAIMS = {
    "exp-absent": signed(exp=DROP),
    "exp-null": signed(exp=None),
    "exp-a-string": signed(exp=str(NOW + 3600)),
    "exp-true": signed(exp=True),
    "exp-negative": signed(exp=-1),
    "exp-beyond-all-years": signed(exp=1e300),
    "exp-a-list": signed(exp=[NOW + 3600]),
    "iat-a-string": signed(iat="yesterday"),
    "iat-false": signed(iat=False),
    "iat-after-exp": signed(iat=NOW + 20, exp=NOW + 10),
    "nbf-a-string": signed(nbf="0"),
    "nbf-null": signed(nbf=None),
    "aud-a-number": signed(aud=7),
    "aud-null": signed(aud=None),
    "aud-an-object": signed(aud={AUDIENCE: True}),
    "aud-a-list-of-other-things": signed(aud=[AUDIENCE, 7]),
    "sub-a-number": signed(sub=1042),
    "sub-null": signed(sub=None),
    "sub-a-list": signed(sub=["u-1042"]),
    "sub-empty": signed(sub=""),
    "sub-huge": signed(sub="u" * (MAX_TEXT + 1)),
    "sub-with-a-newline": signed(sub="u-1042\nactor=root"),
    "sub-with-a-nul": signed(sub="u-1042\0"),
    "jti-a-number": signed(jti=7),
    "jti-empty": signed(jti=""),
}

BAD_BINDING = {
    "to-a-key": signed(cnf={"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"}),
    "to-a-certificate": signed(cnf={"x5t#S256": "bwcK0esc3ACC3DB2Y5_lESsXE8o9ltc05O89jdN-dg2"}),
    "to-nothing": signed(cnf=None),
}

REFUSED = [
    pytest.param(token, code, id=f"{code}-{name}")
    for code, table in {
        "token_malformed": BAD_SHAPE,
        "token_algorithm": BAD_ALGORITHM,
        "token_signature": BAD_SIGNATURE,
        "token_issuer": BAD_ISSUER,
        "token_audience": BAD_AUDIENCE,
        **BAD_TIME,
        "token_claims": BAD_CLAIMS,
        "token_binding": BAD_BINDING,
    }.items()
    for name, token in table.items()
]


@pytest.mark.parametrize(("token", "code"), REFUSED)
def test_a_bad_token_is_refused_and_the_code_says_why(token: str, code: str) -> None:
    assert refusal(token) == code


def test_there_are_cases_enough() -> None:
    assert len(GOOD) + len(REFUSED) >= 120


# ── What the issuer's settings decide ─────────────────────────────────────────────────────────────


def test_an_algorithm_that_the_issuer_does_not_use_is_refused() -> None:
    only_rsa = issuer(algorithms=("RS256",))
    assert verified(RSA.sign(claims()), only_rsa).id == "t-1"
    assert refusal(signed(), only_rsa) == "token_algorithm"


def test_any_of_several_audiences_will_do_and_each_issuer_has_its_own() -> None:
    several = issuer(audiences=("one", "two"))
    assert verified(signed(aud="two"), several).id == "t-1"
    assert refusal(signed(), several) == "token_audience"


def test_a_token_is_verified_for_its_own_issuer_alone() -> None:
    partner = issuer(PARTNER)
    token = signer("partner", "ES256").sign(claims(iss=PARTNER))
    assert verified(token, partner).claims["iss"] == PARTNER
    [key] = KEYS[PARTNER]
    with pytest.raises(Unauthenticated, match="another issuer"):
        tokens.verify(tokens.look(token), ISSUER, key, NOW)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_verifies_by_its_own_algorithm_alone(algorithm: str) -> None:
    unverified = tokens.look(signer(f"{algorithm}-key", algorithm).sign(claims()))
    for key in KEYS[IDP]:
        if not key.fits(algorithm):
            with pytest.raises(Unauthenticated) as caught:
                tokens.verify(unverified, ISSUER, key, NOW)
            assert caught.value.code == "token_algorithm"


@pytest.mark.parametrize("leeway", [0, 300])
def test_clocks_may_differ_by_the_leeway_and_no_more(leeway: int) -> None:
    skewed = issuer(leeway=leeway)
    token = signed(nbf=NOW)
    assert verified(token, skewed, NOW - leeway).id == "t-1"
    assert refusal(token, skewed, NOW - leeway - 61) == "token_not_yet_valid"
    assert verified(token, skewed, NOW + 3600 + leeway - 1).id == "t-1"
    assert refusal(token, skewed, NOW + 3600 + leeway) == "token_expired"


def test_a_verified_tokens_time_can_be_asked_again() -> None:
    token = verified(signed())
    tokens.check_times(token, NOW + 3600)
    with pytest.raises(Unauthenticated, match="expired"):
        tokens.check_times(token, NOW + 3630)


def test_a_refusal_says_nothing_that_the_token_says() -> None:
    for case in REFUSED:
        token = case.values[0]
        assert isinstance(token, str)
        with pytest.raises(Unauthenticated) as caught:
            verified(token)
        for secret in ("u-1042", "ana@example.com", "desk-web", "evil", "root"):
            assert secret not in str(caught.value)


# ── Properties ────────────────────────────────────────────────────────────────────────────────────

BASE64URL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
PART = st.binary(max_size=40).map(b64) | st.text(BASE64URL + ".=+/ \n{", max_size=20)


def _only(key: PublicKey, text: str) -> Token | str:
    try:
        return tokens.verify(tokens.look(text), ISSUER, key, NOW)
    except Unauthenticated as error:
        return error.code


FIRST = next(each for each in KEYS[IDP] if each.id == "key-1")


@given(st.text(max_size=80) | st.lists(PART, min_size=1, max_size=4).map(".".join))
def test_any_text_is_refused_and_nothing_else_happens(text: str) -> None:
    assert isinstance(_only(FIRST, text), str)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
NAMES = st.sampled_from(["iss", "sub", "aud", "exp", "iat", "nbf", "jti", "cnf", "client_id"])
HEADERS = st.sampled_from(["alg", "typ", "kid", "crit", "jwk", "zip", "b64"])


@given(st.dictionaries(NAMES, JSON, max_size=3), st.dictionaries(HEADERS, JSON, max_size=2))
def test_any_signed_claims_are_a_token_or_refused(
    changes: dict[str, Any], header: dict[str, Any]
) -> None:
    result = _only(FIRST, KEY.sign(claims(**changes), **header))
    assert isinstance(result, str) or result.claims["iss"] == IDP


@given(st.data())
def test_a_token_with_one_other_character_is_refused(data: st.DataObject) -> None:
    by = data.draw(st.sampled_from([KEY, RSA]))
    token = by.sign(claims())
    place = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from(BASE64URL + ".=").filter(lambda each: each != token[place]))
    changed = token[:place] + other + token[place + 1 :]
    [key] = [each for each in KEYS[IDP] if each.id == by.id]
    assert isinstance(_only(key, token), Token)
    assert isinstance(_only(key, changed), str)


@pytest.mark.parametrize("by", [KEY, RSA, signer("EdDSA-key", "EdDSA")], ids=lambda by: by.id)
def test_the_last_characters_spare_bits_are_no_second_spelling(by: Signer) -> None:
    token = by.sign(claims())
    [key] = [each for each in KEYS[IDP] if each.id == by.id]
    same = [
        token[:-1] + each
        for each in BASE64URL
        if base64.urlsafe_b64decode((token[:-1] + each).rpartition(".")[2] + "==")
        == base64.urlsafe_b64decode(token.rpartition(".")[2] + "==")
    ]
    assert len(same) > 1
    assert [each for each in same if isinstance(_only(key, each), Token)] == [token]
