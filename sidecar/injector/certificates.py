"""Authorities and certificates: made here, and kept as the data of one Secret.

ECDSA on P-256, signed with SHA-256. An authority signs nothing but certificates, and none that
signs others; a leaf is for a server of these names, and for nothing else.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509 import Certificate
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SKEW = timedelta(minutes=5)
"""How far behind a clock may be that finds a new certificate to be valid."""

NAME = "mcp-opa-sidecar injector"


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key."""

    certificate: Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate alone."""
        return pem((self.certificate,))

    @property
    def key_pem(self) -> bytes:
        """The private key, without a password."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def begins(self) -> datetime:
        """When it was made."""
        return self.certificate.not_valid_before_utc + SKEW

    @property
    def ends(self) -> datetime:
        """From when on nobody believes it."""
        return self.certificate.not_valid_after_utc


@dataclass(frozen=True, slots=True)
class Kept:
    """What all replicas share. The leaf is always one of `authority`."""

    leaf: Pair
    authority: Pair
    coming: Pair | None = None
    believed: datetime | None = None
    """Since when both registrations are known to name `coming`."""
    gone: tuple[Certificate, ...] = ()
    """Authorities that sign no more, and of which there may be valid leaves."""

    @property
    def authorities(self) -> tuple[Certificate, ...]:
        """Those that count, the oldest first: what `caBundle` has to hold."""
        pairs = (self.authority,) if self.coming is None else (self.authority, self.coming)
        return (*self.gone, *(each.certificate for each in pairs))


def authority(now: datetime, seconds: float) -> Pair:
    """A new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{NAME} {now:%Y-%m-%dT%H:%M:%SZ}")
    builder = _builder(key, now, now + timedelta(seconds=seconds))
    builder = builder.subject_name(name).issuer_name(name)
    return _signed(builder, x509.BasicConstraints(ca=True, path_length=0), key, key)


def leaf(signer: Pair, now: datetime, seconds: float, names: Sequence[str]) -> Pair:
    """A server's certificate, which ends no later than its authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + timedelta(seconds=seconds), signer.ends)
    builder = _builder(key, now, until).subject_name(_name(NAME))
    builder = builder.issuer_name(signer.certificate.subject)
    told: tuple[x509.ExtensionType, ...] = (
        x509.SubjectAlternativeName([_general(each) for each in names]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()),
    )
    for each in told:
        builder = builder.add_extension(each, critical=False)
    return _signed(builder, x509.BasicConstraints(ca=False, path_length=None), key, signer.key)


def names_of(certificate: Certificate) -> list[str]:
    """Whose certificate it is, as `leaf` was told."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(each.value) for each in found]


def pem(certificates: Sequence[Certificate]) -> bytes:
    """All of them, in order."""
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def read_pem(data: bytes) -> tuple[Certificate, ...]:
    """The certificates of a file; none of an empty one.

    Raises:
        ValueError: it holds something else.
    """
    return tuple(x509.load_pem_x509_certificates(data)) if data.strip() else ()


# ── As the data of a Secret ───────────────────────────────────────────────────────────────────────


def data_of(kept: Kept) -> dict[str, bytes]:
    """What is written: which authority is which is told by the keys."""
    found = {
        "tls.crt": kept.leaf.pem,
        "tls.key": kept.leaf.key_pem,
        "ca.crt": pem(kept.authorities),
        "ca.key": kept.authority.key_pem,
    }
    if kept.coming is not None:
        found["next.key"] = kept.coming.key_pem
        if kept.believed is not None:
            found["next.believed"] = kept.believed.isoformat().encode()
    return found


def read(data: Mapping[str, bytes]) -> Kept:
    """What was written.

    Raises:
        ValueError: it is something else; what, without anything that is secret.
    """
    try:
        bundle = read_pem(data["ca.crt"])
        [certificate] = read_pem(data["tls.crt"])
        found = Kept(
            Pair(certificate, _key_of(certificate, data["tls.key"])),
            _pair(bundle, data["ca.key"]),
            _pair(bundle, data["next.key"]) if "next.key" in data else None,
            _moment(data["next.believed"]) if "next.believed" in data else None,
        )
        certificate.verify_directly_issued_by(found.authority.certificate)
        names_of(certificate)
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise ValueError("its certificates and keys do not belong together") from error
    except UnsupportedAlgorithm as error:
        raise ValueError("it has keys of a kind that is not known") from error
    signing = found.authorities
    gone = tuple(each for each in bundle if each not in signing)
    return Kept(found.leaf, found.authority, found.coming, found.believed, gone)


def _pair(bundle: Sequence[Certificate], key: bytes) -> Pair:
    read = _ec(key)
    [found] = [each for each in bundle if each.public_key() == read.public_key()]
    return Pair(found, read)


def _key_of(certificate: Certificate, key: bytes) -> ec.EllipticCurvePrivateKey:
    return _pair((certificate,), key).key


def _ec(key: bytes) -> ec.EllipticCurvePrivateKey:
    found = load_pem_private_key(key, None)
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise TypeError("not of an elliptic curve")
    return found


def _moment(text: bytes) -> datetime:
    return datetime.fromisoformat(text.decode("ascii")).astimezone(UTC)


# ── Making ────────────────────────────────────────────────────────────────────────────────────────


def _builder(
    key: ec.EllipticCurvePrivateKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(until)
    )


def _signed(
    builder: x509.CertificateBuilder,
    constraints: x509.BasicConstraints,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
) -> Pair:
    told = (
        (constraints, True),
        (_usage(constraints.ca), True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
    )
    for extension, critical in told:
        builder = builder.add_extension(cast("x509.ExtensionType", extension), critical)
    return Pair(builder.sign(signer, hashes.SHA256()), key)


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
