"""Who sent an HTTP request: its credentials, verified, as one actor.

A credential that is there and is no good is refused, also where none is needed: it is never taken
for "nobody". Tokens are read from the `Authorization` header alone, never from the query. What a
proxy says in headers is believed when the connection comes from the proxy, else it is not read.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

from aiohttp import web

from sidecar.config import Identity, Proxy
from sidecar.errors import Unauthenticated
from sidecar.policy.actors import Asserted, TypeRule, identify
from sidecar.policy.decision import Reason
from sidecar.policy.identity import UNKNOWN, Actor
from sidecar.policy.spiffe import Workload
from sidecar.policy.tokens import Token
from sidecar.protocol.session import Bounded
from sidecar.transport.headers import Headers
from sidecar.transport.workloads import CERTIFICATE_HEADER, Workloads

Verify = Callable[[str], Awaitable[Token]]
"""The token that a text is; raises Unauthenticated."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

AUTHORIZATION = "Authorization"
MAX_ACTORS = 2000
MAX_ID = 1024

_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]+)")
_SCOPE = re.compile(r"[!#-\[\]-~]+")


class Authentication:
    """Makes an actor of a request. Without `verify` no token is read: the server may want it."""

    def __init__(self, identity: Identity, verify: Verify | None = None) -> None:
        self._identity = identity
        self._tokens = None if verify is None else TokenActors(verify, identity.types)
        self._peers = Peers(identity.proxy.peers if identity.proxy else ())
        header = identity.proxy.certificate_header if identity.proxy else None
        self._workloads = Workloads(identity.spiffe, header) if identity.spiffe else None

    @property
    def verifies(self) -> bool:
        """Whether tokens are read here; where they are not, they are the server's to read."""
        return self._tokens is not None

    @property
    def asserting(self) -> frozenset[str]:
        """The headers that say who somebody is, which end here whoever sends them."""
        proxy = self._identity.proxy
        names = (proxy.id_header, proxy.groups_header, proxy.certificate_header) if proxy else ()
        return frozenset(each for each in (CERTIFICATE_HEADER, *names) if each)

    async def actor(self, request: web.Request) -> Actor:
        """Who acts, by all the evidence that there is.

        Raises:
            Unauthenticated: a credential is refused, or there is none and one is needed.
        """
        workload, asserted = self._workload(request), self._asserted(request)
        given = None if self._tokens is None else bearer(request.headers)
        if given is None and asserted is None and workload is None:
            if self._identity.demanded:
                raise Unauthenticated("credentials_missing", "a credential is needed")
            return self._identity.actor
        if self._tokens is None or given is None:
            return identify(self._identity.types, workload=workload, asserted=asserted)
        return await self._tokens.actor(given, asserted, workload)

    def outworn(self, request: web.Request) -> bool:
        """Whether the credential of the connection itself will not do for much longer."""
        return self._workloads is not None and self._workloads.outworn(request)

    def source_address(self, request: web.Request) -> str | None:
        """Where a request comes from: behind a proxy that is believed, what it says."""
        if not self._peers:
            return request.remote
        forwarded = ",".join(request.headers.getall("X-Forwarded-For", ()))
        return self._peers.behind(request.remote, forwarded)

    def challenge(self, error: Unauthenticated, metadata: str | None) -> dict[str, str]:
        """The header of a 401 (RFC 6750 §3): why, and where to look for a token.

        `metadata` is the URL of the protected resource metadata. Who has shown nothing is told no
        error, but what to ask for.
        """
        if error.code == "credentials_missing":
            scopes = " ".join(self._identity.scopes)
            return _challenge(scope=scopes, resource_metadata=metadata)
        return _challenge(
            error="invalid_token", error_description=error.code, resource_metadata=metadata
        )

    def _workload(self, request: web.Request) -> Workload | None:
        if self._workloads is None:
            return None
        return self._workloads.of(request, proxied=self._peers.include(request.remote))

    def _asserted(self, request: web.Request) -> Asserted | None:
        proxy = self._identity.proxy
        if proxy is None or not self._peers.include(request.remote):
            return None
        return asserted_by(proxy, request.headers)


class TokenActors:
    """The actor behind a token. A token that is remembered as verified has its actor kept too."""

    def __init__(self, verify: Verify, rules: Sequence[TypeRule]) -> None:
        self._verify, self._rules = verify, rules
        self._known: Bounded[int, tuple[Token, Actor]] = Bounded(MAX_ACTORS)

    async def actor(
        self, text: str, asserted: Asserted | None = None, workload: Workload | None = None
    ) -> Actor:
        """The actor of a token's text, with what comes beside it.

        Raises:
            Unauthenticated: the token is refused, or what it says of its chain.
        """
        token = await self._verify(text)
        if asserted is not None or workload is not None:
            return identify(self._rules, token=token, asserted=asserted, workload=workload)
        known = self._known.get(id(token))
        if known is None or known[0] is not token:
            known = token, identify(self._rules, token=token)
            self._known.remember(id(token), known)
        return known[1]


class PipeAuthentication:
    """Who is at the other end of a pipe, by the token that is there at the moment."""

    def __init__(
        self, identity: Identity, verify: Verify, current: Callable[[], str | None]
    ) -> None:
        self._tokens = TokenActors(verify, identity.types)
        self._demanded, self._current = identity.demanded, current

    async def actor(self) -> Actor:
        """Who acts now.

        Raises:
            Unauthenticated: the token is refused, or there is none and one is needed.
        """
        text = self._current()
        if text is not None:
            return await self._tokens.actor(text)
        if self._demanded:
            raise Unauthenticated("credentials_missing", "a bearer token is needed")
        return UNKNOWN


class Peers:
    """The networks whose hosts are believed about who is behind them."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(each) for each in networks]

    def __bool__(self) -> bool:
        return bool(self._networks)

    def include(self, remote: str | None) -> bool:
        """Whether this address is one of theirs."""
        address = _address(remote or "")
        return address is not None and any(address in each for each in self._networks)

    def behind(self, remote: str | None, forwarded: str) -> str | None:
        """The last address that is not a peer's, counted from the connection's own backwards."""
        for hop in reversed([each.strip() for each in forwarded.split(",")]):
            address = _address(hop)
            if not self.include(remote) or address is None:
                break
            remote = str(address)
        return remote


def bearer(headers: Headers) -> str | None:
    """The token of a request; None when it has none.

    Raises:
        Unauthenticated: there are several, or what is there is no bearer token.
    """
    given = headers.getall(AUTHORIZATION, [])
    if not given:
        return None
    found = _BEARER.fullmatch(given[0].strip(" \t")) if len(given) == 1 else None
    if found is None:
        raise Unauthenticated("token_malformed", "Authorization has to be one bearer token")
    return found[1]


def asserted_by(proxy: Proxy, headers: Headers) -> Asserted | None:
    """Whom a proxy says it speaks for; None when it says nothing.

    Raises:
        Unauthenticated: it says it twice, or in no usable way.
    """
    ids = headers.getall(proxy.id_header, [])
    groups = headers.getall(proxy.groups_header, []) if proxy.groups_header else []
    if not ids and not groups:
        return None
    usable = len(ids) == 1 and 0 < len(ids[0]) <= MAX_ID and ids[0].isprintable()
    if not usable or len(groups) > 1:
        raise Unauthenticated("proxy_malformed", "the proxy does not name one principal")
    named = [each.strip() for each in ",".join(groups).split(",")]
    return Asserted(ids[0], proxy.name, tuple(each for each in named if each))


def insufficient(reasons: Sequence[Reason], metadata: str | None) -> dict[str, str]:
    """The header of a 403 when a policy names the scopes that would help; {} when it does not."""
    named = " ".join(each.scope or "" for each in reasons).split()
    scopes = dict.fromkeys(each for each in named if _SCOPE.fullmatch(each))
    if not scopes:
        return {}
    return _challenge(
        error="insufficient_scope", scope=" ".join(scopes), resource_metadata=metadata
    )


def _challenge(**parameters: str | None) -> dict[str, str]:
    said = ", ".join(f'{name}="{value}"' for name, value in parameters.items() if value)
    return {"WWW-Authenticate": f"Bearer {said}".strip()}


def _address(text: str) -> Address | None:
    """An address, without a port or a zone; one of IPv4 also where it is written as IPv6."""
    with suppress(ValueError):
        address = ipaddress.ip_address(text.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address
    return None
