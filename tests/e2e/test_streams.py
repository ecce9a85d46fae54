"""Streams that last: a thousand at once, answers that come on another one, and lines for events."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from aiohttp import web

from tests.support import scripted, stream_server
from tests.support.processes import (
    ALLOW_ALL,
    LISTENING,
    Process,
    Served,
    held,
    holds_no_more,
    http_sidecar,
    patient,
    sidecar,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    Object,
    Pipe,
    Wire,
    call,
    dump,
    initialize,
    mirrors,
    modern,
    post,
    request,
)
from tests.support.scripted import Asked, Scripted, event

EACH = 500
"""Streams of either kind."""

SECONDS = 30.0
FILES = 8 * EACH
SCARCE = 256
"""The soft limit of files that the sidecar is started with, as some systems have it."""

GET_HEADERS = (("Accept", "text/event-stream"),)
LISTEN = request("s", "subscriptions/listen", {"notifications": {"resourceSubscriptions": ["a:b"]}})


@pytest.fixture
def env(opa_bin: Path) -> dict[str, str]:
    return patient(opa_bin)


# ── A thousand ────────────────────────────────────────────────────────────────────────────────────


class Stream:
    """A client's stream, and the numbers of the events that came on it."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self.numbers: list[int] = []
        self.ended = False
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Open it as a client of the stateless revision does."""
        body = dump(modern(LISTEN))
        await self._open("POST", [*JSON_HEADERS, *mirrors(LISTEN)], body)

    async def get(self, session: str) -> None:
        """Open it as a client with a session does."""
        await self._open("GET", [*GET_HEADERS, ("Mcp-Session-Id", session)])

    async def _open(self, verb: str, headers: list[tuple[str, str]], body: bytes = b"") -> None:
        parts = self._parts
        reader, self._writer = await asyncio.open_connection(parts.hostname, parts.port)
        lines = [
            f"{verb} {parts.path} HTTP/1.1",
            f"Host: {parts.netloc}",
            *(f"{name}: {value}" for name, value in headers),
            f"Content-Length: {len(body)}",
        ]
        self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while line := await reader.readline():
                if found := re.search(rb"tick://(\d+)", line):
                    self.numbers.append(int(found[1]))
        self.ended = True

    async def close(self) -> None:
        if self._reading is not None and self._writer is not None:
            self._reading.cancel()
            self._writer.close()
            await asyncio.gather(self._reading, return_exceptions=True)


@contextmanager
def few_files(soft: int) -> Iterator[None]:
    """What is started within begins with that limit; we ourselves have as many as we may."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before, min(FILES, hard)), hard))


def test_a_thousand_streams_last_for_half_a_minute(env: dict[str, str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        pytest.skip(f"this system lets a process have {hard} files, and this takes {FILES}")
    with Process(stream_server.command("http")) as server, few_files(SCARCE):
        upstream = server.wait_for(LISTENING)[1]
        with http_sidecar(upstream, "--policy", ALLOW_ALL, env=env) as served:
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
            sessions = [
                post(served.url, initialize()).headers["mcp-session-id"] for _ in range(EACH)
            ]
            before, files = psutil.Process(served.pid).memory_info().rss, held(served.pid)
            streams, grown = asyncio.run(last(served, sessions, before))
            wait_until(lambda: holds_no_more(served.pid, files), "its files are closed")
    least = int(SECONDS / stream_server.PERIOD) - 1
    assert [each.numbers for each in streams] == [
        list(range(1, len(each.numbers) + 1)) for each in streams
    ]
    assert min(len(each.numbers) for each in streams) >= least
    print(
        f"{len(streams)} streams for {SECONDS:.0f} s: none dropped, "
        f"{sum(len(each.numbers) for each in streams)} events delivered, "
        f"{grown / len(streams) / 1024:.0f} KiB of memory for each"
    )
    assert grown / len(streams) < 256 * 1024


async def last(served: Served, sessions: list[str], before: int) -> tuple[list[Stream], int]:
    """Open them all, leave them open, and see that they are; what they take of memory."""
    streams, narrow = [Stream(served.url) for _ in range(2 * EACH)], asyncio.Semaphore(50)

    async def open_one(number: int) -> None:
        async with narrow:
            if number < EACH:
                await streams[number].listen()
            else:
                await streams[number].get(sessions[number - EACH])

    try:
        await asyncio.gather(*map(open_one, range(2 * EACH)))
        await asyncio.sleep(SECONDS)  # which is what is to be shown
        assert [each for each in streams if each.ended] == []
        return streams, psutil.Process(served.pid).memory_info().rss - before
    finally:
        await asyncio.gather(*(each.close() for each in streams))


# ── An answer that comes on another stream ────────────────────────────────────────────────────────


def answer_to(asked: Asked) -> Object:
    return {"id": asked.message["id"], "result": {"content": [{"type": "text", "text": "late"}]}}


class Polled:
    """Answers a call by a stream that ends at once, and what resumes it by the answer."""

    def __init__(self) -> None:
        self._called: Asked | None = None

    async def __call__(
        self, server: Scripted, request: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        if asked.method == "tools/call":
            self._called = asked
            return await self._said(request, "id: 1\nretry: 10\ndata:")
        if asked.verb == "DELETE":
            return web.Response(status=204)
        if asked.verb == "GET" and self._called is not None:
            return await self._said(request, event(answer_to(self._called), "2"))
        return None

    async def _said(self, request: web.Request, said: str) -> web.StreamResponse:
        response = await scripted.stream(request, said)
        await response.write_eof()
        return response


@contextmanager
def polled(env: dict[str, str], audit: Path) -> Iterator[tuple[Served, tuple[str, str]]]:
    """A sidecar in front of a server that is polled, and the header of a session."""
    with (
        scripted.scripted(Polled()) as server,
        http_sidecar(server.url, "--policy", ALLOW_ALL, "--audit", audit, env=env) as served,
    ):
        session = post(served.url, initialize()).headers["mcp-session-id"]
        header = ("Mcp-Session-Id", session)
        post(served.url, {"jsonrpc": "2.0", "method": "notifications/initialized"}, [header])
        answer = post(served.url, call(7), [header])
        assert b"id: 1" in answer.body
        post(served.url, request("ping", "ping"), [header])  # by then that exchange is over
        yield served, header


def outcomes(audit: Path) -> list[str]:
    """What became of tool calls, by the audit."""
    whole, _, _ = audit.read_text(encoding="utf-8").rpartition("\n")
    records = [json.loads(line) for line in whole.splitlines()]
    return [
        each["outcome"]
        for each in records
        if each.get("outcome") and each["method"] == "tools/call"
    ]


def test_a_call_that_is_answered_when_its_stream_is_resumed_is_recorded_as_a_success(
    env: dict[str, str], tmp_path: Path
) -> None:
    with polled(env, tmp_path / "audit") as (served, session):
        assert outcomes(tmp_path / "audit") == []
        with Wire(served.url) as wire:
            wire.request(headers=[*GET_HEADERS, session, ("Last-Event-ID", "1")], verb="GET")
            assert wire.answer("GET").message["result"]["content"][0]["text"] == "late"
        wait_until(lambda: outcomes(tmp_path / "audit"), "the call has ended")
        assert outcomes(tmp_path / "audit") == ["success"]
    assert outcomes(tmp_path / "audit") == ["success"]


def cancel(served: Served, session: tuple[str, str]) -> None:
    message = {"method": "notifications/cancelled", "params": {"requestId": 7}}
    post(served.url, {"jsonrpc": "2.0", **message}, [session])


def delete(served: Served, session: tuple[str, str]) -> None:
    with Wire(served.url) as wire:
        wire.request(headers=[session], verb="DELETE")
        wire.answer("DELETE")


def stop(served: Served, session: tuple[str, str]) -> None:
    served.process.stop()


@pytest.mark.parametrize("end", [cancel, delete, stop])
def test_a_call_that_nobody_comes_back_for_is_recorded_in_the_end(
    env: dict[str, str], tmp_path: Path, end: Callable[[Served, tuple[str, str]], None]
) -> None:
    with polled(env, tmp_path / "audit") as (served, session):
        assert outcomes(tmp_path / "audit") == []
        end(served, session)
        wait_until(lambda: outcomes(tmp_path / "audit"), "the call has ended")
    assert outcomes(tmp_path / "audit") == ["cancelled"]


# ── Lines for events ──────────────────────────────────────────────────────────────────────────────


class Lines:
    """Answers `lines` in JSON, a message a line, each once the one before has been seen."""

    def __init__(self) -> None:
        self._seen = asyncio.Event()

    async def __call__(
        self, server: Scripted, request: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        name = asked.message.get("params", {}).get("name")
        if name == "seen":
            self._seen.set()
        if name not in ("lines", "pretty", "broken"):
            return None
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if name == "pretty":
            await response.write(json.dumps(said(asked), indent=2).encode())
        else:
            await self._say(response, asked)
        await response.write_eof()
        return response

    async def _say(self, response: web.StreamResponse, asked: Asked) -> None:
        note = {"method": "notifications/message", "params": {"level": "info", "data": "hello"}}
        stolen = {"id": "of somebody else", "result": {}}
        for each in (note, stolen):
            await response.write(dump({"jsonrpc": "2.0", **each}) + b"\n")
        await response.write(b"this is no message\n")
        await self._seen.wait()
        if asked.message["params"]["name"] == "lines":
            await response.write(dump(said(asked)))


def said(asked: Asked) -> Object:
    return {"jsonrpc": "2.0", **answer_to(asked)}


@pytest.mark.parametrize("name", ["lines", "broken"])
def test_lines_are_judged_and_passed_on_as_they_come(env: dict[str, str], name: str) -> None:
    with (
        scripted.scripted(Lines()) as server,
        http_sidecar(server.url, "--policy", ALLOW_ALL, env=env) as served,
        Wire(served.url) as wire,
    ):
        wire.request(dump(call(1, name)))
        response = wire.begin()
        assert response.headers["Content-Type"] == "application/json"
        assert json.loads(response.readline())["params"]["data"] == "hello"
        assert "result" in post(served.url, call(2, "seen")).message
        rest = [json.loads(line) for line in response.read().splitlines()]
    assert [each["id"] for each in rest] == [1]
    if name == "lines":
        assert rest[0]["result"]["content"][0]["text"] == "late"
    else:
        assert rest[0]["error"]["code"] == -31502


def test_lines_go_to_a_pipe_as_they_come(env: dict[str, str]) -> None:
    with (
        scripted.scripted(Lines()) as server,
        Process(
            [*sidecar("stdio"), "--policy", str(ALLOW_ALL), "--upstream", server.url],
            env=env,
            pipes=True,
        ) as process,
    ):
        pipe = Pipe(process)
        pipe.greet()
        pipe.send(call(1, "lines"))
        pipe.first(lambda each: each.get("params", {}).get("data") == "hello")
        pipe.ask(call(2, "seen"))
        assert pipe.answer(1)["result"]["content"][0]["text"] == "late"


def test_one_message_on_several_lines_is_one_message(env: dict[str, str]) -> None:
    with (
        scripted.scripted(Lines()) as server,
        http_sidecar(server.url, "--policy", ALLOW_ALL, env=env) as served,
    ):
        answer = post(served.url, call(1, "pretty"))
    assert answer.message["result"]["content"][0]["text"] == "late"
    assert b"\n  " in answer.body
