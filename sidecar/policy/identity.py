"""Who is acting, and for whom.

A `Principal` is somebody at an issuer; its `key` is issuer and id together, so that the same name
at two issuers is two principals. An `Actor` is the chain of principals behind one action: the first
acts, the last is the one it acts for, those between only handed the matter on and are no ground for
access (RFC 8693 §4.1).

With the source `static` the configuration says who is on the other end; `sidecar.policy.actors`
makes an actor of verified evidence. Everybody else is `unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

PrincipalType = Literal["human", "service", "agent", "unknown"]
PRINCIPAL_TYPES: tuple[str, ...] = get_args(PrincipalType)

STATIC_ISSUER = "static"
MAX_CHAIN = 8


@dataclass(frozen=True, slots=True)
class Principal:
    """One human, service or agent, at one issuer."""

    type: PrincipalType
    id: str
    issuer: str
    groups: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    claims: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "|" in self.issuer:
            raise ValueError("an issuer has no '|': it ends the issuer in a principal's key")

    @property
    def key(self) -> str:
        """What grants, revocation and bindings compare."""
        return f"{self.issuer}|{self.id}"


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """Of a verified token what may be shown: never its text. Times are Unix times."""

    expires_at: float
    id: str | None = None
    issued_at: float | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """The chain behind an action, the one that acts first; and how sure we are.

    `assurance`: 0 nothing, 1 asserted, 2 verified bearer token, 3 proof of possession.
    `token` is there when one was verified; `purpose` when it names one; `expires_at`, as Unix time,
    when its evidence does not last: it is the end of a token's leeway.
    """

    chain: tuple[Principal, ...]
    assurance: Literal[0, 1, 2, 3]
    sources: tuple[str, ...]
    token: TokenFacts | None = None
    purpose: str | None = None
    expires_at: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.chain) <= MAX_CHAIN:
            raise ValueError(f"a chain has 1 to {MAX_CHAIN} principals, not {len(self.chain)}")

    @property
    def principal(self) -> Principal:
        """The one that acts."""
        return self.chain[0]

    @property
    def on_behalf_of(self) -> Principal | None:
        """The one it acts for; None when it acts for itself."""
        return self.chain[-1] if len(self.chain) > 1 else None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the whole chain: what sessions and tasks are bound to."""
        return tuple(each.key for each in self.chain)


UNKNOWN = Actor(chain=(Principal("unknown", "anonymous", "none"),), assurance=0, sources=())


def static(actor: Principal, on_behalf_of: Principal | None = None) -> Actor:
    """The actor that the configuration names: asserted, not verified."""
    chain = (actor,) if on_behalf_of is None else (actor, on_behalf_of)
    return Actor(chain=chain, assurance=1, sources=("static",))
