"""A client that goes away during a call: its request ends upstream, and the server does as ever.

A stateless server cancels the call. A server of the handshake revisions finishes it, for the client
may come back for the answer; it is cancelled by a notification alone. The server itself tells.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from tests.support.processes import (
    ALLOW_ALL,
    LISTENING,
    Process,
    bridge,
    http_sidecar,
    patient,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    Headers,
    Object,
    Wire,
    call,
    dump,
    initialize,
    mirrors,
    modern,
    post,
)
from tests.support.scripted import Asked, Scripted, scripted, stream

SERVER = (sys.executable, "-m", "tests.clients.server")
POLICY = ("--policy", ALLOW_ALL)
KEY = "the-call"
TOKEN = "the-token"
SECOND = 1.0
ERAS = ("handshake", "stateless")
AFTERWARDS = {"handshake": "finished", "stateless": "cancelled"}

Env = dict[str, str]
Between = Callable[[str, Env], AbstractContextManager[str]]

by_era = pytest.mark.parametrize("era", ERAS)


@pytest.fixture
def env(opa_bin: Path) -> Env:
    return patient(opa_bin)


# ── A client of either era, byte by byte ──────────────────────────────────────────────────────────


@dataclass
class Caller:
    """A client at an address; one of the handshake revisions has a session."""

    url: str
    era: str
    session: str = ""

    def __post_init__(self) -> None:
        if self.era == "handshake":
            self.session = post(self.url, initialize()).headers["mcp-session-id"]
            self._post({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def ask(self, name: str) -> str:
        """The text that a tool answers with."""
        answer = self._post(self._message(call(1, name, key=KEY)))
        return str(answer["result"]["content"][0]["text"])

    @contextmanager
    def calling(self, name: str, **arguments: Any) -> Iterator[Wire]:
        """A call on a connection that ends with the block, answered or not."""
        message = self._message(call(2, name, **arguments))
        message["params"].setdefault("_meta", {})["progressToken"] = TOKEN
        with Wire(self.url) as wire:
            wire.request(dump(message), (*JSON_HEADERS, *self._headers(message)))
            yield wire
            wire.hang_up()

    def _message(self, message: Object) -> Object:
        return modern(message) if self.era == "stateless" else message

    def _headers(self, message: Object) -> Headers:
        return mirrors(message) if self.era == "stateless" else [("Mcp-Session-Id", self.session)]

    def _post(self, message: Object) -> Object:
        answer = post(self.url, message, tuple(self._headers(message)))
        return answer.message if answer.body else {}


def caller_of(response: HTTPResponse) -> str:
    """Who has called, by the word of the server: it reports progress as soon as it has begun."""
    for line in iter(response.readline, b""):
        field, _, value = line.partition(b": ")
        if field == b"data" and b"notifications/progress" in value:
            return str(json.loads(value)["params"]["message"])
    raise AssertionError("the stream has ended")


# ── Over HTTP ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def through_sidecar(url: str, env: Env) -> Iterator[str]:
    with http_sidecar(url, *POLICY, env=env) as served:
        yield served.url


def connected(pid: int, port: str) -> bool:
    """Whether the process still has a connection from this port."""
    return any(
        each.raddr and each.raddr.port == int(port) and each.status == psutil.CONN_ESTABLISHED
        for each in psutil.Process(pid).net_connections("tcp")
    )


@by_era
@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda url, _: nullcontext(url), id="without"),
        pytest.param(through_sidecar, id="sidecar"),
    ],
)
def test_the_server_loses_its_caller_within_a_second_and_does_as_ever(
    env: Env, era: str, between: Between
) -> None:
    with (
        Process([*SERVER, "--transport", "http"]) as server,
        between(server.wait_for(LISTENING)[1], env) as url,
    ):
        client = Caller(url, era)
        with client.calling("hold", key=KEY, named=True) as wire:
            port = caller_of(wire.begin())
            assert connected(server.pid, port)
        wait_until(lambda: not connected(server.pid, port), "the connection is gone", SECOND)
        if era == "handshake":
            client.ask("release")
        assert client.ask("fate") == AFTERWARDS[era]


@by_era
@pytest.mark.parametrize("answering", [False, True], ids=["before-headers", "in-the-stream"])
def test_a_server_that_says_nothing_is_hung_up_on(env: Env, era: str, answering: bool) -> None:
    async def answer(
        server: Scripted, request: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        if asked.message.get("params", {}).get("name") != "hold":
            return None
        if answering:
            await stream(request)
        await asyncio.sleep(60)
        return None

    with scripted(answer) as server, http_sidecar(server.url, *POLICY, env=env) as served:
        client = Caller(served.url, era)
        with client.calling("hold"):
            server.wait_for("tools/call")
        wait_until(lambda: server.closed == ["tools/call"], "it was hung up on", SECOND)
        assert client.ask("echo") == "done"
        assert not server.seen("notifications/cancelled")


# ── Over the bridge ───────────────────────────────────────────────────────────────────────────────


@by_era
def test_a_stdio_server_does_the_same(env: Env, era: str) -> None:
    with bridge(SERVER, *POLICY, env={**env, "MCP_SIDECAR_BRIDGE__SHARED": "true"}) as served:
        client = Caller(served.url, era)
        with client.calling("hold", key=KEY, named=True) as wire:
            caller_of(wire.begin())
        if era == "handshake":
            client.ask("release")
        assert client.ask("fate") == AFTERWARDS[era]
