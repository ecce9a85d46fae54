"""Bytes that no client should send: a clear error, or a clean close, each time.

The server behind the sidecar executes whatever it can make sense of, and its own log is the
witness. Under the policy that allows everything, what two parsers may read differently must not
arrive all the same; under the one that denies everything, nothing at all may be executed.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import permissive_server
from tests.support.opa import ALLOWED, HUNG, fake_opa
from tests.support.permissive_server import executed, records
from tests.support.processes import ALLOW_ALL, Process, environment, sidecar, wait_until
from tests.support.raw import (
    PATIENCE,
    Pipe,
    beside,
    call,
    code,
    dump,
    post,
    request,
    stdio_sidecar,
)
from tests.support.witnessed import (
    BAD_PARAMS,
    CALL,
    DENIED,
    FIVE_MEGABYTES,
    NO_JSON,
    NO_MESSAGE,
    POLICIES,
    Listening,
    Piped,
    listening,
    piped,
    table,
)


@pytest.fixture(scope="module")
def env(opa_bin: Path) -> dict[str, str]:
    return environment(opa_bin)


@pytest.fixture(scope="module", params=list(POLICIES))
def stdio(
    request: pytest.FixtureRequest, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Piped]:
    """One pipe for a whole table: that the next row is answered shows that it survived this one."""
    with piped(request.param, env, tmp_path_factory.mktemp("stdio") / "log") as place:
        place.pipe.greet()
        yield place


@pytest.fixture(scope="module", params=list(POLICIES))
def http(
    request: pytest.FixtureRequest, opa_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Listening]:
    log = tmp_path_factory.mktemp("http") / "log"
    with listening(request.param, environment(opa_bin), log) as place:
        yield place


# ── One message, on both transports ───────────────────────────────────────────────────────────────


def message(**members: Any) -> bytes:
    return dump({**call(7), **members})


def swapped(old: str, new: str) -> bytes:
    """The call with a piece of its text replaced, as no serialiser would write it."""
    text = CALL.decode()
    assert old in text
    return text.replace(old, new, 1).encode()


NESTED = '{"a":' * 80 + "1" + "}" * 80
DEEP = "[" * 100_000 + "]" * 100_000

# What it is, the bytes, the code of the error, the id in it.
BAD_MESSAGES: list[tuple[str, bytes, int, object]] = [
    ("half of it", CALL[: len(CALL) // 2], NO_JSON, None),
    ("garbage", b"\x16\x03\x01\x02", NO_JSON, None),
    ("HTTP on a pipe", b"POST /mcp HTTP/1.1", NO_JSON, None),
    ("something behind it", CALL + b"x", NO_JSON, None),
    ("two of them", CALL + CALL, NO_JSON, None),
    ("two with a comma", CALL + b"," + CALL, NO_JSON, None),
    ("a comment", CALL + b"// done", NO_JSON, None),
    ("a comma too many", swapped('"id": 7,', '"id": 7,,'), NO_JSON, None),
    ("single quotes", CALL.replace(b'"', b"'"), NO_JSON, None),
    ("a raw control character", swapped("echo", "ec\x01ho"), NO_JSON, None),
    ("a text", b'"tools/call"', NO_MESSAGE, None),
    ("a number", b"7", NO_MESSAGE, None),
    ("null", b"null", NO_MESSAGE, None),
    ("an empty object", b"{}", NO_MESSAGE, None),
    ("a batch", b"[" + CALL + b"," + CALL + b"]", NO_MESSAGE, None),
    ("a batch of one", b"[" + CALL + b"]", NO_MESSAGE, None),
    ("an empty batch", b"[]", NO_MESSAGE, None),
    ("a batch in a batch", b"[[" + CALL + b"]]", NO_MESSAGE, None),
    ("two methods", swapped('"method":', '"method": "ping", "method":'), NO_MESSAGE, None),
    ("a method escaped", swapped('"id"', r'"\u006dethod": "ping", "id"'), NO_MESSAGE, None),
    ("two ids", swapped('"id": 7', '"id": 7, "id": 8'), NO_MESSAGE, None),
    ("two params", swapped('"params"', '"params": {}, "params"'), NO_MESSAGE, None),
    ("two names", swapped('"name"', '"name": "x", "name"'), NO_MESSAGE, None),
    ("two arguments", swapped('"arguments": {}', '"arguments": {"a":1,"a":2}'), NO_MESSAGE, None),
    ("two deep down", swapped("{}", '{"a":[{"b":[{"c":1,"c":1}]}]}'), NO_MESSAGE, None),
    ("two in _meta", swapped('"name"', '"_meta": {"x":1,"x":1}, "name"'), NO_MESSAGE, None),
    ("a byte order mark", b"\xef\xbb\xbf" + CALL, NO_JSON, None),
    ("UTF-16 with a mark", CALL.decode().encode("utf-16"), NO_JSON, None),
    ("UTF-16 LE", CALL.decode().encode("utf-16-le"), NO_JSON, None),
    ("UTF-16 BE", CALL.decode().encode("utf-16-be"), NO_JSON, None),
    ("UTF-32 LE", CALL.decode().encode("utf-32-le"), NO_JSON, None),
    ("UTF-7", b"+AHs-" + CALL[1:], NO_JSON, None),
    ("no UTF-8 in a text", swapped("echo", "echoX").replace(b"X", b"\xff"), NO_JSON, None),
    ("an overlong NUL", swapped("echo", "echoX").replace(b"X", b"\xc0\x80"), NO_JSON, None),
    ("a raw surrogate", swapped("echo", "X").replace(b"X", b"\xed\xa0\x80"), NO_JSON, None),
    ("half of a surrogate pair", swapped("echo", r"\ud800"), NO_MESSAGE, None),
    ("half of one in a key", swapped("{}", r'{"\udfff":1}'), NO_MESSAGE, None),
    ("NaN", swapped("{}", '{"a":NaN}'), NO_JSON, None),
    ("Infinity", swapped("{}", '{"a":Infinity}'), NO_JSON, None),
    ("-Infinity", swapped("{}", '{"a":-Infinity}'), NO_JSON, None),
    ("a number beyond a double", swapped("{}", '{"a":1e400}'), NO_MESSAGE, None),
    ("an integer beyond 2^53", swapped("{}", '{"a":9007199254740993}'), NO_MESSAGE, None),
    ("5000 digits", swapped("{}", '{"a":' + "9" * 5000 + "}"), NO_MESSAGE, None),
    ("80 levels", swapped("{}", NESTED), NO_MESSAGE, None),
    ("100,000 levels", swapped("{}", DEEP), NO_JSON, None),
    ("id null", message(id=None), NO_MESSAGE, None),
    ("id 1.5", message(id=1.5), NO_MESSAGE, None),
    ("id 7.0", message(id=7.0), NO_MESSAGE, None),
    ("id 1e2", swapped('"id": 7', '"id": 1e2'), NO_MESSAGE, None),
    ("id true", message(id=True), NO_MESSAGE, None),
    ("id an object", message(id={}), NO_MESSAGE, None),
    ("id too large", swapped('"id": 7', '"id": 99999999999999999999999'), NO_MESSAGE, None),
    ("id too long", message(id="x" * 257), NO_MESSAGE, None),
    ("id with a control character", message(id="a\nb"), NO_MESSAGE, None),
    ("no jsonrpc", swapped('"jsonrpc": "2.0", ', ""), NO_MESSAGE, 7),
    ("jsonrpc 1.0", message(jsonrpc="1.0"), NO_MESSAGE, 7),
    ("jsonrpc a number", message(jsonrpc=2.0), NO_MESSAGE, 7),
    ("an unknown member", message(extra=1), NO_MESSAGE, 7),
    ("Method", swapped('"method"', '"Method"'), NO_MESSAGE, 7),
    ("method and METHOD", message(METHOD="ping"), NO_MESSAGE, 7),
    ("method null", message(method=None), NO_MESSAGE, 7),
    ("method with a space", message(method="tools/call "), NO_MESSAGE, 7),
    ("method with a NUL", message(method="tools/call\0"), NO_MESSAGE, 7),
    ("params a list", message(params=["echo"]), NO_MESSAGE, 7),
    ("params null", message(params=None), NO_MESSAGE, 7),
    ("method and result", message(result={}), NO_MESSAGE, 7),
    ("method and error", message(error={"code": 1, "message": ""}), NO_MESSAGE, 7),
    (
        "result and error",
        dump({"jsonrpc": "2.0", "id": 7, "result": {}, "error": {"code": 1, "message": ""}}),
        NO_MESSAGE,
        7,
    ),
    ("a result without id", dump({"jsonrpc": "2.0", "result": {}}), NO_MESSAGE, None),
    ("no name", message(params={"arguments": {}}), BAD_PARAMS, 7),
    ("name null", message(params={"name": None}), BAD_PARAMS, 7),
    ("a NUL in the name", message(params={"name": "echo\0"}), BAD_PARAMS, 7),
    ("arguments a list", message(params={"name": "echo", "arguments": [1]}), BAD_PARAMS, 7),
    ("name and Name", message(params={"name": "ping", "Name": "echo"}), BAD_PARAMS, 7),
    ("argumentſ", message(params={"name": "echo", "argumentſ": {}}), BAD_PARAMS, 7),
]


def test_the_witness_would_have_executed_most_of_it() -> None:
    sense = [permissive_server.make_sense(body) for _, body, _, _ in BAD_MESSAGES]
    effective = [each for each in sense if any("method" in message for message in each)]
    assert len(effective) > len(BAD_MESSAGES) * 2 / 3


@pytest.mark.parametrize(("body", "expected", "echoed"), table(BAD_MESSAGES))
def test_a_line_that_can_be_read_in_two_ways_is_refused_and_the_pipe_goes_on(
    stdio: Piped, body: bytes, expected: int, echoed: object
) -> None:
    before, done = len(stdio.pipe.lines), len(executed(stdio.log))
    stdio.pipe.send(body)
    stdio.pipe.ask(request(f"after {before}", "ping"))
    refusal, pong = stdio.pipe.messages()[before:]
    assert (code(refusal), refusal["id"]) == (expected, echoed)
    assert pong["result"] == {}
    assert len(executed(stdio.log)) == done


@pytest.mark.parametrize(("body", "expected", "echoed"), table(BAD_MESSAGES))
def test_a_body_that_can_be_read_in_two_ways_is_refused_and_goes_nowhere(
    http: Listening, body: bytes, expected: int, echoed: object
) -> None:
    before = len(records(http.log))
    answer = post(http.url, body)
    assert (answer.status, code(answer.message), answer.message["id"]) == (400, expected, echoed)
    assert len(records(http.log)) == before


@pytest.mark.parametrize(
    "body",
    table(
        [
            ("white space", b" \t " + CALL + b" "),
            ("escapes in keys", swapped('"method"', r'"\u006dethod"')),
            ("escapes in values", swapped("tools/call", r"tools\/c\u0061ll")),
            ("an escaped name", swapped("echo", r"\u0065cho")),
            ("no arguments", message(params={"name": "echo"})),
            ("arguments null", message(params={"name": "echo", "arguments": None})),
            ("60 levels", swapped("{}", '{"a":' * 60 + "1" + "}" * 60)),
        ]
    ),
)
def test_what_everybody_reads_alike_is_judged_by_its_meaning(
    stdio: Piped, http: Listening, body: bytes
) -> None:
    done = len(executed(stdio.log))
    answers = [post(http.url, body).message]
    stdio.pipe.forget()
    stdio.pipe.send(body)
    answers.append(stdio.pipe.answer(7))
    assert code(answers[0]) == (None if http.allows else DENIED)
    assert code(answers[1]) == (None if stdio.allows else DENIED)
    assert [each["name"] for each in executed(stdio.log)[done:]] == ["echo"] * stdio.allows


# ── A pipe ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "line",
    table(
        [
            ("in an array", b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":[1,\r%b\r]}}'),
            ("at the end", b'{"jsonrpc":"2.0","id":1,"method":"ping"}\r%b'),
            ("before it", b"\r%b"),
            ("twice at the end", b"%b\r\r"),
        ]
    ),
)
def test_nothing_is_smuggled_behind_a_carriage_return(stdio: Piped, line: bytes) -> None:
    before, done = len(stdio.pipe.lines), len(executed(stdio.log))
    stdio.pipe.send(line.replace(b"%b", dump(call("smuggled"))))
    stdio.pipe.ask(request(f"after {before}", "ping"))
    refusal, _ = stdio.pipe.messages()[before:]
    assert (code(refusal), refusal["id"]) == (NO_MESSAGE, None)
    assert len(executed(stdio.log)) == done


def test_a_line_may_end_with_carriage_return_and_newline(stdio: Piped) -> None:
    stdio.pipe.write(dump(call("crlf")) + b"\r\n")
    assert code(stdio.pipe.answer("crlf")) == (None if stdio.allows else DENIED)


def test_a_content_length_preamble_is_refused_and_what_follows_is_judged(stdio: Piped) -> None:
    body, before = dump(call("lsp")), len(stdio.pipe.lines)
    stdio.pipe.write(b"Content-Length: %d\r\n\r\n%b\n" % (len(body), body))
    assert code(stdio.pipe.answer("lsp")) == (None if stdio.allows else DENIED)
    assert code(stdio.pipe.messages()[before]) == NO_JSON


def test_a_message_that_comes_byte_by_byte_is_one_message(stdio: Piped) -> None:
    for byte in dump(call("bytewise")) + b"\n":
        stdio.pipe.write(bytes([byte]))
    assert code(stdio.pipe.answer("bytewise")) == (None if stdio.allows else DENIED)


@pytest.fixture(params=list(POLICIES))
def fresh(request: pytest.FixtureRequest, env: dict[str, str], tmp_path: Path) -> Iterator[Piped]:
    """A pipe for one test, which may break it."""
    with piped(request.param, env, tmp_path / "log") as place:
        yield place


@pytest.mark.parametrize(
    ("last", "answer"),
    table(
        [
            ("half of it", CALL[:40], NO_JSON),
            ("half of a character", CALL[:-20] + b"\xc3", NO_JSON),
            ("all but the newline", CALL, "judged"),
        ]
    ),
)
def test_a_line_that_does_not_end_is_read_at_the_end_of_the_pipe(
    fresh: Piped, last: bytes, answer: object
) -> None:
    fresh.pipe.write(last)
    fresh.pipe.end()
    assert fresh.pipe.wait_for_end() == 0
    [message] = fresh.pipe.messages()
    judged = None if fresh.allows else DENIED
    assert code(message) == (judged if answer == "judged" else answer)
    assert len(executed(fresh.log)) == (answer == "judged" and fresh.allows)


def test_a_line_of_5_megabytes_is_answered_and_the_pipe_is_closed(fresh: Piped) -> None:
    fresh.pipe.send(call("before", "echo"), call("large", text="x" * FIVE_MEGABYTES), call("after"))
    assert fresh.pipe.wait_for_end() == 0
    answers = {each["id"]: code(each) for each in fresh.pipe.messages()}
    assert answers == {"before": None if fresh.allows else DENIED, None: NO_MESSAGE}
    assert [each["id"] for each in executed(fresh.log)] == ["before"] * fresh.allows


def test_a_line_of_5_megabytes_that_never_ends_is_not_kept(fresh: Piped) -> None:
    fresh.pipe.write(b"x" * FIVE_MEGABYTES)
    assert fresh.pipe.wait_for_end() == 0
    assert [code(each) for each in fresh.pipe.messages()] == [NO_MESSAGE]


def test_who_does_not_read_what_is_refused_is_not_read_on(
    env: dict[str, str], tmp_path: Path
) -> None:
    server = permissive_server.command(tmp_path / "log")
    command = [*sidecar("stdio", "--policy", ALLOW_ALL, "--"), *server]
    with Process(command, env=env, pipes=True) as process:
        bad, taken, out = b"x" * 1000 + b"\n", 0, process.stdin.fileno()
        os.set_blocking(out, False)
        while taken < 20_000_000 and select.select([], [out], [], 2)[1]:
            taken += os.write(out, bad)
        assert taken < 20_000_000
        os.set_blocking(out, True)
        pipe = Pipe(process)
        pipe.write(b"\n")
        assert pipe.ask(request("after it all", "ping"))["result"] == {}
        process.stop()
        pipe.reader.join(PATIENCE)


def test_nothing_at_all_ends_without_a_word(fresh: Piped) -> None:
    fresh.pipe.end()
    assert fresh.pipe.wait_for_end() == 0
    assert fresh.pipe.lines == []


def test_an_id_that_is_in_flight_can_not_be_used_again(env: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with stdio_sidecar(permissive_server.command(log), "--policy", ALLOW_ALL, env=env) as pipe:
        pipe.greet()
        pipe.send(call("twice", "hold"), call("twice", "echo"))
        assert code(pipe.answer("twice")) == NO_MESSAGE
        pipe.ask(call("let go", "release"))
        assert [each["name"] for each in executed(log)] == ["hold", "release"]


# ── Order on a pipe ───────────────────────────────────────────────────────────────────────────────


def test_a_hundred_calls_at_once_arrive_in_the_order_they_were_sent(fresh: Piped) -> None:
    fresh.pipe.greet()
    fresh.pipe.send(*(call(number, text="x" * (number * 37 % 500)) for number in range(100)))
    answers = [fresh.pipe.answer(number) for number in range(100)]
    assert {code(each) for each in answers} == {None if fresh.allows else DENIED}
    arrived = [each["id"] for each in executed(fresh.log)]
    assert arrived == (list(range(100)) if fresh.allows else [])


def test_pings_cancels_and_progress_pass_a_call_that_waits_for_its_decision(
    env: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    config = tmp_path / "config.yaml"
    config.write_text("{policy: {deadline: 20}, limits: {drain: 0}}", encoding="utf-8")
    with (
        beside(fake_opa(ALLOWED)) as opa,
        stdio_sidecar(
            permissive_server.command(log), "--opa", opa.url, "--config", config, env=env
        ) as pipe,
    ):
        pipe.greet()
        pipe.ask(request("list", "tools/list"))
        asked, opa.answer = len(opa.questions), HUNG
        pipe.send(call("waits"), call("waits too"), call("never"))
        wait_until(lambda: len(opa.questions) >= asked + 3, "three questions")
        cancel = {"requestId": "never", "reason": "changed my mind"}
        progress = {"progressToken": "t", "progress": 1}
        pipe.send(
            {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": cancel},
            {"jsonrpc": "2.0", "method": "notifications/progress", "params": progress},
        )
        assert pipe.ask(request("now", "ping"))["result"] == {}
        methods = [each["method"] for each in records(log, "message")]
        assert methods[-2:] == ["notifications/progress", "ping"]
        assert executed(log) == []
        assert "notifications/cancelled" not in methods


# ── What is dropped without a word ────────────────────────────────────────────────────────────────


def test_a_notification_that_is_not_in_the_table_is_dropped(http: Listening, stdio: Piped) -> None:
    notification = {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "echo"}}
    before = len(records(http.log)), len(records(stdio.log))
    answer = post(http.url, notification)
    assert (answer.status, answer.body) == (202, b"")
    stdio.pipe.send(notification)
    stdio.pipe.ask(request(f"after {before}", "ping"))
    assert (len(records(http.log)), len(records(stdio.log))) == (before[0], before[1] + 1)


def test_an_answer_that_no_server_asked_for_is_dropped(http: Listening, stdio: Piped) -> None:
    forged = {"jsonrpc": "2.0", "id": "question-1", "result": {"role": "assistant"}}
    before = len(records(http.log)), len(records(stdio.log))
    assert post(http.url, forged).status == 202
    stdio.pipe.send(forged)
    stdio.pipe.ask(request(f"after {before}", "ping"))
    assert (len(records(http.log)), len(records(stdio.log))) == (before[0], before[1] + 1)


def test_a_batch_is_refused_also_where_the_revision_had_them(
    env: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    server = permissive_server.command(log)
    with stdio_sidecar(server, "--policy", ALLOW_ALL, env=env) as pipe:
        pipe.greet("2025-03-26")
        pipe.send([call(1), call(2)])
        refusal = pipe.answer(None)
    assert code(refusal) == NO_MESSAGE
    assert executed(log) == []
