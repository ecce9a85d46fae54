"""After good, bad and broken-off requests a sidecar holds what it held before, and streams stream.

What it holds is counted from outside: its file descriptors, and its asyncio tasks by name.
"""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import permissive_server
from tests.support.opa import write
from tests.support.permissive_server import executed, records
from tests.support.processes import (
    ADMIN,
    ALLOW_ALL,
    LISTENING,
    Process,
    Served,
    environment,
    held,
    http_sidecar,
    wait_ready,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    Object,
    Pipe,
    Wire,
    call,
    code,
    counted,
    dump,
    initialize,
    mirrors,
    modern,
    post,
    post_modern,
    read_event,
    request,
    stdio_sidecar,
    tasks_of,
)

DENIED = -31403
SETTLED = 40.0
"""Longer than connections are kept alive (15 s), and than a client may linger (10 s)."""

ALL_BUT_ONE = """package mcp.custom

allow contains {"rule": "all", "any": true}

deny contains {"code": "forbidden"} if input.target.name == "forbidden"
"""


@pytest.fixture
def env(opa_bin: Path) -> dict[str, str]:
    return environment(opa_bin)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write(tmp_path / "policy", {"custom.rego": ALL_BUT_ONE})


@dataclass(frozen=True, slots=True)
class Counted:
    """What a sidecar holds."""

    files: int
    tasks: Counter[str]


def count(pid: int, file: Path) -> Counted:
    return Counted(held(pid).files, Counter(tasks_of(pid, file)))


def back_to(before: Counted, pid: int, file: Path) -> None:
    """Wait until nothing is held that was not held before."""
    now = count(pid, file)
    peak = now.files

    def settled() -> bool:
        nonlocal now
        now = count(pid, file)
        return now.files <= before.files and now.tasks <= before.tasks

    try:
        wait_until(settled, "what it held before", SETTLED)
    finally:
        print(f"MEASURED files {before.files} before, {peak} then, {now.files} in the end")
        print(f"MEASURED tasks {before.tasks.total()} before, {now.tasks.total()} in the end")
        print("more than before:", now.tasks - before.tasks)


# ── A pipe ────────────────────────────────────────────────────────────────────────────────────────


def pipe_round(pipe: Pipe, number: int) -> None:
    """Ten things that a client may do to a pipe; each one is over when this returns."""
    name = f"{number} "
    assert code(pipe.ask(call(f"{name} good"))) is None
    assert code(pipe.ask(call(f"{name} denied", "forbidden"))) == DENIED
    pipe.send(b"{no json", b"[]", b'{"jsonrpc":"2.0","id":1,"id":1,"method":"ping"}')
    assert code(pipe.ask(call(f"{name} noise", "noise"))) is None
    assert code(pipe.ask(call(f"{name} unsolicited", "unsolicited"))) is None
    assert code(pipe.ask(request(f"{name} list", "tools/list"))) is None
    assert code(pipe.ask(request(f"{name} unknown", "no/method"))) == -32601
    pipe.send({"jsonrpc": "2.0", "id": f"{name} nobody asked", "result": {}})
    pipe.send(call(f"{name} silent", "silent"))
    cancel = {"requestId": f"{name} silent"}
    pipe.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": cancel})
    pipe.send(call(f"{name} asks", "ask_unknown"))
    assert code(pipe.answer(f"{name} asks")) is None
    assert pipe.ask(request(f"{name} end", "ping"))["result"] == {}
    pipe.forget()


def test_two_hundred_messages_on_a_pipe_leave_nothing_behind(
    env: dict[str, str], policy: Path, tmp_path: Path
) -> None:
    log, tasks = tmp_path / "log", tmp_path / "tasks"
    server = permissive_server.command(log)
    with stdio_sidecar(
        server, "--policy", policy, env=env, command=counted(tasks, "stdio")
    ) as pipe:
        pid = pipe.process.pid
        pipe.greet()
        pipe_round(pipe, 0)
        before = count(pid, tasks)
        for number in range(1, 20):
            pipe_round(pipe, number)
        back_to(before, pid, tasks)
        pipe.end()
        assert pipe.wait_for_end() == 0
    assert "forbidden" not in {each["name"] for each in executed(log)}


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    log = tmp_path / "log"
    with Process(permissive_server.command(log, "--transport", "http")) as server:
        yield server.wait_for(LISTENING)[1], log


def gone(log: Path, name: str) -> int:
    return sum(each["name"] == name for each in records(log, "gone"))


def break_off(url: str, log: Path, message: Object, headers: list[tuple[str, str]]) -> None:
    """Call a tool that never ends, hang up when it runs, and see the server lose its caller."""
    name = message["params"]["name"]
    ran, lost = len(executed(log)), gone(log, name)
    with Wire(url) as wire:
        wire.request(dump(message), (*JSON_HEADERS, *headers))
        wait_until(lambda: len(executed(log)) > ran, f"{name} runs")
        wire.hang_up()
    wait_until(lambda: gone(log, name) > lost, f"{name} is cancelled upstream")


def http_round(url: str, log: Path) -> None:
    """Eighteen things that a client may do over HTTP."""
    for send in (post, post_modern):
        assert code(send(url, call(1)).message) is None
        assert code(send(url, call(1, "forbidden")).message) == DENIED
        assert code(send(url, call(1, "events")).message) is None
        assert code(send(url, call(1, "redirect")).message) == -31502
        assert code(send(url, call(1, "cut_body")).message) == -31502
        assert code(send(url, call(1, "events_cut")).message) == -31502
    assert post(url, b"{no json").status == 400
    assert post(url, b"x" * 5_000_000).status == 413
    assert post(url, call(1), (("Mcp-Session-Id", "guessed"),)).status == 404
    with Wire(url) as wire:
        wire.request(b'{"half', length=1000)
        wire.hang_up()
    endless = call(1, "events_forever")
    break_off(url, log, modern(endless), mirrors(endless))
    break_off(url, log, call(1, "hold"), [])


def test_two_hundred_requests_over_http_leave_nothing_behind(
    env: dict[str, str], policy: Path, upstream: tuple[str, Path], tmp_path: Path
) -> None:
    url, log = upstream
    tasks = tmp_path / "tasks"
    where = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--upstream", url)
    command = [*counted(tasks, "http"), *where, "--policy", str(policy)]
    with Process(command, env=env) as process:
        served = process.wait_for(LISTENING)[1]
        wait_ready(process.wait_for(ADMIN)[1])
        http_round(served, log)
        before = count(process.pid, tasks)
        for _ in range(11):
            http_round(served, log)
        back_to(before, process.pid, tasks)
        assert code(post(served, call("after it all")).message) is None
        assert "Traceback" not in process.tail(10_000), process.tail(10_000)
        assert process.stop() == 0
    assert "forbidden" not in {each["name"] for each in executed(log)}


# ── Streams ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def served(env: dict[str, str], upstream: tuple[str, Path]) -> Iterator[Served]:
    with http_sidecar(upstream[0], "--policy", ALLOW_ALL, env=env) as served:
        yield served


ERAS: list[Callable[..., object]] = [post, post_modern]


@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.parametrize("name", ["hold", "events_forever"])
def test_a_client_that_goes_away_cancels_the_request_upstream(
    served: Served, upstream: tuple[str, Path], era: str, name: str
) -> None:
    message = call(1, name)
    headers = mirrors(message) if era == "modern" else []
    break_off(served.url, upstream[1], modern(message) if era == "modern" else message, headers)
    assert code(post(served.url, call("next")).message) is None


def test_a_client_that_closes_its_session_stream_closes_it_upstream(
    served: Served, upstream: tuple[str, Path]
) -> None:
    session = post(served.url, initialize()).headers["mcp-session-id"]
    with Wire(served.url) as wire:
        wire.request(verb="GET", headers=[("Mcp-Session-Id", session), *JSON_HEADERS])
        assert read_event(wire.begin("GET")) == b": open\n\n"
        wire.hang_up()
    wait_until(lambda: gone(upstream[1], "GET") == 1, "the stream is closed upstream")


@pytest.mark.parametrize("name", ["events_gated"])
def test_each_event_arrives_before_the_next_one_is_sent(
    served: Served, upstream: tuple[str, Path], name: str
) -> None:
    with Wire(served.url) as wire:
        wire.request(dump(call("streamed", name)))
        stream = wire.begin()
        for number in (1, 2, 3):
            expected = permissive_server.event(permissive_server.progress(number))
            assert read_event(stream) == expected
            # The server waits for this call before it says more.
            assert code(post(served.url, call("go on", "release")).message) is None
        assert b'"streamed"' in read_event(stream)
        assert read_event(stream) == b""


@pytest.mark.parametrize("name", ["events", "events_dribbled"])
def test_a_stream_arrives_as_it_was_sent_byte_by_byte(
    served: Served, upstream: tuple[str, Path], name: str
) -> None:
    through, direct = (post(url, call(1, name)) for url in (served.url, upstream[0]))
    assert through.body == direct.body
    assert through.body.count(b"\n\n") == {"events": 3, "events_dribbled": 4}[name]


# ── Shutdown ──────────────────────────────────────────────────────────────────────────────────────


def test_sigterm_ends_open_streams_and_idle_connections_at_once(
    served: Served, upstream: tuple[str, Path]
) -> None:
    session = post(served.url, initialize()).headers["mcp-session-id"]
    listen = modern(request("listen", "subscriptions/listen", {"notifications": {}}))
    listen["params"]["name"] = "events_forever"
    with ExitStack() as stack:
        idle, half, opened, listening = (stack.enter_context(Wire(served.url)) for _ in range(4))
        idle.request(dump(call("idle")))
        assert idle.answer().status == 200
        half.send(b"POST /mcp HTTP/1.1\r\nHo")
        opened.request(verb="GET", headers=[("Mcp-Session-Id", session), *JSON_HEADERS])
        streams = [opened.begin("GET")]
        headers = [each for each in mirrors(listen) if each[0] != "Mcp-Name"]
        listening.request(dump(listen), (*JSON_HEADERS, *headers))
        streams.append(listening.begin())
        for each in streams:
            assert read_event(each)
        served.process.signal(signal.SIGTERM)
        assert served.process.wait(8) == 0
        for each in itertools.islice(streams, 2):
            each.close()
    wait_until(lambda: len(records(upstream[1], "gone")) == 2, "both are closed upstream")
