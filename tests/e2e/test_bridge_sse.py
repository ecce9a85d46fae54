"""`mcp-sidecar stdio --upstream …/sse`: a server of the legacy HTTP+SSE transport on a pipe."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import (
    LEGACY,
    codes,
    error_of,
    over_stdio,
    text_of,
    tools_of,
)
from tests.support.processes import (
    ALLOW_ALL,
    DENY_ALL,
    STARTER,
    Process,
    Served,
    done,
    executed,
    patient,
    sidecar,
    ticket_desk,
    wait_until,
)
from tests.support.raw import MODERN, PATIENCE, Pipe, call, code, initialize, modern, request
from tests.support.sse_puppet import END, ENDPOINT, Puppet, event, sse_puppet

ANA = ("--policy", STARTER, "--actor", "human:ana")
TICKET = {"id": 4711}
DENIED, FAILED, LATE = -31403, -31502, -31504
BUT_STREAMS = """package mcp.custom

allow contains {"rule": "everything", "any": true}

deny contains {"code": "no_action", "message": "Listen, and do nothing."} if {
	input.target.type != "stream"
}
"""
NO_SAMPLING = """package mcp.custom

allow contains {"rule": "everything", "any": true}

deny contains {"code": "no_sampling", "message": "Think for yourself."} if {
	input.target.type == "sampling"
}
"""


@pytest.fixture
def env(opa_bin: Path) -> dict[str, str]:
    return patient(opa_bin)


# ── A real server, and the real client ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("mode", "revision"), [(LEGACY, "2025-11-25"), ("auto", MODERN)])
async def test_a_client_of_stdio_uses_it(
    tmp_path: Path, env: dict[str, str], mode: str, revision: str
) -> None:
    log = tmp_path / "log"
    with ticket_desk(log, transport="sse") as server:
        command = sidecar("stdio", *ANA, "--upstream", server.url)
        async with over_stdio(command, mode, env=env) as client:
            assert client.protocol_version == revision
            assert len(await tools_of(client)) == 4
            assert not (await client.call_tool("get_ticket", TICKET)).is_error
            denied = await error_of(client.call_tool("delete_ticket", TICKET))
            assert (denied.code, codes(denied)) == (DENIED, ["not_granted"])
            failed = await client.call_tool("get_ticket", {"id": 1})
            assert "no ticket 1" in text_of(failed)
    assert done(log) == ["get_ticket", "get_ticket"]


@pytest.mark.parametrize("enveloped", [False, True], ids=["handshake", "stateless"])
def test_where_all_is_denied_nothing_executes(
    tmp_path: Path, env: dict[str, str], enveloped: bool
) -> None:
    log, folder = tmp_path / "log", tmp_path / "policy"
    folder.mkdir()
    (folder / "custom.rego").write_text(BUT_STREAMS, encoding="utf-8")
    message = call(1, "get_ticket", id=1)
    with ticket_desk(log, transport="sse") as server:
        with piped(server, env, folder) as pipe:
            assert code(pipe.ask(modern(message) if enveloped else message)) == DENIED
            pipe.end()
            assert pipe.wait_for_end() == 0
        with piped(server, env, DENY_ALL) as pipe:
            answer = pipe.ask(modern(message) if enveloped else message)
            assert code(answer) in (DENIED, FAILED)  # it is judged while the session is not opened
            assert pipe.wait_for_end() == 1
            assert len(pipe.lines) == 1
    assert executed(log) == []


@pytest.mark.parametrize("mode", [LEGACY, MODERN])
async def test_a_cancelled_call_is_cancelled_in_the_server(
    tmp_path: Path, env: dict[str, str], mode: str
) -> None:
    log, hold = tmp_path / "log", tmp_path / "hold"
    with ticket_desk(log, "--hold", str(hold), transport="sse") as server:
        command = sidecar("stdio", *ANA, "--upstream", server.url)
        async with over_stdio(command, mode, env=env) as client:
            await client.list_tools()
            hold.touch()
            waiting = asyncio.create_task(client.call_tool("get_ticket", TICKET))
            await asyncio.to_thread(wait_until, lambda: done(log), "the call has arrived")
            waiting.cancel()
            await asyncio.to_thread(
                wait_until, lambda: "cancelled get_ticket" in done(log), "it was cancelled"
            )
            hold.unlink()
            assert not (await client.call_tool("get_ticket", TICKET)).is_error


# ── A puppet ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def piped(
    puppet: Puppet | Served, env: dict[str, str], policy: Path = ALLOW_ALL, **settings: str
) -> Iterator[Pipe]:
    command = sidecar("stdio", "--policy", policy, "--upstream", puppet.url)
    with Process(command, env={**env, **settings}, pipes=True) as process:
        pipe = Pipe(process)
        try:
            yield pipe
        finally:
            process.stop()
            pipe.reader.join(PATIENCE)


def test_calls_that_wait_when_the_stream_ends_are_failed_and_the_pipe_ends(
    env: dict[str, str],
) -> None:
    with sse_puppet() as puppet, piped(puppet, env) as pipe:
        pipe.greet()
        puppet.answers = False
        pipe.send(request(1, "ping"), request(2, "ping"))
        wait_until(lambda: puppet.methods().count("ping") == 2, "they have arrived")
        puppet.say(END)
        answers = [pipe.answer(number) for number in (1, 2)]
        assert {code(each) for each in answers} == {FAILED}
        assert "may have executed" in str(answers[0])
        assert pipe.wait_for_end() == 1
        assert len(puppet.gets) == 1


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        pytest.param(
            {"opening": (b"event: endpoint\ndata: http://127.0.0.1:1/x\n\n",)},
            FAILED,
            id="an endpoint of somebody else",
        ),
        pytest.param({"opening": (b": hello\n\n",)}, LATE, id="no endpoint"),
        pytest.param({"get_status": 401}, FAILED, id="not authorized"),
    ],
)
def test_a_server_that_opens_no_session_is_said_to_have_failed_and_the_pipe_ends(
    env: dict[str, str], what: dict[str, Any], expected: int
) -> None:
    with sse_puppet(**what) as puppet, piped(puppet, env, MCP_SIDECAR_LIMITS__CONNECT="1") as pipe:
        assert code(pipe.ask(initialize())) == expected
        assert pipe.wait_for_end() == 1
        assert puppet.posted == []


def test_the_session_is_opened_when_it_is_wanted_and_ends_with_the_pipe(
    env: dict[str, str],
) -> None:
    with sse_puppet() as puppet, piped(puppet, env) as pipe:
        assert code(pipe.ask(request(0, "tickets/purge"))) == -32601
        assert puppet.gets == []
        pipe.greet()
        assert pipe.ask(call(1))["result"]["content"][0]["text"] == "echo"
        pipe.end()
        assert pipe.wait_for_end() == 0
        assert puppet.methods() == [
            "initialize",
            "notifications/initialized",
            "tools/list",
            "tools/call",
        ]


@pytest.mark.parametrize("status", [400, 500, 307])
def test_a_message_that_is_not_taken_fails_alone(env: dict[str, str], status: int) -> None:
    with sse_puppet() as puppet, piped(puppet, env) as pipe:
        pipe.greet()
        puppet.status = status
        assert code(pipe.ask(call(1))) == FAILED
        puppet.status = 202
        assert code(pipe.ask(call(2))) is None


def test_what_the_server_says_is_judged_like_on_any_pipe(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "custom.rego").write_text(NO_SAMPLING, encoding="utf-8")
    question = {
        "id": "q",
        "method": "sampling/createMessage",
        "params": {"messages": [], "maxTokens": 1},
    }
    with sse_puppet() as puppet, piped(puppet, env, tmp_path) as pipe:
        pipe.greet()
        puppet.say(
            event({"id": "nobody", "result": {}}), b"data: nothing\n\n", ENDPOINT, b": comment\n\n"
        )
        puppet.say(event(question), event({"id": "r", "method": "roots/list"}))
        pipe.first(lambda each: each.get("method") == "roots/list")
        pipe.send({"jsonrpc": "2.0", "id": "r", "result": {"roots": []}})
        wait_until(lambda: puppet.methods().count(None) == 2, "both answers")
        answers = {each.message.get("id"): each.message for each in puppet.posted}
        assert answers["q"]["error"]["code"] == DENIED
        assert "result" in answers["r"]
        assert len(pipe.lines) == 2
