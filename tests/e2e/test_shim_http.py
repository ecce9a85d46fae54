"""`http --upstream unix-stdio:///PATH`: servers that a shim starts, for the official client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import puppet_server
from tests.support.client import (
    ERAS,
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
    ADMIN,
    ALLOW_ALL,
    LISTENING,
    STARTER,
    Process,
    Served,
    alive,
    desk,
    done,
    executed,
    get,
    held,
    patient,
    sidecar,
    wait_ready,
    wait_until,
)
from tests.support.shims import Shim, shim

ANA = ("--policy", STARTER, "--actor", "human:ana")
TICKET = {"id": 4711}
SHARED = {"MCP_SIDECAR_BRIDGE__SHARED": "true"}


class Shimmed:
    """A ticket desk behind a shim, and sidecars before that."""

    def __init__(self, folder: Path, opa: Path, stack: ExitStack) -> None:
        self.folder, self.log, self.hold = folder, folder / "log", folder / "hold"
        self.server = desk(self.log, "--hold", str(self.hold))
        self.env, self._stack = patient(opa), stack
        self.path = folder / "desk.sock"

    def shim(self, command: list[str] | None = None, *options: str) -> Shim:
        return self._stack.enter_context(shim(command or self.server, self.folder, *options))

    def serve(self, *options: str | Path, **settings: str) -> Served:
        """A sidecar, once it is ready."""
        served = self.start(*options, **settings)
        wait_ready(served.admin)
        return served

    def start(self, *options: str | Path, **settings: str) -> Served:
        """One that may never be."""
        where = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
        words = sidecar(
            "http", *(options or ANA), *where, "--upstream", f"unix-stdio://{self.path}"
        )
        process = self._stack.enter_context(Process(words, env={**self.env, **settings}))
        return Served(process, process.wait_for(LISTENING)[1], process.wait_for(ADMIN)[1])


@pytest.fixture
def tickets(tmp_path: Path, opa_bin: Path) -> Iterator[Shimmed]:
    with ExitStack() as stack:
        yield Shimmed(tmp_path, opa_bin, stack)


async def until(condition: Callable[[], Any], what: str, timeout: float = 20.0) -> None:
    await asyncio.to_thread(wait_until, condition, what, timeout)


def readyz(served: Served) -> tuple[int, Any]:
    status, body = get(f"{served.admin}/readyz")
    return status, json.loads(body)


# ── What clients get ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ERAS)
async def test_clients_get_what_the_policy_allows(tickets: Shimmed, mode: str) -> None:
    tickets.shim()
    async with over_http(tickets.serve(**SHARED).url, mode) as client:
        assert len(await tools_of(client)) == 4
        result = await client.call_tool("get_ticket", TICKET)
        assert result.structured_content is not None
        assert result.structured_content["id"] == TICKET["id"]
        denied = await error_of(client.call_tool("delete_ticket", TICKET))
        assert (denied.code, codes(denied)) == (-31403, ["not_granted"])
        assert (await client.call_tool("get_ticket", {"id": 1})).is_error
        assert (await error_of(ask(client, "tickets/purge"))).code == -32601
    assert done(tickets.log) == ["get_ticket", "get_ticket"]


async def test_two_sessions_have_two_servers_and_their_ends_are_theirs(tickets: Shimmed) -> None:
    found, served = tickets.shim(), tickets.serve()
    async with over_http(served.url, LEGACY) as first:
        async with over_http(served.url, LEGACY) as second:
            for client in (first, second):
                await client.call_tool("create_ticket", {"title": "mine"})
            await until(lambda: len(found.servers()) == 3, "two serve, and one waits")
        await until(lambda: len(found.servers()) == 2, "the second server has ended")
        result = await first.call_tool("search_tickets", {"query": "mine"})
        assert result.structured_content is not None
        assert len(result.structured_content["tickets"]) == 1
    await until(lambda: len(found.servers()) == 1, "the first one has, too")
    pids = [each["pid"] for each in executed(tickets.log)]
    assert pids[0] == pids[2] != pids[1]


async def test_twenty_sessions_at_once(tickets: Shimmed) -> None:
    """With a server that starts faster than those of the SDK."""
    tickets.shim(puppet_server.command(tickets.log))
    served = tickets.serve("--policy", ALLOW_ALL)
    pids, there = list[str](), asyncio.Barrier(20)

    async def one() -> None:
        async with over_http(served.url, LEGACY) as client:
            await there.wait()
            pids.append(text_of(await client.call_tool("say", {})))
            await there.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(one())
    assert (len(pids), len(set(pids))) == (20, 20)


async def test_twenty_stateless_clients_share_one_server(tickets: Shimmed) -> None:
    found, served = tickets.shim(), tickets.serve(**SHARED)

    async def one(number: int) -> None:
        async with over_http(served.url, MODERN) as client:
            title = f"No. {number}"
            result = await client.call_tool("create_ticket", {"title": title})
            assert result.structured_content is not None
            assert result.structured_content["title"] == title

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(one(number))
    assert len(found.servers()) == 2  # one of them waits
    assert len({each["pid"] for each in executed(tickets.log)}) == 1


async def test_the_reference_server_of_npm(tickets: Shimmed, everything_server: list[str]) -> None:
    command = [*everything_server, "stdio"]
    tickets.shim(command)
    served = tickets.serve("--policy", ALLOW_ALL)
    async with over_stdio(command, LEGACY, env=tickets.env) as bare:
        names = await tools_of(bare)
        image = (await bare.call_tool("get-tiny-image", {})).content
    async with over_http(served.url, LEGACY) as client:
        assert await tools_of(client) == names
        assert text_of(await client.call_tool("echo", {"message": "hello"})) == "Echo: hello"
        assert (await client.call_tool("get-tiny-image", {})).content == image
        long = {"duration": 1, "steps": 3}
        steps: list[float] = []

        async def step(progress: float, total: float | None, message: str | None) -> None:
            steps.append(progress)

        name = "trigger-long-running-operation"
        await client.call_tool(name, long, progress_callback=step)
        assert steps == [1, 2, 3]


async def test_on_a_pipe_too(tickets: Shimmed) -> None:
    found = tickets.shim()
    command = sidecar("stdio", *ANA, "--upstream", found.url)
    async with over_stdio(command, LEGACY, env=tickets.env) as client:
        assert not (await client.call_tool("get_ticket", TICKET)).is_error
        assert (await error_of(client.call_tool("delete_ticket", TICKET))).code == -31403
    await until(lambda: len(found.servers()) == 1, "its server has ended")


def test_tools_are_pinned_by_it(tickets: Shimmed) -> None:
    with Process(sidecar("pin", "--upstream", tickets.shim().url), pipes=True) as process:
        assert process.wait() == 0
        assert b"refund_ticket" in process.stdout.read()


# ── When the shim is not there ────────────────────────────────────────────────────────────────────


async def test_without_a_shim_nothing_was_sent_and_the_pod_is_not_ready(tickets: Shimmed) -> None:
    served = tickets.start()

    async def opened() -> None:
        async with over_http(served.url, LEGACY) as client:
            await client.call_tool("get_ticket", TICKET)

    error = await error_of(opened())
    assert error.code == -31502
    assert "may have executed" not in error.message
    await until(lambda: readyz(served)[1]["opa"]["answers"], "OPA answers")
    status, body = readyz(served)
    missing = {"desk": f"{tickets.path}: No such file or directory"}
    assert (status, body["ready"], body["servers"]) == (503, False, {"missing": missing})
    found = tickets.shim()
    await until(lambda: readyz(served)[0] == 200, "it is ready")
    assert len(found.servers()) == 1  # looking costs no server
    await opened()
    found.process.signal(signal.SIGKILL)
    await until(lambda: readyz(served)[0] == 503, "it is not ready any more")
    assert "Connection refused" in readyz(served)[1]["servers"]["missing"]["desk"]


@pytest.mark.parametrize("place", ["link", "file", "folder"])
def test_only_a_socket_is_connected_to(tickets: Shimmed, place: str) -> None:
    """A link in the folder of the server would lead to sockets that are the sidecar's alone."""
    other = tickets.folder / "opa.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(other))
        listener.listen()
        listener.setblocking(False)
        makers: dict[str, Callable[[], object]] = {
            "link": lambda: tickets.path.symlink_to(other),
            "file": tickets.path.touch,
            "folder": tickets.path.mkdir,
        }
        makers[place]()
        served = tickets.start()
        wait_until(lambda: readyz(served)[1]["opa"]["answers"], "OPA answers")
        assert readyz(served)[1]["servers"]["missing"] == {"desk": f"{tickets.path}: not a socket"}
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_on_a_pipe_that_is_a_usage_error(tickets: Shimmed) -> None:
    command = sidecar("stdio", *ANA, "--upstream", f"unix-stdio://{tickets.path}")
    with Process(command, env=tickets.env) as process:
        assert process.wait() == 125
        assert f"no stdio server can be had at {tickets.path}: No such file" in process.tail()


async def test_a_shim_that_serves_others_serves_nobody_here(tickets: Shimmed) -> None:
    found = tickets.shim(None, "--peer", str(os.getuid() + 1))
    served = tickets.start()

    async def opened() -> None:
        async with over_http(served.url, LEGACY):
            pass

    assert (await error_of(opened())).code == -31502
    found.process.wait_for(f"refused a connection of uid {os.getuid()}")
    assert done(tickets.log) == []


# ── Servers that end, and servers that misbehave ──────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ERAS)
async def test_a_server_that_dies_is_seen_by_who_waits_and_may_be_had_anew(
    tickets: Shimmed, mode: str
) -> None:
    tickets.shim()
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


ODD = """
import sys
from mcp.server import MCPServer
if sys.argv[1] == "banner": print("Welcome to the desk!\\n\\n*** ready ***", flush=True)
server = MCPServer("odd")
@server.tool()
def say(size: int) -> str: return "x" * size
server.run("stdio")
"""


def odd(how: str) -> list[str]:
    return [sys.executable, "-c", ODD, how]


async def test_a_banner_on_stdout_goes_nowhere(tickets: Shimmed) -> None:
    tickets.shim(odd("banner"))
    served = tickets.serve("--policy", ALLOW_ALL)
    async with over_http(served.url, LEGACY) as client:
        assert text_of(await client.call_tool("say", {"size": 3})) == "xxx"
    served.process.wait_for("dropped a line of the server's stdout that is no message")


async def test_a_line_may_be_as_long_as_the_limit_and_no_longer(tickets: Shimmed) -> None:
    found = tickets.shim(odd("huge"))
    served = tickets.serve("--policy", ALLOW_ALL, MCP_SIDECAR_LIMITS__SERVER_MESSAGE="20000000")
    async with over_http(served.url, LEGACY) as client:
        for size in (1, 9_000_000):  # once as text, and once more as structured content
            assert len(text_of(await client.call_tool("say", {"size": size}))) == size
        error = await error_of(client.call_tool("say", {"size": 10_000_000}))
        assert error.code == -31502
    await until(lambda: len(found.servers()) == 1, "its server has ended")


# ── The end ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ERAS)
async def test_when_the_server_is_told_to_end_a_call_finishes(tickets: Shimmed, mode: str) -> None:
    found = tickets.shim()
    served = tickets.serve(**SHARED)
    async with over_http(served.url, mode) as client:
        await client.list_tools()
        tickets.hold.touch()
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await until(lambda: done(tickets.log), "the call has arrived")
        found.process.signal(signal.SIGTERM)
        await until(lambda: readyz(served)[0] == 503, "no more sessions come")
        assert not call.done()
        tickets.hold.unlink()
        assert not (await call).is_error


@pytest.mark.parametrize("mode", ERAS)
async def test_when_the_sidecar_is_told_to_end_a_call_finishes_and_servers_end(
    tickets: Shimmed, mode: str
) -> None:
    found = tickets.shim()
    served = tickets.serve(**SHARED)
    async with over_http(served.url, mode) as client:
        await client.list_tools()
        tickets.hold.touch()
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await until(lambda: done(tickets.log), "the call has arrived")
        [pid] = {each["pid"] for each in executed(tickets.log)}
        served.process.signal(signal.SIGTERM)
        await asyncio.to_thread(served.process.wait_for, "stopping")
        assert not call.done()
        tickets.hold.unlink()
        assert not (await call).is_error
    assert served.process.wait() == 0
    await until(lambda: not alive(pid), "its server has ended")
    assert len(found.servers()) == 1


async def test_sessions_come_and_go_and_leave_nothing_behind(tickets: Shimmed) -> None:
    found = tickets.shim(puppet_server.command(tickets.log))
    served = tickets.serve("--policy", ALLOW_ALL)

    async def session() -> None:
        async with over_http(served.url, LEGACY) as client:
            await client.call_tool("say", {})

    await session()
    pids = (served.pid, found.process.pid)
    seen = [tuple(map(held, pids))]

    def settled() -> bool:
        seen.append(tuple(map(held, pids)))
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    await until(settled, "what is held stays the same", 40.0)
    for _ in range(10):
        await session()
    await until(lambda: tuple(map(held, pids)) == seen[-1], f"again {seen[-1]}", 40.0)


async def test_a_sidecar_that_is_killed_leaves_no_server_behind(tickets: Shimmed) -> None:
    found, served = tickets.shim(), tickets.serve()
    with suppress(Exception):
        async with over_http(served.url, LEGACY) as client:
            await client.call_tool("get_ticket", TICKET)
            await until(lambda: len(found.servers()) == 2, "one serves, and one waits")
            served.process.signal(signal.SIGKILL)
            served.process.wait()
    [pid] = {each["pid"] for each in executed(tickets.log)}
    await until(lambda: not alive(pid), "its server has ended")
