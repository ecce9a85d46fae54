"""The signed header: what it says, what signs it, and keys that change or can not be read."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519

from sidecar.errors import ConfigError
from sidecar.policy import enforcement
from sidecar.policy.enforcement import Grounds, Permitted
from sidecar.policy.identity import Principal
from sidecar.protocol.jsonrpc import Notification, Request
from sidecar.protocol.session import Target
from sidecar.transport.assertion import Assertions, KeyFile, read_key
from tests.support.issuing import NOW, Signer, signer
from tests.support.key_files import key_file, private_pem

BOT = Principal("agent", "bot", "https://idp", groups=("g",), claims={"secret": "claim"})
ANA = Principal("human", "ana", "https://idp")
GROUNDS = Grounds("d-1", (BOT, ANA), (Target("tool", "refund"),), "r-1")
LISTING = Request(1, "tools/list", {})
BODY = b'{"jsonrpc":"2.0"}'
KINDS = [("ES256", 0), ("EdDSA", 0), ("PS256", 2048)]


def permitted(grounds: Grounds | None = None) -> Permitted:
    made = enforcement.for_catalog(LISTING)
    return made if grounds is None else made.on(grounds)


def assertions(path: Path, by: Signer, **changes: Any) -> Assertions:
    key_file(path, by)
    said = {"issuer": "us", "audience": "tickets", "lifetime": 30, "now": lambda: NOW + 0.9}
    return Assertions(KeyFile(path), **{**said, **changes})


def read(token: str, by: Signer) -> dict[str, Any]:
    """Verified by an independent library."""
    options: Any = {"verify_exp": False, "verify_aud": False, "verify_iat": False}
    found: dict[str, Any] = jwt.decode(token, by.public_pem(), [by.algorithm], options=options)
    return found


@pytest.mark.parametrize(("algorithm", "bits"), KINDS)
def test_it_says_who_what_and_which_bytes(tmp_path: Path, algorithm: str, bits: int) -> None:
    by = signer("key", algorithm, bits)
    token = assertions(tmp_path / "key.pem", by).sign("POST", permitted(GROUNDS), BODY)
    assert read(token, by) == {
        "iss": "us",
        "aud": "tickets",
        "iat": int(NOW),
        "exp": int(NOW) + 30,
        "jti": "d-1",
        "sub": "https://idp|bot",
        "chain": [
            {"type": "agent", "key": "https://idp|bot"},
            {"type": "human", "key": "https://idp|ana"},
        ],
        "htm": "POST",
        "digest": f"sha256:{hashlib.sha256(BODY).hexdigest()}",
        "method": "tools/list",
        "targets": [{"type": "tool", "name": "refund"}],
        "policy_revision": "r-1",
    }
    head = jwt.get_unverified_header(token)
    assert head == {"alg": algorithm, "typ": "mcp-sidecar-assertion+jwt", "kid": head["kid"]}


def test_what_is_the_sidecars_own_speaks_for_nobody(tmp_path: Path) -> None:
    sign = assertions(tmp_path / "key.pem", signer()).sign
    listing, again = (read(sign("POST", permitted(), BODY), signer()) for _ in range(2))
    assert (listing["sub"], listing["chain"]) == ("us", [])
    assert listing["jti"] != again["jti"]
    stream = read(sign("GET", None, b""), signer())
    assert stream["digest"] == f"sha256:{hashlib.sha256(b'').hexdigest()}"
    assert (stream["htm"], "method" in stream) == ("GET", False)


@pytest.mark.parametrize(("algorithm", "bits"), KINDS)
def test_the_key_is_known_by_its_thumbprint(tmp_path: Path, algorithm: str, bits: int) -> None:
    by = signer("key", algorithm, bits)
    key_file(tmp_path / "key.pem", by)
    jwk = by.jwk()
    members = {
        name: jwk[name] for name in sorted(jwk) if name in ("crv", "e", "kty", "n", "x", "y")
    }
    digest = hashlib.sha256(json.dumps(members, separators=(",", ":")).encode()).digest()
    expected = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    assert read_key(tmp_path / "key.pem").id == expected


def test_what_is_long_is_left_to_the_digest(tmp_path: Path) -> None:
    sign = assertions(tmp_path / "key.pem", signer()).sign
    for length, shown in ((900, True), (4000, False)):
        grounds = Grounds("d", (ANA,), (Target("resource", "x" * length),))
        token = sign("POST", permitted(grounds), BODY)
        assert ("targets" in read(token, signer())) is shown
        assert len(token) < 4096


def test_a_cancel_of_ours_is_not_the_request_again() -> None:
    cancel = enforcement.taken_back(permitted(GROUNDS), "revoked")
    assert isinstance(cancel.message, Notification)
    assert (cancel.grounds.decision_id, cancel.grounds.chain) == (None, (BOT, ANA))
    assert enforcement.readdressed(permitted(GROUNDS), 7).grounds == GROUNDS


# ── Keys ──────────────────────────────────────────────────────────────────────────────────────────

P384 = ec.generate_private_key(ec.SECP384R1())
BAD = {
    "nothing": (None, "No such file or directory"),
    "empty": (b"", "must be a private key in PEM"),
    "no key": (b"hunter2", "must be a private key in PEM"),
    "public": (signer().public_pem(), "must be a private key in PEM"),
    "half": (private_pem(signer().private)[:100], "must be a private key in PEM"),
    "encrypted": (private_pem(signer().private, b"pw"), "must not be encrypted"),
    "another curve": (private_pem(P384), "must be EC P-256, Ed25519, or RSA"),
    "small": (private_pem(signer("s", "RS256", 1024).private), "RSA of at least 2048 bits"),
    "no signer": (private_pem(x25519.X25519PrivateKey.generate()), "must be EC P-256"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_key_that_can_not_sign_is_a_mistake_of_the_configuration(
    tmp_path: Path, name: str
) -> None:
    content, why = BAD[name]
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=why) as caught:
        KeyFile(path)
    assert str(caught.value).startswith(f"assertion.key: {path}: ")
    assert "hunter2" not in str(caught.value)


def test_a_key_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path, new = tmp_path / "key.pem", signer("new", "EdDSA")
    signing = assertions(path, signer())
    first = signing.sign("POST", permitted(), BODY)
    key_file(path, new)
    second = signing.sign("POST", permitted(), BODY)
    assert read(first, signer())["digest"] == read(second, new)["digest"]
    kids = [jwt.get_unverified_header(each)["kid"] for each in (first, second)]
    assert kids[0] != kids[1]


@pytest.mark.parametrize("name", BAD)
def test_a_change_for_the_worse_leaves_the_earlier_key_good(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, content = tmp_path / "key.pem", BAD[name][0]
    signing = assertions(path, signer())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert read(signing.sign("POST", permitted(), BODY), signer())
    [said] = caplog.records
    assert said.levelno == logging.ERROR
    assert "the earlier key stays in force" in said.getMessage()
    assert "hunter2" not in said.getMessage()
    key_file(path, signer("new"))
    assert read(signing.sign("POST", permitted(), BODY), signer("new"))


def test_a_key_in_an_older_form_is_read_too(tmp_path: Path) -> None:
    """As `openssl ecparam -genkey -noout` writes it."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    old = PrivateFormat.TraditionalOpenSSL
    pem = signer().private.private_bytes(Encoding.PEM, old, NoEncryption())
    assert pem.startswith(b"-----BEGIN EC PRIVATE KEY")
    (tmp_path / "key.pem").write_bytes(pem)
    assert read_key(tmp_path / "key.pem").name == "ES256"
