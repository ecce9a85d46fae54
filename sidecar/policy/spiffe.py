"""SPIFFE: whose a certificate is (X509-SVID), and what a proxy tells of one that it was shown.

An id is believed when its trust domain is listed. Which authority signed for which domain is the
TLS listener's bundle to say: every authority in it can speak for every listed domain.

`X-Forwarded-Client-Cert` has an element for each proxy on the way. Only the last one is read: the
nearest proxy wrote it, of the certificate that it verified itself; what stands before it is what
that proxy was sent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.errors import Unauthenticated

MAX_ID = 2048
LAST_PART = 0.1
"""Of a certificate's time: whoever rotates certificates has a newer one by then."""

_ID = re.compile(r"spiffe://([a-z0-9._-]{1,255})((?:/[A-Za-z0-9._-]+)+)")
_PAIR = re.compile(r'[ \t]*([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^",;]*)[ \t]*([;,]|\Z)')
_ONCE = ("hash", "cert", "chain", "subject")


@dataclass(frozen=True, slots=True)
class Workload:
    """Who is on the other end of a connection, by a client certificate."""

    id: str  # a SPIFFE id
    issuer: str  # its trust domain, as spiffe://DOMAIN
    expires_at: float | None = None  # when the certificate's time is over, as Unix time
    renews_at: float | None = None  # when there should be a newer one, some time before
    asserted: bool = False  # a proxy says so: it was not shown on this connection

    @property
    def domain(self) -> str:
        """The trust domain alone."""
        return self.issuer.removeprefix("spiffe://")


def workload(uri: str, **more: Any) -> Workload:
    """The workload of a SPIFFE id, which has a path: a trust domain alone is nobody.

    Raises:
        Unauthenticated: `workload_malformed`.
    """
    found = _ID.fullmatch(uri) if len(uri) <= MAX_ID else None
    if found is None or {".", ".."} & set(found[2].split("/")):
        raise Unauthenticated("workload_malformed", "the certificate's URI is no SPIFFE id")
    return Workload(uri, f"spiffe://{found[1]}", **more)


def of_certificate(der: bytes) -> Workload:
    """The workload of a certificate whose signature has been verified.

    Raises:
        Unauthenticated: `workload_malformed`: not a workload's, but an authority's, or with no
            SPIFFE id, or with several URIs.
    """
    from cryptography import x509

    try:
        certificate = x509.load_der_x509_certificate(der)
        found = {type(each.value): each.value for each in certificate.extensions}
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise Unauthenticated("workload_malformed", "the certificate can not be read") from error
    if _may_sign(found):
        raise Unauthenticated("workload_malformed", "the certificate is an authority's")
    names = found.get(x509.SubjectAlternativeName)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    begins, ends = (
        each.timestamp()
        for each in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    )
    return workload(_only(uris), expires_at=ends, renews_at=ends - LAST_PART * (ends - begins))


def _may_sign(extensions: Mapping[type, object]) -> bool:
    from cryptography import x509

    basic = extensions.get(x509.BasicConstraints)
    usage = extensions.get(x509.KeyUsage)
    authority = isinstance(basic, x509.BasicConstraints) and basic.ca
    signs = isinstance(usage, x509.KeyUsage) and (usage.key_cert_sign or usage.crl_sign)
    return authority or signs


def of_header(value: str) -> Workload:
    """The workload that the nearest proxy tells of.

    Raises:
        Unauthenticated: `proxy_malformed`, the header is no list of elements; or
            `workload_malformed`, the certificate has no SPIFFE id, or several URIs.
    """
    pairs = _last_element(value)
    keys = [key for key, _ in pairs]
    if any(keys.count(key) > 1 for key in _ONCE):
        raise Unauthenticated("proxy_malformed", "the proxy says a thing twice")
    return workload(_only([said for key, said in pairs if key == "uri"]), asserted=True)


def _last_element(value: str) -> list[tuple[str, str]]:
    """Its keys in lower case, and their values; what stands before it is held to the same form."""
    element: list[tuple[str, str]] = []
    at, end = 0, ","
    while end:
        if end == ",":
            element = []
        found = _PAIR.match(value, at)
        if found is None:
            raise Unauthenticated("proxy_malformed", "the proxy's header can not be read")
        element.append((found[1].lower(), _unquoted(found[2].rstrip(" \t"))))
        at, end = found.end(), found[3]
    return element


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


def _only(uris: Sequence[str]) -> str:
    if len(uris) != 1:
        raise Unauthenticated("workload_malformed", "a certificate has one URI, its SPIFFE id")
    return uris[0]


def admit(shown: Workload, trust_domains: Collection[str], now: float) -> Workload:
    """The same workload, if its domain is trusted and its certificate's time is not over.

    A connection can outlive the certificate that it was opened with.

    Raises:
        Unauthenticated: `workload_domain`, `workload_expired`.
    """
    if shown.domain not in trust_domains:
        raise Unauthenticated("workload_domain", "the certificate is of another trust domain")
    if shown.expires_at is not None and now >= shown.expires_at:
        raise Unauthenticated("workload_expired", "the certificate's time is over")
    return shown
