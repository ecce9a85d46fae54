"""The sidecar's own word for a request: who is behind it, what was decided, and which bytes it is.

A server that wants to be called through the sidecar alone asks for this header (a JWT, RFC 7519)
with every request, and checks it by the public half of a key that only the sidecar has. The digest
is over the body as it is sent, so that nobody has to agree on what the same JSON is.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sidecar.conversation import decision_id
from sidecar.errors import ConfigError
from sidecar.policy.enforcement import Grounds, Permitted
from sidecar.protocol.jsonrpc import JsonObject, Response, dump_json

if TYPE_CHECKING:
    from jwt.algorithms import Algorithm

log = logging.getLogger("sidecar.transport.assertion")

TYPE: Final = "mcp-sidecar-assertion+jwt"
"""`typ`: no other token signed by the same key can be taken for one (RFC 8725 §3.11)."""

MAX_TARGETS = 1024
"""Bytes of `targets`: many servers have room for 8 KiB in a header. The digest covers them too."""

MAX_KEY = 64 * 1024
MIN_RSA = 2048
_OWN_GROUNDS: Final = Grounds()


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key, the algorithm that goes with it, and its thumbprint (RFC 7638)."""

    private: Any
    name: str
    algorithm: Algorithm
    id: str

    def sign(self, claims: JsonObject) -> str:
        """A compact JWS over the claims."""
        head = {"alg": self.name, "kid": self.id, "typ": TYPE}
        signed = f"{_part(dump_json(head))}.{_part(dump_json(claims))}"
        return f"{signed}.{_part(self.algorithm.sign(signed.encode('ascii'), self.private))}"


class KeyFile:
    """The key in a file. One that replaces it and can not be read leaves the earlier one good."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _stamp(path)
        self._key = read_key(path)

    def current(self) -> SigningKey:
        """The key to sign with now."""
        seen = _stamp(self._path)
        if seen != self._seen:
            self._seen = seen
            try:
                self._key = read_key(self._path)
                log.info("assertion.key: %s is in force, kid %s", self._path, self._key.id)
            except ConfigError as error:
                log.error("%s; the earlier key stays in force", error)
        return self._key


class Assertions:
    """Signs for what is sent to one server: `audience` is its name, `lifetime` in seconds."""

    def __init__(
        self,
        key: KeyFile,
        *,
        issuer: str,
        audience: str,
        lifetime: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._key, self._now = key, now
        self._issuer, self._audience, self._lifetime = issuer, audience, lifetime

    def sign(self, verb: str, permitted: Permitted | None, body: bytes) -> str:
        """The header's value for a request with this body; what goes without a message has none."""
        grounds = _OWN_GROUNDS if permitted is None else permitted.grounds
        issued_at = int(self._now())
        claims: JsonObject = {
            "iss": self._issuer,
            "aud": self._audience,
            "iat": issued_at,
            "exp": issued_at + self._lifetime,
            "jti": grounds.decision_id or decision_id(),
            "sub": grounds.chain[0].key if grounds.chain else self._issuer,
            "chain": [{"type": each.type, "key": each.key} for each in grounds.chain],
            "htm": verb,
            "digest": f"sha256:{hashlib.sha256(body).hexdigest()}",
        }
        if permitted is not None and not isinstance(permitted.message, Response):
            claims["method"] = permitted.message.method
        targets = [{"type": each.type, "name": each.name} for each in grounds.targets]
        if targets and len(dump_json(targets)) <= MAX_TARGETS:
            claims["targets"] = targets
        if grounds.revision is not None:
            claims["policy_revision"] = grounds.revision
        return self._key.current().sign(claims)


def read_key(path: Path) -> SigningKey:
    """The private key in a PEM file: EC P-256 signs ES256, Ed25519 EdDSA, RSA PS256.

    Raises:
        ConfigError: there is none, or none that can be used.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY)
        private = load_pem_private_key(content, password=None)
    except OSError as error:
        raise ConfigError(f"assertion.key: {path}: {error.strerror}") from error
    except TypeError as error:
        raise ConfigError(f"assertion.key: {path}: must not be encrypted") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        # Not in the library's words, which might show what it has read.
        what = "must be a private key in PEM, as `openssl genpkey` writes it"
        raise ConfigError(f"assertion.key: {path}: {what}") from error
    return _signing_key(private, path)


def _signing_key(private: Any, path: Path) -> SigningKey:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from jwt.algorithms import get_default_algorithms

    members: tuple[str, ...]
    match private:
        case ec.EllipticCurvePrivateKey() if private.curve.name == "secp256r1":
            name, members = "ES256", ("crv", "kty", "x", "y")
        case ed25519.Ed25519PrivateKey():
            name, members = "EdDSA", ("crv", "kty", "x")
        case rsa.RSAPrivateKey() if private.key_size >= MIN_RSA:
            name, members = "PS256", ("e", "kty", "n")
        case _:
            what = f"must be EC P-256, Ed25519, or RSA of at least {MIN_RSA} bits"
            raise ConfigError(f"assertion.key: {path}: {what}")
    algorithm: Any = get_default_algorithms()[name]
    jwk = algorithm.to_jwk(private.public_key(), as_dict=True)
    thumbprint = hashlib.sha256(dump_json({each: jwk[each] for each in members})).digest()
    return SigningKey(private, name, algorithm, _part(thumbprint))


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _part(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode("ascii")
