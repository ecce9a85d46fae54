"""Listings pass and are judged page by page; what they say is what later calls are judged by."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest

from sidecar.errors import DecisionError, DecisionInvalid, DecisionUnavailable, UpstreamError
from sidecar.policy.decision import Decision, Reason
from sidecar.policy.document import Task
from sidecar.policy.enforcement import Deliver, Delivery, Forward, Rules
from sidecar.protocol.jsonrpc import JsonObject, Message, Notification, Request, Response
from sidecar.protocol.session import VERSION_KEY
from tests.support.fakes import ALLOWED, DENIED, REVOKED, Stage, call_tool, modern, tool

SOON = 0.02
LIST = Request(7, "tools/list")
ITEMS = [tool("c"), tool("a"), tool("b")]


def shows(*names: str, mode: Literal["enforce", "shadow"] = "enforce") -> Decision:
    return Decision(allow=True, visible=frozenset(names), mode=mode)


async def page_of(stage: Stage, result: Any = None, request: Request = LIST) -> Delivery:
    return await stage.exchange(request, {"tools": ITEMS} if result is None else result)


def names_in(delivery: Delivery) -> list[str] | None:
    """The names that the client sees; None when the page came as it was."""
    assert isinstance(delivery, Deliver)
    if delivery.replaced is None:
        return None
    assert isinstance(delivery.replaced, Response)
    return [each["name"] for each in delivery.replaced.result["tools"]]


# ── What of a page is seen ────────────────────────────────────────────────────────────────────────


async def test_a_listing_is_let_through_before_anybody_is_asked() -> None:
    stage = Stage(DENIED)
    assert isinstance(await stage.send(LIST), Forward)
    assert stage.decider.questions == []
    assert stage.pipeline.in_flight == 1


async def test_the_page_is_asked_about_with_what_the_server_lists() -> None:
    stage = Stage(listing_deadline=1.5)
    await page_of(stage)
    (question,) = stage.decider.questions
    assert question["target"] == {"type": "listing", "name": "tools"}
    assert [each["target"]["name"] for each in question["listing"]["items"]] == ["c", "a", "b"]
    assert stage.decider.deadlines == [1.5]


SHADOW_DENIED = Decision(allow=False, reasons=(Reason("later"),), mode="shadow")
OBLIGED = Decision(allow=True, obligations=({"type": "mask_result"},))


@pytest.mark.parametrize(
    ("answer", "off", "allowed", "all_"),
    [
        pytest.param(ALLOWED, None, None, None, id="everything"),
        pytest.param(shows("b", "c"), ["c", "b"], ["c", "b"], None, id="some"),
        pytest.param(shows("a", "b", "c", "d"), None, None, None, id="all by name"),
        pytest.param(shows(), [], [], None, id="none by name"),
        pytest.param(DENIED, [], [], None, id="denied"),
        pytest.param(REVOKED, [], [], [], id="revoked"),
        pytest.param(OBLIGED, [], [], None, id="an obligation"),
        pytest.param(SHADOW_DENIED, [], None, None, id="denied in shadow"),
        pytest.param(shows("a", mode="shadow"), ["a"], None, None, id="some in shadow"),
    ],
)
async def test_a_page_shows_what_may_be_seen(
    answer: Decision, off: Any, allowed: Any, all_: Any
) -> None:
    for rules, expected in ((Rules(), off), (Rules("allowed"), allowed), (Rules("all"), all_)):
        stage = Stage(answer, rules=rules)
        assert names_in(await page_of(stage)) == expected
        assert stage.recorder.ends == [("tools/list", "success")]
        assert stage.pipeline.in_flight == 0


def by_page(question: JsonObject) -> Decision:
    names = [each["target"]["name"] for each in question["listing"]["items"]]
    return shows("a") if "x" in names else ALLOWED


async def test_each_page_is_judged_for_itself() -> None:
    stage = Stage(by_page)
    first = await page_of(stage, {"tools": [tool("a"), tool("x")], "nextCursor": "2"})
    second = await page_of(stage, {"tools": [tool("b")]}, Request(8, "tools/list", {"cursor": "2"}))
    assert names_in(first) == ["a"]
    assert names_in(second) is None
    assert isinstance(first, Deliver)
    assert isinstance(first.replaced, Response)
    assert first.replaced.result["nextCursor"] == "2"
    assert len(stage.decider.questions) == 2


@pytest.mark.parametrize(
    ("request_", "result", "shown"),
    [
        pytest.param(
            Request(7, "resources/list"),
            {"resources": [{"uri": "u:a"}, {"uri": "u:b"}]},
            {"resources": [{"uri": "u:b"}]},
            id="resources",
        ),
        pytest.param(
            Request(7, "resources/templates/list"),
            {"resourceTemplates": [{"uriTemplate": "u:{x}"}, {"uriTemplate": "u:b"}]},
            {"resourceTemplates": [{"uriTemplate": "u:b"}]},
            id="templates",
        ),
        pytest.param(
            Request(7, "prompts/list"),
            {"prompts": [{"name": "u:b"}, {"name": "p"}]},
            {"prompts": [{"name": "u:b"}]},
            id="prompts",
        ),
        pytest.param(
            Request(7, "tasks/list"),
            {"tasks": [{"taskId": "t"}, {"taskId": "u:b"}]},
            {"tasks": [{"taskId": "u:b"}]},
            id="tasks",
        ),
        pytest.param(
            modern("tools/list", 7),
            {"tools": ITEMS, "cacheScope": "public", "ttlMs": 9000, "resultType": "complete"},
            {"tools": [], "cacheScope": "private", "ttlMs": 2000, "resultType": "complete"},
            id="modern tools",
        ),
    ],
)
async def test_every_kind_of_listing_is_filtered(
    request_: Request, result: JsonObject, shown: JsonObject
) -> None:
    delivery = await page_of(Stage(shows("u:b")), result, request_)
    assert delivery == Deliver(Response(7, shown))


async def test_listed_tasks_are_judged_by_their_owners() -> None:
    stage = Stage()
    stage.conversation.server.tasks.remember("t1", Task("export", ("static|ana",)))
    await page_of(stage, {"tasks": [{"taskId": "t1"}]}, Request(7, "tasks/list"))
    (item,) = stage.decider.questions[0]["listing"]["items"]
    assert item["task"]["owner"] == ["static|ana"]


@pytest.mark.parametrize(
    ("answer", "retryable"),
    [
        pytest.param(DecisionUnavailable("x", detail="timeout"), True, id="late"),
        pytest.param(DecisionInvalid("x", detail="bad_response"), False, id="garbage"),
    ],
)
@pytest.mark.parametrize("shadow", ["off", "all"])
async def test_no_decision_about_a_listing_is_an_error_and_no_empty_list(
    answer: DecisionError, retryable: bool, shadow: Literal["off", "all"]
) -> None:
    stage = Stage(answer, rules=Rules(shadow))
    delivery = await page_of(stage)
    assert isinstance(delivery, Deliver)
    assert isinstance(delivery.replaced, Response)
    assert delivery.replaced.error is not None
    assert (delivery.replaced.id, delivery.replaced.error["code"]) == (7, -31503)
    assert delivery.replaced.error["data"]["retryable"] is retryable
    assert stage.recorder.verdicts[-1] == ("tools/list", "error", (answer.code,))
    assert stage.recorder.ends == [("tools/list", "policy_error")]
    assert stage.pipeline.in_flight == 0


async def test_a_page_that_can_not_be_written_down_is_withheld() -> None:
    stage = Stage()
    await stage.send(LIST)
    stage.recorder.broken = True
    delivery = await stage.deliver(Response(7, {"tools": ITEMS}))
    assert isinstance(delivery, Deliver)
    assert isinstance(delivery.replaced, Response)
    assert delivery.replaced.error is not None
    assert delivery.replaced.error["data"]["reasons"][0]["code"] == "audit_failed"
    assert stage.recorder.ends == [("tools/list", "policy_error")]


async def test_a_servers_error_has_nothing_to_hide() -> None:
    stage = Stage(DENIED)
    await stage.send(LIST)
    assert await stage.deliver(Response(7, error={"code": -32602, "message": "x"})) == Deliver()
    assert stage.decider.questions == []
    assert stage.recorder.ends == [("tools/list", "upstream_error")]


async def test_a_client_that_goes_away_while_its_page_is_judged_ends_the_call_once() -> None:
    stage = Stage()
    stage.decider.hold("tools")
    await stage.send(LIST)
    judging = asyncio.ensure_future(stage.deliver(Response(7, {"tools": ITEMS})))
    await asyncio.sleep(0)
    judging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await judging
    stage.pipeline.abandon(stage.conversation, stage.calls[0])
    assert stage.recorder.ends == [("tools/list", "cancelled")]
    assert stage.pipeline.in_flight == 0


# ── What calls are judged by ──────────────────────────────────────────────────────────────────────


def known(stage: Stage) -> list[Any]:
    return [each["tool"].get("known") for each in stage.decider.questions if "tool" in each]


async def test_a_listing_that_passes_makes_its_tools_known() -> None:
    stage = Stage()
    await page_of(stage)
    await stage.send(call_tool("a", 1))
    await stage.send(call_tool("z", 2))
    assert known(stage) == [True, False]
    assert stage.server.asked == []


async def test_what_the_actor_may_not_see_is_known_all_the_same() -> None:
    stage = Stage(shows())
    await page_of(stage)
    await stage.send(call_tool("a"))
    assert known(stage) == [True]


@pytest.mark.parametrize(
    "message", [call_tool("t"), modern("tools/call", name="t")], ids=["legacy", "modern"]
)
async def test_where_nothing_was_listed_the_sidecar_lists_for_itself(message: Request) -> None:
    stage = Stage(tools=[[tool("s")], [tool("t")]])
    await stage.send(message)
    assert known(stage) == [True]
    assert len(stage.server.asked) == 2
    envelope = (stage.server.asked[0].params or {}).get("_meta", {})
    assert (VERSION_KEY in envelope) == (VERSION_KEY in str(message.params))
    assert [each.operation.message.method for each in stage.recorder.decided_calls] == [
        "tools/call"
    ]


async def test_after_a_handshake_it_lists_when_the_client_is_ready() -> None:
    stage = Stage(tools=[[tool("t")]], catalog_wait=SOON)
    hello = {"protocolVersion": "2025-11-25"}
    await stage.exchange(Request(0, "initialize", hello), {"protocolVersion": "2025-11-25"})
    await stage.send(call_tool("t", 1))
    assert stage.server.asked == []
    await stage.send(Notification("notifications/initialized"))
    assert stage.conversation.session.initialized
    await stage.send(call_tool("t", 2))
    assert known(stage) == [None, True]
    assert len(stage.server.asked) == 1


async def test_a_call_behind_the_greeting_waits_for_it() -> None:
    stage = Stage(tools=[[tool("t")]])
    hello = {"protocolVersion": "2025-11-25"}
    await stage.exchange(Request(0, "initialize", hello), {"protocolVersion": "2025-11-25"})
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stage.send(Notification("notifications/initialized")))
        tasks.create_task(stage.send(call_tool("t", 2)))
    assert known(stage) == [True]
    assert stage.sent_methods[-2:] == ["notifications/initialized", "tools/call"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(Response("d", {"supportedVersions": []}), True, id="answered"),
        pytest.param(Response("d", error={"code": -32601, "message": "x"}), None, id="refused"),
        pytest.param(None, None, id="pending"),
    ],
)
async def test_after_discovery_it_lists_when_that_was_answered(
    answer: Response | None, expected: bool | None
) -> None:
    stage = Stage(tools=[[tool("t")]], catalog_wait=SOON)
    await stage.send(modern("server/discover", "d"))
    if answer is not None:
        await stage.deliver(answer)
    await stage.send(modern("tools/call", 2, name="t"))
    assert known(stage) == [expected]
    assert len(stage.server.asked) == (1 if expected else 0)


async def test_a_discovery_that_the_server_did_not_get_is_over() -> None:
    stage = Stage(tools=[[tool("t")]], catalog_wait=30)
    await stage.send(modern("server/discover", "d"))
    error = UpstreamError("gone", sent=False)
    stage.pipeline.upstream_failed(stage.conversation, stage.calls[0], error)
    async with asyncio.timeout(0.2):
        await stage.send(modern("tools/call", 2, name="t"))
    assert known(stage) == [None]


async def test_a_server_that_does_not_list_leaves_known_open_after_a_while() -> None:
    stage = Stage(tools=[[tool("t")]], catalog_wait=SOON)
    stage.server.held = asyncio.Event()
    assert isinstance(await stage.send(call_tool("t")), Forward)
    assert known(stage) == [None]
    assert stage.calls[0].tool_known is None
    stage.server.held.set()


async def test_when_the_tools_change_they_are_listed_again() -> None:
    stage = Stage(tools=[[tool("t")]])
    await stage.send(call_tool("t", 1))
    changed: Message = Notification("notifications/tools/list_changed")
    assert await stage.deliver(changed) == Deliver()
    stage.server.pages = [[tool("u")]]
    await stage.send(call_tool("t", 2))
    assert known(stage) == [True, False]
    assert len(stage.server.asked) == 2
