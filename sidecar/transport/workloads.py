"""Which workload a request comes from: by the certificate of its connection, or a proxy's word.

A proxy's own certificate says nothing of who acts: where its header counts, only the header does.
"""

from __future__ import annotations

import time

from aiohttp import web

from sidecar.config import Spiffe
from sidecar.errors import Unauthenticated
from sidecar.policy import spiffe as rules
from sidecar.policy.spiffe import Workload
from sidecar.protocol.session import Bounded

CERTIFICATE_HEADER = "x-forwarded-client-cert"
MAX_KNOWN = 1000


class Workloads:
    """Reads certificates. `header` is where a proxy says which one it was shown."""

    def __init__(self, spiffe: Spiffe, header: str | None = None) -> None:
        self._domains, self._header = frozenset(spiffe.trust_domains), header
        self._known: Bounded[bytes, Workload] = Bounded(MAX_KNOWN)

    def of(self, request: web.Request, *, proxied: bool) -> Workload | None:
        """The workload; None when no certificate was shown. `proxied` is by a trusted proxy.

        Raises:
            Unauthenticated: the certificate is no workload's that is believed.
        """
        if proxied and self._header is not None:
            found = self._told(request.headers.getall(self._header, []))
        else:
            found = self._shown(request)
        return None if found is None else rules.admit(found, self._domains, time.time())

    def outworn(self, request: web.Request) -> bool:
        """Whether the connection should give way to one with a newer certificate."""
        certificate = _certificate(request)
        known = None if certificate is None else self._known.get(certificate)
        return known is not None and (known.renews_at or 0) <= time.time()

    def _told(self, said: list[str]) -> Workload | None:
        if len(said) > 1:
            raise Unauthenticated("proxy_malformed", "the proxy's header stands more than once")
        return rules.of_header(said[0]) if said else None

    def _shown(self, request: web.Request) -> Workload | None:
        if request.transport is None:
            # Without its connection a request must not be taken for one that shows less.
            raise ConnectionResetError("the client is gone")
        certificate = _certificate(request)
        if certificate is None:
            return None
        known = self._known.get(certificate)
        if known is None:
            known = rules.of_certificate(certificate)
            self._known.remember(certificate, known)
        return known


def _certificate(request: web.Request) -> bytes | None:
    """What was shown on the request's connection, which has verified it."""
    transport = request.transport
    connection = None if transport is None else transport.get_extra_info("ssl_object")
    found: bytes | None = connection.getpeercert(binary_form=True) if connection else None
    return found
