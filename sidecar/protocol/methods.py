"""The methods of MCP, as a table.

One row per method: who sends it, in which revisions, how it is governed, what it acts on, which
header mirrors that, and, for listings, where the items are. Code, tests and policy documents walk
this table; a method that has no row is unknown, and unknown is denied. A method is described by the
`schema.ts` of its revisions (https://modelcontextprotocol.io/specification).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

REVISIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28")
LEGACY_REVISIONS = frozenset(REVISIONS[:-1])
MODERN_REVISION = REVISIONS[-1]


class Direction(Enum):
    """Who sent a message."""

    FROM_CLIENT = "client_to_server"
    FROM_SERVER = "server_to_client"


class Era(Enum):
    """Revisions up to 2025-11-25 shake hands; from 2026-07-28 each request carries its envelope."""

    LEGACY = "legacy"
    MODERN = "modern"


class Governed(Enum):
    """How the fate of a message is decided.

    DECISION     the policy is asked before it is let through
    LISTING      it is let through, and the policy is asked about each page of the answer
    NEGOTIATION  the policy is asked, and only a revocation refuses
    TABLE        this table lets it pass
    """

    DECISION = "decision"
    LISTING = "listing"
    NEGOTIATION = "negotiation"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Listing:
    """Where a listing's answer keeps its items, and how an item is named there."""

    kind: str
    items: str
    item_name: str
    item_target: str


@dataclass(frozen=True, slots=True)
class Method:
    """One row. `subject` is the path below `params` to what the method acts on."""

    name: str
    kind: Literal["request", "notification", "stream"]
    sender: Literal["client", "server", "both"]
    revisions: tuple[str, ...]
    governed: Governed
    target: str | None = None
    subject: tuple[str, ...] = ()
    header: bool = False
    listing: Listing | None = None

    def sent_by(self, direction: Direction) -> bool:
        """Whether this method may come from that side."""
        side = "client" if direction is Direction.FROM_CLIENT else "server"
        return self.sender in (side, "both")

    def exists_in(self, era: Era) -> bool:
        """Whether any revision of that era has this method."""
        if era is Era.MODERN:
            return MODERN_REVISION in self.revisions
        return any(each in LEGACY_REVISIONS for each in self.revisions)


ALL = REVISIONS
LEGACY = REVISIONS[:4]
MODERN = REVISIONS[4:]
ELICITING = REVISIONS[2:]
TASKED = REVISIONS[3:]
TASKS_CORE = REVISIONS[3:4]

TOOLS = Listing("tools", "tools", "name", "tool")
RESOURCES = Listing("resources", "resources", "uri", "resource")
TEMPLATES = Listing("resource_templates", "resourceTemplates", "uriTemplate", "resource")
PROMPTS = Listing("prompts", "prompts", "name", "prompt")
TASKS = Listing("tasks", "tasks", "taskId", "task")


def _request(
    name: str,
    revisions: tuple[str, ...],
    target: str,
    *subject: str,
    sender: Literal["client", "server", "both"] = "client",
    header: bool = False,
) -> Method:
    return Method(
        name, "request", sender, revisions, Governed.DECISION, target, subject, header=header
    )


def _listing(name: str, revisions: tuple[str, ...], listing: Listing) -> Method:
    return Method(
        name, "request", "client", revisions, Governed.LISTING, "listing", listing=listing
    )


def _negotiation(name: str, revisions: tuple[str, ...]) -> Method:
    return Method(name, "request", "client", revisions, Governed.NEGOTIATION, "negotiation")


def _passing(
    name: str,
    revisions: tuple[str, ...],
    sender: Literal["client", "server", "both"],
    kind: Literal["request", "notification"] = "notification",
) -> Method:
    return Method(name, kind, sender, revisions, Governed.TABLE)


_ROWS = (
    _negotiation("initialize", LEGACY),
    _negotiation("server/discover", MODERN),
    _request("tools/call", ALL, "tool", "name", header=True),
    _request("resources/read", ALL, "resource", "uri", header=True),
    _request("resources/subscribe", LEGACY, "resource", "uri"),
    _request("resources/unsubscribe", LEGACY, "resource", "uri"),
    _request("prompts/get", ALL, "prompt", "name", header=True),
    _request("completion/complete", ALL, "completion", "ref"),
    _request("subscriptions/listen", MODERN, "subscription", "notifications"),
    _request("tasks/get", TASKED, "task", "taskId", header=True),
    _request("tasks/result", TASKS_CORE, "task", "taskId"),
    _request("tasks/cancel", TASKED, "task", "taskId", header=True),
    _request("tasks/update", MODERN, "task", "taskId", header=True),
    _listing("tools/list", ALL, TOOLS),
    _listing("resources/list", ALL, RESOURCES),
    _listing("resources/templates/list", ALL, TEMPLATES),
    _listing("prompts/list", ALL, PROMPTS),
    _listing("tasks/list", TASKS_CORE, TASKS),
    _request("sampling/createMessage", ALL, "sampling", sender="server"),
    _request("elicitation/create", ELICITING, "elicitation", sender="server"),
    _request("roots/list", ALL, "roots", sender="server"),
    _passing("ping", LEGACY, "both", "request"),
    _passing("logging/setLevel", LEGACY, "client", "request"),
    _passing("notifications/initialized", LEGACY, "client"),
    _passing("notifications/cancelled", ALL, "both"),
    _passing("notifications/progress", ALL, "both"),
    _passing("notifications/roots/list_changed", LEGACY, "client"),
    _passing("notifications/message", ALL, "server"),
    _passing("notifications/tools/list_changed", ALL, "server"),
    _passing("notifications/prompts/list_changed", ALL, "server"),
    _passing("notifications/resources/list_changed", ALL, "server"),
    _passing("notifications/resources/updated", ALL, "server"),
    _passing("notifications/subscriptions/acknowledged", MODERN, "server"),
    _passing("notifications/tasks/status", TASKS_CORE, "both"),
    _passing("notifications/tasks", MODERN, "server"),
    _passing("notifications/elicitation/complete", TASKS_CORE, "server"),
)

CLIENT_HOSTED = {
    name: Method(name, "request", "server", TASKS_CORE, Governed.TABLE)
    for name in ("tasks/get", "tasks/result", "tasks/list", "tasks/cancel")
}
"""2025-11-25 lets a server ask after tasks that the client runs (sampling, elicitation)."""

ROUTING_HEADERS = ("MCP-Protocol-Version", "Mcp-Method", "Mcp-Name")


@dataclass(frozen=True, slots=True)
class MethodTable:
    """The rows, plus the vendor methods that the configuration declares."""

    rows: Mapping[str, Method]

    @classmethod
    def of(cls, declared: Iterable[str] = ()) -> MethodTable:
        """The table of MCP with `declared` methods as rows of target type `method`."""
        vendor = {name: _request(name, ALL, "method", sender="both") for name in declared}
        return cls({**vendor, **{row.name: row for row in _ROWS}})

    def find(
        self, name: str, kind: Literal["request", "notification"], direction: Direction, era: Era
    ) -> Method | None:
        """The row for a message, or None: then nobody has heard of it, and it goes nowhere."""
        hosted = CLIENT_HOSTED.get(name) if direction is Direction.FROM_SERVER else None
        row = hosted or self.rows.get(name)
        if row is None or row.kind != kind or not row.sent_by(direction):
            return None
        return row if row.exists_in(era) else None
