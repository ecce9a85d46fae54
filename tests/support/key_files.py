"""Private keys in files, and their public halves beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.support.issuing import Signer, signer


def private_pem(key: Any, password: bytes | None = None) -> bytes:
    """PKCS #8, as `openssl genpkey` writes it."""
    how = BestAvailableEncryption(password) if password else NoEncryption()
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
    return pem


def key_file(path: Path, by: Signer | None = None) -> Path:
    """Write the private key to `path`; the path of its public half."""
    by = by or signer()
    fresh = path.with_suffix(".new")
    fresh.write_bytes(private_pem(by.private))
    fresh.replace(path)
    public = path.with_name(f"{by.id}.pub")
    public.write_bytes(by.public_pem())
    return public
