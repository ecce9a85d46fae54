"""Who does what in the demo, and what should come of it.

`EXPECTED` is written by hand, from what policies/starter is meant to say. It is not computed from
the policy: else the demo could not tell a wrong policy from a right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.ticket_desk import HIDDEN_METHOD, HIDDEN_TOOL

LIST = "tools/list"
CALL = "tools/call"


@dataclass(frozen=True, slots=True, eq=False)
class Actor:
    """Somebody in front of the sidecar. `identity` is the configuration's `identity.static`."""

    name: str
    title: str
    identity: Mapping[str, Any] | None = None


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


ANA = Actor("ana", "human ana", {"type": "human", "id": "ana"})
REPORTING = Actor("reporting", "service reporting", {"type": "service", "id": "reporting"})
BOT = Actor(
    "support-bot",
    "agent support-bot for ana",
    {"type": "agent", "id": "support-bot", "on_behalf_of": {"type": "human", "id": "ana"}},
)
NOBODY = Actor("nobody", "unknown caller")
ACTORS = (ANA, REPORTING, BOT, NOBODY)

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
    REPORTING: READ,
    BOT: (*READ, "refund_ticket"),
    NOBODY: (),
}

# In the order of STEPS, the listing aside: allowed, or the reason code of the denial.
EXPECTED: Mapping[Actor, tuple[str, ...]] = {
    ANA: (
        ALLOWED,
        ALLOWED,
        ALLOWED,
        ALLOWED,
        "argument_not_allowed",
        "not_granted",
        "unknown_tool",
        "unknown_tool",
        "unknown_method",
    ),
    REPORTING: (
        ALLOWED,
        ALLOWED,
        "not_granted",
        "not_granted",
        "not_granted",
        "not_granted",
        "unknown_tool",
        "unknown_tool",
        "unknown_method",
    ),
    BOT: (
        ALLOWED,
        ALLOWED,
        "not_granted",
        ALLOWED,
        "argument_not_allowed",
        "not_granted_to_principal",
        "unknown_tool",
        "unknown_tool",
        "unknown_method",
    ),
    NOBODY: (
        "unknown_actor",
        "unknown_actor",
        "unknown_actor",
        "unknown_actor",
        "unknown_actor",
        "unknown_actor",
        "unknown_actor",
        "unknown_actor",
        "unknown_method",
    ),
}


def expected(actor: Actor, step: Step) -> str:
    """Allowed, or the reason code of the denial; a listing is never denied, but filtered."""
    if step.method == LIST:
        return ALLOWED
    return EXPECTED[actor][STEPS.index(step) - 1]
