"""`mcp-sidecar stdio --upstream URL` on the wire: what the server behind HTTP sees and may say."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support.processes import ALLOW_ALL, DENY_ALL, patient, wait_until
from tests.support.raw import Pipe, call, code, modern, request, stdio_sidecar
from tests.support.scripted import (
    EVENTS,
    Answer,
    Asked,
    Scripted,
    event,
    result,
    scripted,
    stream,
    tool,
)

Open = Callable[[str], AbstractContextManager[Pipe]]


@pytest.fixture
def bridge(opa_bin: Path) -> Open:
    """A sidecar in front of an address, and a raw client in front of the sidecar."""
    env = patient(opa_bin)
    return lambda url: stdio_sidecar((), "--policy", ALLOW_ALL, "--upstream", url, env=env)


async def nothing_special(server: Scripted, request: web.Request, asked: Asked) -> None:
    """A plain server."""


def cancel(number: object) -> dict[str, Any]:
    params = {"requestId": number}
    return {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}


def says(text: str, message: dict[str, Any]) -> bool:
    return bool(message.get("params", {}).get("data") == text)


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["result"]["content"][0]["text"])


def done(asked: Asked, text: str = "done") -> dict[str, Any]:
    return {"id": asked.message["id"], "result": {"content": [{"type": "text", "text": text}]}}


# ── A session ─────────────────────────────────────────────────────────────────────────────────────


def test_a_session_goes_with_every_request_and_ends_with_the_pipe(bridge: Open) -> None:
    with scripted(nothing_special) as server, bridge(server.url) as pipe:
        pipe.greet("2025-06-18")
        assert text_of(pipe.ask(call(1))) == "done"
        server.wait_for("GET")
        pipe.end()
        assert pipe.wait_for_end() == 0
        asked = {each.method: each for each in server.asked}
    opening = asked.pop("initialize")
    assert not {"mcp-session-id", "mcp-protocol-version"} & set(opening.headers)
    assert set(asked) == {"notifications/initialized", "tools/list", "tools/call", "GET", "DELETE"}
    for each in asked.values():
        assert each.headers["mcp-session-id"] == "the-session"
        assert each.headers["mcp-protocol-version"] == "2025-06-18"
        assert "mcp-method" not in each.headers
    assert asked["tools/call"].headers["accept"] == "application/json, text/event-stream"
    assert asked["GET"].headers["accept"] == "text/event-stream"


def test_nothing_overtakes_the_greeting(bridge: Open) -> None:
    async def answer(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
        if asked.method == "notifications/initialized":
            await asyncio.sleep(0.5)
        return None

    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.greet()
        pipe.ask(call(1))
        assert [each.method for each in server.asked][:3] == [
            "initialize",
            "notifications/initialized",
            "tools/list",
        ]


def test_fifty_calls_leave_in_the_order_in_which_they_came(bridge: Open) -> None:
    gate = asyncio.Event()

    async def answer(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
        if asked.method == "tools/call":
            if asked.message["id"] == 49:
                gate.set()
            await gate.wait()
        return None

    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.greet()
        pipe.ask(request("list", "tools/list"))
        pipe.send(*(call(number) for number in range(50)))
        for number in range(50):
            pipe.answer(number)
        arrived = [each.message["id"] for each in server.seen("tools/call")]
    assert arrived == list(range(50))


def test_a_session_that_is_gone_is_an_error_for_all_until_a_new_handshake(bridge: Open) -> None:
    lost: list[bool] = []

    async def answer(_: Scripted, incoming: web.Request, asked: Asked) -> web.StreamResponse | None:
        if asked.method == "initialize":
            lost.clear()
        elif lost or asked.message.get("id") == "lose":
            lost.append(True)
            return web.Response(status=404)
        elif asked.message.get("id") == "slow":
            response = await stream(incoming)
            await asyncio.sleep(60)
            return response
        return None

    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.greet()
        pipe.ask(request("list", "tools/list"))
        pipe.send(call("slow"))
        wait_until(lambda: server.seen("tools/call"), "the slow call arrived")
        assert code(pipe.ask(call("lose"))) == -31502
        assert code(pipe.answer("slow")) == -31502
        asked = len(server.asked)
        after = pipe.ask(call("after"))
        assert code(after) == -31502
        assert "the session is gone; not executed" in json.dumps(after)
        assert len(server.asked) == asked
        pipe.forget()
        pipe.greet()
        assert text_of(pipe.ask(call("again"))) == "done"


def test_the_servers_own_stream_goes_on_where_it_ended(bridge: Open) -> None:
    def notice(number: int) -> str:
        params = {"level": "info", "data": f"No. {number}"}
        return event({"method": "notifications/message", "params": params}, f"event-{number}")

    async def answer(
        server: Scripted, incoming: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        if asked.verb != "GET":
            return None
        number = len(server.seen("GET"))
        response = await stream(incoming, f"retry: 30\n{notice(number)}")
        if number == 3:
            await asyncio.sleep(60)
        return response

    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.greet()
        for number in (1, 2, 3):
            pipe.first(partial(says, f"No. {number}"))
        headers = [each.headers.get("last-event-id") for each in server.seen("GET")]
    assert headers == [None, "event-1", "event-2"]


def test_a_stream_that_ends_before_its_answer_is_resumed(bridge: Open) -> None:
    async def answer(
        server: Scripted, incoming: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        resumed = asked.headers.get("last-event-id", "")
        if asked.method == "tools/call":
            return await stream(incoming, "id: 7.0\nretry: 40\ndata:")
        if resumed == "7.0":
            progress = {"progressToken": 1, "progress": 0.5}
            message = {"method": "notifications/progress", "params": progress}
            return await stream(incoming, event(message, "7.1"))
        if resumed == "7.1":
            return await stream(incoming, event(done(server.seen("tools/call")[0], "late"), "7.2"))
        return None

    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.greet()
        pipe.ask(request("list", "tools/list"))
        began = time.monotonic()
        assert text_of(pipe.ask(call(1))) == "late"
        assert time.monotonic() - began > 0.08  # twice what the server asked for
        assert len(server.seen("tools/call")) == 1
        assert [each.get("method") for each in pipe.messages()].count("notifications/progress") == 1


@pytest.mark.parametrize("envelope", [False, True], ids=["session", "stateless"])
def test_a_stream_that_can_not_be_resumed_is_an_error(bridge: Open, envelope: bool) -> None:
    async def answer(
        server: Scripted, incoming: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        if asked.method != "tools/call":
            return None
        return await stream(incoming, ": nothing\n", "id: 1\ndata:" if envelope else "data:")

    with scripted(answer) as server, bridge(server.url) as pipe:
        if not envelope:
            pipe.greet()
        answer_ = pipe.ask(modern(call(1)) if envelope else call(1))
        assert code(answer_) == -31502
        assert "may have executed" in json.dumps(answer_)
        assert len(server.seen("tools/call")) == 1


@pytest.mark.parametrize("own_id", [False, True], ids=["no id", "its id"])
def test_404_is_the_end_of_a_session_unless_it_is_about_the_method(
    bridge: Open, own_id: bool
) -> None:
    async def answer(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
        if asked.method != "prompts/list":
            return None
        number = asked.message["id"] if own_id else None
        error = {"code": -32601, "message": "Method not found"}
        return web.json_response({"jsonrpc": "2.0", "id": number, "error": error}, status=404)

    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.greet()
        assert code(pipe.ask(request(1, "prompts/list"))) == (-32601 if own_id else -31502)
        assert code(pipe.ask(call(2))) == (None if own_id else -31502)


def test_a_policy_that_denies_all_opens_no_stream_and_ends_the_session(opa_bin: Path) -> None:
    options = ("--policy", DENY_ALL, "--upstream")
    with (
        scripted(nothing_special) as server,
        stdio_sidecar((), *options, server.url, env=patient(opa_bin)) as pipe,
    ):
        pipe.greet()
        assert code(pipe.ask(call(1))) == -31403
        pipe.end()
        assert pipe.wait_for_end() == 0
        asked = {each.method for each in server.asked}
    assert asked == {"initialize", "notifications/initialized", "tools/list", "DELETE"}


def test_a_cancelled_request_is_told_to_the_server_and_not_hung_up_on(bridge: Open) -> None:
    async def answer(
        server: Scripted, incoming: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        if asked.method == "tools/call" and asked.message["id"] == "held":
            response = await stream(incoming)
            await asyncio.sleep(60)
            return response
        return None

    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.greet()
        pipe.ask(request("list", "tools/list"))
        pipe.send(call("held"))
        wait_until(lambda: server.seen("tools/call"), "the call arrived")
        pipe.send(cancel("held"))
        told = server.wait_for("notifications/cancelled")
        assert told.message["params"]["requestId"] == "held"
        assert server.closed == []
        assert text_of(pipe.ask(call("next"))) == "done"


# ── Without a session ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("listening", [False, True], ids=["call", "subscription"])
def test_a_cancelled_stateless_request_is_hung_up_on(bridge: Open, listening: bool) -> None:
    async def answer(
        server: Scripted, incoming: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        if asked.message.get("id") != "held":
            return None
        response = await stream(incoming)
        await asyncio.sleep(60)
        return response

    notifications = {"notifications": {"toolsListChanged": True}}
    held = request("held", "subscriptions/listen", notifications) if listening else call("held")
    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.ask(modern(request("list", "tools/list")))
        pipe.send(modern(held))
        wait_until(lambda: server.seen(held["method"]), "it arrived")
        began = time.monotonic()
        pipe.send(cancel("held"))
        wait_until(lambda: server.closed == [held["method"]], "it was hung up on")
        assert time.monotonic() - began < 1
        assert text_of(pipe.ask(modern(call("next")))) == "done"
        pipe.end()
        assert pipe.wait_for_end() == 0
        assert not {"notifications/cancelled", "GET", "DELETE"} & {e.method for e in server.asked}


def test_headers_repeat_the_body(bridge: Open) -> None:
    region = {"type": "string", "x-mcp-header": "Region"}
    count = {"type": "object", "properties": {"n": {"type": "integer", "x-mcp-header": "N"}}}
    bad = tool("bad", one={"type": "number", "x-mcp-header": "One"})

    async def answer(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
        if asked.method == "tools/list":
            return result(asked, {"tools": [tool("naïve tool", region=region, count=count), bad]})
        return None

    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.ask(modern(call(1, "naïve tool", region="Süden", count={"n": 7}, other=1)))
        listed = pipe.ask(modern(request(2, "tools/list")))
        asked = server.seen("tools/call")[0].headers
        own = server.seen("tools/list")[0].headers
    assert [each["name"] for each in listed["result"]["tools"]] == ["naïve tool"]
    assert asked["mcp-protocol-version"] == own["mcp-protocol-version"] == "2026-07-28"
    assert (asked["mcp-method"], own["mcp-method"]) == ("tools/call", "tools/list")
    assert asked["mcp-name"] == "=?base64?bmHDr3ZlIHRvb2w=?="
    assert asked["mcp-param-region"] == "=?base64?U8O8ZGVu?="
    assert asked["mcp-param-n"] == "7"
    assert {each for each in asked if each.startswith("mcp-")} == {
        "mcp-protocol-version",
        "mcp-method",
        "mcp-name",
        "mcp-param-region",
        "mcp-param-n",
    }


# ── Servers that are not as they should be ────────────────────────────────────────────────────────


async def _refuses(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
    error = {"code": -32022, "message": "no", "data": {"supported": []}}
    body = {"jsonrpc": "2.0", "id": None, "error": error}
    return web.json_response(body, status=400) if asked.method == "tools/call" else None


async def _redirects(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
    headers = {"Location": "/elsewhere"}
    return web.Response(status=307, headers=headers) if asked.method == "tools/call" else None


async def _says_nothing(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
    return web.Response(status=202) if asked.method == "tools/call" else None


async def _fails(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
    return web.Response(status=500, text="oh no") if asked.method == "tools/call" else None


async def _breaks(_: Scripted, incoming: web.Request, asked: Asked) -> web.StreamResponse | None:
    if asked.method != "tools/call":
        return None
    assert incoming.transport is not None
    incoming.transport.abort()
    return web.Response()


async def _answers_another(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
    body = {"jsonrpc": "2.0", "id": "somebody's", "result": {}}
    return web.json_response(body) if asked.method == "tools/call" else None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param(_refuses, -32022, id="an error for no id"),
        pytest.param(_redirects, -31502, id="a redirect"),
        pytest.param(_says_nothing, -31502, id="202 to a request"),
        pytest.param(_fails, -31502, id="500"),
        pytest.param(_breaks, -31502, id="a broken connection"),
        pytest.param(_answers_another, -31502, id="another id"),
    ],
)
def test_a_request_is_answered_once_and_posted_once(
    bridge: Open, script: Answer, expected: int
) -> None:
    with scripted(script) as server, bridge(server.url) as pipe:
        assert code(pipe.ask(modern(call(1)))) == expected
        pipe.ask(modern(request(2, "tools/list")))
        assert len(server.seen("tools/call")) == 1
        assert len([each for each in pipe.messages() if each.get("id") == 1]) == 1


def test_an_answer_over_several_lines_is_one_line_on_the_pipe(bridge: Open) -> None:
    async def answer(
        server: Scripted, incoming: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        if asked.method != "tools/call":
            return None
        body = json.dumps({"jsonrpc": "2.0", **done(asked)}, indent=2)
        if asked.message["id"] == "json":
            return web.Response(text=body, content_type="application/json")
        lines = "\n".join(f"data: {line}" for line in body.splitlines())
        return web.Response(text=f"{lines}\n\n", headers=EVENTS)

    with scripted(answer) as server, bridge(server.url) as pipe:
        for number in ("json", "events"):
            assert text_of(pipe.ask(modern(call(number)))) == "done"


def test_what_was_asked_is_answered_when_the_client_says_no_more(bridge: Open) -> None:
    async def answer(_: Scripted, __: web.Request, asked: Asked) -> web.StreamResponse | None:
        if asked.method == "tools/call":
            await asyncio.sleep(0.5)
        return None

    notifications = {"notifications": {"toolsListChanged": True}}
    with scripted(answer) as server, bridge(server.url) as pipe:
        pipe.send(modern(call(1)), modern(request(2, "subscriptions/listen", notifications)))
        pipe.end()
        assert pipe.wait_for_end() == 0
        assert text_of(pipe.answer(1)) == "done"
