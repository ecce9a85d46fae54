"""Key sets: what of them can verify, and which key a token gets."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import MalformedMessage, Unauthenticated
from sidecar.policy.jwks import ALGORITHMS, MAX_KEYS, PublicKey, read_keys, select
from tests.support.issuing import DROP, key_set, signer

EC = signer("ec", "ES256")
RSA = signer("rsa", "RS256")
ED = signer("ed", "EdDSA")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_is_read_and_fits_its_own_algorithm_alone(algorithm: str) -> None:
    [key] = read_keys(key_set(signer("k", algorithm).jwk()))
    assert [each for each in ALGORITHMS if key.fits(each)] == [algorithm]


@pytest.mark.parametrize("kind", sorted(set(ALGORITHMS.values())))
def test_a_key_for_no_algorithm_in_particular_fits_those_of_its_kind(kind: str) -> None:
    name = next(each for each in ALGORITHMS if ALGORITHMS[each] == kind)
    [key] = read_keys(key_set(signer("k", name).jwk(alg=DROP)))
    assert {each for each in ALGORITHMS if key.fits(each)} == {
        each for each in ALGORITHMS if ALGORITHMS[each] == kind
    }


@pytest.mark.parametrize(
    "jwk",
    [
        pytest.param({"kty": "oct", "k": "c2VjcmV0", "kid": "s", "alg": "HS256"}, id="symmetric"),
        pytest.param({"kty": "oct", "k": "c2VjcmV0", "kid": "s", "alg": "RS256"}, id="disguised"),
        pytest.param(EC.jwk(d="AAAA"), id="private-ec"),
        pytest.param(RSA.jwk(p="AAAA"), id="private-rsa"),
        pytest.param(EC.jwk(use="enc"), id="for-encryption"),
        pytest.param(EC.jwk(key_ops=["sign"]), id="for-signing"),
        pytest.param(EC.jwk(key_ops="verify"), id="operations-no-list"),
        pytest.param(EC.jwk(kid=7), id="id-a-number"),
        pytest.param(EC.jwk(alg=["ES256"]), id="algorithm-a-list"),
        pytest.param(EC.jwk(kty="AKP"), id="unknown-kind"),
        pytest.param(EC.jwk(kty=["EC"]), id="kind-a-list"),
        pytest.param(EC.jwk(crv="secp256k1"), id="other-curve"),
        pytest.param(EC.jwk(crv={}), id="curve-an-object"),
        pytest.param(EC.jwk(x=DROP), id="no-x"),
        pytest.param(EC.jwk(x="AAAA"), id="not-on-the-curve"),
        pytest.param(EC.jwk(x=7), id="x-a-number"),
        pytest.param(ED.jwk(crv="X25519"), id="for-agreement"),
        pytest.param(RSA.jwk(n="AQAB"), id="tiny-rsa"),
        pytest.param(signer("small", "RS256", 1024).jwk(), id="small-rsa"),
        pytest.param(RSA.jwk(e="!!"), id="exponent-no-base64"),
        pytest.param("key", id="no-object"),
        pytest.param(None, id="null"),
    ],
)
def test_what_can_not_verify_is_left_out(jwk: Any) -> None:
    keys = read_keys(json.dumps({"keys": [jwk, EC.jwk()]}).encode())
    assert [each.id for each in keys] == ["ec"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>", id="html"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"{}", id="no-keys"),
        pytest.param(b'{"keys":{}}', id="keys-an-object"),
        pytest.param(b'{"keys":[],"keys":[]}', id="keys-twice"),
        pytest.param(json.dumps({"keys": [{}] * (MAX_KEYS + 1)}).encode(), id="too-many"),
    ],
)
def test_what_is_no_key_set_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read_keys(content)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_key_set_or_refused(content: bytes) -> None:
    with suppress(MalformedMessage):
        assert read_keys(content) == ()


JWK = st.fixed_dictionaries(
    {"kty": st.sampled_from(["RSA", "EC", "OKP", "oct"])},
    optional={
        name: st.none() | st.integers() | st.sampled_from(["P-256", "Ed25519", "AQAB", "RS256"])
        for name in ("crv", "n", "e", "x", "y", "kid", "alg", "use")
    },
)


@given(JWK)
def test_no_key_makes_a_set_unreadable(jwk: dict[str, Any]) -> None:
    assert len(read_keys(json.dumps({"keys": [jwk, EC.jwk()]}).encode())) == 1


KEYS = read_keys(key_set(EC, RSA, ED, RSA.jwk(kid="twice"), EC.jwk(kid="twice")))


@pytest.mark.parametrize(
    ("key_id", "algorithm", "expected"),
    [
        pytest.param("ec", "ES256", "ec", id="by-id"),
        pytest.param("twice", "RS256", "twice", id="by-id-and-kind"),
        pytest.param(None, "EdDSA", "ed", id="the-only-one-that-fits"),
        pytest.param("other", "ES256", None, id="unknown-id"),
        pytest.param(None, "ES384", None, id="none-that-fits"),
    ],
)
def test_a_token_gets_the_key_it_names(
    key_id: str | None, algorithm: str, expected: str | None
) -> None:
    found = select(KEYS, key_id, algorithm)
    assert (found.id if found else None) == expected


@pytest.mark.parametrize(
    ("key_id", "algorithm", "code"),
    [
        pytest.param(None, "RS256", "token_key_unknown", id="several-fit"),
        pytest.param("rsa", "ES256", "token_algorithm", id="rsa-key-for-ec"),
        pytest.param("ec", "RS256", "token_algorithm", id="ec-key-for-rsa"),
        pytest.param("ec", "ES384", "token_algorithm", id="other-curve"),
        pytest.param("rsa", "PS256", "token_algorithm", id="other-padding"),
    ],
)
def test_a_token_gets_no_key_but_the_right_one(
    key_id: str | None, algorithm: str, code: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        select(KEYS, key_id, algorithm)
    assert caught.value.code == code


def test_the_same_numbers_are_the_same_key() -> None:
    def read(jwk: dict[str, Any]) -> PublicKey:
        [key] = read_keys(key_set(jwk))
        return key

    assert read(EC.jwk()) == read(EC.jwk(x5t="other"))
    assert read(EC.jwk()) != read(EC.jwk(kid="other"))
    assert read(EC.jwk()) != read(signer("ec-2", "ES256").jwk(kid="ec"))
