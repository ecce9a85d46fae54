from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidecar.audit import MAX_LINE, MINUTE, MOST, Audit, line
from sidecar.config import Audit as Settings
from sidecar.conversation import Call, Stranger, TraceContext
from sidecar.errors import AuditError, ConfigError
from sidecar.policy.decision import Decision, Reason
from sidecar.policy.identity import Principal, static
from sidecar.protocol.session import Target
from sidecar.recording import Content
from tests.support import calls

TRACE = TraceContext(trace_id="4bf92f3577b34da6a3ce929d0e0e4736")


def sha256(text: bytes) -> str:
    return "sha256:" + hashlib.sha256(text).hexdigest()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def recorder(path: Path) -> Iterator[Audit]:
    record = Audit.open(Settings(str(path)), stream=2)
    yield record
    record.close()


def test_both_records_say_what_is_acted_on(recorder: Audit, path: Path) -> None:
    call = replace(calls.allowed(TRACE), resource="ticket:4711")
    recorder.decided(call)
    recorder.finished(call)
    assert [each["resource"] for each in records(path)] == ["ticket:4711"] * 2


def test_an_allowed_call_has_a_decision_and_an_outcome(recorder: Audit, path: Path) -> None:
    call = calls.allowed(TRACE)
    recorder.decided(call)
    recorder.finished(call)
    heading = {
        "decision_id": "0190-1",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "actor": {"type": "agent", "key": "static|bot", "on_behalf_of": "static|alice"},
        "server": "tickets",
        "transport": "http",
        "direction": "client_to_server",
        "method": "tools/call",
        "targets": [{"type": "tool", "name": "get_ticket"}],
        "decision": "allow",
        "mode": "enforce",
    }
    assert records(path) == [
        {
            **heading,
            "time": "2026-09-21T14:13:20.003Z",
            "type": "decision",
            "assurance": 1,
            "chain": [
                {"type": "agent", "id": "bot", "issuer": "static", "key": "static|bot"},
                {"type": "human", "id": "alice", "issuer": "static", "key": "static|alice"},
            ],
            "session": "sha256:1ec1c26b50d5d3c58d9583181af8076655fe00756bf7285940ba3670f99fcba0",
            "arguments_digest": sha256(b'{"id":"TOP-SECRET"}'),
            "reasons": [],
            "rule": "desk",
            "owner": "support",
            "policy_revision": "r7",
            "opa_decision_id": "opa-1",
            "milliseconds": 2.0,
        },
        {
            **heading,
            "time": "2026-09-21T14:13:20.010Z",
            "type": "outcome",
            "outcome": "success",
            "forwarded": True,
            "milliseconds": 10.0,
        },
    ]


def test_a_denial_says_why(recorder: Audit, path: Path) -> None:
    recorder.decided(calls.denied())
    recorder.finished(calls.denied())
    decision, outcome = records(path)
    assert decision["decision"] == "deny"
    assert decision["reasons"] == [
        {"code": "not_granted", "message": "no grant covers it"},
        {"code": "second"},
    ]
    assert (outcome["outcome"], outcome["rpc_error"], outcome["forwarded"]) == (
        "denied",
        -31403,
        False,
    )


def test_no_decision_says_what_was_wrong(recorder: Audit, path: Path) -> None:
    recorder.decided(calls.undecided())
    (decision,) = records(path)
    assert (decision["decision"], decision["error"]) == ("error", "timeout")
    assert "rule" not in decision


def test_an_unknown_method_is_recorded(recorder: Audit, path: Path) -> None:
    recorder.decided(calls.unknown("tools/destroy"))
    (decision,) = records(path)
    assert decision["method"] == "tools/destroy"
    assert decision["time"] == "2026-09-21T14:13:20.000Z"
    assert "milliseconds" not in decision


def test_what_nobody_judged_leaves_no_record(recorder: Audit, path: Path) -> None:
    recorder.decided(calls.passed())
    recorder.finished(calls.passed())
    assert records(path) == []


def test_arguments_claims_and_session_ids_are_not_recorded(recorder: Audit, path: Path) -> None:
    human = Principal("human", "alice", "idp", claims={"mail": "CLAIM"}, groups=("GROUP",))
    call = calls.allowed(actor=static(human))
    recorder.decided(call)
    recorder.finished(call)
    text = path.read_text(encoding="utf-8")
    assert not [each for each in ("TOP-SECRET", "CLAIM", "GROUP", "s3cret") if each in text]


def test_content_is_recorded_masked_when_it_is_switched_on(path: Path) -> None:
    content = Content(arguments=True, results=True)
    recorder = Audit.open(Settings(str(path)), stream=2, content=content)
    call = calls.allowed(result={"content": [{"type": "text", "text": "s3cret"}]})
    recorder.decided(call)
    recorder.finished(call)
    recorder.close()
    decision, outcome = records(path)
    assert decision["arguments"] == {"id": "<string 10>"}
    assert outcome["result"] == {"content": [{"type": "<string 4>", "text": "<string 6>"}]}
    assert "arguments" not in outcome
    assert "result" not in decision


@pytest.mark.parametrize(
    ("params", "same"),
    [
        pytest.param({"arguments": {"b": [1, 2], "a": 1}}, True, id="other order of keys"),
        pytest.param({"arguments": {"a": 1, "b": [2, 1]}}, False, id="other order of items"),
        pytest.param({"arguments": None}, False, id="null"),
        pytest.param({}, False, id="none"),
    ],
)
def test_the_digest_is_of_the_arguments_as_a_value(
    recorder: Audit, path: Path, params: dict[str, Any], same: bool
) -> None:
    for each in ({"arguments": {"a": 1, "b": [1, 2]}}, params):
        recorder.decided(calls.allowed(operation=calls.operation(params=each)))
    first, second = (each["arguments_digest"] for each in records(path))
    assert (first == second) is same


def test_only_tools_and_prompts_have_a_digest(recorder: Audit, path: Path) -> None:
    target = Target("resource", "file:///a")
    recorder.decided(calls.allowed(operation=calls.operation("resources/read", target)))
    assert "arguments_digest" not in records(path)[0]


def test_the_file_is_the_owners_alone(recorder: Audit, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_records_are_appended(path: Path) -> None:
    path.write_text("{}\n", encoding="utf-8")
    record = Audit.open(Settings(str(path)), stream=2)
    record.decided(calls.allowed())
    record.close()
    assert [each.get("type") for each in records(path)] == [None, "decision"]


def test_a_stream_is_written_to_and_left_open(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("wb") as file:
        record = Audit.open(Settings("-"), stream=file.fileno())
        record.decided(calls.allowed())
        record.reopen()
        record.close()
        record.finished(calls.allowed())
    assert [each["type"] for each in records(tmp_path / "stream")] == ["decision", "outcome"]


def test_a_file_that_can_not_be_opened_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit\.path: can not append to .*Is a directory"):
        Audit.open(Settings(str(tmp_path)), stream=2)


def test_two_that_share_a_file_do_not_tear_lines(path: Path) -> None:
    long = calls.allowed(server="x" * 1000)

    def write() -> None:
        record = Audit.open(Settings(str(path)), stream=2)
        for _ in range(200):
            record.decided(long)
        record.close()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records(path)) == 800


def fail_to_write(monkeypatch: pytest.MonkeyPatch, after: int | None = None) -> None:
    """The disk is full: nothing is written, or `after` bytes of it."""
    write = os.write

    def fail(fd: int, data: bytes) -> int:
        if after is not None:
            return write(fd, data[:after])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)


def test_a_decision_that_can_not_be_written_stops_the_call(
    recorder: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_write(monkeypatch)
    with pytest.raises(AuditError, match="No space left on device"):
        recorder.decided(calls.allowed())


def test_records_that_could_not_be_written_are_counted(
    recorder: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.decided(calls.allowed())
    fail_to_write(monkeypatch)
    with pytest.raises(AuditError):
        recorder.decided(calls.allowed())
    recorder.finished(calls.allowed())
    assert recorder.failures == 2


def test_half_a_record_stops_the_call_and_does_not_spoil_the_next(
    recorder: Audit, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_to_write(patch, after=20)
        with pytest.raises(AuditError, match=r"20 of [0-9]+ bytes written"):
            recorder.decided(calls.allowed())
    recorder.decided(calls.denied())
    recorder.finished(calls.denied())
    torn, *whole = path.read_bytes().splitlines()
    assert len(torn) == 20
    assert [json.loads(each)["type"] for each in whole] == ["decision", "outcome"]


def test_an_outcome_that_can_not_be_written_is_complained_of_once_a_minute(
    recorder: Audit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_to_write(monkeypatch)
    clock = SimpleNamespace(monotonic=iter((1000.0, 1030.0, 1061.0)).__next__)
    monkeypatch.setattr("sidecar.audit.time", clock)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            recorder.finished(calls.allowed())
    assert [each.message for each in caplog.records] == [
        "the audit record could not be written: No space left on device"
    ] * 2


@pytest.mark.parametrize("sync", [True, False])
def test_sync_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    record = Audit.open(Settings(str(path), sync), stream=2)
    record.decided(calls.allowed())
    record.close()
    assert len(synced) == sync


def test_sync_is_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("a pipe can not be synced"))
    reader, writer = os.pipe()
    Audit.open(Settings("-", sync=True), stream=writer).decided(calls.allowed())
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert json.loads(pipe.read())["type"] == "decision"


def test_after_reopen_the_record_goes_on_in_a_new_file(recorder: Audit, path: Path) -> None:
    recorder.decided(calls.allowed())
    path.rename(path.with_suffix(".1"))
    recorder.reopen()
    recorder.finished(calls.allowed())
    assert [each["type"] for each in records(path.with_suffix(".1"))] == ["decision"]
    assert [each["type"] for each in records(path)] == ["outcome"]


def test_when_reopen_fails_the_record_goes_on_in_the_old_file(
    recorder: Audit, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = path.with_suffix(".1")
    path.rename(moved)
    path.mkdir()
    recorder.reopen()
    recorder.decided(calls.allowed())
    assert len(records(moved)) == 1
    assert "Is a directory" in caplog.text


EMOJI = "\N{GRINNING FACE}" * 8_000


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(
            calls.allowed(operation=calls.operation(target=Target("tool", EMOJI))), id="name"
        ),
        pytest.param(
            calls.allowed(
                operation=calls.operation(
                    targets=tuple(Target("subscription", EMOJI) for _ in range(500))
                )
            ),
            id="targets",
        ),
        pytest.param(
            calls.denied(reasons=tuple(Reason(EMOJI, EMOJI, EMOJI) for _ in range(500))),
            id="reasons",
        ),
        pytest.param(
            calls.denied(
                actor=static(Principal("agent", EMOJI, EMOJI), Principal("human", EMOJI, EMOJI)),
                decision=Decision(False, rule=EMOJI, owner=EMOJI, revision=EMOJI, opa_id=EMOJI),
                reasons=tuple(Reason(EMOJI, EMOJI, EMOJI) for _ in range(500)),
                operation=calls.operation(
                    targets=tuple(Target("subscription", EMOJI) for _ in range(500))
                ),
                server=EMOJI,
            ),
            id="all",
        ),
    ],
)
def test_no_line_is_longer_than_the_limit(recorder: Audit, path: Path, call: Call) -> None:
    recorder.decided(call)
    raw = path.read_bytes()
    assert len(raw) <= MAX_LINE
    assert records(path)[0]["truncated"] is True


@pytest.mark.parametrize("hostile", ["a\nb", "\x1b[31m", "\x85", "\u2028", "\ud800"])
def test_a_line_is_one_line_of_plain_ascii(hostile: str) -> None:
    written = line({"name": hostile})
    assert written.isascii()
    assert written.count(b"\n") == 1
    assert json.loads(written) == {"name": hostile}


# ── Who was not let in ────────────────────────────────────────────────────────────────────────────

EVE = Stranger("token_signature", "http", "10.1.2.3", "/mcp")


def test_who_is_not_let_in_is_written_down(recorder: Audit, path: Path) -> None:
    recorder.refused(EVE)
    recorder.refused(Stranger("token_expired", "stdio"))
    first, second = records(path)
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "type": "refused",
        "reason": "token_signature",
        "transport": "http",
        "source_address": "10.1.2.3",
        "path": "/mcp",
    }
    assert second == {"type": "refused", "reason": "token_expired", "transport": "stdio"}


def test_a_flood_of_them_fills_no_disk_and_hides_no_other(
    recorder: Audit, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("sidecar.audit.time.monotonic", lambda: now)
    for _ in range(1000):
        recorder.refused(EVE)
    recorder.refused(replace(EVE, code="token_audience"))
    assert [each["reason"] for each in records(path)] == ["token_signature"] * MOST + [
        "token_audience"
    ]
    now += MINUTE
    for _ in range(2):
        recorder.refused(EVE)
    assert [each.get("left_out") for each in records(path)[-2:]] == [1000 - MOST, None]


def test_a_stranger_that_can_not_be_written_down_is_complained_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Path("/dev/full").open("wb") as full:
        Audit(full.fileno()).refused(EVE)
    assert "could not be written" in caplog.text
