"""The issuers that are believed: what a token of each must look like, and where its keys are.

Frozen values that the configuration fills in. What could never work, or would weaken every check,
is a `ValueError` here, so that it is found before anything is served.
"""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from sidecar.policy.jwks import ALGORITHMS

IssuerKind = Literal["oidc", "kubernetes"]


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where an issuer's keys are: a URL, a file, or neither, which is OIDC discovery."""

    url: str | None = None  # the JWK set; https, or http on loopback
    file: str | None = None  # the JWK set as a file, read again when it changes
    ca: str | None = None  # file of the certificates that the URL's server is checked by
    bearer: str | None = None  # file of a token to fetch with (a cluster's key set may want one)
    insecure: bool = False  # http to anywhere: whoever is on the path can then sign tokens
    timeout: float = 5.0  # seconds for one fetch
    max_size: int = 256 * 1024  # bytes of a key set
    max_age: float = 300.0  # seconds: a key that the issuer withdraws is accepted no longer
    stale: float = 24 * 3600.0  # seconds that keys are good while the issuer does not answer
    interval: float = 30.0  # seconds between fetches, whatever key ids tokens name
    retry: float = 5.0  # seconds between fetches while they fail

    def __post_init__(self) -> None:
        if self.url is not None and self.file is not None:
            raise ValueError("keys come from a url or from a file, not from both")
        if self.url is not None and not fetchable(self.url, insecure=self.insecure):
            raise ValueError("keys are fetched by https, or by http from loopback")
        if min(self.timeout, self.max_size, self.max_age, self.stale) <= 0:
            raise ValueError("timeout, max_size, max_age and stale are more than 0")
        if min(self.interval, self.retry) < 1:
            raise ValueError("interval and retry are at least 1 s: tokens must not drive fetches")


_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


@dataclass(frozen=True, slots=True)
class Review:
    """The API server that is asked about each token, in place of keys (TokenReview)."""

    url: str = "https://kubernetes.default.svc"  # https, or http on loopback
    ca: str | None = f"{_ACCOUNT}/ca.crt"  # file of the certificates that it is checked by
    token_file: str = f"{_ACCOUNT}/token"  # who asks: may create tokenreviews; read each time
    timeout: float = 2.0  # seconds for one review, waiting for its turn included
    remember: float = 10.0  # seconds that an answer counts: a pod that is deleted is out after it
    concurrent: int = 10  # reviews that go on at once
    rate: int = 50  # reviews that begin in one second

    def __post_init__(self) -> None:
        if not fetchable(self.url, insecure=False):
            raise ValueError("the API server is asked by https, or by http on loopback")
        if not 0 <= self.remember <= 60:
            raise ValueError("remember is 0 to 60 s: what is remembered can not be taken back")
        if self.timeout <= 0 or min(self.concurrent, self.rate) < 1:
            raise ValueError("timeout is more than 0, concurrent and rate are at least 1")


@dataclass(frozen=True, slots=True)
class Issuer:
    """One issuer. Names of claims may be dotted paths, such as `realm_access.roles`."""

    name: str  # `iss`, to the letter
    audiences: tuple[str, ...]  # a token is for us when its `aud` names one of them
    keys: KeySource = KeySource()
    kind: IssuerKind = "oidc"  # `kubernetes`: its tokens are service accounts'
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)  # the only ones accepted
    leeway: float = 30.0  # seconds that clocks may differ
    groups: str = "groups"  # claim: a list, or a string with spaces
    claims: tuple[str, ...] = ()  # the claims that policies see; no others leave the sidecar
    purpose: str | None = None  # claim that says what the access is for
    clients: tuple[str, ...] = ("client_id", "azp")  # claims that name the client
    agents: tuple[str, ...] = ()  # clients that are agents: they act, on behalf of `sub`
    interactive: tuple[str, ...] = ()  # clients where people sign in: then `sub` is human
    actor_issuers: tuple[str, ...] = ()  # other issuers whose principals its `act` may name
    pod_required: bool = False  # kubernetes: refuse tokens that are bound to no pod
    review: Review | None = None  # kubernetes: the cluster is asked; it needs no keys then

    def __post_init__(self) -> None:
        names = (self.name, *self.actor_issuers)
        if not all(names) or any("|" in each for each in names):
            raise ValueError("an issuer has a name, without '|'")
        if not self.audiences or not all(self.audiences):
            raise ValueError("an issuer has at least one audience: else any token of it would do")
        unknown = set(self.algorithms) - set(ALGORITHMS)
        if unknown or not self.algorithms:
            raise ValueError(f"algorithms are of {', '.join(ALGORITHMS)}")
        if not 0 <= self.leeway <= 300:
            raise ValueError("leeway is 0 to 300 s")
        if self.review is not None and (self.kind != "kubernetes" or self.keys != KeySource()):
            raise ValueError("a cluster has tokens reviewed, or verified by keys (jwks), not both")
        discovered = self.review is None and self.keys.url is None and self.keys.file is None
        if discovered and not fetchable(self.name, insecure=self.keys.insecure):
            raise ValueError("without a url or a file of keys, an issuer is an https URL")


def fetchable(url: str, *, insecure: bool) -> bool:
    """Whether nobody on the way can answer in the server's place."""
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError:
        return False
    if not host or parts.username is not None:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and (insecure or _loopback(host)))


def same_origin(one: str, other: str) -> bool:
    """Whether two fetchable URLs are served by the same server."""
    return _origin(urlsplit(one)) == _origin(urlsplit(other))


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
