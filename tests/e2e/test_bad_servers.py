"""What a server should not do: the caller gets a clear error, and nobody else is harmed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import permissive_server
from tests.support.permissive_server import LONG, executed, records
from tests.support.processes import (
    ALLOW_ALL,
    LISTENING,
    Process,
    Served,
    environment,
    http_sidecar,
    wait_until,
)
from tests.support.raw import (
    Object,
    Pipe,
    Wire,
    call,
    code,
    initialize,
    post,
    post_modern,
    request,
    stdio_sidecar,
)

DENIED = -31403
UPSTREAM_FAILED = -31502
MEMORY = 700 * 1024 * 1024


@pytest.fixture(scope="module")
def env(opa_bin: Path) -> dict[str, str]:
    return environment(opa_bin)


def failed(answer: Object, *, sent: bool = True) -> bool:
    """Whether an answer says that the server failed, and what may have happened."""
    assert code(answer) == UPSTREAM_FAILED, answer
    data = answer["error"]["data"]
    assert data["retryable"] is False
    assert data["reasons"][0]["code"] == "upstream_failed"
    told = "may have executed" if sent else "not executed"
    return told in str(answer["error"])


# ── stdio ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stdio") / "log"


@pytest.fixture(scope="module")
def pipe(env: dict[str, str], log: Path) -> Iterator[Pipe]:
    server = permissive_server.command(log, "--banner")
    with stdio_sidecar(server, "--policy", ALLOW_ALL, env=env) as pipe:
        pipe.greet()
        yield pipe


def test_banners_and_noise_on_stdout_are_dropped_and_said(pipe: Pipe) -> None:
    pipe.forget()
    answer = pipe.ask(call("noise", "noise"))
    pipe.ask(request("after noise", "ping"))
    assert [each["id"] for each in pipe.messages()] == ["noise", "after noise"]
    assert answer["result"]["content"]
    pipe.process.wait_for("dropped a line of the server's stdout")
    assert not any("Traceback" in line for line in pipe.process.lines)


def test_an_answer_to_nobody_is_dropped(pipe: Pipe) -> None:
    pipe.forget()
    pipe.ask(call("mine", "unsolicited"))
    pipe.ask(request("after unsolicited", "ping"))
    assert [each["id"] for each in pipe.messages()] == ["mine", "after unsolicited"]


def test_only_the_first_answer_counts(pipe: Pipe) -> None:
    pipe.forget()
    pipe.ask(call("one answer", "twice"))
    pipe.ask(request("after twice", "ping"))
    assert ["second" in each.get("result", {}) for each in pipe.messages()] == [False, False]


def test_an_answer_with_a_wrong_id_answers_nobody_and_the_call_can_be_taken_back(
    pipe: Pipe, log: Path
) -> None:
    pipe.forget()
    pipe.send(call("unanswered", "wrong_id"))
    wait_until(lambda: "unanswered" in [each["id"] for each in executed(log)], "the call")
    pipe.ask(request("after wrong id", "ping"))
    cancel = {"requestId": "unanswered"}
    pipe.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": cancel})
    pipe.ask(request("after the cancel", "ping"))
    assert [each["id"] for each in pipe.messages()] == ["after wrong id", "after the cancel"]
    assert "notifications/cancelled" in [each["method"] for each in records(log, "message")]


def test_a_question_by_an_unknown_method_is_answered_for_the_client(pipe: Pipe, log: Path) -> None:
    pipe.forget()
    pipe.ask(call("asks", "ask_unknown"))
    assert [each["id"] for each in pipe.messages()] == ["asks"]
    assert code(records(log, "answer")[-1]["message"]) == -32601


def test_a_question_that_is_allowed_reaches_the_client_and_its_answer_the_server(
    pipe: Pipe, log: Path
) -> None:
    pipe.forget()
    pipe.send(call("asks", "ask"))
    question = pipe.first(lambda each: each.get("method") == "sampling/createMessage")
    reply = {"role": "assistant", "content": {"type": "text", "text": "yes"}, "model": "m"}
    pipe.send({"jsonrpc": "2.0", "id": question["id"], "result": reply})
    pipe.answer("asks")
    assert records(log, "answer")[-1]["message"]["result"] == reply


def test_a_server_that_ends_at_once_ends_the_sidecar_with_its_code(
    env: dict[str, str], tmp_path: Path
) -> None:
    server = permissive_server.command(tmp_path / "log", "--exit", "3")
    with stdio_sidecar(server, "--policy", ALLOW_ALL, env=env) as pipe:
        pipe.send(initialize(), call(1))
        assert pipe.wait_for_end() == 3
        answers = {each["id"]: code(each) for each in pipe.messages()}
    # What was read before the end is answered; what was not, sees the end.
    assert set(answers.values()) <= {UPSTREAM_FAILED}


def test_a_server_that_dies_in_a_call_fails_that_call_and_those_that_wait(
    env: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with stdio_sidecar(permissive_server.command(log), "--policy", ALLOW_ALL, env=env) as pipe:
        pipe.greet()
        pipe.send(call("waits", "hold"), call("dies", "exit"))
        assert pipe.wait_for_end() == 3
        assert failed(pipe.answer("waits"))
        assert failed(pipe.answer("dies"))
    assert not any("Traceback" in line for line in pipe.process.lines)


@pytest.mark.parametrize("when", ["at its start", "in a call"])
def test_a_line_of_80_megabytes_ends_the_server_and_is_not_kept(
    env: dict[str, str], tmp_path: Path, when: str
) -> None:
    more = ["--long-line"] if when == "at its start" else []
    server = permissive_server.command(tmp_path / "log", *more)
    with stdio_sidecar(server, "--policy", ALLOW_ALL, env=env) as pipe:
        if when == "in a call":
            pipe.greet()
            pipe.send(call("long", "long_line"))
        else:
            pipe.send(initialize("long"))
        assert pipe.wait_for_end() == 128 + 9
        if when == "in a call":
            assert failed(pipe.answer("long"))
        assert max(map(len, pipe.lines), default=0) < 10_000
        pipe.process.wait_for("ending the server: a message is larger than")


def test_a_server_that_does_not_read_for_a_while_does_not_lock_the_pipe(
    env: dict[str, str], tmp_path: Path
) -> None:
    """It answers at length before it reads on: whoever waits for it must go on reading."""
    log, config, go_on = tmp_path / "log", tmp_path / "config.yaml", tmp_path / "go-on"
    many = "{limits: {calls_in_flight: 100000, calls_per_actor: 100000}, policy: {deadline: 30}}"
    config.write_text(many, encoding="utf-8")
    server, number = permissive_server.command(log), 3000
    with stdio_sidecar(server, "--policy", ALLOW_ALL, "--config", config, env=env) as pipe:
        pipe.greet()
        pipe.ask(request("list", "tools/list"))
        pipe.send(call("deaf", "deaf", until=str(go_on)))
        calls = [call(each, size=5_000, text="x" * 200) for each in range(number)]
        sending = threading.Thread(target=pipe.send, args=calls)
        sending.start()
        sending.join(2)  # by then it is through, or held up by a pipe that is full
        go_on.touch()
        pipe.answer("deaf")
        wait_until(lambda: len(pipe.lines) >= number + 3, "all the answers")
        sending.join()
        answered = {each["id"] for each in pipe.messages() if "result" in each}
    assert answered == {"init", "list", "deaf", *range(number)}
    assert [each["id"] for each in executed(log)] == ["deaf", *range(number)]


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def http_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("http") / "log"


@pytest.fixture(scope="module")
def http(env: dict[str, str], http_log: Path) -> Iterator[Served]:
    command = permissive_server.command(http_log, "--transport", "http")
    with (
        Process(command) as server,
        http_sidecar(server.wait_for(LISTENING)[1], "--policy", ALLOW_ALL, env=env) as served,
    ):
        yield served


BROKEN = [
    "redirect",
    "gzip",
    "html",
    "no_json",
    "empty",
    "batch",
    "wrong_id",
    "long_line",
    "no_answer",
    "cut_head",
    "cut_body",
    "events_wrong_id",
    "events_none",
    "events_cut",
    "events_long",
]


@pytest.mark.parametrize("send", [post, post_modern], ids=["legacy", "modern"])
@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_is_none_is_an_error_for_its_caller_and_for_nobody_else(
    http: Served, http_log: Path, name: str, send: object
) -> None:
    assert callable(send)
    done = len(executed(http_log))
    answer = send(http.url, call("broken", name))
    assert answer.status == 200
    assert answer.message["id"] == "broken"
    assert failed(answer.message)
    assert "location" not in answer.headers
    assert send(http.url, call("next")).message["result"]["content"]
    assert [each["name"] for each in executed(http_log)[done:]] == [name, "echo"]


@pytest.mark.parametrize("send", [post, post_modern], ids=["legacy", "modern"])
def test_an_error_of_the_server_that_is_no_message_is_passed_on(http: Served, send: object) -> None:
    assert callable(send)
    answer = send(http.url, call("fails", "failing"))
    assert (answer.status, answer.body) == (500, b"<html>oops</html>")


def test_noise_between_events_is_dropped_and_only_the_first_answer_counts(http: Served) -> None:
    answer = post_modern(http.url, call("mine", "events_noise"))
    data = [line[6:] for line in answer.body.split(b"\n") if line.startswith(b"data: ")]
    assert [json.loads(each)["id"] for each in data] == ["mine"]
    assert b": a comment\n" in answer.body


def test_a_server_that_is_not_there_has_executed_nothing(
    env: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command = permissive_server.command(log, "--transport", "http")
    with Process(command) as server:
        url = server.wait_for(LISTENING)[1]
        with http_sidecar(url, "--policy", ALLOW_ALL, env=env) as served:
            assert post(served.url, call("there")).message["result"]
            server.stop()
            assert failed(post(served.url, call("gone")).message, sent=False)
            with Wire(served.url) as wire:
                wire.request(verb="GET")
                assert wire.answer("GET").status == 502
    assert [each["id"] for each in executed(log)] == ["there"]


def test_memory_stays_bounded_after_answers_of_80_megabytes(http: Served) -> None:
    for name in ("long_line", "events_long"):
        assert failed(post(http.url, call("long", name)).message)
    resident = psutil.Process(http.pid).memory_info().rss
    print(f"resident after {LONG // 10**6} MB answers: {resident / 2**20:.0f} MiB")
    assert resident < MEMORY
