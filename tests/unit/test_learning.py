"""What a call to an unknown tool waits for, and how the sidecar asks for itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import pytest

from sidecar.conversation import Conversation, Server
from sidecar.errors import MalformedMessage, UpstreamError
from sidecar.learning import learn, observe
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.catalog import MAX_PAGES, read_tool
from sidecar.protocol.jsonrpc import JsonObject, Message, Notification, Request, Response
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
    talk.offer.schedules["tools"].due = 0.0


async def test_a_call_has_the_tools_listed_again_and_does_not_wait() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    await learn_for(talk, LEGACY, server)
    before = talk.server.catalog.look_up("t")
    server.pages, server.held = [[tool("t", description="Other.")]], asyncio.Event()
    due(talk)
    await learn_for(talk, LEGACY, server)
    assert talk.server.catalog.look_up("t") == before
    server.held.set()
    assert talk.offer.schedules["tools"].task is not None
    await talk.offer.schedules["tools"].task
    assert talk.server.catalog.look_up("t") != before
    assert len(server.asked) == 2


async def test_they_are_listed_again_once_in_a_while_and_first_a_while_after_the_first_call() -> (
    None
):
    server, talk = MemoryServer([[tool("t")]]), conversation()
    talk.server.catalog.observe(None, [read_tool(tool("t"))], None)
    await learn_for(talk, LEGACY, server)
    assert (server.asked, talk.offer.schedules["tools"].task) == ([], None)
    due(talk)
    server.held = asyncio.Event()
    for _ in range(3):
        await learn_for(talk, LEGACY, server)
        await asyncio.sleep(0)
        assert len(server.asked) == 1
        due(talk)
    server.held.set()
    assert talk.offer.schedules["tools"].task is not None
    await talk.offer.schedules["tools"].task


async def test_what_fails_is_tried_again_later_and_changes_nothing() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    await learn_for(talk, LEGACY, server)
    server.error = UpstreamError("gone", sent=False)
    due(talk)
    await learn_for(talk, LEGACY, server)
    assert talk.offer.schedules["tools"].task is not None
    await talk.offer.schedules["tools"].task
    assert await learn_for(talk, LEGACY, server) is True
    assert len(server.asked) == 2


async def test_a_server_that_is_not_greeted_yet_is_not_asked_again() -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation(protocol_version="2025-11-25")
    talk.server.catalog.observe(None, [read_tool(tool("t"))], None)
    due(talk)
    await learn_for(talk, LEGACY, server)
    assert talk.offer.schedules["tools"].task is None
    talk.greeted.set()
    await learn_for(talk, LEGACY, server)
    assert talk.offer.schedules["tools"].task is not None


@pytest.mark.parametrize("answered", [None, False, True])
async def test_a_server_that_may_not_know_the_era_is_not_asked_again(answered: bool | None) -> None:
    server, talk = MemoryServer([[tool("t")]]), conversation()
    talk.server.catalog.observe(None, [read_tool(tool("t"))], None)
    talk.discovering = asyncio.get_running_loop().create_future()
    if answered is not None:
        talk.discovering.set_result(answered)
    due(talk)
    await learn_for(talk, MODERN, server)
    assert (talk.offer.schedules["tools"].task is not None) is (answered is True)


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
        pytest.param({"code": -32603, "message": "not now"}, id="an error"),
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


# ── Prompts and resources ─────────────────────────────────────────────────────────────────────────


class Library:
    """A server with a page of each kind, that refuses the methods of `without` by a code."""

    LISTS: Mapping[str, JsonObject] = {
        "tools/list": {"tools": [tool("t")]},
        "prompts/list": {"prompts": [{"name": "p"}]},
        "resources/list": {"resources": [{"uri": "a://1"}]},
        "resources/templates/list": {"resourceTemplates": [{"uriTemplate": "b://{x}"}]},
    }

    def __init__(self, *without: str, code: int = -32601) -> None:
        self.without, self.code = without, code
        self.asked: list[str] = []

    async def ask(self, permitted: Permitted) -> Response:
        request = permitted.message
        assert isinstance(request, Request)
        self.asked.append(request.method)
        if request.method in self.without:
            return Response(request.id, error={"code": self.code, "message": "no"})
        return Response(request.id, result=self.LISTS[request.method])


def read(uri: str) -> Request:
    return Request(1, "resources/read", {"uri": uri})


def get(name: str) -> Request:
    return Request(1, "prompts/get", {"name": name})


PROMPTS, RESOURCES = ["prompts/list"], ["resources/list", "resources/templates/list"]


async def asks(talk: Conversation, library: Library, message: Request) -> tuple[bool | None, int]:
    """What is known then, and how often the server was asked for that."""
    before, operation = len(library.asked), receive(talk, message)
    await learn(talk, operation, library.ask, "0.1.0", 1)
    [target] = operation.targets
    return talk.offer.known(target.type, target.name), len(library.asked) - before


@pytest.mark.parametrize(
    ("message", "methods", "other"),
    [
        pytest.param(get("p"), PROMPTS, get("q"), id="a prompt"),
        pytest.param(read("a://1"), RESOURCES, read("a://2"), id="a resource"),
        pytest.param(read("b://1"), RESOURCES, read("a://2"), id="a template's resource"),
        pytest.param(call_tool("t"), ["tools/list"], call_tool("u"), id="a tool"),
    ],
)
async def test_its_listings_are_asked_for_once(
    message: Request, methods: list[str], other: Request
) -> None:
    talk, library = conversation(), Library()
    assert await asks(talk, library, message) == (True, len(methods))
    assert library.asked == methods
    assert await asks(talk, library, other) == (False, 0)
    assert await asks(talk, library, message) == (True, 0)


@pytest.mark.parametrize(
    ("message", "missing"),
    [
        pytest.param(get("p"), "prompts/list", id="a prompt"),
        pytest.param(read("a://1"), "resources/list", id="a resource"),
        pytest.param(call_tool("t"), "tools/list", id="a tool"),
    ],
)
async def test_a_server_without_the_method_is_not_waited_for_again(
    message: Request, missing: str
) -> None:
    talk, library = conversation(), Library(missing)
    known, asked = await asks(talk, library, message)
    assert (known, asked > 0) == (None, True)
    assert await asks(talk, library, message) == (None, 0)
    library.code = -32603
    talk.offer.forget(missing.partition("/")[0])
    for _ in range(2):
        known, asked = await asks(talk, library, message)
        assert (known, asked > 0) == (None, True)


async def test_a_session_whose_server_has_no_such_capability_does_not_ask() -> None:
    talk, library = conversation(capabilities={"prompts": {}}), Library()
    assert await asks(talk, library, read("a://1")) == (None, 0)
    assert await asks(talk, library, get("p")) == (True, 1)
    assert await asks(talk, library, call_tool("t")) == (True, 1)


async def test_a_tool_is_known_without_the_other_lists() -> None:
    talk, library = conversation(), Library(*PROMPTS, *RESOURCES)
    assert await asks(talk, library, call_tool("t")) == (True, 1)


@pytest.mark.parametrize(
    ("message", "kinds"),
    [
        pytest.param(get("p"), ["prompts"], id="a prompt"),
        pytest.param(read("a://1"), ["resources", "resource_templates"], id="a resource"),
    ],
)
async def test_what_is_due_is_listed_again_beside_the_request(
    message: Request, kinds: list[str]
) -> None:
    talk, library = conversation(), Library()
    await asks(talk, library, message)
    for kind in kinds:
        talk.offer.schedules[kind].due = 0.0
    assert await asks(talk, library, message) == (True, 0)
    tasks = [talk.offer.schedules[kind].task for kind in kinds]
    await asyncio.gather(*(each for each in tasks if each is not None))
    assert len(library.asked) == 2 * len(kinds)


async def test_each_caller_learns_what_is_theirs() -> None:
    server = Server("tickets")
    talks = [Conversation(Session(MethodTable.of()), server, "http", caller=each) for each in "ab"]
    first, second = MemoryServer([[tool("t")]]), MemoryServer([[tool("u")]])
    for talk, memory in zip(talks, (first, second), strict=True):
        await learn(talk, receive(talk, LEGACY), memory.ask, "0.1.0", 1)
    assert [talk.offer.known("tool", "t") for talk in talks] == [True, False]
    assert server.catalog.look_up("t").known is None
    assert (len(first.asked), len(second.asked)) == (1, 1)


# ── What passes by ────────────────────────────────────────────────────────────────────────────────


def passes(talk: Conversation, params: dict[str, Any], result: Any) -> None:
    operation = receive(talk, Request(1, "tools/list", params))
    observe(talk, operation, Response(1, result))


def known(talk: Conversation, names: str) -> list[bool | None]:
    return [talk.server.catalog.look_up(name).known for name in names]


def test_a_page_that_passes_is_taken_in() -> None:
    talk = conversation()
    passes(talk, {}, {"tools": [tool("a"), "junk"], "nextCursor": "2"})
    assert known(talk, "ab") == [True, None]
    passes(talk, {"cursor": "2"}, {"tools": [tool("b")]})
    assert known(talk, "abc") == [True, True, False]


@pytest.mark.parametrize("cursor", [5, 0, False, {}, [], ""], ids=repr)
def test_a_page_from_the_middle_is_not_taken_for_the_whole(cursor: Any) -> None:
    talk = conversation()
    passes(talk, {}, {"tools": [tool("a"), tool("b")]})
    passes(talk, {"cursor": cursor}, {"tools": [tool("b")]})
    assert known(talk, "ab") == [True, True]


def test_a_cursor_of_null_is_the_beginning() -> None:
    talk = conversation()
    passes(talk, {"cursor": None}, {"tools": []})
    assert talk.server.catalog.complete


def test_an_answer_that_is_an_error_is_no_page() -> None:
    talk = conversation()
    operation = receive(talk, Request(1, "tools/list"))
    observe(talk, operation, Response(1, error={"code": -32603, "message": "not now"}))
    assert known(talk, "a") == [None]
