"""What a call to an unknown tool waits for, and how the sidecar asks for itself."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from sidecar.conversation import Conversation, Server
from sidecar.errors import MalformedMessage, UpstreamError
from sidecar.learning import learn, observe
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.catalog import MAX_PAGES, Catalog, read_tool
from sidecar.protocol.jsonrpc import Message, Notification, Request, Response
from sidecar.protocol.methods import MODERN_REVISION, Direction, MethodTable
from sidecar.protocol.session import (
    CLIENT_CAPABILITIES_KEY,
    CLIENT_INFO_KEY,
    VERSION_KEY,
    Operation,
    Session,
)
from tests.support.fakes import MemoryServer, call_tool, modern, tool

SOON = 0.02
LEGACY, MODERN = call_tool("t"), modern("tools/call", name="t")
NOTHING = Response(1, {"tools": []})


def conversation(**state: Any) -> Conversation:
    return Conversation(Session(MethodTable.of(), **state), Server("tickets"), "stdio")


def receive(talk: Conversation, message: Message) -> Operation:
    return talk.session.receive(message, Direction.FROM_CLIENT)


async def learn_for(
    talk: Conversation, message: Message, server: MemoryServer, patience: float = 1
) -> bool | None:
    operation = receive(talk, message)
    await learn(talk, operation, server.ask, "0.1.0", patience)
    return talk.server.catalog.look_up("t").known


@pytest.mark.parametrize("message", [LEGACY, MODERN], ids=["legacy", "modern"])
async def test_all_pages_are_asked_for_before_the_first_call(message: Message) -> None:
    server = MemoryServer([[tool("a")], [], [tool("t")]])
    talk = conversation()
    assert await learn_for(talk, message, server) is True
    assert talk.server.catalog.complete
    assert [(each.params or {}).get("cursor") for each in server.asked] == [None, "1", "2"]


async def test_what_is_known_is_not_asked_for_again() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    for _ in range(3):
        await learn_for(talk, LEGACY, server)
        await learn_for(talk, call_tool("unknown"), server)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Request(1, "prompts/get", {"name": "t"}), id="a prompt"),
        pytest.param(Request(1, "tools/list"), id="a listing"),
        pytest.param(Request(1, "ping"), id="a ping"),
        pytest.param(Notification("notifications/initialized"), id="a notification"),
    ],
)
async def test_only_calls_wait_for_the_catalog(message: Message) -> None:
    server = MemoryServer([[tool("t")]])
    assert await learn_for(conversation(), message, server) is None
    assert server.asked == []


async def test_the_sidecar_asks_in_the_era_of_the_call() -> None:
    server = MemoryServer([[], []])
    await learn_for(conversation(), MODERN, server)
    assert [each.params for each in server.asked] == [
        {
            **({"cursor": cursor} if cursor else {}),
            "_meta": {
                VERSION_KEY: MODERN_REVISION,
                CLIENT_CAPABILITIES_KEY: {},
                CLIENT_INFO_KEY: {"name": "mcp-opa-sidecar", "version": "0.1.0"},
            },
        }
        for cursor in (None, "1")
    ]
    server = MemoryServer([[], []])
    await learn_for(conversation(), LEGACY, server)
    assert [each.params for each in server.asked] == [{}, {"cursor": "1"}]


async def test_its_ids_are_text_that_no_client_uses() -> None:
    ids = []
    for _ in range(20):
        server = MemoryServer([[], []])
        await learn_for(conversation(), LEGACY, server)
        ids += [str(each.id) for each in server.asked]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"mcp-opa-sidecar-[0-9a-f]{16}-\d+", each) for each in ids)


async def test_calls_that_wait_at_the_same_time_ask_once() -> None:
    server, talk = MemoryServer([[tool("t")]], held=asyncio.Event()), conversation()
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(learn_for(talk, LEGACY, server)) for _ in range(5)]
        await asyncio.sleep(0)
        assert server.held is not None
        server.held.set()
    assert [each.result() for each in waiting] == [True] * 5
    assert len(server.asked) == 1


async def test_one_that_goes_away_takes_the_listing_from_nobody() -> None:
    server, talk = MemoryServer([[tool("t")]], held=asyncio.Event()), conversation()
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(learn_for(talk, LEGACY, server))
        second = tasks.create_task(learn_for(talk, LEGACY, server))
        await asyncio.sleep(SOON)
        first.cancel()
        await asyncio.sleep(0)
        assert server.held is not None
        server.held.set()
    assert second.result() is True
    assert first.cancelled()


# ── Again ─────────────────────────────────────────────────────────────────────────────────────────


def due(talk: Conversation) -> None:
    talk.server.due = 0.0


async def test_a_call_has_the_tools_listed_again_and_does_not_wait() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    await learn_for(talk, LEGACY, server)
    before = talk.server.catalog.look_up("t")
    server.pages, server.held = [[tool("t", description="Other.")]], asyncio.Event()
    due(talk)
    await learn_for(talk, LEGACY, server)
    assert talk.server.catalog.look_up("t") == before
    server.held.set()
    assert talk.server.learning is not None
    await talk.server.learning
    assert talk.server.catalog.look_up("t") != before
    assert len(server.asked) == 2


async def test_they_are_listed_again_once_in_a_while_and_first_a_while_after_the_first_call() -> (
    None
):
    server, talk = MemoryServer([[tool("t")]]), conversation()
    talk.server.catalog.observe(None, [read_tool(tool("t"))], None)
    await learn_for(talk, LEGACY, server)
    assert (server.asked, talk.server.learning) == ([], None)
    due(talk)
    server.held = asyncio.Event()
    for _ in range(3):
        await learn_for(talk, LEGACY, server)
        await asyncio.sleep(0)
        assert len(server.asked) == 1
        due(talk)
    server.held.set()
    assert talk.server.learning is not None
    await talk.server.learning


async def test_what_fails_is_tried_again_later_and_changes_nothing() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    await learn_for(talk, LEGACY, server)
    server.error = UpstreamError("gone", sent=False)
    due(talk)
    await learn_for(talk, LEGACY, server)
    assert talk.server.learning is not None
    await talk.server.learning
    assert await learn_for(talk, LEGACY, server) is True
    assert len(server.asked) == 2


async def test_a_server_that_is_not_greeted_yet_is_not_asked_again() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation(protocol_version="2025-11-25")
    talk.server.catalog.observe(None, [read_tool(tool("t"))], None)
    due(talk)
    await learn_for(talk, LEGACY, server)
    assert talk.server.learning is None
    talk.greeted.set()
    await learn_for(talk, LEGACY, server)
    assert talk.server.learning is not None


@pytest.mark.parametrize("answered", [None, False, True])
async def test_a_server_that_may_not_know_the_era_is_not_asked_again(answered: bool | None) -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    talk.server.catalog.observe(None, [read_tool(tool("t"))], None)
    talk.discovering = asyncio.get_running_loop().create_future()
    if answered is not None:
        talk.discovering.set_result(answered)
    due(talk)
    await learn_for(talk, MODERN, server)
    assert (talk.server.learning is not None) is (answered is True)


# ── When it may ask ───────────────────────────────────────────────────────────────────────────────


async def test_after_a_handshake_it_waits_until_the_client_is_ready() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation(protocol_version="2025-11-25")
    assert await learn_for(talk, LEGACY, server, SOON) is None
    assert server.asked == []
    talk.greeted.set()
    assert await learn_for(talk, LEGACY, server) is True


async def test_without_a_handshake_there_is_nothing_to_wait_for() -> None:
    server = MemoryServer([[tool("t")]])
    assert await learn_for(conversation(), LEGACY, server) is True


async def test_a_single_exchange_has_no_handshake_to_wait_for() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation(protocol_version="2025-11-25")
    talk.lasting = False
    assert await learn_for(talk, LEGACY, server) is True


async def test_while_discovery_is_pending_it_waits() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    talk.discovering = asyncio.get_running_loop().create_future()
    assert await learn_for(talk, MODERN, server, SOON) is None
    assert server.asked == []
    talk.discovering.set_result(True)
    assert await learn_for(talk, MODERN, server) is True


async def test_after_a_failed_discovery_it_does_not_ask() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    talk.discovering = asyncio.get_running_loop().create_future()
    talk.discovering.set_result(False)
    assert await learn_for(talk, MODERN, server) is None
    assert server.asked == []


# ── What it can not learn ─────────────────────────────────────────────────────────────────────────


async def test_patience_ends_and_the_listing_goes_on() -> None:
    server, talk = MemoryServer([[tool("t")]], held=asyncio.Event()), conversation()
    assert await learn_for(talk, LEGACY, server, SOON) is None
    assert await learn_for(talk, LEGACY, server, SOON) is None
    assert len(server.asked) == 1
    assert server.held is not None
    server.held.set()
    assert await learn_for(talk, LEGACY, server) is True


@pytest.mark.parametrize(
    "error",
    [
        pytest.param({"code": -32601, "message": "no tools here"}, id="an error"),
        pytest.param({"code": -32600}, id="an error without message"),
        pytest.param(UpstreamError("gone", sent=True), id="no server"),
        pytest.param(MalformedMessage("the answer is not JSON"), id="no message"),
    ],
)
async def test_a_server_that_does_not_list_leaves_everything_open(error: Any) -> None:
    server, talk = MemoryServer([[tool("t")]], error=error), conversation()
    assert await learn_for(talk, LEGACY, server) is None
    assert not talk.server.catalog.complete
    server.error = None
    assert await learn_for(talk, LEGACY, server) is True


async def test_a_conversation_that_ends_meanwhile_ends_no_other() -> None:
    talk = conversation()

    async def ask(permitted: Permitted) -> Response:
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        answer.cancel()
        return await answer

    operation = receive(talk, LEGACY)
    await learn(talk, operation, ask, "0.1.0", 1)
    assert talk.server.catalog.look_up("t").known is None


async def test_a_listing_without_end_is_given_up() -> None:
    server, talk = MemoryServer([[]] * (MAX_PAGES + 5)), conversation()
    assert await learn_for(talk, LEGACY, server) is None
    assert len(server.asked) == MAX_PAGES


# ── What passes by ────────────────────────────────────────────────────────────────────────────────


def test_a_page_that_passes_is_taken_in() -> None:
    catalog = Catalog()
    page = Response(1, {"tools": [tool("a"), "junk"], "nextCursor": "2"})
    assert observe(catalog, {}, page) == "2"
    assert observe(catalog, {"cursor": "2"}, Response(2, {"tools": [tool("b")]})) is None
    assert [catalog.look_up(name).known for name in "abc"] == [True, True, False]


@pytest.mark.parametrize("cursor", [5, 0, False, {}, [], ""], ids=repr)
def test_a_page_from_the_middle_is_not_taken_for_the_whole(cursor: Any) -> None:
    catalog = Catalog()
    observe(catalog, {}, Response(1, {"tools": [tool("a"), tool("b")]}))
    observe(catalog, {"cursor": cursor}, Response(2, {"tools": [tool("b")]}))
    assert [catalog.look_up(name).known for name in "ab"] == [True, True]


def test_a_cursor_of_null_is_the_beginning() -> None:
    catalog = Catalog()
    observe(catalog, {"cursor": None}, NOTHING)
    assert catalog.complete
