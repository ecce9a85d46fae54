"""`mcp-sidecar stdio`: a wrapped server behaves like one that is not, until somebody says no."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from mcp import Client

from tests.support import client as clients
from tests.support.client import ERAS, LEGACY, MODERN, error_of
from tests.support.processes import (
    ADMIN,
    ALLOW_ALL,
    STARTER,
    Process,
    alive,
    descendants,
    desk,
    done,
    held,
    holds_no_more,
    patient,
    running,
    sidecar,
    wait_for_line,
    wait_ready,
    wait_until,
)

ANA = ("--policy", STARTER, "--actor", "human:ana")
TICKET = {"id": 4711}


class Wrapped:
    """A ticket desk behind a sidecar, for the official client."""

    def __init__(self, folder: Path, opa: Path) -> None:
        self.log, self.errors, self.hold = folder / "log", folder / "stderr", folder / "hold"
        self.env = patient(opa)

    def open(self, *options: str | Path, mode: str = MODERN) -> AbstractAsyncContextManager[Client]:
        server = desk(self.log, "--hold", str(self.hold))
        command = [*sidecar("stdio", *(options or ANA), "--"), *server]
        return clients.over_stdio(command, mode, env=self.env, errors=self.errors)


@pytest.fixture
def wrapped(tmp_path: Path, opa_bin: Path) -> Iterator[Wrapped]:
    wrapped = Wrapped(tmp_path, opa_bin)
    yield wrapped
    if wrapped.errors.exists():
        print(wrapped.errors.read_text(encoding="utf-8"))  # shown when the test failed


@pytest.fixture
def env(opa_bin: Path) -> dict[str, str]:
    return patient(opa_bin)


def python(program: str) -> list[str]:
    """A server that is no MCP server at all."""
    return [sys.executable, "-c", program]


# ── The life of a wrapped server ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", [0, 7, 125])
def test_the_exit_code_is_the_servers(env: dict[str, str], code: int) -> None:
    server = python(f"raise SystemExit({code})")
    with Process([*sidecar("stdio", *ANA, "--"), *server], env=env, pipes=True) as process:
        assert process.wait() == code


def test_a_server_that_a_signal_ended_has_the_exit_code_of_a_shell(env: dict[str, str]) -> None:
    server = python("import os; os.kill(os.getpid(), 9)")
    with Process([*sidecar("stdio", *ANA, "--"), *server], env=env, pipes=True) as process:
        assert process.wait() == 128 + signal.SIGKILL


def test_a_command_that_is_not_there_is_a_usage_error(env: dict[str, str]) -> None:
    with Process(sidecar("stdio", *ANA, "--", "no-such-server"), env=env, pipes=True) as process:
        assert process.wait() == 125
        assert "no-such-server" in process.tail()


def test_a_policy_that_does_not_compile_is_no_start(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "broken.rego").write_text("package mcp.custom\n\nallow if {", encoding="utf-8")
    started = tmp_path / "started"
    server = python(f"open({str(started)!r}, 'w')")
    command = sidecar("stdio", "--policy", tmp_path, "--", *server)
    with Process(command, env=env, pipes=True) as process:
        assert process.wait() == 126
        assert "broken.rego" in process.tail()
    assert not started.exists()


def test_stdout_is_for_mcp_alone_and_stderr_for_logs_and_for_the_server(
    env: dict[str, str],
) -> None:
    server = python("import sys; print('the server says hello', file=sys.stderr)")
    with Process([*sidecar("stdio", *ANA, "--"), *server], env=env, pipes=True) as process:
        assert process.wait() == 0
        assert process.stdout.read() == b""
        assert "the server says hello" in process.lines
        logs = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert logs
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in logs)


async def test_nothing_is_left_when_the_client_has_gone(wrapped: Wrapped) -> None:
    async with wrapped.open() as client:
        await client.call_tool("get_ticket", TICKET)
        pid = running("sidecar")
        family = [pid, *descendants(pid)]
        assert len(family) >= 3  # the sidecar, OPA and the server
    assert [each for each in family if alive(each)] == []


async def test_nothing_outlives_a_sidecar_that_was_killed(wrapped: Wrapped) -> None:
    async with wrapped.open() as client:
        await client.call_tool("get_ticket", TICKET)
        pid = running("sidecar")
        family = [pid, *descendants(pid)]
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(
            wait_until, lambda: not any(map(alive, family)), f"{family} have ended"
        )


@pytest.mark.parametrize("mode", ERAS)
async def test_sigterm_lets_a_call_finish(wrapped: Wrapped, mode: str) -> None:
    wrapped.hold.touch()
    async with wrapped.open(mode=mode) as client:
        await client.list_tools()  # else the client would, within its call
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await asyncio.to_thread(wait_until, lambda: done(wrapped.log), "the call has arrived")
        pid = running("sidecar")
        os.kill(pid, signal.SIGTERM)
        assert not call.done()
        wrapped.hold.unlink()
        result = await call
        await asyncio.to_thread(wait_until, lambda: not alive(pid), "the sidecar has ended")
    assert result.structured_content is not None
    assert result.structured_content["id"] == TICKET["id"]
    assert done(wrapped.log) == ["get_ticket"]


# ── Traffic ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_that_asks_for_the_era_gets_the_newer_one(wrapped: Wrapped) -> None:
    async with wrapped.open(mode="auto") as client:
        assert client.protocol_version == MODERN
        await client.call_tool("get_ticket", TICKET)
    assert done(wrapped.log) == ["get_ticket"]


@pytest.mark.parametrize("mode", ERAS)
async def test_calls_at_the_same_time_get_their_own_answers(wrapped: Wrapped, mode: str) -> None:
    async with wrapped.open(mode=mode) as client, asyncio.TaskGroup() as group:
        created = [
            group.create_task(client.call_tool("create_ticket", {"title": f"No. {number}"}))
            for number in range(20)
        ]
        denied = [
            group.create_task(error_of(client.call_tool("delete_ticket", {"id": number})))
            for number in range(20)
        ]
    titles = [task.result().structured_content["title"] for task in created]
    assert titles == [f"No. {number}" for number in range(20)]
    assert {task.result().code for task in denied} == {-31403}
    assert done(wrapped.log) == ["create_ticket"] * 20


@pytest.mark.parametrize("mode", ERAS)
async def test_a_cancelled_call_is_cancelled_in_the_server(wrapped: Wrapped, mode: str) -> None:
    wrapped.hold.touch()
    async with wrapped.open(mode=mode) as client:
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await asyncio.to_thread(wait_until, lambda: done(wrapped.log), "the call has arrived")
        call.cancel()
        await asyncio.to_thread(
            wait_until, lambda: "cancelled get_ticket" in done(wrapped.log), "it was cancelled"
        )
        wrapped.hold.unlink()
        assert not (await client.call_tool("get_ticket", TICKET)).is_error


async def test_a_hundred_calls_leave_nothing_behind(wrapped: Wrapped) -> None:
    async with wrapped.open() as client:
        await _some_of_everything(client)
        pid = running("sidecar")
        before = held(pid)
        for _ in range(25):
            await _some_of_everything(client)
        assert holds_no_more(pid, before)


async def _some_of_everything(client: Client) -> None:
    await clients.tools_of(client)
    await client.call_tool("get_ticket", TICKET)
    await error_of(client.call_tool("delete_ticket", TICKET))
    await error_of(clients.ask(client, "tickets/purge"))


async def test_the_admin_port_is_there_when_it_is_asked_for(wrapped: Wrapped) -> None:
    async with wrapped.open(*ANA, "--admin", "127.0.0.1:0", mode=LEGACY) as client:
        admin = wait_for_line(wrapped.errors, ADMIN)[1]
        await asyncio.to_thread(wait_ready, admin)
        assert not (await client.call_tool("get_ticket", TICKET)).is_error


async def test_an_actor_that_nobody_named_is_unknown(wrapped: Wrapped) -> None:
    async with wrapped.open("--policy", STARTER) as client:
        error = await error_of(client.call_tool("get_ticket", TICKET))
    assert clients.codes(error)[0] == "unknown_actor"
    assert done(wrapped.log) == []


async def test_a_policy_that_allows_all_leaves_the_server_to_itself(wrapped: Wrapped) -> None:
    async with wrapped.open("--policy", ALLOW_ALL) as client:
        result = await client.call_tool("export_all", {})
        unknown = await client.call_tool("drop_tables", {})
    assert not result.is_error
    assert unknown.is_error
    assert "Unknown tool" in clients.text_of(unknown)
    assert done(wrapped.log) == ["export_all", "drop_tables"]
