"""Authorities and certificates of any kind, also such as no authority should issue."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

BOT = "spiffe://prod.example.com/ns/support/sa/bot"
"""The workload that most tests are about."""

_NO_USAGE = dict.fromkeys(
    (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    ),
    False,
)


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    private: Any

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def cert_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        form = PrivateFormat.PKCS8
        pem: bytes = self.private.private_bytes(Encoding.PEM, form, NoEncryption())
        return pem

    def saved(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Written to `NAME.pem` and `NAME.key`."""
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(self.cert_pem)
        key.write_bytes(self.key_pem)
        return cert, key


class Authority:
    """Somebody who signs certificates."""

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self._private: Any = load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        self._issuer = x509.load_pem_x509_certificate(self.pem)

    @property
    def pem(self) -> bytes:
        return self._ca.cert_pem.bytes()

    def server(self, *names: str) -> Issued:
        """For this machine's loopback, unless it has other names."""
        leaf = self._ca.issue_cert(*(names or ("localhost", "127.0.0.1")))
        chain = b"".join(each.bytes() for each in leaf.cert_chain_pems)
        return Issued(
            x509.load_pem_x509_certificate(chain),
            load_pem_private_key(leaf.private_key_pem.bytes(), None),
        )

    def client(
        self,
        *names: str | x509.GeneralName,
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
        begins: timedelta = timedelta(minutes=-1),
        ends: timedelta = timedelta(hours=1),
        **usage: bool,
    ) -> Issued:
        """A client's certificate with these names, of which texts are URIs; `usage` of its key."""
        private = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bot")]))
            .issuer_name(self._issuer.subject)
            .public_key(private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
        )
        uris = [uri(each) if isinstance(each, str) else each for each in names]
        told: list[tuple[x509.ExtensionType, bool]] = [*extensions]
        if uris:
            told.append((x509.SubjectAlternativeName(uris), False))
        if not any(isinstance(each, x509.KeyUsage) for each, _ in told):
            said = {**_NO_USAGE, "digital_signature": True, **usage}
            told.append((x509.KeyUsage(**said), True))
        for extension, critical in told:
            builder = builder.add_extension(extension, critical)
        return Issued(builder.sign(self._private, hashes.SHA256()), private)

    def trusting(self, shown: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """What a client of our server connects with; `shown` are its own certificate and key."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        if shown is not None:
            context.load_cert_chain(*shown)
        return context


def uri(text: str) -> x509.UniformResourceIdentifier:
    """A URI as it is, also one that is none."""
    return x509.UniformResourceIdentifier._init_without_validation(text)
