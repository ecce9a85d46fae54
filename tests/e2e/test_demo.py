"""The demo shows what it says it shows, and would notice if it were not so."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.demo.screen import Screen
from tests.demo.stage import PLAYED, Answer, Transport
from tests.demo.story import (
    ACTORS,
    ALLOWED,
    ANA,
    BOT,
    BOT_FOR_ANA,
    NOBODY,
    STEPS,
    VISIBLE,
    Actor,
    Cell,
    Step,
    expected,
    written,
)
from tests.demo.verdict import problems
from tests.support.otlp import Sink
from tests.support.processes import ALLOW_ALL, ROOT, environment

LANES = [(actor, transport) for transport, actors in PLAYED.items() for actor in actors]
DELETE = next(step for step in STEPS if step.tool == "delete_ticket")
GET = next(step for step in STEPS if step.tool == "get_ticket")


def play(opa: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.demo", *arguments],
        cwd=ROOT,
        env=environment(opa),
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


def test_it_shows_the_main_job_and_passes_the_spans_on(opa_bin: Path) -> None:
    with Sink() as sink:
        done = play(opa_bin, "--otlp", sink.url)
    assert done.returncode == 0, done.stdout + done.stderr
    for actor in ACTORS:
        first, _, behind = actor.title.partition(" for ")
        assert f"\n{first} " in done.stdout
        assert not behind or f"\n  for {behind} " in done.stdout
    for step in STEPS:
        assert done.stdout.count(f" {step.title} ") >= len(ACTORS), step.title
    for word in ("not_granted_to_principal", "unknown_actor", "ticket:4711", "4 of 5"):
        assert word in done.stdout
    allowed, _, denied = done.stdout.partition("ALLOWED:")[2].partition("DENIED:")
    assert [allowed.count(name) for name in ("opa: ", "ticket-desk: ")] == [1, 1]
    assert [denied.count(name) for name in ("opa: ", "ticket-desk: ")] == [1, 0]
    assert "\x1b" not in done.stdout
    assert "exactly those that the policy allows" in done.stdout
    services = Counter(span.service for span in sink.spans)
    requests = len(LANES) * len(STEPS)
    assert services["demo-client"] == requests
    assert services["mcp-opa-sidecar"] > requests
    assert services["opa"] >= requests - len(LANES)


def test_it_notices_a_policy_that_allows_too_much(opa_bin: Path) -> None:
    done = play(opa_bin, "--policy", str(ALLOW_ALL))
    assert done.returncode == 1
    assert "✗ unknown anonymous over http, export_all (never listed): the server executed" in (
        done.stdout
    )
    assert "make demo OTLP=http://localhost:4318" in done.stdout


def test_it_says_why_it_can_not_be_played(opa_bin: Path, tmp_path: Path) -> None:
    done = play(opa_bin, "--policy", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


# ── The verdict ───────────────────────────────────────────────────────────────────────────────────


def told() -> list[Answer]:
    """What the callers get when all is well."""
    return [_told(actor, step, transport) for actor, transport in LANES for step in STEPS]


def _told(actor: Actor, step: Step, transport: Transport) -> Answer:
    reason = expected(actor, step)
    trace = f"{actor.title} {step.title} {transport}"
    listed = VISIBLE[actor] if step.method == "tools/list" else ()
    if reason == ALLOWED:
        return Answer(actor, step, transport, "allow", "", 1.0, trace, listed)
    return Answer(actor, step, transport, "deny", reason, 1.0, trace)


def executed(answers: list[Answer]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """What the server executes when all is well."""
    return {
        each.trace_id: [each.step.effect]
        for each in answers
        if each.decision == "allow" and each.step.effect is not None
    }


def seen(answers: list[Answer]) -> dict[str, Cell]:
    """What the sidecar writes down when all is well."""
    return {
        each.trace_id: written(each.actor, each.step, expected(each.actor, each.step))
        for each in answers
    }


def trace(actor: Actor, step: Step) -> str:
    return _told(actor, step, "http").trace_id


def test_every_type_of_actor_is_there_alone_and_for_a_human() -> None:
    cells = {(each.type, each.on_behalf_of is not None) for each in ACTORS}
    types = ("human", "service", "agent", "unknown")
    assert cells == {(kind, behind) for kind in types for behind in (False, True)}


def test_nothing_is_wrong_when_all_is_as_it_should_be() -> None:
    assert problems(told(), executed(told()), seen(told())) == []


@pytest.mark.parametrize(
    ("trace_id", "effects", "said"),
    [
        pytest.param(trace(ANA, GET), [], "executed nothing, and should", id="too little"),
        pytest.param(
            trace(ANA, GET), [("get_ticket", {"id": 1})], "{'id': 1}", id="something else"
        ),
        pytest.param(trace(ANA, GET), [GET.effect] * 2, "and get_ticket", id="twice"),
        pytest.param(
            trace(BOT_FOR_ANA, DELETE),
            [DELETE.effect],
            "and should have nothing",
            id="what was denied",
        ),
        pytest.param("nobody's", [DELETE.effect], "nobody asked for", id="what nobody asked for"),
    ],
)
def test_the_server_must_execute_what_was_allowed_and_nothing_else(
    trace_id: str, effects: list[tuple[str, dict[str, Any]]], said: str
) -> None:
    (problem,) = problems(told(), {**executed(told()), trace_id: effects}, seen(told()))
    assert said in problem


def test_a_caller_must_get_the_right_reason_and_see_its_own_tools() -> None:
    answers = told()
    done, cells = executed(answers), seen(answers)
    wrong = replace(answers[5], reason="not_granted")
    (problem,) = problems([*answers[:5], wrong, *answers[6:]], done, cells)
    assert "not_granted, and should be argument_not_allowed" in problem
    curious = replace(answers[0], listed=VISIBLE[BOT_FOR_ANA])
    (problem,) = problems([curious, *answers[1:]], done, cells)
    assert "should see" in problem


@pytest.mark.parametrize("wrong", list(Cell.__dataclass_fields__))
def test_a_span_must_say_what_was_done_by_whom_and_why(wrong: str) -> None:
    cells, cell = seen(told()), trace(BOT, DELETE)
    (problem,) = problems(
        told(), executed(told()), {**cells, cell: replace(cells[cell], **{wrong: "?"})}
    )
    assert f"{wrong}='?'" in problem


def test_a_span_that_is_missing_is_missed() -> None:
    cells = seen(told())
    del cells[trace(NOBODY, GET)]
    (problem,) = problems(told(), executed(told()), cells)
    assert "the span says None" in problem


# ── The screen ────────────────────────────────────────────────────────────────────────────────────


class Terminal(io.StringIO):
    """Somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "coloured"),
    [
        pytest.param(Terminal, {}, True, id="terminal"),
        pytest.param(Terminal, {"NO_COLOR": "1"}, False, id="NO_COLOR"),
        pytest.param(io.StringIO, {}, False, id="pipe"),
    ],
)
def test_colours_and_progress_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch,
    stream: type[io.StringIO],
    environ: dict[str, str],
    coloured: bool,
) -> None:
    out, errors = stream(), stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    screen = Screen(environ)
    screen.progress("starting")
    screen.table(told(), executed(told()), seen(told()))
    assert ("\x1b[" in out.getvalue()) is coloured
    assert ("starting" in errors.getvalue()) is (stream is Terminal)


def test_a_row_is_for_both_transports_and_two_rows_where_they_differ(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = told()
    Screen({}).table(answers, executed(answers), seen(answers))
    rows = [line for line in capsys.readouterr().out.splitlines() if DELETE.title in line]
    assert len(rows) == len(ACTORS)
    effect = DELETE.effect
    assert effect is not None
    done = {**executed(answers), trace(BOT_FOR_ANA, DELETE): [effect]}
    Screen({}).table(answers, done, seen(answers))
    rows = [line for line in capsys.readouterr().out.splitlines() if DELETE.title in line]
    assert len(rows) == len(ACTORS) + 1
    assert [line.endswith("✗") for line in rows].count(True) == 1
