"""A policy that changes what clients see tells them so, where the protocol has a way.

The official client lists, hears of the change, lists again, and sees what the new policy shows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from tests.support.client import LEGACY, MODERN, over_http, over_sse, over_stdio, tools_of
from tests.support.offering_server import Offers
from tests.support.opa import write
from tests.support.processes import (
    LISTENING,
    Process,
    bridge,
    http_sidecar,
    patient,
    sidecar,
)

SOON = 20.0
"""Seconds in which a change of the policy is noticed, at the very latest."""

RULE = """package mcp.custom

allow contains {"rule": "listed", "any": true} if input.target.name in data.seen

allow contains {"rule": "streams", "any": true} if {
	input.target.type in {"stream", "subscription", "negotiation"}
}
"""
OFFER = {
    "tools": {"echo": "Says it.", "hold": "Keeps it."},
    "prompts": ["ask", "beg"],
    "resources": ["a://one", "a://two"],
    "templates": ["b://{x}", "c://{x}"],
}
ANNOUNCES = "--announces"
FIRST = ["echo", "ask", "a://one", "b://{x}"]


@dataclass
class Stage:
    """A policy, an offer, and sidecars before servers of every kind."""

    folder: Path
    env: dict[str, str]
    stack: ExitStack
    offers: Offers = field(init=False)

    def __post_init__(self) -> None:
        self.offers = Offers(self.folder)
        self.offers.set(nobody=OFFER)
        self.show(*FIRST)
        write(self.policy, {"custom.rego": RULE})

    @property
    def policy(self) -> Path:
        return self.folder / "policy"

    def show(self, *names: str, **more: Any) -> None:
        """Edit the policy: only these are allowed."""
        write(self.policy, {"data.yaml": json.dumps({"seen": names, **more})})

    @property
    def options(self) -> tuple[str | Path, ...]:
        return ("--policy", self.policy, "--actor", "human:ana")

    def server(self, transport: str, *arguments: str) -> str:
        command = self.offers.command("--transport", transport, *arguments)
        return self.stack.enter_context(Process(command)).wait_for(LISTENING)[1]

    def way(self, name: str, mode: str, ear: Ear) -> Any:
        """A client by one of the ways, and what it is told."""
        # What comes on a subscription comes to the handler as well.
        more: dict[str, Any] = {"message_handler": _handler(ear)} if mode == LEGACY else {}
        match name:
            case "stdio":
                said = [str(each) for each in self.options]
                command = self.offers.command(ANNOUNCES)
                whole = [*sidecar("stdio"), *said, "--", *command]
                return over_stdio(whole, mode, env=self.env, **more)
            case "http":
                upstream = self.server("http", ANNOUNCES)
                served = http_sidecar(upstream, *self.options, env=self.env)
                return over_http(self.stack.enter_context(served).url, mode, **more)
            case "sse":
                upstream = self.server("sse", ANNOUNCES)
                served = http_sidecar(upstream, *self.options, env=self.env)
                return over_sse(self.stack.enter_context(served).url, mode, **more)
            case "shared":
                (self.folder / "s.yaml").write_text("bridge: {shared: true}", encoding="utf-8")
                options = (*self.options, "--config", self.folder / "s.yaml")
                served = bridge(self.offers.command(ANNOUNCES), *options, env=self.env)
                return over_http(self.stack.enter_context(served).url, mode, **more)
            case "bridge":
                served = bridge(self.offers.command(ANNOUNCES), *self.options, env=self.env)
                return over_http(self.stack.enter_context(served).url, mode, **more)
            case _:
                raise AssertionError(name)


@pytest.fixture
def stage(tmp_path: Path, opa_bin: Path) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(tmp_path, patient(opa_bin), stack)


class Ear:
    """What a client was told, in order, as the names of the kinds."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self._news = asyncio.Event()

    def take(self, message: Any) -> None:
        method = getattr(message, "method", None) or getattr(
            getattr(message, "root", None), "method", None
        )
        if isinstance(method, str) and method.endswith("/list_changed"):
            self.add(method.split("/")[1])

    def add(self, family: str) -> None:
        self.heard.append(family)
        self._news.set()

    async def until(self, count: int) -> list[str]:
        async with asyncio.timeout(SOON):
            while len(self.heard) < count:
                self._news.clear()
                await self._news.wait()
        return self.heard


@asynccontextmanager
async def listening(client: Client, mode: str, ear: Ear, *wanted: str) -> AsyncIterator[None]:
    """While the client hears of changes; a session's own stream is the SDK's affair."""
    if mode == LEGACY:
        yield
        return
    families = wanted or ("tools", "prompts", "resources")
    asked: Any = {f"{each}_list_changed": True for each in families}
    async with client.listen(**asked) as notices:

        async def follow() -> None:
            async for event in notices:
                ear.add(type(event).__name__.removesuffix("ListChanged").lower())

        task = asyncio.ensure_future(follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


async def everything(client: Client) -> list[str]:
    """All that the client is shown, by name."""
    fresh: Any = {"cache_mode": "bypass"}
    tools, prompts = await tools_of(client), (await client.list_prompts(**fresh)).prompts
    resources = (await client.list_resources(**fresh)).resources
    templates = (await client.list_resource_templates(**fresh)).resource_templates
    uris = [str(each.uri) for each in resources]
    return [*tools, *(each.name for each in prompts), *uris, *(t.uri_template for t in templates)]


WAYS = [
    pytest.param("stdio", LEGACY, id="stdio, a session"),
    pytest.param("stdio", MODERN, id="stdio, stateless"),
    pytest.param("http", LEGACY, id="HTTP, a session"),
    pytest.param("http", MODERN, id="HTTP, stateless"),
    pytest.param("sse", LEGACY, id="HTTP+SSE"),
    pytest.param("bridge", LEGACY, id="a bridge, a session"),
    pytest.param("shared", MODERN, id="a shared bridge, stateless"),
]


@pytest.mark.parametrize(("name", "mode"), WAYS)
async def test_a_client_is_told_of_what_it_sees_now_and_of_nothing_else(
    stage: Stage, name: str, mode: str
) -> None:
    ear = Ear()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(stage.way(name, mode, ear))
        await stack.enter_async_context(listening(client, mode, ear))
        assert await everything(client) == FIRST

        stage.show("hold", *FIRST)
        assert await ear.until(1) == ["tools"]
        assert await tools_of(client) == ["echo", "hold"]

        # An edit that changes nothing for it, and then one that does: nothing comes between.
        stage.show("hold", *FIRST, other=["thing"])
        await _in_force(stage, client, "marker", *FIRST, "hold")
        stage.show("hold", "echo", "ask", "a://one", "c://{x}")
        assert await ear.until(2) == ["tools", "resources"]
        shown = await everything(client)
        assert shown == ["echo", "hold", "ask", "a://one", "c://{x}"]

        stage.show("hold", "echo", "beg", "a://one", "c://{x}")
        assert await ear.until(3) == ["tools", "resources", "prompts"]


async def _in_force(stage: Stage, client: Client, name: str, *seen: str) -> None:
    """Wait until a call tells that the last edit is in force: it allows a tool nobody lists."""
    stage.show(name, *seen)
    async with asyncio.timeout(SOON):
        while True:
            try:
                await client.call_tool(name, {})
                return
            except Exception:
                await asyncio.sleep(0.1)


async def test_who_has_not_listed_or_can_not_be_told_is_told_nothing(stage: Stage) -> None:
    urls = {name: stage.server("http", *more) for name, more in SERVERS.items()}
    upstreams = [{"name": name, "path": f"/{name}", "url": url} for name, url in urls.items()]
    (stage.folder / "s.json").write_text(json.dumps({"upstreams": upstreams}), encoding="utf-8")
    where = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    command = sidecar("http", *where, *stage.options, "--config", stage.folder / "s.json")
    base = stage.stack.enter_context(Process(command, env=stage.env)).wait_for(LISTENING)[1]
    paths = {"tools": "tells", "prompts": "tells", "nothing": "tells", "in vain": "silent"}
    ears = {name: Ear() for name in paths}
    async with AsyncExitStack() as stack:
        clients = {}
        for name, path in paths.items():
            url, told = f"{base.rpartition('/')[0]}/{path}", _handler(ears[name])
            connected = over_http(url, LEGACY, message_handler=told)
            clients[name] = await stack.enter_async_context(connected)
        await clients["prompts"].list_prompts()
        for turn, seen in enumerate((["hold"], ["echo"], ["hold"]), start=1):
            for name in ("tools", "in vain"):
                assert await tools_of(clients[name]) != seen
            stage.show(*seen)
            assert await ears["tools"].until(turn) == ["tools"] * turn
            assert await ears["prompts"].until(1) == ["prompts"]
    assert [ears[name].heard for name in ("nothing", "in vain")] == [[], []]


async def test_a_subscription_is_told_of_what_it_asks_for(stage: Stage) -> None:
    upstream = stage.server("http", ANNOUNCES)
    url = stage.stack.enter_context(http_sidecar(upstream, *stage.options, env=stage.env)).url
    both, prompts = Ear(), Ear()
    async with (
        over_http(url, MODERN) as client,
        over_http(url, MODERN) as other,
        listening(client, MODERN, both),
        listening(other, MODERN, prompts, "prompts"),
    ):
        assert await everything(client) == FIRST
        stage.show("hold", *FIRST[1:])
        await both.until(1)
        assert await tools_of(client) == ["hold"]
        stage.show("echo", "beg", *FIRST[2:])
        assert await prompts.until(1) == ["prompts"]
        assert sorted(await both.until(3)) == ["prompts", "tools", "tools"]


SERVERS: dict[str, tuple[str, ...]] = {"tells": (ANNOUNCES,), "silent": ()}


def _handler(ear: Ear) -> Callable[[Any], Awaitable[None]]:
    async def hear(message: Any) -> None:
        ear.take(message)

    return hear
