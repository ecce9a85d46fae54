"""Who does what in the demo, and what should come of it: the matrix.

Every type of actor, alone and on behalf of a human, does the same ten things. `EXPECTED` is written
by hand, from what policies/starter is meant to say. It is not computed from the policy: else the
demo could not tell a wrong policy from a right one. The tests of identity play the same matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from tests.support.issuing import DROP, claims, nested, own_claims
from tests.support.ticket_desk import HIDDEN_METHOD, HIDDEN_TOOL

LIST = "tools/list"
CALL = "tools/call"
ANONYMOUS = "anonymous"

# How the sidecar is told what an issuer means by a claim, and what a tool acts on.
TYPES = [
    {"type": each, "source": "jwt", "claim": "kind", "equals": each}
    for each in ("human", "service")
]
RESOURCES = dict.fromkeys(("get_ticket", "refund_ticket", "delete_ticket"), "ticket:{id}")


@dataclass(frozen=True, slots=True, eq=False)
class Actor:
    """Somebody in front of the sidecar, for themselves or for a human; `claims` is their token."""

    type: str
    id: str
    claims: Mapping[str, Any]
    on_behalf_of: str | None = None

    @property
    def title(self) -> str:
        """Who it is, in words."""
        behind = f" for {self.on_behalf_of}" if self.on_behalf_of else ""
        return f"{self.type} {self.id}{behind}"

    @property
    def static(self) -> Mapping[str, Any] | None:
        """The same as the configuration's `identity.static`; None for who is unknown."""
        if self.type == "unknown":
            return None
        behind = {"on_behalf_of": {"type": "human", "id": self.on_behalf_of}}
        return {"type": self.type, "id": self.id, **(behind if self.on_behalf_of else {})}


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One of the ten things: a listing, a tool call, or a request by another method."""

    title: str
    method: str
    tool: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def effect(self) -> tuple[str, dict[str, Any]] | None:
        """What the server's own log says when this is executed; None for what changes nothing."""
        if self.method == LIST:
            return None
        return self.tool or self.method, dict(self.arguments)

    @property
    def resource(self) -> str:
        """What it acts on, in the words of the span; nothing where the method is unknown."""
        if self.tool is None:
            return "listing:tools" if self.method == LIST else ""
        return f"ticket:{self.arguments['id']}" if self.tool in RESOURCES else f"tool:{self.tool}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One actor, one thing: what the sidecar has written down about it."""

    actor: str
    principal: str
    tool: str
    resource: str
    decision: str
    reason: str

    @classmethod
    def of(cls, span: Mapping[str, Any]) -> Self:
        """By the attributes of the sidecar's SERVER span; what is absent is an empty text."""
        said = {name: str(span.get(name, "")) for name in ("actor.type", "actor.id", *WRITTEN)}
        return cls(f"{said['actor.type']} {said['actor.id']}", *(said[name] for name in WRITTEN))


WRITTEN = (
    "actor.on_behalf_of",
    "gen_ai.tool.name",
    "authz.resource",
    "authz.decision",
    "authz.reason",
)

ANA = Actor("human", "ana", claims(sub="ana", groups=DROP))
ANA_FOR_BEN = Actor(
    "human", "ana", claims(sub="ben", groups=DROP, act={"sub": "ana", "kind": "human"}), "ben"
)
REPORTING = Actor("service", "reporting", own_claims("reporting"))
REPORTING_FOR_ANA = Actor(
    "service",
    "reporting",
    claims(sub="ana", groups=DROP, act={"sub": "reporting", "kind": "service"}),
    "ana",
)
BOT = Actor("agent", "support-bot", own_claims("support-bot"))
BOT_FOR_ANA = Actor(
    "agent", "support-bot", claims(sub="ana", groups=DROP, client_id="support-bot"), "ana"
)
NOBODY = Actor("unknown", ANONYMOUS, claims(sub=ANONYMOUS, groups=DROP, client_id="not-listed"))
NOBODY_FOR_ANA = Actor(
    "unknown", ANONYMOUS, claims(sub="ana", groups=DROP, act=nested(ANONYMOUS)), "ana"
)
ACTORS = (
    ANA,
    ANA_FOR_BEN,
    REPORTING,
    REPORTING_FOR_ANA,
    BOT,
    BOT_FOR_ANA,
    NOBODY,
    NOBODY_FOR_ANA,
)
# Over HTTP all of them, by their tokens; a pipe has one end, and its sidecar is told whose it is.
PIPED = (ANA, REPORTING, BOT_FOR_ANA, NOBODY)

STEPS = (
    Step("list the tools", LIST),
    Step("search_tickets", CALL, "search_tickets", {"query": "kettle"}),
    Step("get_ticket 4711", CALL, "get_ticket", {"id": 4711}),
    Step("create_ticket", CALL, "create_ticket", {"title": "Late again"}),
    Step("refund_ticket 20", CALL, "refund_ticket", {"id": 4711, "amount": 20}),
    Step("refund_ticket 500", CALL, "refund_ticket", {"id": 4711, "amount": 500}),
    Step("delete_ticket 4712", CALL, "delete_ticket", {"id": 4712}),
    Step(f"{HIDDEN_TOOL} (never listed)", CALL, HIDDEN_TOOL),
    Step("drop_tables (unknown)", CALL, "drop_tables"),
    Step(f"{HIDDEN_METHOD} (no method)", HIDDEN_METHOD),
)

ALLOWED = "allowed"
READ = ("search_tickets", "get_ticket")

VISIBLE: Mapping[Actor, tuple[str, ...]] = {
    ANA: (*READ, "create_ticket", "refund_ticket"),
    ANA_FOR_BEN: (),
    REPORTING: READ,
    REPORTING_FOR_ANA: READ,
    BOT: (*READ, "delete_ticket"),
    BOT_FOR_ANA: (*READ, "refund_ticket"),
    NOBODY: (),
    NOBODY_FOR_ANA: (),
}

_STRANGE = ("unknown_tool", "unknown_tool", "unknown_method")
_UNKNOWN = (*("unknown_actor",) * 8, "unknown_method")

# In the order of STEPS, the listing aside: allowed, or the reason code of the denial.
EXPECTED: Mapping[Actor, tuple[str, ...]] = {
    ANA: (
        ALLOWED,
        ALLOWED,
        ALLOWED,
        ALLOWED,
        "argument_not_allowed",
        "not_granted",
        *_STRANGE,
    ),
    ANA_FOR_BEN: (
        "not_granted_to_principal",
        "not_granted_to_principal",
        "not_granted_to_principal",
        "not_granted_to_principal",
        "argument_not_allowed",
        "not_granted",
        *_STRANGE,
    ),
    REPORTING: (
        ALLOWED,
        ALLOWED,
        "not_granted",
        "not_granted",
        "not_granted",
        "not_granted",
        *_STRANGE,
    ),
    REPORTING_FOR_ANA: (
        ALLOWED,
        ALLOWED,
        "not_granted",
        "not_granted",
        "argument_not_allowed",
        "not_granted",
        *_STRANGE,
    ),
    BOT: (
        ALLOWED,
        ALLOWED,
        "not_granted",
        "refund_needs_principal",
        "refund_needs_principal",
        ALLOWED,
        *_STRANGE,
    ),
    BOT_FOR_ANA: (
        ALLOWED,
        ALLOWED,
        "not_granted",
        ALLOWED,
        "argument_not_allowed",
        "not_granted_to_principal",
        *_STRANGE,
    ),
    NOBODY: _UNKNOWN,
    NOBODY_FOR_ANA: _UNKNOWN,
}


def expected(actor: Actor, step: Step) -> str:
    """Allowed, or the reason code of the denial; a listing is never denied, but filtered."""
    if step.method == LIST:
        return ALLOWED
    return EXPECTED[actor][STEPS.index(step) - 1]


def written(actor: Actor, step: Step, outcome: str) -> Cell:
    """What the sidecar should write down about it, when the outcome is as `expected` says it."""
    allowed = outcome == ALLOWED
    return Cell(
        actor=f"{actor.type} {actor.id}",
        principal=actor.on_behalf_of or "",
        tool=step.tool or "",
        resource=step.resource,
        decision="allow" if allowed else "deny",
        reason="" if allowed else outcome,
    )
