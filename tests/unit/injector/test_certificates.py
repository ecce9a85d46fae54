"""Authorities and certificates: what they may be used for, and that a Secret keeps them whole."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from sidecar.injector.certificates import (
    Kept,
    authority,
    data_of,
    leaf,
    names_of,
    pem,
    read,
    read_pem,
)

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
DAY = 86400.0
NAMES = ("injector.system.svc", "injector.system.svc.cluster.local", "127.0.0.1", "::1")

Data = dict[str, bytes]


def kept(*, coming: bool = False, gone: int = 0) -> Kept:
    signer = authority(NOW, 90 * DAY)
    return Kept(
        leaf(signer, NOW, DAY, NAMES),
        signer,
        authority(NOW, 180 * DAY) if coming else None,
        NOW if coming else None,
        tuple(authority(NOW, DAY).certificate for _ in range(gone)),
    )


def is_believed(made: Kept, name: str, at: datetime, *authorities: x509.Certificate) -> bool:
    """By somebody else's verifier, which is as strict as the web is."""
    builder = PolicyBuilder().store(Store([*authorities])).time(at)
    try:
        builder.build_server_verifier(x509.DNSName(name)).verify(made.leaf.certificate, [])
    except VerificationError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "seconds", "expected"),
    [
        pytest.param(NAMES[0], 0, True, id="at once"),
        pytest.param(NAMES[1], 0, True, id="its other name"),
        pytest.param(NAMES[0], -299, True, id="by a clock that is behind"),
        pytest.param(NAMES[0], -301, False, id="by one that is too far behind"),
        pytest.param(NAMES[0], DAY, True, id="to the end"),
        pytest.param(NAMES[0], DAY + 1, False, id="no longer"),
        pytest.param("injector.other.svc", 0, False, id="of somebody else"),
    ],
)
def test_who_believes_it(name: str, seconds: float, expected: bool) -> None:
    made, at = kept(), NOW + timedelta(seconds=seconds)
    assert is_believed(made, name, at, made.authority.certificate) is expected
    assert not is_believed(made, name, at, authority(NOW, DAY).certificate)


def test_it_is_for_a_server_and_signs_nothing() -> None:
    certificate = kept().leaf.certificate
    extensions = certificate.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert (constraints.critical, constraints.value.ca) == (True, False)
    assert (usage.critical, usage.value.key_cert_sign) == (True, False)
    assert [*purposes.value] == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert names_of(certificate) == [*NAMES]


def test_an_authority_signs_leaves_alone() -> None:
    certificate = kept().authority.certificate
    extensions = certificate.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert (usage.key_cert_sign, usage.digital_signature, usage.crl_sign) == (True, False, False)


def test_numbers_and_keys_are_drawn_anew() -> None:
    made = [each for _ in range(8) for each in (kept().leaf, kept().authority)]
    assert len({each.certificate.serial_number for each in made}) == len(made)
    assert len({each.key_pem for each in made}) == len(made)
    assert all(isinstance(each.key.curve, ec.SECP256R1) for each in made)


def test_a_leaf_does_not_outlive_its_authority() -> None:
    signer = authority(NOW, DAY)
    assert leaf(signer, NOW, 30 * DAY, NAMES).ends == signer.ends


@pytest.mark.parametrize("coming", [False, True])
@pytest.mark.parametrize("gone", [0, 2])
def test_a_secret_keeps_them(coming: bool, gone: int) -> None:
    made = kept(coming=coming, gone=gone)
    found = read(data_of(made))
    assert data_of(found) == data_of(made)
    assert (found.authorities, found.believed) == (made.authorities, made.believed)
    assert read_pem(data_of(made)["ca.crt"]) == made.authorities


def test_a_bundle_says_nothing_secret() -> None:
    assert b"PRIVATE" not in pem(kept(coming=True).authorities)
    assert read_pem(b"") == read_pem(b"\n") == ()


def without(name: str) -> Callable[[Data], Data]:
    return lambda data: {key: value for key, value in data.items() if key != name}


def with_another(name: str) -> Callable[[Data], Data]:
    """What belongs to other certificates, at one place."""
    return lambda data: {**data, name: data_of(kept(coming=True))[name]}


def with_text(name: str, text: bytes) -> Callable[[Data], Data]:
    return lambda data: {**data, name: text}


@pytest.mark.parametrize(
    "change",
    [
        *(
            pytest.param(change(name), id=f"{change.__name__} {name}")
            for change in (without, with_another)
            for name in ("tls.crt", "tls.key", "ca.crt", "ca.key")
        ),
        pytest.param(with_another("next.key"), id="the next one's key"),
        pytest.param(with_text("next.believed", b"yesterday"), id="no time"),
        pytest.param(with_text("next.believed", b"\xff"), id="no text"),
        pytest.param(with_text("tls.key", b""), id="an empty key"),
        pytest.param(with_text("tls.crt", b"-----BEGIN CERTIFICATE-----"), id="half a certificate"),
        pytest.param(lambda _: {}, id="nothing"),
    ],
)
def test_what_is_not_whole_is_not_read(change: Callable[[Data], Data]) -> None:
    with pytest.raises(ValueError, match=r"it has no|do not belong together"):
        read(change(data_of(kept(coming=True))))


def test_why_it_is_not_read_says_nothing_secret() -> None:
    secret = b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"
    with pytest.raises(ValueError, match="do not belong together") as refused:
        read({**data_of(kept()), "ca.key": secret})
    assert "c2VjcmV0" not in str(refused.value)
