"""`mcp-sidecar http -- COMMAND`: a stdio server on Streamable HTTP, for the official client."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import (
    LEGACY,
    MODERN,
    ask,
    codes,
    error_of,
    over_http,
    over_stdio,
    text_of,
    tools_of,
)
from tests.support.processes import (
    LISTENING,
    STARTER,
    Process,
    Served,
    alive,
    bridge,
    descendants,
    desk,
    done,
    executed,
    held,
    patient,
    sidecar,
    wait_until,
)

ANA = ("--policy", STARTER, "--actor", "human:ana")
TICKET = {"id": 4711}
SHARED = {"MCP_SIDECAR_BRIDGE__SHARED": "true"}
HANDSHAKES = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")


class Bridged:
    """A ticket desk on stdio, behind sidecars that speak HTTP."""

    def __init__(self, folder: Path, opa: Path, stack: ExitStack) -> None:
        self.log, self.hold = folder / "log", folder / "hold"
        self.server = desk(self.log, "--hold", str(self.hold))
        self.env, self._stack = patient(opa), stack

    def serve(self, *options: str | Path, **settings: str) -> Served:
        """A sidecar."""
        started = bridge(self.server, *(options or ANA), env={**self.env, **settings})
        return self._stack.enter_context(started)


@pytest.fixture
def tickets(tmp_path: Path, opa_bin: Path) -> Iterator[Bridged]:
    with ExitStack() as stack:
        yield Bridged(tmp_path, opa_bin, stack)


async def until(condition: Callable[[], Any], what: str, timeout: float = 20.0) -> None:
    await asyncio.to_thread(wait_until, condition, what, timeout)


def servers(served: Served) -> list[int]:
    """The wrapped servers that run; the other child is OPA."""
    return [each for each in descendants(served.pid) if "ticket_desk" in _command(each)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


# ── Every revision ────────────────────────────────────────────────────────────────────────────────


async def _use(url: str, mode: str) -> str:
    """List, call, be denied, fail; the revision that was agreed on."""
    async with over_http(url, mode) as client:
        assert len(await tools_of(client)) == 4
        result = await client.call_tool("get_ticket", TICKET)
        assert result.structured_content is not None
        assert result.structured_content["id"] == TICKET["id"]
        denied = await error_of(client.call_tool("delete_ticket", TICKET))
        assert denied.code == -31403
        assert codes(denied) == ["not_granted"]
        failed = await client.call_tool("get_ticket", {"id": 1})
        assert failed.is_error
        assert "no ticket 1" in text_of(failed)
        assert (await error_of(ask(client, "tickets/purge"))).code == -32601
        return str(client.protocol_version)


@pytest.mark.parametrize("revision", HANDSHAKES)
async def test_each_handshake_revision_works_and_stays_what_it_is(
    tickets: Bridged, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp.client.session.LATEST_HANDSHAKE_VERSION", revision)
    served = tickets.serve()
    assert await _use(served.url, LEGACY) == revision
    async with over_stdio(tickets.server, LEGACY, env=tickets.env) as client:
        assert client.protocol_version == revision
    assert done(tickets.log) == ["get_ticket", "get_ticket"]


@pytest.mark.parametrize(
    ("mode", "settings", "revision"),
    [
        pytest.param("auto", {}, "2025-11-25", id="auto falls back to the handshake"),
        pytest.param("auto", SHARED, MODERN, id="auto is stateless where that is served"),
        pytest.param(MODERN, SHARED, MODERN, id="stateless"),
        pytest.param(LEGACY, SHARED, "2025-11-25", id="a handshake beside a shared server"),
    ],
)
async def test_clients_of_each_kind_are_served(
    tickets: Bridged, mode: str, settings: dict[str, str], revision: str
) -> None:
    assert await _use(tickets.serve(**settings).url, mode) == revision
    assert done(tickets.log) == ["get_ticket", "get_ticket"]


async def test_a_stateless_client_learns_which_revisions_there_are(tickets: Bridged) -> None:
    async with over_http(tickets.serve().url, MODERN) as client:
        error = await error_of(client.list_tools())
    assert error.code == -32022
    assert error.data == {"supported": list(HANDSHAKES), "requested": MODERN}
    assert not tickets.log.exists()


# ── Children ──────────────────────────────────────────────────────────────────────────────────────


async def test_two_sessions_have_two_servers_and_their_ends_are_theirs(tickets: Bridged) -> None:
    served = tickets.serve()
    async with over_http(served.url, LEGACY) as first:
        async with over_http(served.url, LEGACY) as second:
            for client in (first, second):
                await client.call_tool("create_ticket", {"title": "mine"})
            assert len(servers(served)) == 2
        await until(lambda: len(servers(served)) == 1, "the second server has ended")
        result = await first.call_tool("search_tickets", {"query": "mine"})
        assert result.structured_content is not None
        assert len(result.structured_content["tickets"]) == 1
    await until(lambda: not servers(served), "the first one has, too")
    pids = [each["pid"] for each in executed(tickets.log)]
    assert pids[0] == pids[2] != pids[1]


async def test_stateless_clients_share_one_server(tickets: Bridged) -> None:
    served = tickets.serve(**SHARED)

    async def one(number: int) -> None:
        async with over_http(served.url, MODERN) as client:
            title = f"No. {number}"
            result = await client.call_tool("create_ticket", {"title": title})
            assert result.structured_content is not None
            assert result.structured_content["title"] == title

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(one(number))
    assert len(servers(served)) == 1
    assert len({each["pid"] for each in executed(tickets.log)}) == 1


@pytest.mark.parametrize("mode", [LEGACY, MODERN])
async def test_a_server_that_dies_is_seen_by_who_waits_and_may_be_had_anew(
    tickets: Bridged, mode: str
) -> None:
    served = tickets.serve(**SHARED)
    tickets.hold.touch()
    async with over_http(served.url, mode) as client:
        await client.list_tools()
        call = asyncio.create_task(error_of(client.call_tool("get_ticket", TICKET)))
        await until(lambda: done(tickets.log), "the call has arrived")
        os.kill(executed(tickets.log)[0]["pid"], signal.SIGKILL)
        error = await call
        assert error.code == -31502
        assert "may have executed" in error.message
        tickets.hold.unlink()
        if mode == LEGACY:
            again = await error_of(client.call_tool("get_ticket", TICKET))
            assert again.message == "Session not found"
    async with over_http(served.url, mode) as client:
        assert not (await client.call_tool("get_ticket", TICKET)).is_error


async def test_of_too_many_sessions_an_unused_one_gives_way_and_else_nobody(
    tickets: Bridged,
) -> None:
    served = tickets.serve(MCP_SIDECAR_LIMITS__CHILDREN="1")
    async with over_http(served.url, LEGACY) as client:
        assert await tools_of(client)  # its stream is open: it is used

        async def another() -> None:
            async with over_http(served.url, LEGACY):
                pass

        error = await error_of(another())
        assert error.code == -31429
        assert error.data["retryable"] is True
        assert await tools_of(client)
        assert len(servers(served)) == 1


async def test_a_command_that_is_not_there_is_a_usage_error(tickets: Bridged) -> None:
    options = ("--listen", "127.0.0.1:0", "--admin", "off")
    command = sidecar("http", *ANA, *options, "--", "no-such-server", "--token", "s3cret")
    with Process(command, env=tickets.env) as process:
        assert process.wait() == 125
        assert "'no-such-server' can not be started" in process.tail()
        assert "s3cret" not in process.tail()


# ── Cancelling, and going away ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [LEGACY, MODERN])
async def test_a_cancelled_call_is_cancelled_in_the_server_within_a_second(
    tickets: Bridged, mode: str
) -> None:
    served = tickets.serve(**SHARED)
    tickets.hold.touch()
    async with over_http(served.url, mode) as client:
        await client.list_tools()
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await until(lambda: done(tickets.log), "the call has arrived")
        call.cancel()
        await until(lambda: "cancelled get_ticket" in done(tickets.log), "it was cancelled", 1.0)
        tickets.hold.unlink()
        assert not (await client.call_tool("get_ticket", TICKET)).is_error


@pytest.mark.parametrize("mode", [LEGACY, MODERN])
async def test_sigterm_lets_a_call_finish_and_ends_every_server(
    tickets: Bridged, mode: str
) -> None:
    served = tickets.serve(**SHARED)
    async with over_http(served.url, LEGACY) as other, over_http(served.url, mode) as client:
        await other.call_tool("get_ticket", TICKET)
        await client.list_tools()
        tickets.hold.touch()
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await until(lambda: len(done(tickets.log)) == 2, "the call has arrived")
        children = descendants(served.pid)
        assert len(servers(served)) == 2
        served.process.signal(signal.SIGTERM)
        await asyncio.to_thread(served.process.wait_for, "stopping")
        assert not call.done()
        tickets.hold.unlink()
        assert not (await call).is_error
    assert served.process.wait() == 0
    assert not [each for each in children if alive(each)]


async def test_sessions_come_and_go_and_leave_nothing_behind(tickets: Bridged) -> None:
    served = tickets.serve(**SHARED)

    async def some_of_everything() -> None:
        for mode in (LEGACY, MODERN):
            async with over_http(served.url, mode) as client:
                await client.list_tools()
                await client.call_tool("get_ticket", TICKET)
                await error_of(client.call_tool("delete_ticket", TICKET))

    await some_of_everything()
    seen = [held(served.pid)]

    def settled() -> bool:
        seen.append(held(served.pid))
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    await until(settled, "what is held stays the same", 40.0)
    for _ in range(5):
        await some_of_everything()
    await until(lambda: held(served.pid) == seen[-1], f"again {seen[-1]}", 40.0)


def test_it_says_where_it_listens_and_no_arguments(tickets: Bridged) -> None:
    served = tickets.serve(MCP_SIDECAR_BRIDGE__PATH="/tickets")
    assert served.url.endswith("/tickets")
    line = served.process.wait_for(LISTENING).string
    assert str(tickets.log) not in line
