"""What is open when somebody is revoked, or the policy changes, ends; all else goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest
from aiohttp import web

from tests.support import puppet_server, scripted
from tests.support.opa import real_opa, write
from tests.support.processes import (
    ALLOW_ALL,
    ROOT,
    Process,
    Served,
    bridge,
    http_sidecar,
    patient,
    sidecar,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    Headers,
    Object,
    Pipe,
    Wire,
    beside,
    call,
    code,
    dump,
    initialize,
    mirrors,
    modern,
    post,
    post_modern,
    request,
    stdio_sidecar,
)
from tests.support.scripted import Asked, Scripted
from tests.support.sse_client import Client as Listener
from tests.support.sse_client import listening
from tests.support.sse_puppet import Puppet, sse_puppet

IN_FORCE = 5.0
DENIED = -31403
OPEN = 'allow contains {{"rule": "all", "any": true}} if input.target.type != "{0}"\n'
REVOKED = {"principals": {"static|ana": "left the company"}}
LISTEN = request("s", "subscriptions/listen", {"notifications": {"toolsListChanged": True}})
SESSION = ("Mcp-Session-Id", "the-session")
GET = (("Accept", "text/event-stream"), SESSION)
GREETED = {"jsonrpc": "2.0", "method": "notifications/initialized"}

Revoke = Callable[[], None]


# ── Who decides, and how somebody is revoked ──────────────────────────────────────────────────────


@contextmanager
def folder(opa_bin: Path, tmp_path: Path) -> Iterator[tuple[list[str], Revoke]]:
    """Each sidecar has an OPA of its own, over one folder that is edited."""
    policy = Path(shutil.copytree(ALLOW_ALL, tmp_path / "policy"))

    def revoke() -> None:
        write(policy, {"data.json": json.dumps({"mcp_revoked": REVOKED})})

    yield ["--policy", str(policy)], revoke


@contextmanager
def co_located(opa_bin: Path, tmp_path: Path) -> Iterator[tuple[list[str], Revoke]]:
    """The sidecars share an OPA, which is told."""
    with beside(real_opa(opa_bin, ROOT / "policies" / "mcp", str(ALLOW_ALL))) as opa:

        def revoke() -> None:
            put(opa.url, "/v1/data/mcp_revoked", REVOKED)

        yield ["--opa", opa.url], revoke


DECIDERS = [pytest.param(folder, id="own OPA"), pytest.param(co_located, id="co-located OPA")]


def put(url: str, path: str, value: Object) -> None:
    """Tell an OPA on a unix socket."""
    body = dump(value)
    head = f"PUT {path} HTTP/1.1\r\nHost: opa\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(url.removeprefix("unix://"))
        wire.sendall(head.encode() + body)
        assert b" 204 " in wire.recv(1024)


@pytest.fixture
def env(opa_bin: Path) -> dict[str, str]:
    return patient(opa_bin)


# ── Clients ───────────────────────────────────────────────────────────────────────────────────────


class Open:
    """A request whose answer lasts; a thread reads it to its end."""

    def __init__(
        self, stack: ExitStack, url: str, body: bytes = b"", headers: Headers = GET
    ) -> None:
        self._wire = stack.enter_context(Wire(url, timeout=60))
        self.ended: float | None = None
        self.status, self.body = 0, b""
        self._wire.request(body, headers, verb="POST" if body else "GET")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        stack.callback(self._reader.join, 5)
        stack.callback(self._wire.hang_up)

    def _read(self) -> None:
        try:
            answer = self._wire.answer()
            self.status, self.body = answer.status, answer.body
        except (OSError, HTTPException):
            self.body = b"broken"
        self.ended = time.monotonic()

    def last(self) -> Object:
        """The last message that came."""
        return dict(json.loads(self.body.rpartition(b"data: ")[2]))


def posted(stack: ExitStack, url: str, message: Object, *more: tuple[str, str]) -> Open:
    return Open(stack, url, dump(message), [*JSON_HEADERS, *more])


def posted_modern(stack: ExitStack, url: str, message: Object) -> Open:
    return posted(stack, url, modern(message), *mirrors(message))


class Loop:
    """Calls, one after the other, until one is refused."""

    def __init__(self, stack: ExitStack, url: str) -> None:
        self.calls, self.refused = 0, list[float]()
        self.times: list[tuple[float, float]] = []
        self._url, self._done = url, threading.Event()
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        stack.callback(thread.join, 5)
        stack.callback(self._done.set)

    def _run(self) -> None:
        while not self._done.is_set() and not self.refused:
            began = time.monotonic()
            answer = post_modern(self._url, call(self.calls)).message
            self.times.append((began, time.monotonic() - began))
            self.calls += 1
            if code(answer) == DENIED:
                self.refused.append(time.monotonic())


class Lasting:
    """A server whose streams and slow calls last until somebody ends them."""

    async def __call__(
        self, server: Scripted, request: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        name = asked.message.get("params", {}).get("name")
        if asked.verb == "GET" or asked.method == "subscriptions/listen" or name == "streamed":
            await scripted.stream(request, ": here")
            await asyncio.Event().wait()
        if name == "silent":
            await asyncio.Event().wait()
        return None


@dataclass
class Client:
    """What one client has open."""

    served: Served
    streams: dict[str, Open]
    calls: dict[str, Open]
    loop: Loop

    @property
    def open(self) -> dict[str, Open]:
        return {**self.streams, **self.calls}


def client(stack: ExitStack, served: Served, server: Scripted) -> Client:
    """Open one of each, and wait until the server has them."""
    url, before = served.url, len(server.asked)
    post(url, initialize())
    post(url, GREETED, [SESSION])
    opened = Client(
        served,
        streams={
            "listen stream": posted_modern(stack, url, LISTEN),
            "GET stream": Open(stack, url),
        },
        calls={
            "call of the stateless revision": posted_modern(stack, url, call(1, "silent")),
            "streamed call": posted_modern(stack, url, call(2, "streamed")),
            "call in a session": posted(stack, url, call(3, "silent"), SESSION),
        },
        loop=Loop(stack, url),
    )

    def there() -> bool:
        asked = [each.message.get("id", each.verb) for each in server.asked[before:]]
        return {"s", "GET", 1, 2, 3} <= set(asked) and opened.loop.calls > 0

    wait_until(there, "everything is open")
    return opened


# ── Revocation ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("decided_by", DECIDERS)
def test_what_somebody_has_open_ends_with_the_revocation_and_nobody_else_notices(
    decided_by: Callable[[Path, Path], AbstractContextManager[tuple[list[str], Revoke]]],
    opa_bin: Path,
    tmp_path: Path,
    env: dict[str, str],
) -> None:
    with ExitStack() as stack:
        decide, revoke = stack.enter_context(decided_by(opa_bin, tmp_path))
        theirs = stack.enter_context(scripted.scripted(Lasting()))
        others = stack.enter_context(scripted.scripted(Lasting()))
        audit = tmp_path / "audit"
        more: dict[str, list[str | Path]] = {"ana": ["--audit", audit], "bea": []}
        one, other = (
            stack.enter_context(
                http_sidecar(each.url, *decide, "--actor", f"human:{name}", *more[name], env=env)
            )
            for name, each in (("ana", theirs), ("bea", others))
        )
        ana, bea = client(stack, one, theirs), client(stack, other, others)
        began = time.monotonic()
        revoke()
        wait_until(
            lambda: ana.loop.refused and all(each.ended for each in ana.open.values()),
            "everything of hers has ended",
        )
        ended = {name: each.ended or 0 for name, each in ana.open.items()}
        ended["call in a loop"] = ana.loop.refused[0]
        for name, when in ended.items():
            print(f"{name}: {when - began:.2f} s")
        assert max(ended.values()) - began < IN_FORCE
        for each in (*ana.calls.values(), ana.streams["listen stream"]):
            error = each.last()["error"]
            assert (error["code"], error["data"]["reasons"][0]["code"]) == (DENIED, "revoked")
            perhaps = "it may have executed" in error["data"]["reasons"][0]["message"]
            assert perhaps is (each in ana.calls.values())
        assert ana.streams["GET stream"].status == 200
        # The server is told: by closed connections, and in a session by a message.
        wait_until(lambda: len(theirs.closed) >= len(ana.open), "the server's side is closed")
        cancel = theirs.wait_for("notifications/cancelled").message
        assert cancel["params"]["requestId"] == 3
        assert theirs.wait_for("DELETE").headers[SESSION[0].lower()] == SESSION[1]
        # Nothing is left, and nothing begins.
        assert post(one.url, call(9), [SESSION]).status == 404
        assert code(post(one.url, initialize()).message) == DENIED
        assert recorded(audit) >= {
            ("tools/call", "denied", True),
            ("subscriptions/listen", "denied", True),
            ("stream/open", "denied", False),
            ("initialize", "denied", False),
        }
        calls = bea.loop.calls
        wait_until(lambda: bea.loop.calls > calls + 10, "the others' calls go on")
        assert [name for name, each in bea.open.items() if each.ended] == []
        assert others.closed == []
        assert others.seen("DELETE") == []
        assert "result" in post(other.url, call(9), [SESSION]).message


def recorded(audit: Path) -> set[tuple[str, str, bool]]:
    """Method and outcome of what was refused, and whether it had gone out to the server."""
    records = [json.loads(line) for line in audit.read_text(encoding="utf-8").splitlines()]
    return {
        (each["method"], each["outcome"], each["forwarded"])
        for each in records
        if each["type"] == "outcome" and each["decision"] == "deny"
    }


@pytest.mark.parametrize("era", ["handshake", "stateless"])
def test_a_pipe_ends_with_its_call(
    opa_bin: Path, tmp_path: Path, env: dict[str, str], era: str
) -> None:
    said = modern if era == "stateless" else dict
    logs = {name: tmp_path / name for name in ("ana", "bea")}
    with co_located(opa_bin, tmp_path) as (decide, revoke), ExitStack() as stack:
        ana, bea = (
            stack.enter_context(
                stdio_sidecar(
                    puppet_server.command(log), *decide, "--actor", f"human:{name}", env=env
                )
            )
            for name, log in logs.items()
        )
        for each in (ana, bea):
            if era == "handshake":
                each.greet()
            each.send(said(call(7, "say", then="wait")))
        for log in logs.values():
            wait_until(partial(puppet_server.heard, log, "tools/call"), "the call is there")
        began = time.monotonic()
        revoke()
        answer = ana.answer(7)
        print(f"call of a pipe: {time.monotonic() - began:.2f} s")
        assert answer["error"]["data"]["reasons"][0]["code"] == "revoked"
        assert ana.wait_for_end() == 0
        took = time.monotonic() - began
        print(f"pipe: {took:.2f} s")
        assert took < IN_FORCE
        (told,) = puppet_server.heard(logs["ana"], "notifications/cancelled")
        assert told["params"]["requestId"] == 7
        assert "result" in bea.ask(said(call(8, "say")))
        assert puppet_server.heard(logs["bea"], "notifications/cancelled") == []


def test_a_session_of_the_legacy_transport_ends_with_its_stream(
    opa_bin: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    with (
        co_located(opa_bin, tmp_path) as (decide, revoke),
        sse_puppet() as theirs,
        sse_puppet() as others,
        http_sidecar(theirs.url, *decide, "--actor", "human:ana", env=env) as ana,
        http_sidecar(others.url, *decide, "--actor", "human:bea", env=env) as bea,
        listening(ana.url) as her,
        listening(bea.url) as them,
    ):
        endpoint, other = greeted(her), greeted(them)
        theirs.answers = others.answers = False
        assert post(ana.url, call(7), target=endpoint).status == 202
        assert post(bea.url, call(7), target=other).status == 202
        began = time.monotonic()
        revoke()
        assert her.message()["error"]["data"]["reasons"][0]["code"] == "revoked"
        assert her.stream.read() == b""
        took = time.monotonic() - began
        print(f"session of the legacy transport: {took:.2f} s")
        assert took < IN_FORCE
        assert theirs.wait_for("notifications/cancelled")["params"]["requestId"] == 7
        wait_until(partial(closed, theirs), "the server's stream is closed")
        assert post(ana.url, call(8), target=endpoint).status == 404
        others.answers = True
        assert post(bea.url, call(8), target=other).status == 202
        assert them.message()["id"] == 8


def closed(puppet: Puppet) -> bool:
    """It is by writing that this server learns who is gone."""
    puppet.say(b":\n\n")
    return puppet.closed > 0


def greeted(listener: Listener) -> str:
    """Where a client that has shaken hands, and called once, sends its messages."""
    endpoint = listener.endpoint
    post(listener.url, initialize(), target=endpoint)
    assert listener.message()["id"] == "init"
    post(listener.url, GREETED, target=endpoint)
    post(listener.url, call(1), target=endpoint)
    assert listener.message()["id"] == 1
    return endpoint


@pytest.mark.parametrize("shared", [False, True], ids=["sessions", "shared"])
def test_calls_of_a_bridge_end_and_its_server_is_told(
    opa_bin: Path, tmp_path: Path, env: dict[str, str], shared: bool
) -> None:
    log = tmp_path / "log"
    config = write(tmp_path, {"sidecar.yaml": f"bridge: {{shared: {str(shared).lower()}}}\n"})
    options = ["--config", str(config / "sidecar.yaml"), "--actor", "human:ana"]
    with (
        co_located(opa_bin, tmp_path) as (decide, revoke),
        bridge(puppet_server.command(log), *decide, *options, env=env) as served,
        ExitStack() as stack,
    ):
        waits, stream = call(7, "say", then="wait"), None
        if shared:
            lasting = posted_modern(stack, served.url, waits)
        else:
            session = ("Mcp-Session-Id", post(served.url, initialize()).headers["mcp-session-id"])
            post(served.url, GREETED, [session])
            stream = Open(stack, served.url, headers=[GET[0], session])
            lasting = posted(stack, served.url, waits, session)
        wait_until(lambda: puppet_server.heard(log, "tools/call"), "the call is there")
        began = time.monotonic()
        revoke()
        wait_until(lambda: lasting.ended, "the call has ended")
        assert lasting.last()["error"]["data"]["reasons"][0]["code"] == "revoked"
        if stream is not None:
            wait_until(lambda: stream.ended, "the stream has ended")
            wait_until(lambda: post(served.url, call(8), [session]).status == 404, "it is gone")
        took = time.monotonic() - began
        print(f"bridge: {took:.2f} s")
        assert took < IN_FORCE
        wait_until(lambda: puppet_server.heard(log, "notifications/cancelled"), "it is told")


# ── Policy changes ────────────────────────────────────────────────────────────────────────────────


def allow_all_but(policy: Path, target: str) -> None:
    write(policy, {"custom.rego": "package mcp.custom\n\n" + OPEN.format(target)})


def test_a_policy_closes_the_streams_that_it_would_not_open_and_lets_calls_end(
    tmp_path: Path, env: dict[str, str]
) -> None:
    policy = tmp_path / "policy"
    allow_all_but(policy, "nothing")
    with (
        scripted.scripted(Lasting()) as server,
        http_sidecar(server.url, "--policy", policy, "--admin", "127.0.0.1:0", env=env) as served,
        ExitStack() as stack,
    ):
        mine = client(stack, served, server)
        for target, ends in (("prompt", set[str]()), ("stream", {"GET stream"})):
            allow_all_but(policy, target)
            wait_until(partial(has_ended, mine, ends), "what is denied has ended")
            wait_until(partial(goes_on, mine.loop, mine.loop.calls), "calls go on")
            assert ended(mine) == ends
        allow_all_but(policy, "subscription")
        wait_until(lambda: "listen stream" in ended(mine), "the subscription has ended")
        allow_all_but(policy, "tool")
        wait_until(lambda: mine.loop.refused, "new calls are refused")
        assert ended(mine) == set(mine.streams)


def test_a_policy_closes_the_stream_of_a_pipe_that_does_not_know_of_it(
    tmp_path: Path, env: dict[str, str]
) -> None:
    policy = tmp_path / "policy"
    allow_all_but(policy, "nothing")
    with (
        scripted.scripted(Lasting()) as server,
        Process(
            sidecar("stdio", "--policy", policy, "--upstream", server.url), env=env, pipes=True
        ) as process,
    ):
        pipe = Pipe(process)
        pipe.greet()
        server.wait_for("GET")
        assert "result" in pipe.ask(call(1))
        allow_all_but(policy, "stream")
        wait_until(lambda: server.closed == ["GET"], "the stream is closed")
        assert "result" in pipe.ask(call(2))
        assert len(server.seen("GET")) == 1


def has_ended(mine: Client, which: set[str]) -> bool:
    return ended(mine) >= which


def goes_on(loop: Loop, calls: int) -> bool:
    return loop.calls > calls + 100


def ended(mine: Client) -> set[str]:
    return {name for name, each in mine.open.items() if each.ended}


# ── Many ──────────────────────────────────────────────────────────────────────────────────────────

STREAMS = 500


def test_calls_go_on_while_very_many_streams_are_asked_about(
    opa_bin: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    with (
        co_located(opa_bin, tmp_path) as (decide, revoke),
        scripted.scripted(Lasting()) as server,
        http_sidecar(server.url, *decide, "--actor", "human:ana", env=env) as ana,
        http_sidecar(server.url, *decide, "--actor", "human:bea", env=env) as bea,
        ExitStack() as stack,
    ):
        asyncio.run(_many(ana.url, Loop(stack, bea.url), revoke))


async def _many(url: str, others: Loop, revoke: Revoke) -> None:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None)
    headers = dict([*JSON_HEADERS, *mirrors(LISTEN)])
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        narrow = asyncio.Semaphore(50)

        async def listen(number: int) -> aiohttp.ClientResponse:
            async with narrow:
                body = dump(modern({**LISTEN, "id": number}))
                return await session.post(url, data=body, headers=headers)

        async with asyncio.timeout(30):
            streams = await asyncio.gather(*map(listen, range(STREAMS)))
        quiet = time.monotonic()
        await asyncio.to_thread(lambda: wait_until(lambda: len(others.times) > 300, "calls"))
        began = time.monotonic()
        await asyncio.to_thread(revoke)
        first = await streams[0].read()
        noticed = time.monotonic()
        bodies = await asyncio.gather(*(each.read() for each in streams[1:]))
        took = time.monotonic()
    assert all(b"revoked" in each for each in (first, *bodies))
    before = [spent for when, spent in others.times if quiet <= when < began]
    during = [spent for when, spent in others.times if noticed - 0.05 <= when <= took]
    print(
        f"{STREAMS} streams ended {took - began:.2f} s after the change, "
        f"{took - noticed:.2f} s after the first; calls of others: p50 "
        f"{statistics.median(before) * 1000:.1f} ms before, "
        f"{statistics.median(during or [0]) * 1000:.1f} ms meanwhile ({len(during)} calls)"
    )
    assert took - began < IN_FORCE
    assert others.refused == []
