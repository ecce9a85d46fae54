"""What a message means in its conversation, and which answer belongs to which question."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import MalformedMessage, UnknownMethod
from sidecar.protocol.jsonrpc import Message, Notification, Request, Response
from sidecar.protocol.methods import (
    LEGACY_REVISIONS,
    MODERN_REVISION,
    Direction,
    Era,
    MethodTable,
)
from sidecar.protocol.session import (
    CLIENT_INFO_KEY,
    MAX_ABANDONED,
    VERSION_KEY,
    Bounded,
    ClientInfo,
    Operation,
    Outstanding,
    Session,
    envelope_version,
)
from tests.support.fakes import modern

TABLE = MethodTable.of(["acme/reindex"])
CLIENT, SERVER = Direction.FROM_CLIENT, Direction.FROM_SERVER


def receive(message: Message, direction: Direction = CLIENT, **state: Any) -> Operation:
    return Session(TABLE, **state).receive(message, direction)


def targets(operation: Operation) -> list[tuple[str, str]]:
    return [(each.type, each.name) for each in operation.targets]


# ── What it acts on ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "params", "expected"),
    [
        pytest.param("tools/call", {"name": "t"}, [("tool", "t")], id="tool"),
        pytest.param("tools/call", {"name": "T ö"}, [("tool", "T ö")], id="tool, as written"),
        pytest.param("tools/call", {"name": "t", "arguments": None}, [("tool", "t")], id="null"),
        pytest.param(
            "resources/read", {"uri": "file:///a"}, [("resource", "file:///a")], id="read"
        ),
        pytest.param("resources/subscribe", {"uri": "u:a"}, [("resource", "u:a")], id="subscribe"),
        pytest.param("resources/unsubscribe", {"uri": "u:a"}, [("resource", "u:a")], id="unsub"),
        pytest.param("prompts/get", {"name": "p"}, [("prompt", "p")], id="prompt"),
        pytest.param(
            "completion/complete",
            {"ref": {"type": "ref/prompt", "name": "p"}},
            [("completion", "p")],
            id="completion of a prompt",
        ),
        pytest.param(
            "completion/complete",
            {"ref": {"type": "ref/resource", "uri": "u:{x}", "name": "p"}},
            [("completion", "u:{x}")],
            id="completion of a resource",
        ),
        pytest.param("tasks/get", {"taskId": "1"}, [("task", "1")], id="task"),
        pytest.param("tasks/result", {"taskId": "1"}, [("task", "1")], id="result of a task"),
        pytest.param("tasks/cancel", {"taskId": "1"}, [("task", "1")], id="cancel of a task"),
        pytest.param("tools/list", {"cursor": "2"}, [("listing", "tools")], id="tools"),
        pytest.param("tools/list", None, [("listing", "tools")], id="tools without params"),
        pytest.param(
            "resources/templates/list", {}, [("listing", "resource_templates")], id="templates"
        ),
        pytest.param("tasks/list", {}, [("listing", "tasks")], id="tasks"),
        pytest.param("initialize", {}, [("negotiation", "initialize")], id="initialize"),
        pytest.param("acme/reindex", {"x": 1}, [("method", "acme/reindex")], id="declared"),
        pytest.param("ping", None, [], id="ping"),
        pytest.param("logging/setLevel", {"level": "info"}, [], id="level"),
    ],
)
def test_a_request_acts_on_its_target(
    method: str, params: dict[str, Any] | None, expected: list[tuple[str, str]]
) -> None:
    operation = receive(Request(1, method, params))
    assert targets(operation) == expected
    assert (operation.era, operation.direction) == (Era.LEGACY, CLIENT)
    assert operation.params == (params or {})


@pytest.mark.parametrize(
    ("method", "params", "expected"),
    [
        pytest.param("sampling/createMessage", {"messages": []}, ("sampling", "-"), id="sampling"),
        pytest.param("roots/list", None, ("roots", "-"), id="roots"),
        pytest.param("elicitation/create", {}, ("elicitation", "form"), id="a form"),
        pytest.param("elicitation/create", {"mode": "url"}, ("elicitation", "url"), id="a URL"),
        pytest.param("elicitation/create", {"mode": 7}, ("elicitation", "-"), id="what mode"),
        pytest.param("acme/reindex", None, ("method", "acme/reindex"), id="declared"),
    ],
)
def test_a_question_of_the_server_acts_on_the_client(
    method: str, params: dict[str, Any] | None, expected: tuple[str, str]
) -> None:
    asked = receive(Request(1, method, params), SERVER, protocol_version="2025-11-25")
    assert targets(asked) == [expected]
    assert asked.era is Era.LEGACY
    if method != "acme/reindex":
        embedded = Session(TABLE).receive_embedded(Notification(method, params))
        assert targets(embedded) == [expected]
        assert (embedded.era, embedded.direction) == (Era.MODERN, SERVER)
        assert embedded.protocol_version == MODERN_REVISION


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        pytest.param({}, [("-", "listing")], id="nothing"),
        pytest.param({"toolsListChanged": True}, [("toolsListChanged", "listing")], id="a list"),
        pytest.param({"toolsListChanged": False}, [("-", "listing")], id="a list, not wanted"),
        pytest.param(
            {
                "resourceSubscriptions": ["u:a", "u:b"],
                "taskIds": ["u:a", "toolsListChanged"],
                "promptsListChanged": True,
            },
            [
                ("u:a", "resource"),
                ("u:b", "resource"),
                ("u:a", "task"),
                ("toolsListChanged", "task"),
                ("promptsListChanged", "listing"),
            ],
            id="each of many, whatever its name looks like",
        ),
    ],
)
def test_each_thing_listened_to_is_a_target(
    wanted: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    operation = receive(modern("subscriptions/listen", notifications=wanted))
    assert [(each.type, each.name, each.kind) for each in operation.targets] == [
        ("subscription", name, kind) for name, kind in expected
    ]


def test_listening_to_nothing_named_is_one_target() -> None:
    assert targets(receive(modern("subscriptions/listen"))) == [("subscription", "-")]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Request(7, "tools/call"), id="no params"),
        pytest.param(Request(7, "tools/call", {}), id="no name"),
        pytest.param(Request(7, "tools/call", {"name": None}), id="name null"),
        pytest.param(Request(7, "tools/call", {"name": ["t"]}), id="name list"),
        pytest.param(Request(7, "tools/call", {"name": "a\nb"}), id="name with newline"),
        pytest.param(Request(7, "tools/call", {"name": "a\x00"}), id="name with NUL"),
        pytest.param(Request(7, "tools/call", {"name": "a\x7f"}), id="name with DEL"),
        pytest.param(
            Request(7, "tools/call", {"name": "t", "arguments": [1]}), id="arguments list"
        ),
        pytest.param(
            Request(7, "tools/call", {"name": "t", "arguments": "x"}), id="arguments text"
        ),
        pytest.param(
            Request(7, "prompts/get", {"name": "t", "arguments": 0}), id="arguments number"
        ),
        pytest.param(Request(7, "resources/read", {"uri": 1}), id="uri number"),
        pytest.param(Request(7, "resources/read", {"uri": "file:///a\tb"}), id="uri with tab"),
        pytest.param(Request(7, "tasks/get", {"taskId": 1}), id="task number"),
        pytest.param(Request(7, "completion/complete", {}), id="no ref"),
        pytest.param(Request(7, "completion/complete", {"ref": "p"}), id="ref text"),
        pytest.param(
            Request(7, "completion/complete", {"ref": {"type": "ref/tool", "name": "t"}}),
            id="ref tool",
        ),
        pytest.param(
            Request(7, "completion/complete", {"ref": {"type": "ref/prompt", "uri": "u:a"}}),
            id="ref prompt by uri",
        ),
        pytest.param(modern("subscriptions/listen", 7, notifications={"x": 1}), id="wanted number"),
        pytest.param(
            modern("subscriptions/listen", 7, notifications={"x": None}), id="wanted null"
        ),
        pytest.param(
            modern("subscriptions/listen", 7, notifications={"x": {}}), id="wanted object"
        ),
        pytest.param(modern("subscriptions/listen", 7, notifications={"x": ["a"]}), id="what list"),
        pytest.param(
            modern("subscriptions/listen", 7, notifications={"taskIds": ["a", 1]}), id="mixed"
        ),
        pytest.param(
            modern("subscriptions/listen", 7, notifications={"taskIds": True}), id="all tasks"
        ),
        pytest.param(
            modern("subscriptions/listen", 7, notifications={"resourceSubscriptions": ["u:\n"]}),
            id="uri with newline",
        ),
        pytest.param(modern("subscriptions/listen", 7, notifications=["u:a"]), id="wanted list"),
    ],
)
def test_params_that_name_no_target_are_refused(message: Request) -> None:
    with pytest.raises(MalformedMessage) as refused:
        receive(message)
    assert (refused.value.rpc_code, refused.value.request_id) == (-32602, 7)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        pytest.param("tools/call", {"name": "a", "Name": "b"}, id="case"),
        pytest.param("tools/call", {"name": "a", "NAME": "b"}, id="upper case"),
        pytest.param("tools/call", {"Name": "b"}, id="instead"),
        pytest.param("tools/call", {"name": "a", "argumentſ": {}}, id="long s"),
        pytest.param("tools/call", {"name": "a", "\uff4e\uff41\uff4d\uff45": "b"}, id="full width"),
        pytest.param("tools/call", {"name": "a", "_Meta": {}}, id="_Meta"),
        pytest.param("tools/call", {"name": "a", "tasK": {}}, id="Kelvin sign"),
        pytest.param("resources/read", {"uri": "u:a", "URI": "u:b"}, id="URI"),
        pytest.param("tasks/get", {"taskId": "1", "taskid": "2"}, id="taskid"),
        pytest.param(
            "tools/call", {"name": "a", "_meta": {VERSION_KEY.upper(): "x"}}, id="envelope"
        ),
        pytest.param(
            "completion/complete",
            {"ref": {"type": "ref/prompt", "name": "a", "Name": "b"}},
            id="in a ref",
        ),
        pytest.param(
            "completion/complete",
            {"ref": {"type": "ref/prompt", "Type": "ref/resource", "name": "a", "uri": "u:b"}},
            id="type of a ref",
        ),
    ],
)
def test_a_key_that_can_be_read_as_another_is_refused(method: str, params: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage) as refused:
        receive(Request("x", method, params))
    assert (refused.value.rpc_code, refused.value.request_id) == (-32602, "x")


def test_keys_inside_arguments_are_the_tools_own_business() -> None:
    receive(Request(1, "tools/call", {"name": "a", "arguments": {"Name": 1, "name": 2, "URI": 3}}))
    receive(Request(1, "tools/call", {"name": "a", "vendor": 1, "_meta": {"acme.com/Key": 1}}))


# ── Eras and revisions ────────────────────────────────────────────────────────────────────────────


def test_the_envelope_makes_a_request_modern() -> None:
    operation = receive(modern("tools/call", name="t"), protocol_version="2025-06-18")
    assert (operation.era, operation.protocol_version) == (Era.MODERN, MODERN_REVISION)


def test_without_an_envelope_the_revision_is_that_of_the_handshake() -> None:
    operation = receive(Request(1, "tools/list"), protocol_version="2025-06-18")
    assert (operation.era, operation.protocol_version) == (Era.LEGACY, "2025-06-18")
    assert receive(Request(1, "tools/list")).protocol_version is None


@pytest.mark.parametrize(
    ("message", "direction", "state", "status"),
    [
        pytest.param(Request(7, "tools/destroy"), CLIENT, {}, 200, id="nobody's"),
        pytest.param(Request(7, "tools/Call", {"name": "t"}), CLIENT, {}, 200, id="case"),
        pytest.param(Request(7, "server/discover"), CLIENT, {}, 200, id="of the other era"),
        pytest.param(modern("initialize", 7), CLIENT, {}, 404, id="of the era before"),
        pytest.param(modern("tasks/result", 7, taskId="1"), CLIENT, {}, 404, id="removed"),
        pytest.param(modern("ping", 7), CLIENT, {}, 404, id="removed ping"),
        pytest.param(Request(7, "sampling/createMessage"), CLIENT, {}, 200, id="the server's"),
        pytest.param(Request(7, "notifications/progress"), CLIENT, {}, 200, id="a notification"),
        pytest.param(
            Request(7, "tools/call", {"name": "t"}),
            SERVER,
            {"protocol_version": "2025-11-25"},
            200,
            id="the client's",
        ),
        pytest.param(Request(7, "roots/list"), SERVER, {}, 404, id="a modern server asks nothing"),
        pytest.param(Request(7, "acme/reindex"), SERVER, {}, 404, id="nor what is declared"),
    ],
)
def test_an_unknown_method_is_refused_with_its_id(
    message: Request, direction: Direction, state: dict[str, Any], status: int
) -> None:
    with pytest.raises(UnknownMethod) as refused:
        receive(message, direction, **state)
    error = refused.value
    assert (error.rpc_code, error.status, error.request_id) == (-32601, status, 7)
    assert message.method in str(error)


@pytest.mark.parametrize("method", ["tools/call", "ping", "notifications/none", "roots/list"])
def test_a_request_without_id_is_no_notification(method: str) -> None:
    with pytest.raises(UnknownMethod) as refused:
        receive(Notification(method, {"name": "t"}))
    assert refused.value.request_id is None


@pytest.mark.parametrize("method", ["ping", "tasks/get", "tools/list", "tools/call", "acme/none"])
def test_only_questions_may_stand_inside_a_result(method: str) -> None:
    with pytest.raises(UnknownMethod):
        Session(TABLE).receive_embedded(Notification(method, {"name": "t"}))


def test_a_question_inside_a_result_keeps_the_conversation() -> None:
    session = Session(TABLE, "s1", "2026-09-01", ClientInfo("c"))
    operation = session.receive_embedded(Notification("roots/list"))
    assert (operation.session_id, operation.protocol_version) == ("s1", "2026-09-01")
    assert operation.client == ClientInfo("c")


def test_the_server_chooses_the_revision() -> None:
    session = Session(TABLE)
    asked = {"protocolVersion": "2099-01-01", "clientInfo": {"name": "c", "version": "1"}}
    operation = session.receive(Request(0, "initialize", asked), CLIENT)
    assert operation.protocol_version == "2099-01-01"
    assert operation.client == ClientInfo("c", "1")
    session.negotiated(Response(0, {"protocolVersion": "2025-03-26"}))
    assert session.receive(Request(1, "tools/list"), CLIENT).protocol_version == "2025-03-26"
    assert session.receive(Request(1, "ping"), SERVER).era is Era.LEGACY


@pytest.mark.parametrize(
    ("result", "capabilities"),
    [
        ({"capabilities": {"tools": {}}}, {"tools": {}}),
        ({"capabilities": {}}, {}),
        ({"capabilities": ["tools"]}, None),
        ({}, None),
        (None, None),
    ],
)
def test_what_the_server_can_do_is_what_it_said_last(result: Any, capabilities: Any) -> None:
    session = Session(TABLE, capabilities={"prompts": {}})
    session.negotiated(Response(0, result))
    assert session.capabilities == capabilities


@pytest.mark.parametrize("result", [None, [], {}, {"protocolVersion": 1}], ids=repr)
def test_an_answer_without_revision_changes_none(result: Any) -> None:
    session = Session(TABLE, protocol_version="2025-03-26")
    session.negotiated(Response(0, result))
    assert session.protocol_version == "2025-03-26"


def test_a_handshake_without_revision_is_the_oldest() -> None:
    assert receive(Request(0, "initialize")).protocol_version == "2024-11-05"


@pytest.mark.parametrize(
    ("claim", "client"),
    [
        pytest.param({"name": "c", "version": "2"}, ClientInfo("c", "2"), id="both"),
        pytest.param({"name": "c"}, ClientInfo("c"), id="a name"),
        pytest.param({"name": "c", "version": 2}, ClientInfo("c"), id="a version that is none"),
        pytest.param({"name": 1}, None, id="no name"),
        pytest.param("c", None, id="text"),
        pytest.param(
            {"name": "n" * 999, "version": "v" * 999},
            ClientInfo("n" * 128, "v" * 64),
            id="too long",
        ),
    ],
)
def test_what_a_client_says_of_itself_is_taken_down(claim: Any, client: ClientInfo | None) -> None:
    assert receive(Request(0, "initialize", {"clientInfo": claim})).client == client
    envelope = modern("tools/list", _meta={CLIENT_INFO_KEY: claim})
    assert receive(envelope).client == client
    other = ClientInfo("other")
    assert receive(envelope, client=other).client == (client or other)


NO_WORDS = ["", "2026-07-28 ", "2026\r\nX: y", "2026\x00", "\u212a", "x" * 65]


@pytest.mark.parametrize("version", [None, 1, {}, *NO_WORDS, *sorted(LEGACY_REVISIONS)], ids=repr)
def test_an_envelope_names_a_revision_that_has_envelopes(version: Any) -> None:
    message = Request(7, "tools/list", {"_meta": {VERSION_KEY: version}})
    with pytest.raises(MalformedMessage) as refused:
        envelope_version(message)
    assert (refused.value.rpc_code, refused.value.request_id) == (-32602, 7)


@pytest.mark.parametrize(
    ("message", "version"),
    [
        pytest.param(modern("tools/list"), MODERN_REVISION, id="modern"),
        pytest.param(modern("tools/list", version="2030-01-01"), "2030-01-01", id="later"),
        pytest.param(Request(1, "tools/list"), None, id="no params"),
        pytest.param(Request(1, "tools/list", {"_meta": {"a": 1}}), None, id="no envelope"),
        pytest.param(
            Request(1, "tools/list", {"_meta": [VERSION_KEY]}), None, id="_meta no object"
        ),
        pytest.param(Response(1, {"_meta": {VERSION_KEY: "x"}}), None, id="an answer"),
    ],
)
def test_the_envelope_says_the_revision(message: Message, version: str | None) -> None:
    assert envelope_version(message) == version


# ── Questions and answers ─────────────────────────────────────────────────────────────────────────


def test_a_question_is_answered_once() -> None:
    waiting = Outstanding[str]()
    waiting.ask(1, "one")
    assert waiting.get(1) == "one"
    assert waiting.answer(1) == "one"
    assert waiting.answer(1) is None
    assert len(waiting) == 0


def test_a_number_and_its_text_are_two_ids() -> None:
    waiting = Outstanding[str]()
    waiting.ask(1, "number")
    waiting.ask("1", "text")
    assert waiting.answer("1") == "text"
    assert waiting.get(1) == "number"
    assert waiting.answer(1) == "number"


def test_nobody_asked_for_an_answer_without_id() -> None:
    waiting = Outstanding[str]()
    assert waiting.answer(None) is None
    assert waiting.get(None) is None
    assert waiting.answer("never asked") is None


def test_an_id_in_flight_is_taken() -> None:
    waiting = Outstanding[str]()
    waiting.ask("a", "first")
    with pytest.raises(MalformedMessage) as refused:
        waiting.ask("a", "second")
    assert refused.value.request_id == "a"
    assert waiting.answer("a") == "first"
    waiting.ask("a", "third")
    assert waiting.answer("a") == "third"


def test_an_abandoned_question_is_still_answered_once() -> None:
    waiting = Outstanding[str]()
    waiting.ask(1, "one")
    waiting.abandon(1)
    waiting.abandon(1)
    assert (len(waiting), waiting.get(1)) == (0, None)
    assert waiting.answer(1) == "one"
    assert waiting.answer(1) is None


def test_an_abandoned_id_is_not_free_for_a_question_that_is_judged_otherwise() -> None:
    waiting = Outstanding[str]()
    waiting.ask(1, "a listing, to be filtered")
    waiting.abandon(1)
    with pytest.raises(MalformedMessage):
        waiting.ask(1, "a ping, let pass")


def test_only_the_newest_abandoned_questions_are_remembered() -> None:
    waiting = Outstanding[int]()
    for number in range(1, MAX_ABANDONED + 2):
        waiting.ask(number, number)
        waiting.abandon(number)
    assert waiting.answer(1) is None
    assert waiting.answer(2) == 2


def test_at_the_end_all_that_wait_are_taken() -> None:
    waiting = Outstanding[str]()
    waiting.ask(1, "one")
    waiting.ask(2, "two")
    assert sorted(waiting.drain()) == ["one", "two"]
    assert waiting.drain() == []
    assert waiting.answer(1) is None


@given(st.lists(st.tuples(st.sampled_from(["ask", "answer", "abandon"]), st.integers(0, 3))))
def test_no_question_is_answered_twice(steps: list[tuple[str, int]]) -> None:
    waiting = Outstanding[object]()
    answered: list[object] = []
    for step, request_id in steps:
        if step == "ask":
            try:
                waiting.ask(request_id, object())
            except MalformedMessage:
                continue
        elif step == "abandon":
            waiting.abandon(request_id)
        elif (question := waiting.answer(request_id)) is not None:
            answered.append(question)
    assert len({id(each) for each in answered}) == len(answered)


def test_a_bounded_memory_forgets_the_oldest() -> None:
    memory = Bounded[str, int](2)
    memory.remember("a", 1)
    memory.remember("b", 2)
    memory.remember("a", 3)
    memory.remember("c", 4)
    assert dict(memory) == {"a": 3, "c": 4}
