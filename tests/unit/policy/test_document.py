"""The question is what the schema says, whatever was sent, and holds no secret."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.policy import document, identity
from sidecar.policy.document import Environment, Facts, Task, build, build_listing
from sidecar.policy.identity import Actor, Principal, TokenFacts
from sidecar.protocol.catalog import Lookup, Tool, digest
from sidecar.protocol.jsonrpc import JsonObject, Message, Notification, Request, dump_json
from sidecar.protocol.methods import Direction, Era, Governed, Method, MethodTable
from sidecar.protocol.session import ClientInfo, Operation, Session, Target
from tests.support.fakes import ANA, TRACE_ID, modern, tool

SCHEMAS = Path(__file__).resolve().parents[3] / "policies" / "schemas"
SCHEMA = json.loads((SCHEMAS / "input.schema.json").read_text(encoding="utf-8"))
VALID = jsonschema.Draft7Validator(SCHEMA)

TABLE = MethodTable.of(["acme/reindex"])
CLIENT, SERVER = Direction.FROM_CLIENT, Direction.FROM_SERVER
ENVIRONMENT = Environment(
    enforcer_version="0.1.0",
    server="tickets",
    transport="http",
    time="2026-11-22T10:15:00Z",
    source_address="10.1.2.3",
    trace_id=TRACE_ID,
    pod={"name": "tickets-7c9", "namespace": "support"},
)
BARE = Environment("0.1.0", "tickets", "stdio", "2026-11-22T10:15:00Z")
BOT = Principal("agent", "bot", "static", ("bots",), ("tickets:read",), {"team": "support"})
BOT_FOR_ANA = identity.static(BOT, ANA.principal)


def receive(message: Message, direction: Direction = CLIENT, **state: Any) -> Operation:
    return Session(TABLE, **state).receive(message, direction)


def ask(
    operation: Operation,
    actor: Actor = ANA,
    environment: Environment = ENVIRONMENT,
    facts: Facts = document.NO_FACTS,
) -> JsonObject:
    """The question about the first target, held against the schema."""
    question = build(operation, operation.targets[0], actor, environment, facts)
    VALID.validate(question)
    return question


# ── The whole of it ───────────────────────────────────────────────────────────────────────────────


BOT_SHOWN = {
    "type": "agent",
    "id": "bot",
    "issuer": "static",
    "key": "static|bot",
    "groups": ["bots"],
    "scopes": ["tickets:read"],
    "claims": {"team": "support"},
}
ANA_SHOWN = {
    "type": "human",
    "id": "ana",
    "issuer": "static",
    "key": "static|ana",
    "groups": ["support"],
    "scopes": [],
    "claims": {},
}


def test_a_call_is_asked_about_with_all_that_is_known() -> None:
    listed = Tool("delete_ticket", {"destructiveHint": True}, "sha256:9ab2")
    operation = receive(
        Request(7, "tools/call", {"name": "delete_ticket", "arguments": {"id": 4711}}),
        id="secret-session",
        protocol_version="2025-11-25",
        client=ClientInfo("some-client", "2.1"),
    )
    assert ask(operation, BOT_FOR_ANA, facts=Facts(tool=Lookup(True, listed))) == {
        "version": 1,
        "enforcer": {"version": "0.1.0", "obligations": []},
        "actor": {
            **BOT_SHOWN,
            "assurance": 1,
            "sources": ["static"],
            "chain": [BOT_SHOWN, ANA_SHOWN],
            "on_behalf_of": ANA_SHOWN,
        },
        "mcp": {
            "method": "tools/call",
            "kind": "request",
            "direction": "client_to_server",
            "era": "legacy",
            "protocol_version": "2025-11-25",
            "transport": "http",
            "session": document.session_digest("secret-session"),
            "claimed_client": {"name": "some-client", "version": "2.1"},
        },
        "target": {"type": "tool", "name": "delete_ticket"},
        "tool": {
            "name": "delete_ticket",
            "arguments": {"id": 4711},
            "annotations": {"destructiveHint": True},
            "known": True,
            "digest": "sha256:9ab2",
        },
        "server": {"name": "tickets"},
        "context": {
            "time": "2026-11-22T10:15:00Z",
            "source_address": "10.1.2.3",
            "pod": {"name": "tickets-7c9", "namespace": "support"},
            "unverified": {"headers": {}},
            "trace_id": TRACE_ID,
        },
    }


def test_a_verified_token_is_told_of_and_the_purpose_it_names() -> None:
    evidence = TokenFacts(1_795_344_900, "f81d", 1_795_341_300)
    actor = replace(BOT_FOR_ANA, token=evidence, purpose="refund-flow")
    question = ask(receive(modern("tools/call", name="t")), actor)
    assert question["actor"]["token"] == {
        "id": "f81d",
        "issued_at": 1_795_341_300,
        "expires_at": 1_795_344_900,
    }
    assert question["context"]["purpose"] == "refund-flow"
    least = replace(actor, token=TokenFacts(1_795_344_900))
    question = ask(receive(modern("tools/call", name="t")), least)
    assert question["actor"]["token"] == {"expires_at": 1_795_344_900}


def test_what_is_not_known_is_an_absent_key() -> None:
    question = ask(receive(modern("tools/call", name="t")), identity.UNKNOWN, BARE)
    assert question["tool"] == {"name": "t", "arguments": {}, "annotations": {}}
    assert "session" not in question["mcp"]
    assert "claimed_client" not in question["mcp"]
    assert "on_behalf_of" not in question["actor"]
    assert set(question["context"]) == {"time", "unverified"}
    assert None not in list(_values(question))


def test_headers_that_may_be_shown_are_unverified() -> None:
    place = replace(BARE, unverified={"x-tenant": "blue"})
    question = ask(receive(modern("tools/call", name="t")), identity.UNKNOWN, place)
    assert question["context"]["unverified"] == {"headers": {"x-tenant": "blue"}}


def _values(value: Any) -> Any:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    yield value
    for each in inner:
        yield from _values(each)


def test_what_rules_compare_is_always_there() -> None:
    question = ask(receive(Request(1, "tools/call", {"name": "t"})), identity.UNKNOWN, BARE)
    for each in (question["actor"], *question["actor"]["chain"]):
        assert (each["groups"], each["scopes"], each["claims"]) == ([], [], {})
    assert len(question["actor"]["chain"]) == 1


@pytest.mark.parametrize("known", [True, False, None])
def test_whether_a_tool_is_known_is_said_or_left_open(known: bool | None) -> None:
    question = ask(
        receive(Request(1, "tools/call", {"name": "t"})), facts=Facts(tool=Lookup(known))
    )
    assert question["tool"].get("known") is known
    assert ("known" in question["tool"]) == (known is not None)


# ── The object of each kind ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("message", "kind", "expected"),
    [
        pytest.param(
            Request(1, "tools/call", {"name": "t", "arguments": None}),
            "tool",
            {"name": "t", "arguments": {}, "annotations": {}},
            id="arguments null",
        ),
        pytest.param(
            Request(1, "tools/call", {"name": "t", "task": {"ttl": 5}}),
            "tool",
            {"name": "t", "arguments": {}, "annotations": {}, "task": {"ttl": 5}},
            id="a call as a task",
        ),
        pytest.param(
            Request(1, "prompts/get", {"name": "p", "arguments": {"a": "b"}}),
            "prompt",
            {"name": "p", "arguments": {"a": "b"}},
            id="prompt",
        ),
        pytest.param(
            Request(1, "prompts/get", {"name": "p"}),
            "prompt",
            {"name": "p", "arguments": {}},
            id="bare",
        ),
        pytest.param(
            Request(
                1,
                "completion/complete",
                {
                    "ref": {"type": "ref/prompt", "name": "p"},
                    "argument": {"name": "a", "value": "b"},
                },
            ),
            "completion",
            {"ref": {"type": "ref/prompt", "name": "p"}, "argument": {"name": "a", "value": "b"}},
            id="completion",
        ),
        pytest.param(
            Request(1, "completion/complete", {"ref": {"type": "ref/resource", "uri": "u:x"}}),
            "completion",
            {"ref": {"type": "ref/resource", "uri": "u:x"}, "argument": {}},
            id="completion of nothing",
        ),
        pytest.param(
            Request(1, "tasks/get", {"taskId": "t1"}),
            "task",
            {"id": "t1", "known": False},
            id="task",
        ),
        pytest.param(
            modern("subscriptions/listen", notifications={"resourceSubscriptions": ["u:a"]}),
            "subscription",
            {"name": "u:a", "kind": "resource"},
            id="subscription",
        ),
        pytest.param(
            Request(1, "acme/reindex", {"deep": True}),
            "method",
            {"params": {"deep": True}},
            id="method",
        ),
        pytest.param(Request(1, "acme/reindex"), "method", {"params": {}}, id="method, no params"),
    ],
)
def test_a_target_comes_with_what_is_asked_of_it(
    message: Request, kind: str, expected: JsonObject
) -> None:
    question = ask(receive(message))
    assert question[kind] == expected
    assert question["target"]["type"] == kind


TEXT_DIGEST = digest("Who are you?")


@pytest.mark.parametrize(
    ("method", "params", "kind", "expected"),
    [
        pytest.param(
            "sampling/createMessage",
            {"messages": [], "maxTokens": 100, "tools": [{"name": "a"}, {"name": 1}, "b", {}]},
            "sampling",
            {"tools": ["a"], "max_tokens": 100},
            id="sampling",
        ),
        pytest.param(
            "sampling/createMessage",
            {"maxTokens": 1e3},
            "sampling",
            {"tools": [], "max_tokens": 1e3},
            id="tokens as a float",
        ),
        *(
            pytest.param(
                "sampling/createMessage",
                {"tools": odd, "maxTokens": "9"},
                "sampling",
                {"tools": []},
                id=f"tools {odd!r}",
            )
            for odd in (5, True, "abc", {"name": "a"}, None)
        ),
        pytest.param(
            "sampling/createMessage",
            {"maxTokens": True},
            "sampling",
            {"tools": []},
            id="tokens true",
        ),
        pytest.param(
            "elicitation/create",
            {"message": "Who are you?"},
            "elicitation",
            {"mode": "form", "message_digest": TEXT_DIGEST},
            id="a form",
        ),
        pytest.param(
            "elicitation/create",
            {"mode": "url", "url": "https://a.example/x", "message": "Who are you?"},
            "elicitation",
            {"mode": "url", "url": "https://a.example/x", "message_digest": TEXT_DIGEST},
            id="a URL",
        ),
        pytest.param(
            "elicitation/create",
            {"mode": 7, "url": 7},
            "elicitation",
            {"mode": "-", "message_digest": digest(None)},
            id="neither",
        ),
        pytest.param("roots/list", None, "roots", {}, id="roots"),
    ],
)
def test_a_servers_question_is_asked_about_as_the_clients_action(
    method: str, params: JsonObject | None, kind: str, expected: JsonObject
) -> None:
    operation = receive(Request(1, method, params), SERVER, protocol_version="2025-11-25")
    question = ask(operation)
    assert question[kind] == expected
    assert question["mcp"]["direction"] == "server_to_client"
    assert question["actor"]["id"] == "ana"


def test_a_task_is_asked_about_with_its_tool_and_its_owners() -> None:
    known = Facts(task=Task("export", ("static|bot", "static|ana")))
    expected = {"id": "t1", "known": True, "tool": "export", "owner": ["static|bot", "static|ana"]}
    assert ask(receive(modern("tasks/get", taskId="t1")), facts=known)["task"] == expected
    listening = receive(modern("subscriptions/listen", notifications={"taskIds": ["t1"]}))
    assert ask(listening, facts=known)["task"] == expected
    assert ask(listening)["task"] == {"id": "t1", "known": False}


@pytest.mark.parametrize(
    ("responses", "told"),
    [
        pytest.param({"q1": {"action": "accept"}}, {"q1": {"action": "accept"}}, id="answers"),
        pytest.param(["odd"], {}, id="no answers"),
        pytest.param(None, {}, id="null"),
    ],
)
def test_a_later_round_says_its_number_and_the_answers(responses: Any, told: JsonObject) -> None:
    operation = receive(modern("tools/call", name="t", inputResponses=responses))
    assert ask(operation, facts=Facts(round=3))["round"] == {"n": 3, "input_responses": told}
    assert "round" not in ask(operation)


@pytest.mark.parametrize("action", ["open", "resume", "close"])
def test_a_stream_has_no_object(action: str) -> None:
    row = Method("stream", "request", "client", (), Governed.DECISION, "stream")
    target = Target("stream", action)
    message = Notification(f"stream/{action}")
    operation = Operation(message, row, CLIENT, Era.LEGACY, "2025-11-25", (target,), session_id="s")
    question = ask(operation)
    assert question["target"] == {"type": "stream", "name": action}
    assert "stream" not in question


# ── Listings and the canary ───────────────────────────────────────────────────────────────────────


def listing_of(method: str, items: list[JsonObject], **tasks: Task) -> JsonObject:
    operation = receive(Request(1, method))
    listing = operation.method.listing
    assert listing is not None
    question = build_listing(operation, listing, items, ANA, ENVIRONMENT, tasks=tasks)
    VALID.validate(question)
    assert question["target"] == {"type": "listing", "name": listing.kind}
    assert question["listing"]["kind"] == listing.kind
    slim = question["listing"]["items"]
    assert len(slim) == len(items)
    return {"items": slim}


def test_tools_are_judged_by_name_hints_and_digest() -> None:
    item = tool("a", annotations={"readOnlyHint": True}, description="long " * 100)
    assert listing_of("tools/list", [item, tool("b", annotations=7)])["items"] == [
        {
            "target": {"type": "tool", "name": "a"},
            "annotations": {"readOnlyHint": True},
            "digest": digest(item),
        },
        {
            "target": {"type": "tool", "name": "b"},
            "annotations": {},
            "digest": digest(tool("b", annotations=7)),
        },
    ]


@pytest.mark.parametrize(
    ("method", "item", "target"),
    [
        pytest.param("resources/list", {"uri": "u:a", "name": "n"}, ("resource", "u:a"), id="uri"),
        pytest.param(
            "resources/templates/list",
            {"uriTemplate": "u:{x}"},
            ("resource", "u:{x}"),
            id="template",
        ),
        pytest.param("prompts/list", {"name": "p"}, ("prompt", "p"), id="prompt"),
        pytest.param("prompts/list", {"title": "p"}, ("prompt", ""), id="no name"),
        pytest.param("resources/list", {"uri": 7}, ("resource", ""), id="a name that is none"),
    ],
)
def test_other_items_are_judged_by_name(
    method: str, item: JsonObject, target: tuple[str, str]
) -> None:
    (slim,) = listing_of(method, [item])["items"]
    assert slim == {"target": {"type": target[0], "name": target[1]}}


def test_listed_tasks_are_judged_by_what_is_remembered_of_them() -> None:
    known = Task("export", ("static|ana",))
    items = listing_of("tasks/list", [{"taskId": "t1"}, {"taskId": "t2"}], t1=known)["items"]
    assert [each["task"] for each in items] == [
        {"id": "t1", "known": True, "tool": "export", "owner": ["static|ana"]},
        {"id": "t2", "known": False},
    ]


def test_the_canary_is_a_listing_by_nobody() -> None:
    question = document.canary(ENVIRONMENT, identity.UNKNOWN)
    VALID.validate(question)
    assert question["canary"] is True
    assert question["actor"]["type"] == "unknown"
    assert question["listing"] == {"kind": "tools", "items": []}
    assert set(question) - {"canary", "listing"} == set(SCHEMA["required"])


# ── Whatever is sent ──────────────────────────────────────────────────────────────────────────────

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=3)
REFS = st.builds(lambda n: {"type": "ref/prompt", "name": n}, NAMES) | st.builds(
    lambda n: {"type": "ref/resource", "uri": n}, NAMES
)
LISTENED = st.fixed_dictionaries(
    {},
    optional={
        "resourceSubscriptions": st.lists(NAMES, max_size=2),
        "taskIds": st.lists(NAMES, max_size=2),
        "toolsListChanged": st.booleans(),
    },
)
PARAMS = st.fixed_dictionaries(
    {"name": NAMES, "uri": NAMES, "taskId": NAMES, "ref": REFS, "notifications": LISTENED},
    optional={
        "arguments": st.none() | OBJECTS,
        "argument": VALUES,
        "task": VALUES,
        "tools": VALUES | st.lists(st.fixed_dictionaries({"name": VALUES}), max_size=3),
        "maxTokens": VALUES,
        "mode": VALUES,
        "url": VALUES,
        "message": VALUES,
        "inputResponses": VALUES,
        "requestState": VALUES,
        "vendor": VALUES,
    },
)
FACTS = st.builds(
    Facts,
    tool=st.builds(
        Lookup,
        st.none() | st.booleans(),
        st.none() | st.builds(Tool, TEXT, OBJECTS, TEXT),
        st.none() | st.booleans(),
    ),
    resource=st.none() | TEXT,
    task=st.none() | st.builds(Task, TEXT, st.lists(TEXT, max_size=2).map(tuple)),
    round=st.none() | st.integers(2, 9),
)
PRINCIPALS = st.builds(
    Principal,
    st.sampled_from(["human", "service", "agent", "unknown"]),
    TEXT,
    TEXT.filter(lambda issuer: "|" not in issuer),
    st.lists(TEXT, max_size=2).map(tuple),
    st.lists(TEXT, max_size=2).map(tuple),
    OBJECTS,
)
ACTORS = st.builds(
    Actor,
    st.lists(PRINCIPALS, min_size=1, max_size=3).map(tuple),
    st.sampled_from([0, 1, 2, 3]),
    st.lists(TEXT, max_size=2).map(tuple),
)
GOVERNED = sorted(
    row.name
    for row in TABLE.rows.values()
    if row.governed in (Governed.DECISION, Governed.NEGOTIATION)
)


def operation_of(method: str, params: JsonObject) -> Operation:
    row = TABLE.rows[method]
    if not row.exists_in(Era.LEGACY):
        return receive(modern(method, **params))
    state = {"id": "session-secret", "protocol_version": "2025-11-25"}
    return receive(Request(1, method, params), CLIENT if row.sent_by(CLIENT) else SERVER, **state)


@given(st.sampled_from(GOVERNED), PARAMS, ACTORS, FACTS)
def test_every_question_is_what_the_schema_says(
    method: str, params: JsonObject, actor: Actor, facts: Facts
) -> None:
    operation = operation_of(method, params)
    for target in operation.targets:
        question = build(operation, target, actor, ENVIRONMENT, facts)
        VALID.validate(question)
        assert question["target"] == {"type": target.type, "name": target.name}
        assert json.loads(dump_json(question)) == question


ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "name": VALUES,
            "uri": VALUES,
            "uriTemplate": VALUES,
            "taskId": VALUES,
            "annotations": VALUES,
        },
    ),
    max_size=3,
)
LISTINGS = sorted(row.name for row in TABLE.rows.values() if row.listing)


@given(st.sampled_from(LISTINGS), ITEMS)
def test_every_page_is_what_the_schema_says(method: str, items: list[JsonObject]) -> None:
    listing_of(method, items)


MARK = "s3cret-that-nobody-may-see"
SECRET_PLACES = {
    "the session id": {"id": MARK},
    "the envelope": {"params": {"_meta": {"authorization": MARK, "traceparent": MARK}}},
    "the progress token": {"params": {"_meta": {"progressToken": MARK}}},
    "the state of a round": {"params": {"requestState": MARK}},
    "the messages of a sampling": {"params": {"messages": [MARK], "systemPrompt": MARK}},
    "the text of an elicitation": {"params": {"message": MARK}},
    "the schema of an elicitation": {"params": {"requestedSchema": {"default": MARK}}},
    "the schema of a sampled tool": {"params": {"tools": [{"name": "t", "inputSchema": MARK}]}},
}


@pytest.mark.parametrize("place", SECRET_PLACES.values(), ids=SECRET_PLACES)
def test_what_no_rule_needs_is_in_no_question(place: dict[str, Any]) -> None:
    base = {"name": "n", "uri": "u:a", "taskId": "1", "ref": {"type": "ref/prompt", "name": "p"}}
    params = {**base, **place.get("params", {})}
    for method in sorted(set(GOVERNED) - {"acme/reindex", "subscriptions/listen"}):
        row = TABLE.rows[method]
        if not row.exists_in(Era.LEGACY):
            continue
        state = {"id": place.get("id", "s"), "protocol_version": "2025-11-25"}
        direction = CLIENT if row.sent_by(CLIENT) else SERVER
        question = ask(receive(Request(MARK, method, params), direction, **state))
        assert MARK not in dump_json(question).decode(), method


def test_a_session_is_shown_by_its_digest() -> None:
    assert document.session_digest(None) is None
    assert document.session_digest("\udcff")  # a header is bytes, which need not be text
    shown = document.session_digest("a")
    assert shown is not None
    assert shown.startswith("sha256:")
    assert shown != document.session_digest("b")
