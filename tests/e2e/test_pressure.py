"""Peers that say too much, read too little or never finish: memory has a bound, others are served.

Times are printed, and none is asserted: what others must notice is that they are served.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support import permissive_server, stream_server
from tests.support.opa import ALLOWED, HUNG, fake_opa
from tests.support.processes import (
    ALLOW_ALL,
    LISTENING,
    Process,
    Served,
    bridge,
    held,
    holds_no_more,
    http_sidecar,
    patient,
    sidecar,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    PATIENCE,
    Answer,
    Object,
    Wire,
    beside,
    call,
    code,
    dump,
    initialize,
    post,
    post_modern,
    request,
    stdio_sidecar,
)

MEBIBYTE = 1024 * 1024
BOUND = 4 * MEBIBYTE
"""The largest message of a server in these tests."""

OVERLOADED = -31429


# ── Measuring ─────────────────────────────────────────────────────────────────────────────────────


class Memory:
    """How much more a process came to hold while we looked, at its peak."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before: int = self._process.memory_info().rss
        self._peak: int = self._before
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def growth(self) -> int:
        return self._peak - self._before

    def __enter__(self) -> Memory:
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._looking.join()


def serve_others(url: str, number: int = 100) -> float:
    """Somebody else's calls, each of which is answered with its own; their median in ms."""
    took = []
    for each in range(number):
        began = time.perf_counter()
        answer = post(url, call(each, "echo", own=each))
        took.append((time.perf_counter() - began) * 1000)
        assert answer.status == 200
        assert answer.message["id"] == each
        assert f'"own": {each}' in answer.message["result"]["content"][0]["text"]
    return statistics.median(took)


def told(url: str) -> int:
    """The bytes that the server got rid of so far."""
    return int(post(url, call("told", "told")).message["result"]["content"][0]["text"])


def report(what: str, memory: Memory, calm: float, pressed: float) -> None:
    print(
        f"{what}: {memory.growth / MEBIBYTE:.1f} MiB more at the peak; "
        f"others' p50 {calm:.1f} ms without, {pressed:.1f} ms with"
    )


# ── A server that says much ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def env(opa_bin: Path) -> dict[str, str]:
    limits = {"SERVER_MESSAGE": BOUND, "DRAIN": 1}
    named = {f"MCP_SIDECAR_LIMITS__{name}": str(value) for name, value in limits.items()}
    return {**patient(opa_bin), **named}


@pytest.fixture(scope="module")
def talker(env: dict[str, str]) -> Iterator[Served]:
    """A sidecar in front of the server that never stops talking, warmed up."""
    with (
        Process(stream_server.command("http")) as server,
        http_sidecar(server.wait_for(LISTENING)[1], "--policy", ALLOW_ALL, env=env) as served,
    ):
        serve_others(served.url, 200)
        yield served


def ask_for(name: str) -> Callable[[Wire], None]:
    return lambda wire: wire.request(dump(call(name, name)))


def listen_to_a_flood(wire: Wire) -> None:
    hello = initialize()
    hello["params"]["clientInfo"]["name"] = "flood"
    wire.request(dump(hello))
    session = wire.answer().headers["mcp-session-id"]
    wire.request(headers=(("Accept", "text/event-stream"), ("Mcp-Session-Id", session)), verb="GET")


FLOODS = {"the answer to a call": ask_for("flood"), "the stream of a session": listen_to_a_flood}


@pytest.mark.parametrize("begin", FLOODS.values(), ids=FLOODS.keys())
def test_a_client_that_does_not_read_holds_its_server_back(
    talker: Served, begin: Callable[[Wire], None]
) -> None:
    calm = serve_others(talker.url)
    with Memory(talker.pid) as memory, ExitStack() as stack:
        before = told(talker.url)
        for _ in range(5):
            begin(stack.enter_context(Wire(talker.url)))
        pressed = [serve_others(talker.url)]

        def stands_still() -> bool:
            now = told(talker.url)
            pressed[0] = serve_others(talker.url)
            return before < now == told(talker.url)

        wait_until(stands_still, "the server is held back")
        sent = told(talker.url) - before
    report(f"5 clients that do not read, {sent / MEBIBYTE:.1f} MiB sent", memory, calm, *pressed)
    assert memory.growth < 16 * MEBIBYTE


@pytest.mark.parametrize("begin", FLOODS.values(), ids=FLOODS.keys())
def test_a_server_that_floods_a_client_that_reads_takes_no_memory(
    talker: Served, begin: Callable[[Wire], None]
) -> None:
    calm, read = serve_others(talker.url), [0]
    with Memory(talker.pid) as memory, Wire(talker.url) as wire:
        begin(wire)

        def drink() -> None:
            with suppress(OSError):
                while data := wire.socket.recv(MEBIBYTE):
                    read[0] += len(data)

        drinking = threading.Thread(target=drink)
        drinking.start()
        pressed = serve_others(talker.url)
        wait_until(lambda: read[0] > 16 * MEBIBYTE, "16 MiB came")
        wire.hang_up()
        drinking.join()
    report(f"a flood, {read[0] / MEBIBYTE:.0f} MiB read", memory, calm, pressed)
    assert memory.growth < 16 * MEBIBYTE


@pytest.mark.parametrize("name", ["huge", "crumbs"])
def test_an_event_without_end_ends_its_stream_and_nothing_else(talker: Served, name: str) -> None:
    calm = serve_others(talker.url)
    with Memory(talker.pid) as memory, ExitStack() as stack:
        wires = [stack.enter_context(Wire(talker.url)) for _ in range(4)]
        for wire in wires:
            wire.request(dump(call(name, name)))
        pressed = serve_others(talker.url)
        answers = [wire.answer().message for wire in wires]
    assert [code(each) for each in answers] == [-31502] * 4
    report(f"4 events without end ({name})", memory, calm, pressed)
    assert memory.growth < 4 * 4 * BOUND


def test_a_client_that_does_not_read_its_pipe_holds_its_server_back(env: dict[str, str]) -> None:
    with Process(
        [*sidecar("stdio"), "--policy", str(ALLOW_ALL), "--", *stream_server.command("stdio")],
        env=env,
        pipes=True,
    ) as process:
        process.stdin.write(dump(initialize()) + b"\n")
        process.stdin.flush()
        assert process.stdout.readline()
        with Memory(process.pid) as memory:
            process.stdin.write(dump(call("flood", "flood")) + b"\n")
            process.stdin.flush()
            server = server_of(process)
            wait_until(lambda: stands_still(server), "the server is held back")
        print(f"a pipe that is not read: {memory.growth / MEBIBYTE:.1f} MiB more at the peak")
        assert memory.growth < 16 * MEBIBYTE


def test_a_server_that_does_not_read_its_pipe_is_told_no_more(
    env: dict[str, str], tmp_path: Path
) -> None:
    """Also of clients that do not wait: what they sent is in the pipe, whoever has gone."""
    server, go_on = permissive_server.command(tmp_path / "log"), tmp_path / "go-on"
    with bridge(server, "--policy", ALLOW_ALL, env=env) as served, ExitStack() as stack:
        session = ("Mcp-Session-Id", post(served.url, initialize()).headers["mcp-session-id"])
        post(served.url, request("list", "tools/list"), [session])
        with Memory(served.pid) as memory:
            deaf = stack.enter_context(Wire(served.url))
            deaf.request(dump(call("deaf", "deaf", until=str(go_on))), (*JSON_HEADERS, session))
            log = tmp_path / "log"
            wait_until(lambda: permissive_server.executed(log), "the server is deaf")
            params = {"progressToken": "t", "progress": 1, "message": "x" * 3 * MEBIBYTE}
            note = {"jsonrpc": "2.0", "method": "notifications/progress", "params": params}
            wires = [stack.enter_context(Wire(served.url)) for _ in range(60)]
            for wire in wires:
                wire.request(dump(note), (*JSON_HEADERS, session))

            def refused() -> list[Wire]:
                return [each for each in wires if each.peek()]

            wait_until(lambda: len(refused()) >= 60 - 64 // 3 - 1, "the rest is refused")
            assert {read(each).status for each in refused()} == {404}
            for wire in wires:
                wire.hang_up()
        print(f"a server that does not read: {memory.growth / MEBIBYTE:.0f} MiB more at the peak")
        assert memory.growth < 400 * MEBIBYTE
        go_on.touch()
        assert "result" in deaf.answer().message


def server_of(process: Process) -> psutil.Process:
    """The wrapped server."""
    found: list[psutil.Process] = [
        each
        for each in psutil.Process(process.pid).children()
        if "tests.support.stream_server" in each.cmdline()
    ]
    (server,) = found
    return server


def stands_still(server: psutil.Process) -> bool:
    """Whether a flooding process waits to be read: it uses no time at all."""
    before = server.cpu_times()
    time.sleep(0.5)
    return bool(before.user + before.system > 0 and server.cpu_times() == before)


def test_a_pipe_that_is_flooded_still_answers(env: dict[str, str]) -> None:
    server = stream_server.command("stdio")
    with stdio_sidecar(server, "--policy", ALLOW_ALL, env=env) as pipe:
        pipe.greet()
        pipe.ask(call("before", "echo"))
        with Memory(pipe.process.pid) as memory:
            pipe.send(call("flood", "flood"))
            for number in range(10):
                answer = pipe.ask(call(number, "echo", own=number))
                assert f'"own": {number}' in answer["result"]["content"][0]["text"]
                pipe.forget()
        print(f"a pipe that is flooded: {memory.growth / MEBIBYTE:.1f} MiB more at the peak")
        assert memory.growth < 16 * MEBIBYTE


# ── A client that says much ───────────────────────────────────────────────────────────────────────


@contextmanager
def limited(log: Path, env: dict[str, str], **limits: float) -> Iterator[tuple[Served, str]]:
    """A sidecar with such limits, and the address of the server behind it."""
    names = {f"MCP_SIDECAR_LIMITS__{name.upper()}": str(each) for name, each in limits.items()}
    with Process(permissive_server.command(log, "--transport", "http")) as server:
        url = server.wait_for(LISTENING)[1]
        with http_sidecar(url, "--policy", ALLOW_ALL, env={**env, **names}) as served:
            yield served, url


def read(wire: Wire) -> Answer:
    wire.socket.settimeout(PATIENCE)
    return wire.answer()


@pytest.mark.parametrize("limit", ["calls_in_flight", "calls_per_actor"])
def test_calls_beyond_the_limit_are_refused_and_may_be_tried_again(
    env: dict[str, str], tmp_path: Path, limit: str
) -> None:
    with limited(tmp_path / "log", env, **{limit: 10}) as (served, server), ExitStack() as stack:
        wires = [stack.enter_context(Wire(served.url)) for _ in range(30)]
        for number, wire in enumerate(wires):
            wire.request(dump(call(number, "hold_until_released", own=number)))

        def refused() -> list[Wire]:
            return [each for each in wires if each.peek()]

        wait_until(lambda: len(refused()) >= 20, "those beyond the limit are refused")
        beyond = refused()
        answers = [read(each) for each in beyond]
        assert [each.status for each in answers] == [200] * 20
        assert [code(each.message) for each in answers] == [OVERLOADED] * 20
        assert all(each.message["error"]["data"]["retryable"] for each in answers)
        assert code(post(served.url, call("more")).message) == OVERLOADED
        post(server, call("go on", "release"))
        for number, wire in enumerate(wires):
            if wire not in beyond:
                text = read(wire).message["result"]["content"][0]["text"]
                assert text == f'{{"own": {number}}}'
        assert "result" in post(served.url, call("again")).message


def test_streams_beyond_the_limit_are_not_there_and_calls_go_on(
    env: dict[str, str], tmp_path: Path
) -> None:
    accept = (("Accept", "text/event-stream"),)
    listen = request(
        "listen", "subscriptions/listen", {"notifications": {"toolsListChanged": True}}
    )
    limits = {"streams": 2, "calls_in_flight": 1}
    with limited(tmp_path / "log", env, **limits) as (served, _), ExitStack() as stack:
        wires = [stack.enter_context(Wire(served.url)) for _ in range(3)]
        for wire, status in zip(wires, (200, 200, 405), strict=True):
            wire.request(headers=accept, verb="GET")
            assert wire.begin("GET").status == status
        refusal = post_modern(served.url, listen)
        assert (refusal.status, code(refusal.message)) == (200, OVERLOADED)
        assert refusal.message["error"]["data"]["retryable"] is True
        assert "result" in post(served.url, call(1)).message
        wires[0].hang_up()
        wait_until(lambda: opens(served.url), "there is room for another stream")


def opens(url: str) -> bool:
    with Wire(url) as wire:
        wire.request(headers=(("Accept", "text/event-stream"),), verb="GET")
        return wire.begin("GET").status == 200


def test_clients_that_never_finish_hold_up_nobody(talker: Served) -> None:
    calm, before = serve_others(talker.url), held(talker.pid)
    whole = dump(call(1, "echo"))
    with Memory(talker.pid) as memory, ExitStack() as stack:
        slow = [stack.enter_context(Wire(talker.url)) for _ in range(200)]
        for number, wire in enumerate(slow):
            if number % 2:
                wire.request(whole[:10], length=len(whole))
            else:
                wire.send(f"POST {wire.path} HTTP/1.1\r\nHost: {wire.authority}\r\nX: ".encode())
        pressed = 0.0
        for byte in whole[10:15]:
            for wire in slow:
                assert wire.send(bytes([byte]))
            pressed = serve_others(talker.url, 20)
    report("200 requests that never end", memory, calm, pressed)
    assert memory.growth < 16 * MEBIBYTE
    wait_until(lambda: holds_no_more(talker.pid, before), "their connections are closed")


def test_a_body_that_does_not_come_is_not_waited_for(env: dict[str, str], tmp_path: Path) -> None:
    whole = dump(call(1, "echo"))
    with limited(tmp_path / "log", env, body=0.5) as (served, _), Wire(served.url) as wire:
        wire.request(whole[:10], length=len(whole))
        answer = wire.begin()
        assert (answer.status, answer.will_close) == (408, True)
        assert "result" in post(served.url, call(1)).message


def test_bodies_beyond_the_bound_are_refused_and_others_are_served(talker: Served) -> None:
    chunk = b"100000\r\n" + b" " * MEBIBYTE + b"\r\n"
    head = [*JSON_HEADERS, ("Transfer-Encoding", "chunked")]
    lines = "".join(f"{name}: {value}\r\n" for name, value in head)
    calm = serve_others(talker.url)
    with Memory(talker.pid) as memory, ExitStack() as stack:
        large = [stack.enter_context(Wire(talker.url)) for _ in range(8)]
        for wire in large:
            start = f"POST {wire.path} HTTP/1.1\r\nHost: {wire.authority}\r\n{lines}\r\n"
            wire.send(start.encode() + chunk * 4)
        pressed = serve_others(talker.url)
        for wire in large:
            wire.send(chunk)
            assert wire.begin().status == 413
    report("8 bodies that are too large", memory, calm, pressed)
    assert memory.growth < 8 * 2 * 4 * MEBIBYTE


def test_200_calls_at_once_on_one_pipe_are_answered_once_and_with_their_own(
    env: dict[str, str], tmp_path: Path
) -> None:
    server = permissive_server.command(tmp_path / "log")
    with stdio_sidecar(server, "--policy", ALLOW_ALL, env=env) as pipe:
        pipe.greet()
        pipe.send(*(call(each, "hold", own=each) for each in range(200)))
        wait_until(
            lambda: len(permissive_server.executed(tmp_path / "log")) == 200, "all are in flight"
        )
        assert len(pipe.lines) == 1
        pipe.ask(call("go on", "release"))
        wait_until(lambda: len(pipe.lines) >= 202, "all are answered")
        pipe.ask(call("last", "echo"))
        answers = [each for each in pipe.messages() if isinstance(each["id"], int)]
    texts = {each["id"]: each["result"]["content"][0]["text"] for each in answers}
    assert len(answers) == 200
    assert texts == {each: f'{{"own": {each}}}' for each in range(200)}


# ── A policy that does not answer ─────────────────────────────────────────────────────────────────


def test_an_opa_that_hangs_holds_up_only_what_it_is_asked_about(
    env: dict[str, str], tmp_path: Path
) -> None:
    with (
        beside(fake_opa(ALLOWED)) as opa,
        Process(permissive_server.command(tmp_path / "log", "--transport", "http")) as server,
        http_sidecar(server.wait_for(LISTENING)[1], "--opa", opa.url, env=env) as served,
        stdio_sidecar(
            permissive_server.command(tmp_path / "pipe"), "--opa", opa.url, env=env
        ) as pipe,
        ExitStack() as stack,
    ):
        pipe.greet()
        pipe.ask(call("before"))
        post(served.url, call("before"))
        opa.answer, before = HUNG, asked(opa.questions)
        wires = [stack.enter_context(Wire(served.url)) for _ in range(50)]
        for number, wire in enumerate(wires):
            wire.request(dump(call(number)))
        pipe.send(*(call(number) for number in range(50)))
        wait_until(lambda: asked(opa.questions) >= before + 100, "OPA was asked about all of them")
        began = time.perf_counter()
        assert post(served.url, request("ping", "ping")).message["result"] == {}
        assert pipe.ask(request("ping", "ping"))["result"] == {}
        print(f"two pings beside 100 calls: {(time.perf_counter() - began) * 1000:.1f} ms")
        assert not any(wire.peek() for wire in wires)
        assert {each["id"] for each in pipe.messages()} == {"init", "before", "ping"}


def asked(questions: list[tuple[str, dict[str, str], Object]]) -> int:
    """How often it was asked about a tool."""
    return sum("tool" in body.get("input", {}) for _, _, body in list(questions) if body)
