"""Who is told, after a change of the policy, that a listing is not what it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sidecar import judging, relisting
from sidecar.conversation import Call, Conversation, Origin
from sidecar.errors import DecisionUnavailable
from sidecar.policy import identity
from sidecar.policy.decision import Decision
from sidecar.policy.enforcement import Forward, Rules
from sidecar.policy.identity import Principal
from sidecar.protocol.jsonrpc import JsonObject, Notification, Request
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session
from sidecar.relisting import SUBSCRIPTION
from tests.support.fakes import ANA, DENIED, Stage, modern, tool

BEA = identity.static(Principal("human", "bea", "static"))
LATE = DecisionUnavailable("late", detail="timeout")
EVERY = ("tools", "prompts", "resources", "resource_templates")
DECLARED = {each: {"listChanged": True} for each in ("tools", "prompts", "resources")}
LISTS: dict[str, tuple[str, str, str]] = {
    "tools": ("tools/list", "tools", "name"),
    "prompts": ("prompts/list", "prompts", "name"),
    "resources": ("resources/list", "resources", "uri"),
    "resource_templates": ("resources/templates/list", "resourceTemplates", "uriTemplate"),
}


def showing(*names: str) -> Callable[[JsonObject], Decision]:
    """A policy that shows these names of any listing, and allows what is no listing."""

    def decide(document: JsonObject) -> Decision:
        listed = {each["target"]["name"] for each in document.get("listing", {}).get("items", [])}
        return Decision(allow=True, visible=frozenset(names) & listed)

    return decide


class Told:
    """A stage whose client has a stream, and what comes on it."""

    def __init__(self, *names: str, capabilities: Any = None, **options: Any) -> None:
        self.stage = Stage(showing(*names), **options)
        self.notices: list[tuple[str, Any]] = []
        self.listeners(self.stage.conversation, DECLARED if capabilities is None else capabilities)

    def listeners(self, conversation: Conversation, capabilities: Any) -> None:
        conversation.tell = self.tell
        conversation.session.capabilities = capabilities

    async def tell(self, message: Notification) -> None:
        self.notices.append((message.method, message.params))

    async def listed(self, kind: str, *names: str, **page: Any) -> None:
        """The client lists, on one page or on the one with a `cursor`."""
        method, items, name = LISTS[kind]
        params = {key: value for key, value in page.items() if key == "cursor"}
        found = [{name: each, "name": each} for each in names]
        more = {"nextCursor": page["more"]} if "more" in page else {}
        await self.stage.exchange(Request(1, method, params), {items: found, **more})

    async def change(self, *names: str, answer: Any = None) -> list[str]:
        """Another policy; the methods that were told then."""
        self.stage.decider.default = answer or showing(*names)
        self.stage.decider.questions.clear()
        before = len(self.notices)
        self.stage.pipeline.policy_changed()
        await self.stage.pipeline.lists.sweep()
        return [method for method, _ in self.notices[before:]]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("tools", "notifications/tools/list_changed"),
        ("prompts", "notifications/prompts/list_changed"),
        ("resources", "notifications/resources/list_changed"),
        ("resource_templates", "notifications/resources/list_changed"),
    ],
)
async def test_one_who_would_see_something_else_is_told_once(kind: str, method: str) -> None:
    told = Told("a")
    await told.listed(kind, "a", "b")
    assert await told.change("a") == []
    assert await told.change("a", "b") == [method]
    assert await told.change("b") == []
    await told.listed(kind, "a", "b")
    assert await told.change("a") == [method]
    assert [params for _, params in told.notices] == [None, None]


async def test_the_question_is_the_one_that_was_asked() -> None:
    told = Told("a")
    items = [tool("a", annotations={"readOnlyHint": True}), tool("b", description="Does it.")]
    pins = told.stage.conversation.server.offers
    pins.pins = {"a": "sha256:other"}
    await told.stage.exchange(Request(1, "tools/list"), {"tools": items})
    [first] = told.stage.decider.questions
    await told.change("a", "b")
    [again] = told.stage.decider.questions
    for each in (first, again):
        del each["context"]["time"]
    assert again == first


async def test_what_was_listed_on_many_pages_is_one() -> None:
    told = Told("a", "c")
    await told.listed("tools", "a", "b", more="2")
    await told.listed("tools", "c", "d", cursor="2")
    assert await told.change("c", "a") == []
    assert await told.change("c", "d") == ["notifications/tools/list_changed"]


async def test_one_who_has_not_listed_to_the_end_is_not_told() -> None:
    told = Told("a")
    await told.listed("tools", "a", "b", more="2")
    assert await told.change("b") == []
    await told.listed("tools", "c", cursor="of another time")
    assert await told.change("c") == []


async def test_when_nobody_knows_what_there_is_nobody_is_told() -> None:
    told = Told("a")
    await told.listed("tools", "a", "b")
    await told.stage.deliver(Notification("notifications/tools/list_changed"))
    assert await told.change("b") == []
    assert told.stage.decider.questions == []


@pytest.mark.parametrize(
    "capabilities",
    [
        pytest.param({}, id="no tools"),
        pytest.param({"tools": {}}, id="not said"),
        pytest.param({"tools": {"listChanged": False}}, id="said not"),
        pytest.param({"tools": {"listChanged": "yes"}}, id="said oddly"),
        pytest.param({"tools": True}, id="said in no object"),
        pytest.param({"prompts": {"listChanged": True}}, id="said of something else"),
    ],
)
async def test_a_server_that_does_not_tell_of_changes_makes_nobody_tell(capabilities: Any) -> None:
    told = Told("a", capabilities=capabilities)
    await told.listed("tools", "a", "b")
    assert await told.change("b") == []
    assert told.stage.decider.questions == []


async def test_without_a_stream_nobody_is_asked_and_it_is_told_later() -> None:
    told = Told("a")
    await told.listed("tools", "a", "b")
    told.stage.conversation.tell = None
    assert await told.change("b") == []
    assert told.stage.decider.questions == []
    told.stage.conversation.tell = told.tell
    assert await told.change("b") == ["notifications/tools/list_changed"]


async def test_a_conversation_that_is_over_is_forgotten() -> None:
    told = Told("a")
    await told.listed("tools", "a", "b")
    told.stage.pipeline.close(told.stage.conversation)
    assert await told.change("b") == []


async def test_what_gets_no_decision_comes_again() -> None:
    told = Told("a")
    await told.listed("tools", "a", "b")
    assert await told.change(answer=LATE) == []
    told.stage.decider.default = showing("b")
    async with asyncio.timeout(5):
        await told.stage.pipeline.lists.step()
    assert [method for method, _ in told.notices] == ["notifications/tools/list_changed"]


@pytest.mark.parametrize(
    ("answer", "rules", "changed"),
    [
        pytest.param(DENIED, Rules(), True, id="a deny shows nothing"),
        pytest.param(DENIED, Rules(shadow="all"), True, id="a shadowed one shows all"),
        pytest.param(Decision(allow=True), Rules(), True, id="no filter shows all"),
        pytest.param(showing("b"), Rules(shadow="all"), True, id="a shadowed filter shows all"),
        pytest.param(showing("a"), Rules(), False, id="the same"),
    ],
)
async def test_what_would_be_shown_is_what_a_page_shows(
    answer: Any, rules: Rules, changed: bool
) -> None:
    told = Told("a")
    await told.listed("tools", "a", "b")
    told.stage.pipeline.lists._judge._rules = rules
    assert bool(await told.change(answer=answer)) is changed


async def test_what_was_shown_in_shadow_was_everything() -> None:
    told = Told("a", rules=Rules(shadow="all"))
    await told.listed("tools", "a", "b")
    assert await told.change("b") == []


async def test_a_long_list_is_asked_about_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "PAGE", 2)
    told, names = Told("a", "e"), "abcde"
    await told.listed("tools", *names)
    assert await told.change("a", "e") == []
    asked = [len(each["listing"]["items"]) for each in told.stage.decider.questions]
    assert asked == [2, 2, 1]
    assert await told.change("a", "d") == ["notifications/tools/list_changed"]


async def test_those_who_are_alike_are_asked_about_once_and_all_told() -> None:
    told = Told("a")
    others = [_another(told) for _ in range(5)]
    for each in (told.stage.conversation, *others):
        told.stage.conversation = each
        await told.listed("tools", "a", "b")
    assert await told.change("b") == ["notifications/tools/list_changed"] * 6
    assert len(told.stage.decider.questions) == 1


async def test_only_those_are_told_for_whom_it_is_another() -> None:
    told = Told("a")
    await told.listed("tools", "a", "b")
    other = told.stage.conversation = _another(told)
    told.stage.origin = Origin(BEA)
    await told.listed("tools", "a", "b")
    heard: list[str] = []

    async def hear(message: Notification) -> None:
        heard.append(message.method)

    other.tell = hear

    def more_for_bea(document: JsonObject) -> Decision:
        return showing(*("ab" if document["actor"]["id"] == "bea" else "a"))(document)

    assert await told.change(answer=more_for_bea) == []
    assert heard == ["notifications/tools/list_changed"]


async def test_one_that_does_not_read_or_is_gone_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relisting, "TO_TELL", 0.01)
    told = Told("a")
    for way in (_never, _gone):
        told.stage.conversation = _another(told)
        told.stage.conversation.tell = way
        await told.listed("tools", "a", "b")
    told.stage.conversation = _another(told)
    await told.listed("tools", "a", "b")
    assert await told.change("b") == ["notifications/tools/list_changed"]


async def test_a_page_that_was_judged_before_the_change_is_asked_about() -> None:
    told = Told("a")
    held = told.stage.decider.hold("tools")
    listing = asyncio.ensure_future(told.listed("tools", "a", "b"))
    while not told.stage.decider.questions:
        await asyncio.sleep(0)
    told.stage.pipeline.policy_changed()
    await told.stage.pipeline.lists.sweep()
    held.set()
    await listing
    told.stage.decider.default = showing("b")
    await told.stage.pipeline.lists.step()
    assert [method for method, _ in told.notices] == ["notifications/tools/list_changed"]


async def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relisting, "MAX_SHOWN", 3)
    told = Told("a")
    for _ in range(5):
        told.stage.conversation = _another(told)
        await told.listed("tools", "a", "b")
    assert len(await told.change("b")) == 3


# ── Subscriptions ─────────────────────────────────────────────────────────────────────────────────


class Subscribed(Told):
    """A stateless client: each of its requests is a conversation of its own."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.server = self.stage.conversation.server

    def alone(self, caller: object = None) -> Conversation:
        session = Session(MethodTable.of())
        self.stage.conversation = Conversation(
            session, self.server, "http", lasting=False, caller=caller
        )
        return self.stage.conversation

    async def listed(self, kind: str, *names: str, **page: Any) -> None:
        self.alone(page.get("caller"))
        method, items, name = LISTS[kind]
        found = [{name: each, "name": each} for each in names]
        await self.stage.exchange(modern(method), {items: found})

    async def listen(
        self, asked: Sequence[str], agreed: Sequence[str] | None = None, caller: object = None
    ) -> Call:
        """Listen to these; the server agrees to as much, or to what is said."""
        conversation = self.alone(caller)
        wanted = {f"{each}ListChanged": True for each in asked}
        listen = modern("subscriptions/listen", "s", notifications=wanted)
        assert isinstance(await self.stage.send(listen), Forward)
        call = self.stage.calls[-1]
        call.tell = self.tell
        given = {f"{each}ListChanged": True for each in (asked if agreed is None else agreed)}
        params = {"notifications": given, "_meta": {SUBSCRIPTION: "s"}}
        acknowledged = Notification("notifications/subscriptions/acknowledged", params)
        await self.stage.pipeline.from_server(conversation, acknowledged, self.stage.origin)
        return call


async def test_a_subscription_is_told_under_its_id() -> None:
    told = Subscribed("a")
    await told.listen(["tools"])
    await told.listed("tools", "a", "b")
    assert await told.change("b") == ["notifications/tools/list_changed"]
    assert told.notices[0][1] == {"_meta": {SUBSCRIPTION: "s"}}
    assert await told.change("a") == []


@pytest.mark.parametrize(
    ("asked", "agreed", "told_of"),
    [
        pytest.param(["tools"], ["tools"], True, id="agreed"),
        pytest.param(["tools"], [], False, id="not agreed"),
        pytest.param(["prompts"], ["prompts"], False, id="not asked"),
        pytest.param(["prompts"], ["prompts", "tools"], False, id="agreed and not asked"),
    ],
)
async def test_only_of_what_was_asked_and_agreed(
    asked: list[str], agreed: list[str], told_of: bool
) -> None:
    told = Subscribed("a")
    await told.listen(asked, agreed)
    await told.listed("tools", "a", "b")
    assert bool(await told.change("b")) is told_of


async def test_before_the_server_agrees_nothing_is_said() -> None:
    told = Subscribed("a")
    await told.listed("tools", "a", "b")
    told.alone()
    listen = modern("subscriptions/listen", "s", notifications={"toolsListChanged": True})
    assert isinstance(await told.stage.send(listen), Forward)
    told.stage.calls[-1].tell = told.tell
    assert await told.change("b") == []


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"notifications": {"toolsListChanged": True}},
        {"notifications": True, "_meta": {SUBSCRIPTION: "s"}},
        {"notifications": {"toolsListChanged": True}, "_meta": {SUBSCRIPTION: "another"}},
        {"notifications": {"toolsListChanged": "yes"}, "_meta": {SUBSCRIPTION: "s"}},
        {"notifications": {"toolsListChanged": True}, "_meta": True},
    ],
    ids=repr,
)
async def test_an_acknowledgement_that_says_nothing_is_none(params: JsonObject) -> None:
    told = Subscribed("a")
    await told.listen(["tools"], [])
    acknowledged = Notification("notifications/subscriptions/acknowledged", params)
    conversation = told.stage.conversation
    await told.stage.pipeline.from_server(conversation, acknowledged, told.stage.origin)
    await told.listed("tools", "a", "b")
    assert await told.change("b") == []


async def test_a_subscription_that_is_over_hears_nothing() -> None:
    told = Subscribed("a")
    call = await told.listen(["tools"])
    told.stage.pipeline.abandon(told.stage.conversation, call)
    await told.listed("tools", "a", "b")
    assert await told.change("b") == []


@pytest.mark.parametrize("other", ["actor", "caller"])
async def test_another_one_hears_nothing_of_it(other: str) -> None:
    told = Subscribed("a")
    await told.listed("tools", "a", "b", caller="hers")
    if other == "actor":
        told.stage.origin = Origin(BEA)
    await told.listen(["tools"], caller="hers" if other == "actor" else "his")
    assert await told.change("b") == []
    told.stage.origin = Origin(ANA)
    await told.listen(["tools"], caller="hers")
    assert await told.change("b") == ["notifications/tools/list_changed"]


async def test_without_a_session_the_handshake_revisions_have_no_way() -> None:
    told = Subscribed("a")
    told.alone()
    result = {"tools": [tool("a"), tool("b")]}
    await told.stage.exchange(Request(1, "tools/list"), result)
    await told.listen(["tools"])
    assert await told.change("b") == []


def _another(told: Told) -> Conversation:
    session = Session(MethodTable.of())
    conversation = Conversation(session, told.stage.conversation.server, "http")
    told.listeners(conversation, DECLARED)
    return conversation


async def _never(message: Notification) -> None:
    await asyncio.Event().wait()


async def _gone(message: Notification) -> None:
    raise ConnectionError("the client is gone")
