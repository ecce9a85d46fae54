"""Decision to outcome: what is let through, and what the caller gets instead.

Nothing reaches a server but a `Permitted`, and this module is its only maker, in three ways:

* `by_decision`: the policy allowed it, and every obligation can be met;
* `by_table`: the table of methods lets it pass (negotiation that is not revoked, listings whose
  answer is judged, answers to outstanding questions, pings, cancels, our own refusals);
* `for_catalog`: the sidecar's own listing, and what has to come before it.

A `Permitted` goes on as it was judged, or `readdressed` where clients share a server; `taken_back`
is the cancel of one whose client is gone. Everything else is a `Refusal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from sidecar.errors import DecisionError, Overloaded, SidecarError, UnknownMethod, UpstreamError
from sidecar.policy.decision import Decision, Mode, Reason
from sidecar.policy.document import OBLIGATIONS, item_name
from sidecar.policy.identity import Principal
from sidecar.protocol.jsonrpc import (
    JsonObject,
    Message,
    Notification,
    Request,
    RequestId,
    Response,
    encode,
)
from sidecar.protocol.methods import Era, Governed, Listing
from sidecar.protocol.session import Operation, Target

DENIED = -31403
UNAVAILABLE = -31503
OVERLOADED = -31429
INTERNAL = -32603

LISTING_TTL_MS = 2000
"""The longest that a client may keep a filtered list: a policy edit is in force within as much."""

TRACE_CONTEXT = frozenset({"traceparent", "tracestate", "baggage"})

LEARNING = frozenset(
    {
        "server/discover",
        "initialize",
        "notifications/initialized",
        "tools/list",
        "resources/list",
        "resources/templates/list",
        "prompts/list",
    }
)
"""What the sidecar says as a client of its own."""

PERHAPS = "it may have executed"

_MINT: Final = object()


@dataclass(frozen=True, slots=True)
class Grounds:
    """What a message rests on, for a server that wants to know. The sidecar's own has none."""

    decision_id: str | None = None
    chain: tuple[Principal, ...] = ()
    targets: tuple[Target, ...] = ()
    revision: str | None = None


class Permitted:
    """A message that may go to the server: as it was judged, trace context apart."""

    __slots__ = ("grounds", "message")

    def __init__(self, message: Message, *, mint: object, grounds: Grounds | None = None) -> None:
        if mint is not _MINT:
            raise TypeError("only sidecar.policy.enforcement makes a Permitted")
        self.message: Final = message
        self.grounds: Final = grounds or Grounds()

    def on(self, grounds: Grounds) -> Permitted:
        """The same message, with what it rests on."""
        return Permitted(self.message, mint=_MINT, grounds=grounds)

    @property
    def frame(self) -> bytes:
        """The bytes to send: our own serialisation of what was judged."""
        return encode(self.message)


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of enforcement (`enforcement` in the configuration)."""

    shadow: Literal["off", "allowed", "all"] = "off"
    disclose: Literal["full", "codes"] = "full"
    denial: Literal["error", "result"] = "error"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something is not let through, as the caller will read it."""

    verdict: Literal["deny", "error"]
    reasons: tuple[Reason, ...]
    rpc_code: int = DENIED
    status: int = 200
    retryable: bool = False
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """Let through to the server."""

    permitted: Permitted


@dataclass(frozen=True, slots=True)
class Reply:
    """Answered by the sidecar; `status` is the HTTP status."""

    response: Response
    status: int = 200


@dataclass(frozen=True, slots=True)
class Drop:
    """Neither let through nor answered."""


Outcome = Forward | Reply | Drop


@dataclass(frozen=True, slots=True)
class Deliver:
    """Goes to the client: as it came, or as the message that replaces it."""

    replaced: Message | None = None


@dataclass(frozen=True, slots=True)
class AnswerServer:
    """The server's question is answered by the sidecar."""

    permitted: Permitted


Delivery = Deliver | AnswerServer | Drop


def judge(decision: Decision, rules: Rules) -> tuple[Refusal | None, Mode]:
    """Whether this decision stands in the way, and in which mode it was enforced.

    Shadow mode lifts a valid refusal and records it; it lifts no revocation. An obligation that the
    sidecar can not meet is a refusal of its own.
    """
    if not decision.allow:
        refusal = Refusal(
            "deny", decision.reasons or (Reason("denied"),), revision=decision.revision
        )
    elif unmet := [each for each in decision.obligations if each["type"] not in OBLIGATIONS]:
        message = f"this sidecar can not meet the obligation {unmet[0]['type']!r}"
        reason = Reason("obligation_unsupported", message)
        refusal = Refusal("deny", (reason,), revision=decision.revision)
    else:
        return None, "shadow" if shadowed(decision, rules) else "enforce"
    if decision.revoked or not shadowed(decision, rules):
        return refusal, "enforce"
    return None, "shadow"


def shadowed(decision: Decision, rules: Rules) -> bool:
    """Whether refusals, filters and obligations of this decision are recorded and not applied."""
    return rules.shadow == "all" or (rules.shadow == "allowed" and decision.mode == "shadow")


def by_decision(
    operation: Operation, decision: Decision, rules: Rules, carrier: Mapping[str, str]
) -> Permitted | Refusal:
    """Let `operation` through when the decision says so; `carrier` is trace context for `_meta`."""
    refusal, _ = judge(decision, rules)
    if refusal is None and operation.method.governed is Governed.DECISION:
        return Permitted(_with_trace(operation.message, carrier), mint=_MINT)
    return refusal or Refusal("deny", (Reason("denied"),))


def by_table(
    operation: Operation, carrier: Mapping[str, str], decision: Decision | None = None
) -> Permitted | Refusal:
    """Let through what the table lets pass; of negotiation only a revocation refuses."""
    match operation.method.governed:
        case Governed.TABLE | Governed.LISTING:
            return Permitted(_with_trace(operation.message, carrier), mint=_MINT)
        case Governed.NEGOTIATION if decision is None or not decision.revoked:
            return Permitted(_with_trace(operation.message, carrier), mint=_MINT)
        case _:
            reasons = (decision.reasons if decision else ()) or (Reason("denied"),)
            return Refusal("deny", reasons, revision=decision.revision if decision else None)


def answer_to_server(response: Response, question: Operation) -> Permitted:
    """An answer, the client's or our own refusal, to a question that the server did ask."""
    if not isinstance(question.message, Request) or response.id != question.message.id:
        raise ValueError("this is not the answer to that question")
    return Permitted(response, mint=_MINT)


def for_catalog(message: Request | Notification) -> Permitted:
    """The sidecar's own listing, which no client sees, and its own greeting before it."""
    if message.method not in LEARNING:
        raise ValueError("the catalog is learned by listings alone")
    return Permitted(message, mint=_MINT)


def readdressed(permitted: Permitted, request_id: RequestId) -> Permitted:
    """The same request under the id, and progress token, that are its own at a shared server."""
    request = permitted.message
    if not isinstance(request, Request):
        raise ValueError("only a request has an id of its own")
    params, meta = request.params, (request.params or {}).get("_meta")
    if isinstance(meta, dict) and "progressToken" in meta:
        params = {**(params or {}), "_meta": {**meta, "progressToken": request_id}}
    readdressed = Request(request_id, request.method, params)
    return Permitted(readdressed, mint=_MINT, grounds=permitted.grounds)


def taken_back(permitted: Permitted, reason: str) -> Permitted:
    """The cancel of a request that was let through, for a client that can not send it."""
    request = permitted.message
    if not isinstance(request, Request):
        raise ValueError("only a request can be taken back")
    params: JsonObject = {"requestId": request.id, "reason": reason}
    cancel = Notification("notifications/cancelled", params)
    return Permitted(cancel, mint=_MINT, grounds=Grounds(chain=permitted.grounds.chain))


def refusal_of(error: SidecarError) -> Refusal:
    """The refusal that an error is, one row a kind."""
    match error:
        case UnknownMethod():
            reason, code, status = Reason(error.code, str(error)), error.rpc_code, error.status
            return Refusal("deny", (reason,), code, status)
        case Overloaded():
            return Refusal("error", (Reason(error.code, str(error)),), OVERLOADED, retryable=True)
        case DecisionError():
            reason = Reason(error.code, str(error))
            return Refusal("error", (reason,), UNAVAILABLE, retryable=error.retryable)
        case UpstreamError():
            message = f"{error}; {PERHAPS}" if error.sent else f"{error}; not executed"
            return Refusal("error", (Reason(error.code, message),), error.rpc_code)
        case _:
            return Refusal("error", (Reason(error.code, str(error)),), UNAVAILABLE)


def too_late(refusal: Refusal) -> Refusal:
    """The same for a call that is on its way already: what it has done is done."""
    first, *others = refusal.reasons
    message = f"{first.message.rstrip('.')}; {PERHAPS}" if first.message else PERHAPS
    return replace(refusal, reasons=(replace(first, message=message), *others))


def reply(
    operation: Operation, refusal: Refusal, decision_id: str, rules: Rules
) -> Response | None:
    """What the asker gets for a refusal; None for a notification, which gets nothing."""
    if not isinstance(operation.message, Request):
        return None
    reasons = [_shown(each, rules) for each in refusal.reasons]
    data: JsonObject = {"reasons": reasons, "decision_id": decision_id}
    if refusal.revision is not None:
        data["policy_revision"] = refusal.revision
    data["retryable"] = refusal.retryable
    text = _sentence(operation, refusal, rules)
    if rules.denial == "result" and _answers_with_a_result(operation, refusal):
        return Response(operation.message.id, result=_error_result(operation, text, data))
    error = {"code": refusal.rpc_code, "message": text, "data": data}
    return Response(operation.message.id, error=error)


def protocol_reply(
    request_id: RequestId | None,
    code: int,
    message: str,
    data: Mapping[str, object] | None = None,
) -> Response:
    """The answer to a message that could not be read as an action."""
    error: JsonObject = {"code": code, "message": message}
    return Response(request_id, error={**error, "data": data} if data is not None else error)


def filter_page(response: Response, listing: Listing, decision: Decision) -> Response:
    """The page without what the policy hides; the very same object where nothing changes.

    Every sibling is kept. What depends on the caller must not be shared between callers, so a
    cacheable page becomes private and short-lived (MCP 2026-07-28, caching). A policy that names
    no items filters nothing.
    """
    result, visible = response.result, decision.visible
    if not isinstance(result, dict) or visible is None:
        return response
    items = result.get(listing.items)
    listed = items if isinstance(items, list) else []
    shown = [each for each in listed if _visible(each, listing, visible)]
    page = {**result, **_private(result), listing.items: shown}
    return response if page == result else replace(response, result=page)


def empty_page(response: Response, listing: Listing) -> Response:
    """The page of somebody who may see nothing: a listing is never refused for policy."""
    return filter_page(response, listing, Decision(allow=True, visible=frozenset()))


def page_items(response: Response, listing: Listing) -> list[JsonObject]:
    """The items of a page that can be judged: those that are objects."""
    result = response.result if isinstance(response.result, dict) else {}
    items = result.get(listing.items)
    return [each for each in items if isinstance(each, dict)] if isinstance(items, list) else []


def _visible(item: Any, listing: Listing, visible: frozenset[str]) -> bool:
    return isinstance(item, dict) and item_name(listing, item) in visible


def _private(result: JsonObject) -> JsonObject:
    changed: JsonObject = {}
    if "cacheScope" in result:
        changed["cacheScope"] = "private"
    ttl = result.get("ttlMs")
    if isinstance(ttl, (int, float)) and ttl > LISTING_TTL_MS:
        changed["ttlMs"] = LISTING_TTL_MS
    return changed


def _with_trace(
    message: Request | Notification, carrier: Mapping[str, str]
) -> Request | Notification:
    """The message with the trace context in `params._meta` (SEP-414). Params are never invented.

    What the client sent of a trace is taken out first: what of it was good is in `carrier`.
    """
    if not carrier or message.params is None:
        return message
    meta = message.params.get("_meta", {})
    if not isinstance(meta, dict):
        return message
    others = {key: value for key, value in meta.items() if key not in TRACE_CONTEXT}
    return replace(message, params={**message.params, "_meta": {**others, **carrier}})


def _shown(reason: Reason, rules: Rules) -> JsonObject:
    shown: JsonObject = {"code": reason.code}
    if rules.disclose == "full" and reason.message:
        shown["message"] = reason.message
    if reason.scope is not None:
        shown["scope"] = reason.scope
    return shown


def _sentence(operation: Operation, refusal: Refusal, rules: Rules) -> str:
    first = refusal.reasons[0]
    if isinstance(operation.message, Request) and refusal.rpc_code == UnknownMethod.rpc_code:
        return first.message
    by_policy = refusal.verdict == "deny" and refusal.rpc_code == DENIED
    what = "Denied by policy" if by_policy else "Not let through"
    detail = f": {first.message}" if rules.disclose == "full" and first.message else ""
    return f"{what} ({first.code}){detail}"


def _answers_with_a_result(operation: Operation, refusal: Refusal) -> bool:
    """Only a plain tool call has a result that can say "error"; a task-augmented one has not."""
    plain = operation.method.name == "tools/call" and "task" not in operation.params
    return plain and refusal.verdict == "deny"


def _error_result(operation: Operation, text: str, data: JsonObject) -> JsonObject:
    result: JsonObject = {
        "content": [{"type": "text", "text": text}],
        "isError": True,
        "_meta": {"io.mcp-opa-sidecar/denial": data},
    }
    if operation.era is Era.MODERN:
        result["resultType"] = "complete"
    return result
