"""`mcp-sidecar http`: a proxy that streams, and lets nothing happen that was not judged."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mcp.client.subscriptions import SubscriptionLost

from tests.support.client import ERAS, LEGACY, MODERN, error_of, over_http, tools_of
from tests.support.processes import (
    LISTENING,
    STARTER,
    Process,
    Served,
    done,
    get,
    held,
    holds_no_more,
    http_sidecar,
    patient,
    sidecar,
    ticket_desk,
    wait_until,
)
from tests.support.raw import code, mirrors, modern, post

ANA = ("--policy", STARTER, "--actor", "human:ana")
TICKET = {"id": 4711}


TENANT = """package mcp.custom

allow contains {"rule": "blue", "any": true} if {
	input.target.type == "tool"
	input.context.unverified.headers == {"x-tenant": "blue"}
}
"""


class Desk:
    """A ticket desk over HTTP with sidecars in front of it."""

    def __init__(self, folder: Path, opa: Path, stack: ExitStack) -> None:
        self.folder, self.log, self.hold = folder, folder / "log", folder / "hold"
        self.env, self._stack = patient(opa), stack

    def start(self, *arguments: str) -> Served:
        """The server."""
        started = ticket_desk(self.log, "--hold", str(self.hold), *arguments)
        return self._stack.enter_context(started)

    def guard(self, upstream: str, *options: str | Path) -> Served:
        """A sidecar."""
        return self._stack.enter_context(http_sidecar(upstream, *(options or ANA), env=self.env))


@pytest.fixture
def tickets(tmp_path: Path, opa_bin: Path) -> Iterator[Desk]:
    with ExitStack() as stack:
        yield Desk(tmp_path, opa_bin, stack)


@pytest.fixture
def env(opa_bin: Path) -> dict[str, str]:
    return patient(opa_bin)


# ── What it refuses to be ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(
            ("--listen", "0.0.0.0:0", "--upstream", "http://127.0.0.1:1/mcp"),
            "static_for_all",
            id="one actor for everybody who can reach it",
        ),
        pytest.param(
            ("--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:1/mcp", "--", "python"),
            "two servers",
            id="in front of two servers at one address",
        ),
    ],
)
def test_what_it_can_not_be_is_a_usage_error(
    env: dict[str, str], options: tuple[str, ...], said: str
) -> None:
    with Process(sidecar("http", *ANA, *options), env=env) as process:
        assert process.wait() == 125
        assert said in process.tail()


def test_one_actor_for_everybody_can_be_asked_for(env: dict[str, str]) -> None:
    options = ("--listen", "0.0.0.0:0", "--admin", "off", "--upstream", "http://127.0.0.1:1/mcp")
    wanted = {**env, "MCP_SIDECAR_IDENTITY__STATIC_FOR_ALL": "true"}
    with Process(sidecar("http", *ANA, *options), env=wanted) as process:
        process.wait_for(LISTENING)


def test_an_address_that_is_taken_is_said_and_is_no_start(env: dict[str, str]) -> None:
    with http_sidecar("http://127.0.0.1:1/mcp", *ANA, env=env) as first:
        taken = first.url.removeprefix("http://").removesuffix("/mcp")
        options = ("--listen", taken, "--admin", "off", "--upstream", "http://127.0.0.1:1/mcp")
        with Process(sidecar("http", *ANA, *options), env=env) as process:
            assert process.wait() == 125
            assert taken in process.tail()


def test_it_listens_on_several_addresses_or_on_none(env: dict[str, str]) -> None:
    def listening(at: str) -> Process:
        options = ("--listen", at, "--admin", "off", "--upstream", "http://127.0.0.1:1/mcp")
        return Process(sidecar("http", *ANA, *options), env=env)

    with listening("[127.0.0.1,127.0.0.2]:0") as first:
        port = first.wait_for(r"listening on http://127\.0\.0\.2:(\d+)")[1]
        answers = [get(f"http://127.0.0.{n}:{port}/elsewhere")[0] for n in (1, 2)]
        assert answers == [404, 403]  # the other's name is none that is known for loopback
        with listening(f"[127.0.0.3,127.0.0.2]:{port}") as second:
            assert second.wait() == 125
            assert f"[127.0.0.3,127.0.0.2]:{port}" in second.tail()


# ── Its life ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ERAS)
async def test_sigterm_lets_a_call_finish_and_lets_nobody_in(tickets: Desk, mode: str) -> None:
    server = tickets.start()
    served = tickets.guard(server.url)
    async with over_http(served.url, mode) as client:
        await client.list_tools()  # else the client would, within its call
        tickets.hold.touch()
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await asyncio.to_thread(wait_until, lambda: done(tickets.log), "the call has arrived")
        served.process.signal(signal.SIGTERM)
        await asyncio.to_thread(served.process.wait_for, "stopping")
        assert not call.done()
        await asyncio.to_thread(wait_until, lambda: _refuses(served.url), "nobody is let in")
        tickets.hold.unlink()
        result = await call
    assert result.structured_content is not None
    assert result.structured_content["id"] == TICKET["id"]
    assert served.process.wait() == 0
    assert done(tickets.log) == ["get_ticket"]


def _refuses(url: str) -> bool:
    try:
        get(url, timeout=1)
    except OSError:
        return True
    return False


async def test_a_stream_that_never_ends_holds_up_no_shutdown(tickets: Desk) -> None:
    served = tickets.guard(tickets.start().url)
    async with over_http(served.url, LEGACY) as old, over_http(served.url, MODERN) as new:
        await tools_of(old)  # its stream for notices is open as well
        async with new.listen(tools_list_changed=True) as notices:
            served.process.signal(signal.SIGTERM)
            code = await asyncio.to_thread(served.process.wait, 5)
            with pytest.raises(SubscriptionLost):
                await anext(aiter(notices))
    assert code == 0


async def test_a_server_that_is_down_is_an_error_of_its_own_and_may_come_back(
    tickets: Desk,
) -> None:
    with ticket_desk(tickets.log) as server:
        served = tickets.guard(server.url)
        async with over_http(served.url, MODERN) as client:
            assert await tools_of(client)
    port = server.url.rpartition(":")[2].partition("/")[0]
    async with over_http(served.url, MODERN) as client:
        error = await error_of(client.call_tool("get_ticket", TICKET))
        assert error.code == -31502
        assert error.data["retryable"] is False
        with ticket_desk(tickets.log, "--port", port):
            assert not (await client.call_tool("get_ticket", TICKET)).is_error


async def test_a_hundred_calls_leave_nothing_behind(tickets: Desk) -> None:
    served = tickets.guard(tickets.start().url)
    await _some_of_everything(served.url)
    before = held(served.pid)
    for _ in range(12):
        await _some_of_everything(served.url)
    await asyncio.to_thread(
        wait_until, lambda: holds_no_more(served.pid, before), f"no more than {before}"
    )


async def _some_of_everything(url: str) -> None:
    for mode in ERAS:
        async with over_http(url, mode) as client:
            await client.list_tools()
            for _ in range(3):
                await client.call_tool("get_ticket", TICKET)
                await error_of(client.call_tool("delete_ticket", TICKET))


def test_the_admin_port_says_how_it_is(tickets: Desk) -> None:
    served = tickets.guard("http://127.0.0.1:1/mcp")
    status, body = get(f"{served.admin}/readyz")
    assert status == 200
    assert json.loads(body)["policy"]["revision"]
    assert get(f"{served.admin}/livez")[0] == 200
    assert get(f"{served.admin}/nothing")[0] == 404


async def test_metrics_count_decisions(tickets: Desk) -> None:
    served = tickets.guard(tickets.start().url)
    async with over_http(served.url, MODERN) as client:
        await client.call_tool("get_ticket", TICKET)
        await error_of(client.call_tool("delete_ticket", TICKET))
    metrics = get(f"{served.admin}/metrics")[1].decode()
    decisions = [line for line in metrics.splitlines() if "decision" in line and "_count" in line]
    assert any('"allow"' in line for line in decisions), metrics
    assert any('"deny"' in line for line in decisions), metrics
    assert "ana" not in metrics


# ── Traffic ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("answers", [(), ("--json",)], ids=["sse", "json"])
@pytest.mark.parametrize("mode", ERAS)
async def test_both_kinds_of_answers_are_passed_on(
    tickets: Desk, mode: str, answers: tuple[str, ...]
) -> None:
    served = tickets.guard(tickets.start(*answers).url)
    async with over_http(served.url, mode) as client:
        assert len(await tools_of(client)) == 4
        result = await client.call_tool("get_ticket", TICKET)
        error = await error_of(client.call_tool("delete_ticket", TICKET))
    assert result.structured_content is not None
    assert error.code == -31403
    assert done(tickets.log) == ["get_ticket"]


async def test_a_client_that_asks_for_the_era_gets_the_newer_one(tickets: Desk) -> None:
    served = tickets.guard(tickets.start().url)
    async with over_http(served.url, "auto") as client:
        assert client.protocol_version == MODERN
        await client.call_tool("get_ticket", TICKET)


@pytest.mark.parametrize("mode", ERAS)
async def test_clients_at_the_same_time_get_their_own_answers(tickets: Desk, mode: str) -> None:
    served = tickets.guard(tickets.start().url)

    async def one(number: int) -> None:
        async with over_http(served.url, mode) as client:
            title = f"No. {number}"
            result = await client.call_tool("create_ticket", {"title": title})
            assert result.structured_content is not None
            assert result.structured_content["title"] == title
            error = await error_of(client.call_tool("delete_ticket", {"id": number}))
            assert error.code == -31403

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(one(number))
    assert done(tickets.log) == ["create_ticket"] * 10


@pytest.mark.parametrize("mode", ERAS)
async def test_a_cancelled_call_is_cancelled_in_the_server(tickets: Desk, mode: str) -> None:
    served = tickets.guard(tickets.start().url)
    tickets.hold.touch()
    async with over_http(served.url, mode) as client:
        call = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await asyncio.to_thread(wait_until, lambda: done(tickets.log), "the call has arrived")
        call.cancel()
        await asyncio.to_thread(
            wait_until, lambda: "cancelled get_ticket" in done(tickets.log), "it was cancelled"
        )
        tickets.hold.unlink()
        assert not (await client.call_tool("get_ticket", TICKET)).is_error


async def test_several_servers_have_a_path_each(tickets: Desk, tmp_path: Path) -> None:
    first, second = tickets.start(), tickets.start()
    config = {
        "upstreams": [
            {"name": "first", "path": "/one", "url": first.url},
            {"name": "second", "path": "/two", "url": second.url},
        ]
    }
    file, audit = tmp_path / "config.yaml", tmp_path / "audit.jsonl"
    file.write_text(json.dumps(config), encoding="utf-8")
    options = ("--config", file, "--audit", audit, "--listen", "127.0.0.1:0", "--admin", "off")
    with Process(sidecar("http", *ANA, *options), env=tickets.env) as process:
        base = process.wait_for(LISTENING)[1].rpartition("/")[0]
        process.wait_for("opa_ready")
        for path, mode in (("/one", LEGACY), ("/two", MODERN)):
            async with over_http(base + path, mode) as client:
                assert not (await client.call_tool("get_ticket", TICKET)).is_error
        assert get(f"{base}/three")[0] == 404
    records = [json.loads(line) for line in audit.read_text(encoding="utf-8").splitlines()]
    called = [each["server"] for each in records if each["method"] == "tools/call"]
    assert called == ["first", "first", "second", "second"]


def test_the_policy_sees_the_headers_on_the_list_and_no_others(tickets: Desk) -> None:
    folder = tickets.folder / "by-tenant"
    folder.mkdir()
    (folder / "custom.rego").write_text(TENANT, encoding="utf-8")
    file = tickets.folder / "tenant.yaml"
    file.write_text('{"http": {"unverified_headers": ["x-tenant"]}}', encoding="utf-8")
    front = tickets.guard(tickets.start().url, "--policy", folder, "--config", file)
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    message = {**call, "params": {"name": "get_ticket", "arguments": TICKET}}

    def answer(*headers: tuple[str, str]) -> int | None:
        whole = modern(message)
        return code(post(front.url, whole, (*mirrors(message), *headers)).message)

    assert answer(("X-Tenant", "blue"), ("X-Other", "x")) is None
    assert answer(("X-Tenant", "red")) == answer() == answer(("X-Other", "blue")) == -31403
    assert done(tickets.log) == ["get_ticket"]
