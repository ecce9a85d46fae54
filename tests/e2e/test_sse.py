"""`mcp-sidecar http` in front of a server of the legacy HTTP+SSE transport."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import (
    LEGACY,
    ask,
    codes,
    error_of,
    over_sse,
    text_of,
    tools_of,
)
from tests.support.processes import (
    ALLOW_ALL,
    DENY_ALL,
    STARTER,
    Served,
    done,
    executed,
    http_sidecar,
    patient,
    ticket_desk,
    wait_until,
)
from tests.support.raw import (
    MODERN,
    Object,
    Wire,
    call,
    code,
    dump,
    initialize,
    mirrors,
    modern,
    post,
    read_event,
    request,
)
from tests.support.sse_client import listening, session
from tests.support.sse_puppet import END, ENDPOINT, Puppet, event, sse_puppet

ANA = ("--policy", STARTER, "--actor", "human:ana")
TICKET = {"id": 4711}
DENIED, FAILED = -31403, -31502
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
QUESTION = {
    "id": "q1",
    "method": "sampling/createMessage",
    "params": {"messages": [], "maxTokens": 1},
}


def policy(folder: Path, text: str) -> Path:
    made = folder / "policy"
    made.mkdir()
    (made / "custom.rego").write_text(text, encoding="utf-8")
    return made


# ── A real server, and the real client ────────────────────────────────────────────────────────────


@dataclass
class Desk:
    """A ticket desk that speaks HTTP+SSE, and sidecars in front of it."""

    log: Path
    hold: Path
    url: str
    env: dict[str, str]
    stack: ExitStack

    def serve(self, *options: str | Path) -> Served:
        return self.stack.enter_context(http_sidecar(self.url, *(options or ANA), env=self.env))


@pytest.fixture
def tickets(tmp_path: Path, opa_bin: Path) -> Iterator[Desk]:
    log, hold = tmp_path / "log", tmp_path / "hold"
    with ExitStack() as stack:
        started = ticket_desk(log, "--hold", str(hold), transport="sse")
        url = stack.enter_context(started).url
        yield Desk(log, hold, url, patient(opa_bin), stack)


@pytest.mark.parametrize(
    ("mode", "handshake", "revision"),
    [
        pytest.param(LEGACY, "2024-11-05", "2024-11-05", id="the transport's own revision"),
        pytest.param(LEGACY, "2025-11-25", "2025-11-25", id="a later handshake"),
        pytest.param(MODERN, "2025-11-25", MODERN, id="stateless"),
        pytest.param("auto", "2025-11-25", MODERN, id="auto"),
    ],
)
async def test_each_revision_works_and_denials_are_answers(
    tickets: Desk, mode: str, handshake: str, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp.client.session.LATEST_HANDSHAKE_VERSION", handshake)
    async with over_sse(tickets.url, mode) as client:
        assert client.protocol_version == revision
    async with over_sse(tickets.serve().url, mode) as client:
        assert client.protocol_version == revision
        assert len(await tools_of(client)) == 4
        result = await client.call_tool("get_ticket", TICKET)
        assert result.structured_content is not None
        assert result.structured_content["id"] == TICKET["id"]
        denied = await error_of(client.call_tool("delete_ticket", TICKET))
        assert denied.code == DENIED
        assert codes(denied) == ["not_granted"]
        assert denied.data["retryable"] is False
        assert {"decision_id", "policy_revision"} <= set(denied.data)
        failed = await client.call_tool("get_ticket", {"id": 1})
        assert failed.is_error
        assert "no ticket 1" in text_of(failed)
        assert (await error_of(ask(client, "tickets/purge"))).code == -32601
    assert done(tickets.log) == ["get_ticket", "get_ticket"]


async def test_two_clients_have_two_sessions(tickets: Desk) -> None:
    served = tickets.serve()
    async with over_sse(served.url, LEGACY) as first, over_sse(served.url, LEGACY) as second:

        async def many(client: Any, number: int) -> None:
            for _ in range(5):
                result = await client.call_tool("search_tickets", {"query": f"{number}"})
                assert not result.is_error
                assert (await error_of(client.call_tool("delete_ticket", TICKET))).code == DENIED

        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(many((first, second)[number % 2], number))
    assert done(tickets.log) == ["search_tickets"] * 50


@pytest.mark.parametrize("mode", [LEGACY, MODERN])
async def test_where_all_but_the_stream_is_denied_nothing_executes_and_the_session_lives(
    tickets: Desk, tmp_path: Path, mode: str
) -> None:
    served = tickets.serve("--policy", policy(tmp_path, BUT_STREAMS))
    async with over_sse(served.url, mode) as client:
        for _ in range(3):
            assert (await error_of(client.call_tool("get_ticket", TICKET))).code == DENIED
        assert await tools_of(client) == []
    assert executed(tickets.log) == []


def test_where_the_stream_is_denied_there_is_no_session(tickets: Desk) -> None:
    served = tickets.serve("--policy", DENY_ALL, "--actor", "human:ana")
    with Wire(served.url) as wire:
        wire.request(headers=(("Accept", "text/event-stream"),), verb="GET")
        assert wire.answer("GET").status == 405
    assert post(served.url, call(1, "get_ticket", id=4711)).status == 404
    assert executed(tickets.log) == []


async def test_sigterm_lets_a_call_finish(tickets: Desk) -> None:
    served = tickets.serve()
    async with over_sse(served.url, LEGACY) as client:
        await client.list_tools()
        tickets.hold.touch()
        waiting = asyncio.create_task(client.call_tool("get_ticket", TICKET))
        await asyncio.to_thread(wait_until, lambda: done(tickets.log), "the call has arrived")
        served.process.signal(signal.SIGTERM)
        await asyncio.to_thread(served.process.wait_for, "stopping")
        tickets.hold.unlink()
        assert not (await waiting).is_error
    assert served.process.wait() == 0


# ── A puppet, and a client that says what it likes ────────────────────────────────────────────────


@pytest.fixture(scope="module")
def env(opa_bin: Path) -> dict[str, str]:
    return patient(opa_bin)


@pytest.fixture(scope="module")
def pair(env: dict[str, str]) -> Iterator[tuple[Puppet, Served]]:
    with sse_puppet() as puppet, http_sidecar(puppet.url, "--policy", ALLOW_ALL, env=env) as served:
        yield puppet, served


@pytest.fixture
def puppet(pair: tuple[Puppet, Served]) -> Iterator[Puppet]:
    """It behaves, unless a test wants something else."""
    puppet = pair[0]
    usual = replace(Puppet(), url=puppet.url)
    yield puppet
    for name in ("opening", "status", "get_status", "body", "media", "answers"):
        setattr(puppet, name, getattr(usual, name))
    puppet.posted.clear()
    puppet.gets.clear()


@pytest.fixture
def url(pair: tuple[Puppet, Served], puppet: Puppet) -> str:
    return pair[1].url


def test_the_endpoint_is_the_sidecars_and_the_servers_own_stays_inside(
    puppet: Puppet, url: str
) -> None:
    with session(url) as here, session(url) as other:
        assert here.endpoint.startswith("/sse?session_id=")
        assert "secret" not in here.endpoint
        assert len({here.endpoint, other.endpoint}) == 2
        assert len(here.endpoint.partition("=")[2]) >= 43
        puppet.streams.reverse()
        assert here.ask(call(1))["result"]["content"][0]["text"] == "echo"
    assert {each.path for each in puppet.posted} == {"/messages?session_id=secret"}


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        pytest.param("/messages?a=1", "/messages?a=1", id="absolute path"),
        pytest.param("messages/x", "/messages/x", id="relative path"),
        pytest.param("?a=b", "/sse?a=b", id="a query alone"),
        pytest.param("http://HOST/elsewhere?x=%2F", "/elsewhere?x=%2F", id="absolute URL"),
    ],
)
@pytest.mark.parametrize("ends", [b"\n", b"\r", b"\r\n"], ids=["LF", "CR", "CRLF"])
def test_endpoints_of_the_same_server_work_however_they_are_written(
    puppet: Puppet, url: str, reference: str, path: str, ends: bytes
) -> None:
    host = puppet.url.removeprefix("http://").removesuffix("/sse")
    text = f"event: endpoint\ndata: {reference.replace('HOST', host)}\n\n"
    whole = text.encode().replace(b"\n", ends)
    puppet.opening = tuple(bytes([each]) for each in whole)
    with session(url) as here:
        here.ask(call("x"))
    assert {each.path for each in puppet.posted} == {path}


@pytest.mark.parametrize(
    "reference",
    [
        "http://127.0.0.1:1/messages",
        "https://HOST/messages",
        "http://localhost:PORT/messages",
        "//evil.example/messages",
        "http://evil.example@HOST/",
        "http://HOST@evil.example/",
        "file:///etc/passwd",
        "http://[/",
    ],
)
def test_an_endpoint_of_somebody_else_opens_no_session(
    puppet: Puppet, url: str, reference: str
) -> None:
    host = puppet.url.removeprefix("http://").removesuffix("/sse")
    reference = reference.replace("HOST", host).replace("PORT", host.partition(":")[2])
    puppet.opening = (f"event: endpoint\ndata: {reference}\n\n".encode(), END)
    with listening(url) as client:
        assert client.stream.status == 502
        assert b"endpoint" in client.stream.read()
    assert puppet.posted == []


def test_what_comes_before_the_endpoint_and_another_endpoint_are_dropped(
    puppet: Puppet, pair: tuple[Puppet, Served]
) -> None:
    early = event({"method": "notifications/message", "params": {"level": "info", "data": "early"}})
    late = event({"method": "notifications/message", "params": {"level": "info", "data": "late"}})
    other = b"event: endpoint\ndata: http://127.0.0.1:1/stolen\n\n"
    puppet.opening = (early, ENDPOINT, other, late)
    with session(pair[1].url) as here:
        assert here.client.message()["params"]["data"] == "late"
        here.ask(call("after"))
    assert puppet.posted[-1].path == "/messages?session_id=secret"
    pair[1].process.wait_for("dropped another endpoint")


@pytest.mark.parametrize(
    ("what", "status"),
    [
        pytest.param({"opening": (END,)}, 502, id="the stream ends"),
        pytest.param({"get_status": 401}, 401, id="not authorized"),
        pytest.param({"get_status": 404}, 404, id="not found"),
        pytest.param({"get_status": 302}, 502, id="a redirect"),
        pytest.param({"get_status": 204}, 502, id="no stream"),
    ],
)
def test_a_server_that_opens_no_session(
    puppet: Puppet, url: str, what: dict[str, Any], status: int
) -> None:
    for name, value in what.items():
        setattr(puppet, name, value)
    with listening(url) as client:
        assert client.stream.status == status


def test_a_server_that_names_no_endpoint_has_failed_in_time(env: dict[str, str]) -> None:
    with (
        sse_puppet(opening=(b": hello\n\n",)) as puppet,
        http_sidecar(
            puppet.url,
            *("--policy", ALLOW_ALL),
            env={**env, "MCP_SIDECAR_LIMITS__CONNECT": "0.3"},
        ) as served,
        listening(served.url) as client,
    ):
        assert client.stream.status == 502
        wait_until(lambda: say_until_closed(puppet), "the server is let go")


def say_until_closed(puppet: Puppet) -> bool:
    puppet.say(b": still there\n\n")
    return puppet.closed == 1


# ── Whose session it is ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "target",
    [
        "/sse",
        "/sse?session_id=",
        "/sse?session_id=guessed",
        "/sse?session_id=secret",
        "{endpoint}x",
        "{endpoint}&session_id=x",
        "/messages?session_id=secret",
        "/messages/",
    ],
)
def test_only_the_token_of_a_session_leads_into_it(puppet: Puppet, url: str, target: str) -> None:
    with session(url) as here:
        goal = target.format(endpoint=here.endpoint)
        assert post(url, call(1), target=goal).status == 404
    assert "tools/call" not in puppet.methods()


def test_a_session_ends_with_its_stream_on_both_sides(puppet: Puppet, url: str) -> None:
    before = puppet.closed
    with session(url) as here:
        here.ask(call(1))
    wait_until(lambda: say_and_see(puppet, before), "the server's stream is closed")
    assert post(url, call(2), target=here.endpoint).status == 404


def say_and_see(puppet: Puppet, before: int) -> bool:
    puppet.say(b": there\n\n")
    return puppet.closed > before


@pytest.mark.parametrize("verb", ["DELETE", "PUT", "HEAD", "OPTIONS"])
def test_there_are_two_verbs(url: str, verb: str) -> None:
    with session(url) as here, Wire(url) as wire:
        wire.request(verb=verb, target=here.endpoint)
        answer = wire.answer(verb)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, POST")
        here.ask(call(1))


def opens(url: str) -> bool:
    with listening(url) as client:
        return client.stream.status == 200


def test_too_many_sessions_are_refused_and_one_that_ended_is_none(env: dict[str, str]) -> None:
    only = {**env, "MCP_SIDECAR_LIMITS__SESSIONS": "1"}
    with (
        sse_puppet() as puppet,
        http_sidecar(puppet.url, "--policy", ALLOW_ALL, env=only) as served,
    ):
        with session(served.url) as here:
            with listening(served.url) as client:
                assert client.stream.status == 503
            puppet.streams.reverse()
            here.ask(call(1))
        wait_until(lambda: opens(served.url), "a session can be had again")


# ── What goes up ──────────────────────────────────────────────────────────────────────────────────


def test_headers_that_only_the_other_transport_has_mean_nothing_here(
    puppet: Puppet, url: str
) -> None:
    message = modern(call(1))
    lying = (("Mcp-Method", "ping"), ("Mcp-Name", "harmless"), ("Mcp-Param-X", "y"))
    with session(url) as here:
        for headers in (lying, tuple(mirrors(message)), ()):
            assert here.post({**message, "id": str(headers)}, headers).status == 202
            here.client.message()
    calls = [each for each in puppet.posted if each.message["method"] == "tools/call"]
    assert len(calls) == 3
    for each in calls:
        assert not [name for name in each.headers if name.startswith(("mcp-method", "mcp-name"))]
        assert not [name for name in each.headers if name.startswith("mcp-param")]
        assert each.message["params"]["name"] == "echo"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        pytest.param(b"{", (), 400, id="no JSON"),
        pytest.param([call(1)], (), 400, id="a batch"),
        pytest.param(b"x" * (5 * 1024 * 1024), (), 413, id="too large"),
    ],
)
def test_what_names_no_request_is_refused_in_the_response(
    puppet: Puppet, url: str, body: object, headers: Any, status: int
) -> None:
    with session(url) as here:
        assert here.post(body, headers).status == status
        here.ask(call("after"))
    assert puppet.methods().count("tools/call") == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param({**call(7), "extra": 1, "result": {}}, -32600, id="two kinds at once"),
        pytest.param(request(7, "tickets/purge"), -32601, id="an unknown method"),
        pytest.param(modern(call(7), version="2025-11-25"), -32602, id="a bad envelope"),
        pytest.param(request(7, "tools/call", {"name": 5}), -32602, id="bad params"),
    ],
)
def test_what_names_its_request_is_refused_on_the_stream(
    puppet: Puppet, url: str, message: Object, expected: int
) -> None:
    with session(url) as here:
        assert code(here.ask(message)) == expected
        assert code(here.ask(call("after"))) is None
    assert puppet.methods().count("tools/call") == 1


def test_the_acknowledgement_carries_no_message(puppet: Puppet, url: str) -> None:
    puppet.media, puppet.body = "application/json", dump({"jsonrpc": "2.0", "id": 1, "result": {}})
    with session(url) as here:
        answer = here.post(call(1))
        assert (answer.status, answer.body) == (202, b"")
        assert here.client.message()["result"]["content"]


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_refused_message_is_refused_and_its_call_is_over(
    puppet: Puppet, url: str, status: int
) -> None:
    puppet.status, puppet.body = status, b"no"
    with session(url) as here:
        answer = here.post(call(1))
        assert (answer.status, answer.body) == (status, b"no")
        puppet.status = 202
        assert code(here.ask(call(1))) is None  # the id is free again


def test_a_redirected_message_fails_on_the_stream(puppet: Puppet, url: str) -> None:
    puppet.status = 307
    with session(url) as here:
        answer = here.ask(call(1))
        assert code(answer) == FAILED
        assert "may have executed" in str(answer["error"])
    assert {each.path for each in puppet.posted} == {"/messages?session_id=secret"}


# ── What comes down ───────────────────────────────────────────────────────────────────────────────


def test_calls_that_wait_when_the_stream_ends_are_answered_and_then_it_ends(
    puppet: Puppet, url: str
) -> None:
    puppet.answers = False
    with session(url) as here:
        for number in (1, 2):
            assert here.post(request(number, "ping")).status == 202
        puppet.say(END)
        answers = [here.client.message() for _ in range(2)]
        assert {each["id"] for each in answers} == {1, 2}
        assert {code(each) for each in answers} == {FAILED}
        assert read_event(here.client.stream) == b""
        assert here.post(request(3, "ping")).status == 404


def test_comments_pass_and_answers_to_nobody_do_not(puppet: Puppet, url: str) -> None:
    with session(url) as here:
        puppet.say(event({"id": "nobody", "result": {}}), b": keep-alive\n\n")
        assert read_event(here.client.stream) == b": keep-alive\n\n"
        puppet.say(b"data: no message\n\n", b"data: {\n", b'data: "jsonrpc": "2.0",\ndata: ')
        puppet.say(b'"method": "notifications/tools/list_changed"}\n\n')
        assert here.client.message()["method"] == "notifications/tools/list_changed"


def test_our_own_questions_are_asked_once_and_never_seen(env: dict[str, str]) -> None:
    with (
        sse_puppet() as puppet,
        http_sidecar(puppet.url, "--policy", ALLOW_ALL, env=env) as served,
        session(served.url) as here,
    ):
        here.ask(initialize())
        assert here.post({"jsonrpc": "2.0", "method": "notifications/initialized"}).status == 202
        for number in range(3):
            here.ask(call(number))
        assert puppet.methods().count("tools/list") == 1
        assert puppet.methods().count("tools/call") == 3


def test_a_denied_question_is_answered_to_the_server_and_an_allowed_one_by_the_client(
    env: dict[str, str], tmp_path: Path
) -> None:
    roots = {"id": "r1", "method": "roots/list"}
    with (
        sse_puppet() as puppet,
        http_sidecar(puppet.url, "--policy", policy(tmp_path, NO_SAMPLING), env=env) as served,
        session(served.url) as here,
    ):
        here.ask(initialize())
        puppet.say(event(QUESTION), event(roots))
        assert here.client.message()["method"] == "roots/list"
        refusal = puppet.wait_for(None)
        assert (refusal["id"], refusal["error"]["code"]) == ("q1", DENIED)
        forged = {"jsonrpc": "2.0", "id": "q1", "result": {"model": "forged"}}
        assert here.post(forged).status == 202
        assert here.post({"jsonrpc": "2.0", "id": "r1", "result": {"roots": []}}).status == 202
        wait_until(lambda: puppet.methods().count(None) == 2, "the client's answer")
        assert [each.message["id"] for each in puppet.posted if "method" not in each.message] == [
            "q1",
            "r1",
        ]


def test_what_is_injected_never_lands_inside_an_event(puppet: Puppet, url: str) -> None:
    note = event(
        {"method": "notifications/message", "params": {"level": "info", "data": "x" * 50_000}}
    )
    with session(url) as here:
        for number in range(20):
            puppet.say(note[:100], note[100:30_000])
            assert here.post(request(number, "tickets/purge")).status == 202
            puppet.say(note[30_000:])
        seen = [here.client.message() for _ in range(40)]
    assert sum("id" in each for each in seen) == 20
    assert sum("method" in each for each in seen) == 20


def test_who_does_not_read_is_told_no_more_and_nobody_else_waits(puppet: Puppet, url: str) -> None:
    data = "x" * 30_000_000
    note = {"method": "notifications/message", "params": {"level": "info", "data": data}}
    with session(url) as here, Wire(url, timeout=1.0) as wire:
        puppet.say(event(note))
        assert here.client.stream.read(7) == b"event: "
        wire.request(dump(request(1, "tickets/purge")), target=here.endpoint)
        with pytest.raises(TimeoutError):
            wire.answer()
        with session(url) as other:
            other.ask(call(1))
        assert (
            data in here.client.stream.readline().decode() + here.client.message()["params"]["data"]
        )
        assert code(here.client.message()) == -32601
        wire.socket.settimeout(20)
        assert wire.answer().status == 202
