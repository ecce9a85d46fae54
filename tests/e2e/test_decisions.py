"""What each actor can and cannot do, on both transports and in both eras, by the starter policy.

The client is the official one, the server is real, and its own log is the witness of what it did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mcp import Client

from tests.support import client as clients
from tests.support.client import LEGACY, MODERN, codes, error_of, tools_of
from tests.support.processes import (
    ALLOW_ALL,
    STARTER,
    Served,
    desk,
    done,
    http_sidecar,
    patient,
    sidecar,
    ticket_desk,
)
from tests.support.ticket_desk import HIDDEN_METHOD, HIDDEN_TOOL, LISTED

DENIED = -31403
NO_METHOD = -32601

WHO: dict[str, dict[str, Any] | None] = {
    "ana": {"type": "human", "id": "ana"},
    "reporting": {"type": "service", "id": "reporting"},
    "bot": {
        "type": "agent",
        "id": "support-bot",
        "on_behalf_of": {"type": "human", "id": "ana"},
    },
    "nobody": None,
}


class Http:
    """One ticket desk, and a sidecar in front of it for whoever comes."""

    def __init__(self, folder: Path, env: dict[str, str], stack: ExitStack) -> None:
        self.log, self.env, self._stack = folder / "log", env, stack
        self._desk = stack.enter_context(ticket_desk(self.log))
        self._sidecars: dict[tuple[str, ...], Served] = {}

    def sidecars(self) -> list[Served]:
        return list(self._sidecars.values())

    def open(self, arguments: list[str], mode: str) -> AbstractAsyncContextManager[Client]:
        key = tuple(arguments)
        if key not in self._sidecars:
            started = http_sidecar(self._desk.url, *arguments, env=self.env)
            self._sidecars[key] = self._stack.enter_context(started)
        return clients.over_http(self._sidecars[key].url, mode)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory, opa_bin: Path) -> Iterator[Http]:
    with ExitStack() as stack:
        yield Http(tmp_path_factory.mktemp("http"), patient(opa_bin), stack)


@dataclass
class Place:
    """A transport and an era to be tested."""

    transport: str
    mode: str
    log: Path
    env: dict[str, str]
    http: Http
    seen: int

    def executed(self) -> list[str]:
        """What the desk did in this test, by its own log."""
        return done(self.log)[self.seen :]

    def open(
        self, who: str, *options: str | Path, policy: Path = STARTER, **settings: Any
    ) -> AbstractAsyncContextManager[Client]:
        """The official client, with a sidecar between it and the ticket desk."""
        identity = {} if WHO[who] is None else {"identity": {"static": WHO[who]}}
        text = json.dumps({**identity, **settings})  # JSON is YAML
        file = self.log.parent / f"{sha256(text.encode()).hexdigest()[:12]}.yaml"
        file.write_text(text, encoding="utf-8")
        arguments = [str(each) for each in ("--policy", policy, "--config", file, *options)]
        if self.transport == "http":
            return self.http.open(arguments, self.mode)
        command = [*sidecar("stdio", *arguments, "--"), *desk(self.log)]
        errors = self.log.with_suffix(".stderr")
        return clients.over_stdio(command, self.mode, env=self.env, errors=errors)

    def said(self) -> str:
        """What the sidecars wrote to stderr."""
        if self.transport == "http":
            return "".join(
                f"{each.process}\n{each.process.tail()}" for each in self.http.sidecars()
            )
        file = self.log.with_suffix(".stderr")
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def direct(self) -> AbstractAsyncContextManager[Client]:
        """The official client at a ticket desk of its own, without a sidecar."""
        return clients.over_stdio(desk(self.log.with_suffix(".direct")), self.mode)


PLACES = [
    pytest.param((transport, mode), id=f"{transport}-{era}")
    for transport in ("stdio", "http")
    for mode, era in ((LEGACY, "legacy"), (MODERN, "modern"))
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, http: Http, tmp_path: Path) -> Iterator[Place]:
    """Every transport in every era."""
    transport, mode = request.param
    yield from _place(http, tmp_path, transport, mode)


@pytest.fixture(params=["stdio", "http"])
def modern(request: pytest.FixtureRequest, http: Http, tmp_path: Path) -> Iterator[Place]:
    """Every transport, for what does not depend on the era."""
    yield from _place(http, tmp_path, request.param, MODERN)


def _place(http: Http, folder: Path, transport: str, mode: str) -> Iterator[Place]:
    log = http.log if transport == "http" else folder / "log"
    place = Place(transport, mode, log, http.env, http, len(done(log)))
    yield place
    print(place.said())  # shown when the test failed


async def test_an_allowed_call_returns_what_the_server_returns(place: Place) -> None:
    async with place.direct() as client:
        plain = [await client.call_tool(*call) for call in READS]
    async with place.open("ana") as client:
        assert client.protocol_version == (MODERN if place.mode == MODERN else "2025-11-25")
        judged = [await client.call_tool(*call) for call in READS]
    assert [each.model_dump() for each in judged] == [each.model_dump() for each in plain]
    assert judged[0].structured_content == {"tickets": [KETTLE]}
    assert place.executed() == [name for name, _ in READS]


KETTLE = {"id": 4711, "title": "Refund for a broken kettle", "status": "open", "refunded": 0.0}
READS: list[tuple[str, dict[str, Any]]] = [
    ("search_tickets", {"query": "kettle"}),
    ("get_ticket", {"id": 4711}),
    ("get_ticket", {"id": 1}),
]


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_every_revision_with_a_handshake_is_judged(
    http: Http,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    version: str,
) -> None:
    monkeypatch.setattr("mcp.client.session.LATEST_HANDSHAKE_VERSION", version)
    (place,) = _place(http, tmp_path, transport, LEGACY)
    async with place.open("ana") as client:
        assert client.protocol_version == version
        assert await tools_of(client) == LISTED[:4]
        result = await client.call_tool("get_ticket", {"id": 4711})
        error = await error_of(client.call_tool("delete_ticket", {"id": 4711}))
    assert "kettle" in clients.text_of(result)
    assert (error.code, codes(error)) == (DENIED, ["not_granted"])
    assert place.executed() == ["get_ticket"]


@pytest.mark.parametrize(
    ("who", "tool", "arguments", "code"),
    [
        pytest.param("ana", "delete_ticket", {"id": 4711}, "not_granted", id="human"),
        pytest.param(
            "ana", "refund_ticket", {"id": 4711, "amount": 500}, "argument_not_allowed", id="amount"
        ),
        pytest.param("reporting", "create_ticket", {"title": "x"}, "not_granted", id="service"),
        pytest.param(
            "bot", "delete_ticket", {"id": 4711}, "not_granted_to_principal", id="agent-for-ana"
        ),
        pytest.param("nobody", "get_ticket", {"id": 4711}, "unknown_actor", id="unknown"),
    ],
)
async def test_a_denied_call_is_a_typed_error_and_is_not_executed(
    place: Place, who: str, tool: str, arguments: dict[str, Any], code: str
) -> None:
    async with place.open(who) as client:
        error = await error_of(client.call_tool(tool, arguments))
    assert error.code == DENIED
    assert codes(error)[0] == code
    assert UUID(error.data["decision_id"]).version == 7
    assert error.data["retryable"] is False
    assert error.data["policy_revision"]
    assert place.executed() == []


async def test_the_connection_outlives_a_denial(place: Place) -> None:
    async with place.open("ana") as client:
        await error_of(client.call_tool("delete_ticket", {"id": 4711}))
        result = await client.call_tool("create_ticket", {"title": "After a denial"})
    assert result.structured_content is not None
    assert result.structured_content["title"] == "After a denial"
    assert place.executed() == ["create_ticket"]


async def test_a_tool_that_is_not_listed_is_denied_though_the_server_has_it(place: Place) -> None:
    async with place.open("ana") as client:
        hidden = await error_of(client.call_tool(HIDDEN_TOOL, {}))
        missing = await error_of(client.call_tool("drop_tables", {}))
    assert (hidden.code, codes(hidden)[0]) == (DENIED, "unknown_tool")
    assert (missing.code, codes(missing)[0]) == (DENIED, "unknown_tool")
    assert place.executed() == []


async def test_an_unknown_method_is_denied_though_the_server_has_it(place: Place) -> None:
    async with place.direct() as client:
        await clients.ask(client, HIDDEN_METHOD)
    async with place.open("ana", policy=ALLOW_ALL) as client:
        error = await error_of(clients.ask(client, HIDDEN_METHOD))
        assert await tools_of(client) == LISTED
    assert error.code == NO_METHOD
    assert place.executed() == []


@pytest.mark.parametrize(
    ("who", "visible"),
    [
        pytest.param("ana", LISTED[:4], id="human"),
        pytest.param("reporting", LISTED[:2], id="service"),
        pytest.param("bot", [*LISTED[:2], "refund_ticket"], id="agent-for-ana"),
        pytest.param("nobody", [], id="unknown"),
    ],
)
async def test_a_listing_shows_each_actor_its_own_tools(
    place: Place, who: str, visible: list[str]
) -> None:
    async with place.open(who) as client:
        listing = await client.list_tools()
    assert [tool.name for tool in listing.tools] == visible
    if place.mode == MODERN:
        assert listing.cache_scope == "private"


async def test_a_tool_keeps_its_description_in_a_filtered_listing(place: Place) -> None:
    async with place.direct() as client:
        plain = {tool.name: tool for tool in (await client.list_tools()).tools}
    async with place.open("bot") as client:
        filtered = (await client.list_tools()).tools
    assert len(filtered) < len(plain)
    assert all(tool == plain[tool.name] for tool in filtered)


async def test_shadow_mode_executes_what_would_be_denied(modern: Place) -> None:
    async with modern.open("reporting", "--shadow") as client:
        result = await client.call_tool("create_ticket", {"title": "In the shadow"})
        assert await tools_of(client) == LISTED
        error = await error_of(clients.ask(client, HIDDEN_METHOD))
    assert not result.is_error
    assert error.code == NO_METHOD
    assert modern.executed() == ["create_ticket"]


async def test_a_denial_can_be_a_result_that_a_model_reads(place: Place) -> None:
    async with place.open("ana", enforcement={"denial": "result"}) as client:
        result = await client.call_tool("delete_ticket", {"id": 4711})
    assert result.is_error
    assert "not_granted" in clients.text_of(result)
    assert result.meta is not None
    assert result.meta["io.mcp-opa-sidecar/denial"]["reasons"][0]["code"] == "not_granted"
    assert place.executed() == []


async def test_messages_of_a_policy_can_be_kept_back(modern: Place) -> None:
    async with modern.open("ana", enforcement={"disclose": "codes"}) as client:
        error = await error_of(client.call_tool("delete_ticket", {"id": 4711}))
    assert error.data["reasons"] == [{"code": "not_granted"}]
    assert "ana" not in error.message
    assert modern.executed() == []


async def test_the_audit_has_each_decision_and_its_outcome_and_no_arguments(
    modern: Place, tmp_path: Path
) -> None:
    file = tmp_path / "audit.jsonl"
    async with modern.open("bot", "--audit", file) as client:
        await client.call_tool("search_tickets", {"query": "needle"})
        error = await error_of(client.call_tool("delete_ticket", {"id": 4711}))
    text = file.read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    calls = [each for each in records if each["method"] == "tools/call"]
    assert [(each["type"], each["targets"][0]["name"], each["decision"]) for each in calls] == [
        ("decision", "search_tickets", "allow"),
        ("outcome", "search_tickets", "allow"),
        ("decision", "delete_ticket", "deny"),
        ("outcome", "delete_ticket", "deny"),
    ]
    allowed, succeeded, denied, refused = calls
    assert allowed["decision_id"] == succeeded["decision_id"]
    assert denied["decision_id"] == refused["decision_id"] == error.data["decision_id"]
    assert (succeeded["outcome"], refused["outcome"]) == ("success", "denied")
    assert (allowed["rule"], allowed["owner"]) == ("bot-read", "support-team")
    assert [each["code"] for each in denied["reasons"]] == ["not_granted_to_principal"]
    assert [each["key"] for each in denied["chain"]] == ["static|support-bot", "static|ana"]
    assert allowed["policy_revision"] == denied["policy_revision"] == error.data["policy_revision"]
    assert allowed["arguments_digest"].startswith("sha256:")
    assert "needle" not in text
    assert modern.executed() == ["search_tickets"]


async def test_the_decision_is_written_before_anything_is_forwarded(
    modern: Place,
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no device here on which every write fails")
    async with modern.open("ana", "--audit", "/dev/full") as client:
        error = await error_of(client.call_tool("get_ticket", {"id": 4711}))
    assert codes(error) == ["audit_failed"]
    assert modern.executed() == []
