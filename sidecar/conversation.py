"""What lasts longer than one message: conversations, the calls in them, and their servers.

A transport makes a `Conversation` for each pipe, HTTP session or stateless POST. A `Call` is one
action from its arrival to its end. `Turn` keeps the order of arrival. The ports that the pipeline
needs (`Decider`, `Tracer`, `Recorder`) are here, so that those who fulfil them need not know it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from sidecar.errors import DecisionError
from sidecar.offers import Offer, Offers
from sidecar.policy import document
from sidecar.policy.decision import Decision, Mode, Reason
from sidecar.policy.enforcement import Grounds, Permitted, Refusal
from sidecar.policy.identity import Actor
from sidecar.protocol.catalog import Catalog, Lookup, digest
from sidecar.protocol.jsonrpc import JsonObject, Notification, Request, RequestId, Response
from sidecar.protocol.mapping import fill
from sidecar.protocol.session import Bounded, Operation, Outstanding, Session, Target
from sidecar.protocol.validation import Validation

MAX_TASKS = 10_000
MAX_ROUNDS = 10_000

Verdict = Literal["allow", "deny", "error"]
End = Literal["success", "tool_error", "denied", "policy_error", "upstream_error", "cancelled"]
Transport = Literal["stdio", "http"]

Address = tuple[str, int]
"""Host and port."""

Withdraw = Callable[[Response], Awaitable[None]]
"""Ends a call that is on its way: the client gets this answer, and the server is told."""

Tell = Callable[[Notification], Awaitable[None]]
"""Writes a message to a stream that the client reads, outside of any answer."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The spans of one action by their ids, made before the first of them is recorded.

    `to_opa` are headers for the policy query, `to_upstream` goes into the forwarded `_meta` and the
    upstream's HTTP headers. `state` is the tracer's own.
    """

    trace_id: str | None = None
    to_opa: Mapping[str, str] = field(default_factory=dict)
    to_upstream: Mapping[str, str] = field(default_factory=dict)
    state: Any = None


@dataclass(slots=True, eq=False)
class Call:
    """One action from its arrival to its end: what telemetry and audit write down.

    Times are nanoseconds since the epoch, 0 for what did not happen. `verdict` is what the policy
    (or the table of methods) said, `outcome` what came of it, set exactly once. `suspended`: its
    stream is gone, and its answer may come on another one. `withdrawn`: the policy has taken back
    what it had allowed; `withdraw` is how the transport that has it on its way ends it. `result` is
    the server's, until the end of the call is written down.
    """

    operation: Operation
    actor: Actor
    server: str
    transport: Transport
    decision_id: str
    trace: TraceContext
    source_address: str | None = None
    server_address: Address | None = None
    unverified: Mapping[str, str] = field(default_factory=dict)
    received: int = 0
    asked: int = 0
    answered: int = 0
    forwarded: int = 0
    finished: int = 0
    decision: Decision | None = None
    error: DecisionError | None = None
    verdict: Verdict = "allow"
    mode: Mode = "enforce"
    reasons: tuple[Reason, ...] = ()
    tool_known: bool | None = None
    tool_pinned: bool | None = None
    resource: str | None = None
    outcome: End | None = None
    rpc_error: tuple[int, str] | None = None
    result: Any = None
    cancelled: bool = False
    suspended: bool = False
    withdrawn: Refusal | None = None
    withdraw: Withdraw | None = None
    tell: Tell | None = None

    @property
    def grounds(self) -> Grounds:
        """What it rests on by now."""
        revision = self.decision.revision if self.decision else None
        return Grounds(self.decision_id, self.actor.chain, self.operation.targets, revision)

    @property
    def request_id(self) -> RequestId | None:
        """The id that the asker waits under; None for what expects no answer."""
        message = self.operation.message
        return message.id if isinstance(message, Request) else None


class Recorder(Protocol):
    """Who writes down what happened: spans and metrics, audit records."""

    def decided(self, call: Call) -> None:
        """Before anything is forwarded. Raises AuditError when nothing may be let through."""

    def finished(self, call: Call) -> None:
        """Exactly once, when `outcome` is known."""


@dataclass(frozen=True, slots=True)
class Stranger:
    """Who was not let in: a credential is refused, or missing. Nothing of it is here."""

    code: str
    transport: Transport
    source_address: str | None = None
    path: str | None = None


@runtime_checkable
class Doorkeeper(Protocol):
    """A recorder that also writes down who was not let in."""

    def refused(self, stranger: Stranger) -> None:
        """Never raises: nothing depends on it."""


class Tracer(Protocol):
    """Who joins the client's trace and names our spans."""

    def begin(
        self,
        meta: Mapping[str, object],
        headers: Mapping[str, str],
        cause: TraceContext | None = None,
    ) -> TraceContext:
        """The context of one action, from the message's `_meta` or the HTTP headers.

        `cause` is that of the action which this one goes on with.
        """

    def malformed(self, code: str) -> None:
        """Count a message that was refused before it was anybody's action."""


class Decider(Protocol):
    """Who answers the input document."""

    async def decide(
        self, document: JsonObject, *, deadline: float, headers: Mapping[str, str]
    ) -> Decision:
        """The decision, within `deadline` seconds. Raises DecisionError."""


@dataclass(slots=True)
class Turn:
    """Forwarding in order of arrival: each ticket waits for the one before it."""

    _last: asyncio.Future[None] | None = None

    def take(self) -> Ticket:
        """The next place in the queue."""
        ticket = Ticket(self._last, asyncio.get_running_loop().create_future())
        self._last = ticket.done
        return ticket


@dataclass(slots=True)
class Ticket:
    """A place in the queue. `release` lets the next one go, once those before are gone too."""

    before: asyncio.Future[None] | None
    done: asyncio.Future[None]

    async def wait(self) -> None:
        """Until everything that arrived earlier is on its way."""
        if self.before is not None:
            await asyncio.shield(self.before)
            self.before = None

    def release(self) -> None:
        """Give the place up; safe to call twice, and before one's turn has come."""
        if self.before is None or self.before.done():
            self._open(None)
        else:
            self.before.add_done_callback(self._open)

    def _open(self, _: object) -> None:
        if not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a message came from: who sent it, and with which HTTP headers (lower-case names).

    `headers` carry the trace, `unverified` are what the policy is shown of the others. `cause` is
    the action that the message belongs to, where that is known.
    """

    actor: Actor
    source_address: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    unverified: Mapping[str, str] = field(default_factory=dict)
    cause: TraceContext | None = None


@dataclass(slots=True)
class Server:
    """What is known of one MCP server, across its conversations.

    `resources` are templates by tool; `validation` is None where arguments are not held against
    schemas; `refresh` is how many seconds the sidecar's own listing is good for. `address` is None
    for one behind pipes.
    """

    name: str
    address: Address | None = None
    offers: Offers = field(default_factory=Offers)
    resources: Mapping[str, str] = field(default_factory=dict)
    validation: Validation | None = None
    refresh: float = 300.0
    tasks: Bounded[str, document.Task] = field(default_factory=lambda: Bounded(MAX_TASKS))
    rounds: Bounded[str, int] = field(default_factory=lambda: Bounded(MAX_ROUNDS))

    @property
    def catalog(self) -> Catalog:
        """The tools that are offered to whoever brings no credentials."""
        return self.offers.shared.tools

    def facts(
        self, operation: Operation, target: Target, offer: Offer | None = None
    ) -> document.Facts:
        """What is known of a target, for the input document, where `offer` is the caller's."""
        offer, is_tool = offer or self.offers.shared, target.type == "tool"
        tool = offer.tools.look_up(target.name) if is_tool else Lookup(None)
        return document.Facts(
            tool=tool,
            known=None if is_tool else offer.known(target.type, target.name),
            resource=self._resource(operation, target, tool),
            arguments_valid=self._valid(operation, tool),
            task=self.tasks.get(target.name) if "task" in (target.type, target.kind) else None,
            round=self._round(operation),
        )

    def remember(self, operation: Operation, actor: Actor, result: JsonObject) -> None:
        """Learn from a result whose task it made, and how many rounds a request has gone."""
        created = result if result.get("resultType") == "task" else result.get("task")
        task_id = created.get("taskId") if isinstance(created, dict) else None
        if isinstance(task_id, str) and operation.method.target == "tool":
            task = document.Task(operation.targets[0].name, actor.keys)
            self.tasks.remember(task_id, task)
        if result.get("resultType") == "input_required":
            state = digest(result.get("requestState"))
            self.rounds.remember(state, self._round(operation) or 1)

    def _resource(self, operation: Operation, target: Target, lookup: Lookup) -> str | None:
        """By the configuration, else by what the server declares."""
        declared = lookup.tool.mapping if lookup.tool else None
        template = self.resources.get(target.name, declared) if target.type == "tool" else None
        return fill(template, operation.params.get("arguments")) if template else None

    def _valid(self, operation: Operation, lookup: Lookup) -> bool | None:
        if self.validation is None or lookup.tool is None:
            return None
        arguments = operation.params.get("arguments", {})
        return self.validation.valid(lookup.tool.digest, lookup.tool.schema, arguments)

    def _round(self, operation: Operation) -> int | None:
        params = operation.params
        if "inputResponses" not in params and "requestState" not in params:
            return None
        return self.rounds.get(digest(params.get("requestState")), 1) + 1


@dataclass(slots=True, eq=False)
class Conversation:
    """One pipe, HTTP session or stateless POST: its state, its order, and a way to ask its server.

    `lasting` says whether answers may still come when a connection is gone. `end` is how its
    transport ends it for good; None where there is nothing to be ended but its calls. `opened` is
    the trace of its newest stream. `caller` is
    who its server may offer something else than to others; None where that is nobody's matter.
    `tell` is there as long as the client has a stream for what answers nothing.
    """

    session: Session
    server: Server
    transport: Transport
    lasting: bool = True
    calls: Outstanding[Call] = field(default_factory=Outstanding)
    server_calls: Outstanding[Call] = field(default_factory=Outstanding)
    turn: Turn = field(default_factory=Turn)
    greeted: asyncio.Event = field(default_factory=asyncio.Event)
    discovering: asyncio.Future[bool] | None = None
    opened: TraceContext | None = None
    end: Callable[[], None] | None = None
    caller: Hashable | None = None
    tell: Tell | None = None

    @property
    def offer(self) -> Offer:
        """What its caller is offered."""
        return self.server.offers.to(self.caller)


Ask = Callable[[Permitted], Awaitable[Response]]
"""A way to put the sidecar's own request to the server of a conversation."""


def decision_id() -> str:
    """A UUIDv7 (RFC 9562 §5.7): sortable by time, and there also when OPA gave no answer."""
    value = int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    text = f"{value & ~(0x3 << 62) | 0x2 << 62:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
