"""What is let through, what the caller gets instead, and what of a listing may be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import errors
from sidecar.policy import enforcement
from sidecar.policy.decision import Decision, Mode, Reason
from sidecar.policy.enforcement import (
    DENIED,
    LISTING_TTL_MS,
    OVERLOADED,
    UNAVAILABLE,
    Permitted,
    Refusal,
    Rules,
    answer_to_server,
    by_decision,
    by_table,
    empty_page,
    filter_page,
    for_catalog,
    judge,
    page_items,
    protocol_reply,
    readdressed,
    refusal_of,
    reply,
    taken_back,
)
from sidecar.protocol.jsonrpc import JsonObject, Message, Notification, Request, Response, decode
from sidecar.protocol.methods import TOOLS, Direction, Governed, Listing, MethodTable
from sidecar.protocol.session import Operation, Session
from tests.support.fakes import CARRIER, call_tool, modern, tool

TABLE = MethodTable.of(["acme/reindex"])
CLIENT, SERVER = Direction.FROM_CLIENT, Direction.FROM_SERVER

YES = Decision(allow=True, revision="r1")
NO = Decision(
    allow=False,
    reasons=(Reason("missing_scope", "ask for it", "tickets:write"), Reason("second")),
    revision="r1",
)
BARE_NO = Decision(allow=False)
REVOKED = Decision(allow=False, reasons=(Reason("revoked", "withdrawn"),))
OBLIGED = Decision(allow=True, obligations=({"type": "mask_result"},), revision="r1")


def receive(message: Message, direction: Direction = CLIENT) -> Operation:
    return Session(TABLE, protocol_version="2025-11-25").receive(message, direction)


CALL = receive(call_tool("t", 7, id=4711))
MODERN_CALL = receive(modern("tools/call", 7, name="t", arguments={"id": 4711}))


# ── Who makes a Permitted ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mint", [None, object(), "mint", Permitted], ids=["", "o", "s", "c"])
def test_nobody_else_makes_a_permitted(mint: object) -> None:
    with pytest.raises(TypeError, match="enforcement"):
        Permitted(call_tool("t"), mint=mint)
    with pytest.raises(TypeError):
        Permitted(call_tool("t"))  # type: ignore[call-arg]


def permitted_messages() -> Iterator[Permitted | Refusal]:
    yield by_decision(CALL, YES, Rules(), {})
    yield by_table(receive(Request(7, "ping")), {})
    yield for_catalog(Request("x", "tools/list"))
    yield answer_to_server(Response(7, {}), receive(Request(7, "roots/list"), SERVER))


def test_a_permitted_is_written_by_ourselves() -> None:
    for permitted in permitted_messages():
        assert isinstance(permitted, Permitted)
        assert decode(permitted.frame) == permitted.message


@pytest.mark.parametrize("method", sorted(TABLE.rows))
def test_each_method_has_one_way_through(method: str) -> None:
    row = TABLE.rows[method]
    operation = Operation(
        Request(7, method) if row.kind == "request" else Notification(method),
        row,
        CLIENT,
        CALL.era,
        None,
        CALL.targets,
    )
    by_policy = isinstance(by_decision(operation, YES, Rules(), {}), Permitted)
    by_the_table = isinstance(by_table(operation, {}), Permitted)
    assert by_policy == (row.governed is Governed.DECISION)
    assert by_the_table == (row.governed is not Governed.DECISION)
    assert isinstance(by_table(operation, {}, YES), Permitted) == by_the_table


def test_only_the_answer_to_the_question_answers_it() -> None:
    question = receive(Request(7, "roots/list"), SERVER)
    answer = Response(7, {"roots": []})
    assert answer_to_server(answer, question).message is answer
    for other in (Response("7", {}), Response(8, {}), Response(None, error={"code": 1})):
        with pytest.raises(ValueError, match="answer"):
            answer_to_server(other, question)
    with pytest.raises(ValueError, match="answer"):
        answer_to_server(answer, receive(Notification("notifications/message"), SERVER))


@pytest.mark.parametrize("token", [None, 7, "t"])
def test_a_request_to_a_shared_server_has_an_id_of_its_own_and_is_else_the_same(
    token: object,
) -> None:
    meta = {} if token is None else {"progressToken": token}
    judged = modern("tools/call", 7, name="t", arguments={"id": 4711}, _meta=meta)
    permitted = by_decision(receive(judged), YES, Rules(), {})
    assert isinstance(permitted, Permitted)
    sent = readdressed(permitted, "own-1").message
    assert isinstance(sent, Request)
    params = judged.params or {}
    if token is not None:
        params = {**params, "_meta": {**params["_meta"], "progressToken": "own-1"}}
    assert sent == Request("own-1", "tools/call", params)
    assert permitted.message == judged


def test_what_is_taken_back_is_what_was_sent() -> None:
    permitted = by_decision(CALL, YES, Rules(), {})
    assert isinstance(permitted, Permitted)
    cancel = taken_back(readdressed(permitted, "own-1"), "the client has gone").message
    params = {"requestId": "own-1", "reason": "the client has gone"}
    assert cancel == Notification("notifications/cancelled", params)
    for make in (partial(readdressed, request_id="x"), partial(taken_back, reason="x")):
        with pytest.raises(ValueError, match="request"):
            make(taken_back(permitted, ""))


def test_the_sidecar_itself_asks_for_listings_only() -> None:
    for message in (call_tool("t"), Notification("notifications/cancelled"), Request(1, "ping")):
        with pytest.raises(ValueError, match="listings"):
            for_catalog(message)


# ── Whether a decision stands in the way ──────────────────────────────────────────────────────────

SHADOW_NO = Decision(allow=False, reasons=(Reason("later"),), mode="shadow")
SHADOW_REVOKED = Decision(allow=False, reasons=(Reason("revoked"),), mode="shadow")
SHADOW_OBLIGED = Decision(allow=True, obligations=({"type": "mask_result"},), mode="shadow")
SHADOW_YES = Decision(allow=True, mode="shadow")


@pytest.mark.parametrize(
    ("decision", "off", "allowed", "all_"),
    [
        pytest.param(YES, "enforce", "enforce", "shadow", id="allow"),
        pytest.param(SHADOW_YES, "enforce", "shadow", "shadow", id="allow in shadow"),
        pytest.param(NO, "missing_scope", "missing_scope", "shadow", id="deny"),
        pytest.param(BARE_NO, "denied", "denied", "shadow", id="deny without reason"),
        pytest.param(SHADOW_NO, "later", "shadow", "shadow", id="deny in shadow"),
        pytest.param(REVOKED, "revoked", "revoked", "revoked", id="revoked"),
        pytest.param(SHADOW_REVOKED, "revoked", "revoked", "revoked", id="revoked in shadow"),
        pytest.param(
            OBLIGED, "obligation_unsupported", "obligation_unsupported", "shadow", id="obligation"
        ),
        pytest.param(
            SHADOW_OBLIGED, "obligation_unsupported", "shadow", "shadow", id="obligation in shadow"
        ),
    ],
)
def test_a_decision_is_enforced_or_recorded(
    decision: Decision, off: str, allowed: str, all_: str
) -> None:
    settings = (Rules("off"), off), (Rules("allowed"), allowed), (Rules("all"), all_)
    for rules, expected in settings:
        refusal, mode = judge(decision, rules)
        passed = by_decision(CALL, decision, rules, {})
        if expected in ("enforce", "shadow"):
            assert (refusal, mode) == (None, expected)
            assert isinstance(passed, Permitted)
            continue
        assert refusal is not None
        assert (refusal.verdict, refusal.reasons[0].code) == ("deny", expected)
        assert (mode, refusal.rpc_code, refusal.status) == ("enforce", DENIED, 200)
        assert (refusal.retryable, refusal.revision) == (False, decision.revision)
        assert passed == refusal


@pytest.mark.parametrize(
    ("decision", "passes"),
    [
        pytest.param(None, True, id="no answer"),
        pytest.param(YES, True, id="allow"),
        pytest.param(NO, True, id="deny"),
        pytest.param(BARE_NO, True, id="deny without reason"),
        pytest.param(OBLIGED, True, id="obligation"),
        pytest.param(REVOKED, False, id="revoked"),
        pytest.param(SHADOW_REVOKED, False, id="revoked in shadow"),
    ],
)
@pytest.mark.parametrize("method", ["initialize", "server/discover"])
def test_of_negotiation_only_a_revocation_refuses(
    method: str, decision: Decision | None, passes: bool
) -> None:
    message = Request(7, method, {}) if method == "initialize" else modern(method, 7)
    outcome = by_table(receive(message), {}, decision)
    assert isinstance(outcome, Permitted) == passes
    if isinstance(outcome, Refusal):
        assert (outcome.verdict, outcome.reasons[0].code) == ("deny", "revoked")


def test_a_refusal_always_has_a_reason() -> None:
    for decision in (None, YES, BARE_NO, NO):
        refusal = by_table(CALL, {}, decision)
        assert isinstance(refusal, Refusal)
        assert refusal.reasons


# ── Trace context ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("params", "sent"),
    [
        pytest.param(None, None, id="params are not invented"),
        pytest.param({}, {"_meta": CARRIER}, id="no _meta"),
        pytest.param({"_meta": {}}, {"_meta": CARRIER}, id="empty _meta"),
        pytest.param(
            {"_meta": {"progressToken": 1, "traceparent": "old", "tracestate": "old"}},
            {"_meta": {"progressToken": 1, **CARRIER}},
            id="another trace is replaced",
        ),
        pytest.param({"_meta": None}, {"_meta": None}, id="_meta null"),
        pytest.param({"_meta": [1]}, {"_meta": [1]}, id="_meta list"),
    ],
)
def test_the_trace_goes_on_in_meta_and_nothing_else_changes(
    params: JsonObject | None, sent: JsonObject | None
) -> None:
    message = Request(7, "ping", params)
    operation = receive(message)
    permitted = by_table(operation, CARRIER)
    assert isinstance(permitted, Permitted)
    assert permitted.message == Request(7, "ping", sent)
    assert message.params == params
    untraced = by_table(operation, {})
    assert isinstance(untraced, Permitted)
    assert untraced.message is message


# ── What the caller gets ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        pytest.param(
            errors.DecisionUnavailable("x", detail="timeout"),
            Refusal("error", (Reason("policy_unavailable", "x"),), UNAVAILABLE, retryable=True),
            id="OPA late",
        ),
        pytest.param(
            errors.DecisionInvalid("x", detail="undefined_decision"),
            Refusal("error", (Reason("policy_invalid", "x"),), UNAVAILABLE),
            id="undefined",
        ),
        pytest.param(
            errors.Overloaded("x"),
            Refusal("error", (Reason("too_many_calls", "x"),), OVERLOADED, retryable=True),
            id="too many calls",
        ),
        pytest.param(
            errors.UnknownMethod("x", status=404),
            Refusal("deny", (Reason("unknown_method", "x"),), -32601, 404),
            id="unknown method",
        ),
        pytest.param(
            errors.UpstreamError("x", sent=False),
            Refusal("error", (Reason("upstream_failed", "x; not executed"),), -31502),
            id="server gone",
        ),
        pytest.param(
            errors.UpstreamTimeout("x", sent=True),
            Refusal("error", (Reason("upstream_timeout", "x; it may have executed"),), -31504),
            id="server late",
        ),
        pytest.param(
            errors.AuditError("x"),
            Refusal("error", (Reason("audit_failed", "x"),), UNAVAILABLE),
            id="no record",
        ),
    ],
)
def test_each_kind_of_error_is_its_own_refusal(
    error: errors.SidecarError, refusal: Refusal
) -> None:
    assert refusal_of(error) == refusal
    if refusal.verdict == "error":
        response = reply(CALL, refusal, "d1", Rules(denial="result"))
        assert response is not None
        assert response.error is not None


def refused(decision: Decision) -> Refusal:
    refusal, _ = judge(decision, Rules())
    assert refusal is not None
    return refusal


@pytest.mark.parametrize("operation", [CALL, MODERN_CALL], ids=["legacy", "modern"])
def test_a_denial_says_why_by_whom_and_that_asking_again_is_no_use(operation: Operation) -> None:
    assert reply(operation, refused(NO), "d1", Rules()) == Response(
        7,
        error={
            "code": -31403,
            "message": "Denied by policy (missing_scope): ask for it",
            "data": {
                "reasons": [
                    {"code": "missing_scope", "message": "ask for it", "scope": "tickets:write"},
                    {"code": "second"},
                ],
                "decision_id": "d1",
                "policy_revision": "r1",
                "retryable": False,
            },
        },
    )


def test_only_codes_are_shown_when_no_more_may_be() -> None:
    response = reply(CALL, refused(NO), "d1", Rules(disclose="codes"))
    assert response is not None
    assert response.error is not None
    assert response.error["message"] == "Denied by policy (missing_scope)"
    assert response.error["data"]["reasons"] == [
        {"code": "missing_scope", "scope": "tickets:write"},
        {"code": "second"},
    ]


def test_without_a_decision_no_revision_is_named() -> None:
    late = errors.DecisionUnavailable("OPA is late", detail="timeout")
    response = reply(CALL, refusal_of(late), "d1", Rules())
    assert response is not None
    assert response.error == {
        "code": -31503,
        "message": "Not let through (policy_unavailable): OPA is late",
        "data": {
            "reasons": [{"code": "policy_unavailable", "message": "OPA is late"}],
            "decision_id": "d1",
            "retryable": True,
        },
    }


def test_an_unknown_method_is_answered_as_a_server_would() -> None:
    refusal = refusal_of(errors.UnknownMethod("Method not found: x"))
    response = reply(CALL, refusal, "d1", Rules())
    assert response is not None
    assert response.error is not None
    assert (response.error["code"], response.error["message"]) == (-32601, "Method not found: x")


@pytest.mark.parametrize("rules", [Rules(), Rules(denial="result")], ids=["error", "result"])
def test_a_notification_gets_no_answer(rules: Rules) -> None:
    operation = receive(Notification("notifications/initialized"))
    assert reply(operation, refused(NO), "d1", rules) is None


@pytest.mark.parametrize(
    ("operation", "more"),
    [
        pytest.param(CALL, {}, id="legacy"),
        pytest.param(MODERN_CALL, {"resultType": "complete"}, id="modern"),
    ],
)
def test_a_denied_call_may_be_answered_by_a_result(operation: Operation, more: JsonObject) -> None:
    text = "Denied by policy (missing_scope): ask for it"
    as_error = reply(operation, refused(NO), "d1", Rules())
    assert as_error is not None
    assert as_error.error is not None
    assert reply(operation, refused(NO), "d1", Rules(denial="result")) == Response(
        7,
        result={
            "content": [{"type": "text", "text": text}],
            "isError": True,
            "_meta": {"io.mcp-opa-sidecar/denial": as_error.error["data"]},
            **more,
        },
    )


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Request(7, "tools/call", {"name": "t", "task": {}}), id="a task"),
        pytest.param(Request(7, "prompts/get", {"name": "p"}), id="a prompt"),
        pytest.param(Request(7, "resources/read", {"uri": "u:a"}), id="a resource"),
        pytest.param(modern("tasks/get", 7, taskId="1"), id="a task's state"),
    ],
)
def test_what_has_no_result_for_an_error_is_answered_by_an_error(message: Request) -> None:
    response = reply(receive(message), refused(NO), "d1", Rules(denial="result"))
    assert response is not None
    assert response.error is not None


def test_what_is_no_action_gets_a_plain_error() -> None:
    answer = protocol_reply(None, -32700, "not JSON")
    assert answer == Response(None, error={"code": -32700, "message": "not JSON"})


# ── Listings ──────────────────────────────────────────────────────────────────────────────────────

SIBLINGS = {"nextCursor": "2", "_meta": {"x": 1}, "resultType": "complete", "vendor": [1]}


def page(*items: Any, **siblings: Any) -> Response:
    return Response(7, {"tools": list(items), **siblings})


def shows(*names: str) -> Decision:
    return Decision(allow=True, visible=frozenset(names))


def test_a_page_keeps_order_and_siblings() -> None:
    items = [tool("c"), tool("a", title="A"), tool("b")]
    shown = filter_page(page(*items, **SIBLINGS), TOOLS, shows("a", "c", "never listed"))
    assert shown == page(items[0], items[1], **SIBLINGS)
    assert list(shown.result) == ["tools", *SIBLINGS]


@pytest.mark.parametrize(
    "decision", [Decision(allow=True), shows("a", "b"), shows("a", "b", "c")], ids=["all", "1", "2"]
)
@pytest.mark.parametrize(
    "siblings",
    [
        pytest.param({}, id="plain"),
        pytest.param(SIBLINGS, id="siblings"),
        pytest.param({"cacheScope": "private", "ttlMs": 0}, id="private"),
        pytest.param({"ttlMs": LISTING_TTL_MS}, id="short-lived"),
        pytest.param({"ttlMs": "soon"}, id="a time that is none"),
    ],
)
def test_a_page_of_which_nothing_is_hidden_is_the_very_same(
    decision: Decision, siblings: JsonObject
) -> None:
    whole = page(tool("a"), tool("b"), **siblings)
    assert filter_page(whole, TOOLS, decision) is whole


@pytest.mark.parametrize(
    ("siblings", "shown"),
    [
        pytest.param({"cacheScope": "public"}, {"cacheScope": "private"}, id="public"),
        pytest.param({"ttlMs": 60_000}, {"ttlMs": LISTING_TTL_MS}, id="long-lived"),
        pytest.param({"ttlMs": 1e9}, {"ttlMs": LISTING_TTL_MS}, id="as a float"),
        pytest.param(
            {"ttlMs": 2001, "cacheScope": "public"},
            {"ttlMs": 2000, "cacheScope": "private"},
            id="both",
        ),
    ],
)
def test_what_depends_on_the_caller_is_kept_by_nobody_else_and_not_long(
    siblings: JsonObject, shown: JsonObject
) -> None:
    whole = page(tool("a"), **siblings)
    assert filter_page(whole, TOOLS, shows("a")) == page(tool("a"), **shown)
    assert filter_page(whole, TOOLS, Decision(allow=True)) is whole


def test_what_has_no_name_is_hidden_with_the_rest() -> None:
    whole = page(tool("a"), {"name": None}, {}, None, "a", ["a"], tool("b"))
    assert filter_page(whole, TOOLS, shows("a")) == page(tool("a"))
    assert filter_page(whole, TOOLS, Decision(allow=True)) is whole
    assert page_items(whole, TOOLS) == [tool("a"), {"name": None}, {}, tool("b")]


def test_who_may_see_nothing_sees_an_empty_page() -> None:
    whole = page(tool("a"), tool("b"), **SIBLINGS)
    assert empty_page(whole, TOOLS) == page(**SIBLINGS)
    assert whole.result["tools"] == [tool("a"), tool("b")]


@pytest.mark.parametrize("result", [None, [], "text"])
def test_what_is_no_page_has_nothing_to_hide(result: Any) -> None:
    response = Response(7, result)
    assert filter_page(response, TOOLS, shows()) is response
    assert page_items(response, TOOLS) == []


@pytest.mark.parametrize("result", [{}, {"tools": None}, {"tools": {"a": 1}}])
def test_a_page_whose_items_are_no_list_shows_none(result: Any) -> None:
    response = Response(7, result)
    assert filter_page(response, TOOLS, shows("a")) == Response(7, {"tools": []})
    assert filter_page(response, TOOLS, Decision(allow=True)) is response


@pytest.mark.parametrize("row", [row for row in TABLE.rows.values() if row.listing])
def test_every_listing_is_filtered_by_the_name_it_is_asked_for(row: Any) -> None:
    listing: Listing = row.listing
    items = [{listing.item_name: name, "title": "same"} for name in ("x", "y", "z")]
    whole = Response(7, {listing.items: items})
    assert filter_page(whole, listing, shows("y")).result == {listing.items: [items[1]]}


NAMES = st.sampled_from("abcd")


@given(st.lists(NAMES, max_size=6), st.frozensets(NAMES))
def test_a_filtered_page_is_an_ordered_part_of_the_page(
    names: list[str], visible: frozenset[str]
) -> None:
    whole = page(*(tool(name, position=number) for number, name in enumerate(names)), **SIBLINGS)
    before = [each["position"] for each in whole.result["tools"]]
    shown = filter_page(whole, TOOLS, Decision(allow=True, visible=visible)).result
    positions = [each["position"] for each in shown["tools"]]
    assert positions == [each for each in before if names[each] in visible]
    assert {key: shown[key] for key in SIBLINGS} == SIBLINGS
    again = filter_page(Response(7, shown), TOOLS, Decision(allow=True, visible=visible))
    assert again.result is shown


CODES = st.sampled_from(["denied", "revoked", "other"])
MODES: st.SearchStrategy[Mode] = st.sampled_from(["enforce", "shadow"])
DECISIONS = st.builds(
    Decision,
    st.booleans(),
    st.lists(st.builds(Reason, CODES), max_size=2).map(tuple),
    mode=MODES,
    obligations=st.sampled_from([(), ({"type": "mask_result"},)]),
)


@given(DECISIONS)
def test_without_shadow_nothing_but_a_clean_allow_passes(decision: Decision) -> None:
    passed = by_decision(CALL, decision, Rules(), CARRIER)
    assert isinstance(passed, Permitted) == (decision.allow and not decision.obligations)


@given(DECISIONS)
def test_no_setting_lifts_a_revocation(decision: Decision) -> None:
    settings: list[Callable[[], Rules]] = [Rules, lambda: Rules("allowed"), lambda: Rules("all")]
    for make, operation in product(settings, (CALL, MODERN_CALL)):
        passed = by_decision(operation, decision, make(), {})
        assert not (decision.revoked and isinstance(passed, enforcement.Permitted))
