"""Calls as the pipeline records them, without a pipeline: an allowed one and its variations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sidecar.conversation import Call, TraceContext
from sidecar.errors import DecisionUnavailable
from sidecar.policy.decision import Decision, Reason
from sidecar.policy.identity import Principal, static
from sidecar.protocol.jsonrpc import Notification, Request
from sidecar.protocol.methods import Direction, Era, Governed, Method, MethodTable
from sidecar.protocol.session import Operation, Target

TABLE = MethodTable.of()
START = 1_790_000_000_000_000_000
MILLISECOND = 1_000_000
BOT = static(Principal("agent", "bot", "static"), Principal("human", "alice", "static"))
ALLOWED = Decision(
    allow=True, rule="desk", owner="support", revision="r7", opa_id="opa-1", attributes={"risk": 3}
)
DENIED = Decision(
    allow=False,
    reasons=(Reason("not_granted", "no grant covers it"), Reason("second")),
    rule="default",
    revision="r7",
)


def operation(
    method: str = "tools/call",
    target: Target | None = Target("tool", "get_ticket"),  # noqa: B008 (it is frozen)
    *,
    params: dict[str, Any] | None = None,
    era: Era = Era.LEGACY,
    **changes: Any,
) -> Operation:
    """A request of the table, or of no table."""
    row = TABLE.rows.get(method) or Method("_OTHER", "request", "both", (), Governed.DECISION)
    is_request = row.kind == "request"
    value = Operation(
        message=Request(7, method, params) if is_request else Notification(method, params),
        method=row,
        direction=Direction.FROM_CLIENT,
        era=era,
        protocol_version="2025-11-25" if era is Era.LEGACY else "2026-07-28",
        targets=() if target is None else (target,),
        session_id="s3cret" if era is Era.LEGACY else None,
    )
    return replace(value, **changes)


def allowed(trace: TraceContext | None = None, **changes: Any) -> Call:
    """A tool call that was allowed, and did what it should, 10 ms in all."""
    call = Call(
        operation=operation(params={"name": "get_ticket", "arguments": {"id": "TOP-SECRET"}}),
        actor=BOT,
        server="tickets",
        transport="http",
        decision_id="0190-1",
        trace=trace or TraceContext(),
        source_address="10.1.2.3",
        server_address=("tickets", 9000),
        received=START,
        asked=START + 1 * MILLISECOND,
        answered=START + 3 * MILLISECOND,
        forwarded=START + 4 * MILLISECOND,
        finished=START + 10 * MILLISECOND,
        decision=ALLOWED,
        tool_known=True,
        outcome="success",
    )
    return replace(call, **changes)


def denied(trace: TraceContext | None = None, **changes: Any) -> Call:
    """The same, denied by the policy."""
    base: dict[str, Any] = {
        "decision": DENIED,
        "verdict": "deny",
        "reasons": DENIED.reasons,
        "outcome": "denied",
        "rpc_error": (-31403, "Denied by policy (not_granted)"),
        "forwarded": 0,
    }
    return allowed(trace, **{**base, **changes})


def undecided(trace: TraceContext | None = None, **changes: Any) -> Call:
    """The same, with an OPA that does not answer."""
    error = DecisionUnavailable("OPA did not answer within 500 ms", detail="timeout")
    base: dict[str, Any] = {
        "decision": None,
        "error": error,
        "verdict": "error",
        "reasons": (Reason(error.code, str(error)),),
        "outcome": "policy_error",
        "rpc_error": (-31503, "Not let through (policy_unavailable)"),
        "forwarded": 0,
    }
    return allowed(trace, **{**base, **changes})


def unknown(method: str, trace: TraceContext | None = None) -> Call:
    """A method that is in no table: denied, and nobody was asked."""
    return denied(
        trace,
        operation=operation(method, None),
        decision=None,
        reasons=(Reason("unknown_method"),),
        rpc_error=(-32601, f"Method not found: {method}"),
        asked=0,
        answered=0,
        tool_known=None,
    )


def passed(trace: TraceContext | None = None, **changes: Any) -> Call:
    """A ping: the table lets it pass."""
    base = {"operation": operation("ping", None), "decision": None, "asked": 0, "answered": 0}
    return allowed(trace, **{**base, **changes})
