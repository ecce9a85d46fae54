"""`mcp-sidecar stdio --upstream URL`: a client that knows pipes alone, and a server behind HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path

import pytest
from mcp import Client

from tests.support import client as clients
from tests.support.client import ERAS, LEGACY, MODERN, error_of, over_http, over_stdio
from tests.support.processes import (
    ALLOW_ALL,
    STARTER,
    Process,
    Served,
    done,
    executed,
    held,
    patient,
    running,
    sidecar,
    ticket_desk,
    wait_until,
)

ANA = ("--policy", STARTER, "--actor", "human:ana")
TICKET = {"id": 4711}
PINNED = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")


class Bridged:
    """A ticket desk over HTTP, and sidecars that put it on a pipe."""

    def __init__(self, folder: Path, opa: Path, stack: ExitStack) -> None:
        self.log, self.hold, self.errors = folder / "log", folder / "hold", folder / "stderr"
        self.env, self._stack = patient(opa), stack

    def start(self, *arguments: str) -> Served:
        """The server."""
        started = ticket_desk(self.log, "--hold", str(self.hold), *arguments)
        return self._stack.enter_context(started)

    def open(
        self, server: Served, mode: str = MODERN, options: tuple[str | Path, ...] = ANA
    ) -> AbstractAsyncContextManager[Client]:
        """The official client of a sidecar."""
        command = sidecar("stdio", *options, "--upstream", server.url)
        return over_stdio(command, mode, env=self.env, errors=self.errors)


@pytest.fixture
def bridged(tmp_path: Path, opa_bin: Path) -> Iterator[Bridged]:
    with ExitStack() as stack:
        bridged = Bridged(tmp_path, opa_bin, stack)
        yield bridged
        if bridged.errors.exists():
            print(bridged.errors.read_text(encoding="utf-8"))  # shown when the test failed


async def _arrived(bridged: Bridged, what: str = "get_ticket") -> None:
    await asyncio.to_thread(wait_until, lambda: what in done(bridged.log), f"{what} arrived")


# ── Revisions ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("version", "answers"),
    [
        *(pytest.param(each, (), id=f"{each} sse") for each in (*PINNED, "auto", MODERN)),
        *(pytest.param(each, ("--json",), id=f"{each} json") for each in (PINNED[-1], MODERN)),
    ],
)
async def test_what_a_client_gets_is_what_it_gets_over_http(
    bridged: Bridged, monkeypatch: pytest.MonkeyPatch, version: str, answers: tuple[str, ...]
) -> None:
    mode = version if version in ("auto", MODERN) else LEGACY
    if mode == LEGACY:
        monkeypatch.setattr("mcp.client.session.LATEST_HANDSHAKE_VERSION", version)
    server = bridged.start(*answers)
    async with over_http(server.url, mode) as client:
        negotiated = client.protocol_version
        direct = [each.name for each in (await client.list_tools()).tools]
        unknown = await client.call_tool("get_ticket", {"id": 1})
    async with bridged.open(server, mode) as client:
        assert client.protocol_version == negotiated
        assert await clients.tools_of(client) == direct[:4]  # the fifth is nothing for Ana
        result = await client.call_tool("get_ticket", TICKET)
        assert result.structured_content is not None
        assert result.structured_content["id"] == TICKET["id"]
        error = await error_of(client.call_tool("delete_ticket", TICKET))
        assert error.code == -31403
        failed = await client.call_tool("get_ticket", {"id": 1})
        assert failed.is_error
        assert clients.text_of(failed) == clients.text_of(unknown)
    assert negotiated == (version if mode == LEGACY else MODERN)
    assert "delete_ticket" not in done(bridged.log)


async def test_a_policy_that_allows_all_leaves_the_server_to_itself(bridged: Bridged) -> None:
    options = ("--policy", ALLOW_ALL)
    async with bridged.open(bridged.start(), options=options) as client:
        result = await client.call_tool("export_all", {})
        unknown = await client.call_tool("drop_tables", {})
    assert not result.is_error
    assert "Unknown tool" in clients.text_of(unknown)


# ── Traffic ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ERAS)
async def test_a_cancelled_call_is_cancelled_in_the_server(bridged: Bridged, mode: str) -> None:
    bridged.hold.touch()
    async with bridged.open(bridged.start(), mode) as client:
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await _arrived(bridged)
        call.cancel()
        await asyncio.wait_for(_arrived(bridged, "cancelled get_ticket"), 5)
        bridged.hold.unlink()
        assert not (await client.call_tool("get_ticket", TICKET)).is_error


@pytest.mark.parametrize("mode", ERAS)
async def test_fifty_calls_at_once_get_their_own_answers(bridged: Bridged, mode: str) -> None:
    async with bridged.open(bridged.start(), mode) as client:
        await client.list_tools()
        async with asyncio.TaskGroup() as group:
            created = [
                group.create_task(client.call_tool("create_ticket", {"title": f"No. {number}"}))
                for number in range(50)
            ]
            denied = [
                group.create_task(error_of(client.call_tool("delete_ticket", {"id": number})))
                for number in range(20)
            ]
    titles = [task.result().structured_content["title"] for task in created]
    assert titles == [f"No. {number}" for number in range(50)]
    assert {task.result().code for task in denied} == {-31403}
    assert sorted(each["arguments"]["title"] for each in executed(bridged.log)) == sorted(titles)


async def test_a_server_that_is_down_is_an_error_and_may_come_back(bridged: Bridged) -> None:
    with ticket_desk(bridged.log) as server:
        port = server.url.rpartition(":")[2].partition("/")[0]
        async with bridged.open(server) as client:
            await client.list_tools()
            server.process.stop()
            for _ in range(2):
                error = await error_of(client.call_tool("get_ticket", TICKET))
                assert error.code == -31502
                assert "not executed" in error.data["reasons"][0]["message"]
            bridged.start("--port", port)
            assert not (await client.call_tool("get_ticket", TICKET)).is_error
    assert done(bridged.log) == ["get_ticket"]


async def test_a_session_does_not_outlive_its_server(bridged: Bridged) -> None:
    with ticket_desk(bridged.log) as server:
        port = server.url.rpartition(":")[2].partition("/")[0]
        async with bridged.open(server, LEGACY) as client:
            assert not (await client.call_tool("get_ticket", TICKET)).is_error
            server.process.stop()
            down = await error_of(client.call_tool("get_ticket", TICKET))
            bridged.start("--port", port)
            gone = [await error_of(client.call_tool("get_ticket", TICKET)) for _ in range(2)]
    assert down.code == -31502
    assert [each.code for each in gone] == [-31502, -31502]
    assert "the session is gone" in gone[1].data["reasons"][0]["message"]
    assert done(bridged.log) == ["get_ticket"]


# ── Its life ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ERAS)
async def test_sigterm_lets_a_call_finish(bridged: Bridged, mode: str) -> None:
    bridged.hold.touch()
    async with bridged.open(bridged.start(), mode) as client:
        await client.list_tools()  # else the client would, within its call
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await _arrived(bridged)
        os.kill(running("sidecar"), signal.SIGTERM)
        bridged.hold.unlink()
        assert not (await call).is_error


@pytest.mark.parametrize("mode", ERAS)
async def test_a_hundred_calls_leave_nothing_behind(bridged: Bridged, mode: str) -> None:
    async with bridged.open(bridged.start(), mode) as client:
        await _some_of_everything(client)
        pid = running("sidecar")
        before = held(pid)
        for _ in range(25):
            await _some_of_everything(client)
        await asyncio.to_thread(wait_until, lambda: held(pid).files <= before.files, "as before")
        assert held(pid).threads == before.threads


async def _some_of_everything(client: Client) -> None:
    await clients.tools_of(client)
    await client.call_tool("get_ticket", TICKET)
    await error_of(client.call_tool("delete_ticket", TICKET))
    await error_of(clients.ask(client, "tickets/purge"))


def test_a_child_and_an_address_are_one_server_too_many(bridged: Bridged) -> None:
    command = sidecar("stdio", *ANA, "--upstream", "http://127.0.0.1:1/mcp", "--", "python")
    with Process(command, env=bridged.env, pipes=True) as process:
        assert process.wait() == 125
        assert "two servers" in process.tail()


def test_the_help_names_both_kinds_of_servers(bridged: Bridged) -> None:
    with Process(sidecar("stdio", "--help"), env=bridged.env, pipes=True) as process:
        said = process.stdout.read().decode()
    assert "--upstream URL" in said
    assert "COMMAND" in said
