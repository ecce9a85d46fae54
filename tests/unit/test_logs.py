"""Logs are one JSON object a line, whatever they say."""

from __future__ import annotations

import json
import logging
import sys

from sidecar.logs import MOST, Calm, JsonFormatter


def record(message: str, *, failed: bool = False) -> logging.LogRecord:
    info = None
    if failed:
        try:
            raise ValueError("what went wrong")
        except ValueError:
            info = sys.exc_info()
    return logging.LogRecord("sidecar.opa", logging.WARNING, "", 0, message, (), info)


def test_a_line_says_when_how_bad_who_and_what() -> None:
    entry = json.loads(JsonFormatter().format(record("two\nlines")))
    assert entry.pop("time").endswith("+00:00")
    assert entry == {"level": "warning", "logger": "sidecar.opa", "message": "two\nlines"}


def test_a_failure_is_in_the_same_line() -> None:
    text = JsonFormatter().format(record("it failed", failed=True))
    assert "\n" not in text
    assert "what went wrong" in json.loads(text)["error"]


def said(calm: Calm, at: float, *, level: int = logging.WARNING, line: int = 7) -> str | None:
    """What is written of a message at that time, said in that line of code."""
    made = logging.LogRecord("sidecar", level, "code.py", line, "no: %s", ("x",), None)
    made.created = at
    return made.getMessage() if calm.filter(made) else None


def test_a_flood_of_one_kind_is_counted_and_the_count_is_told_once() -> None:
    calm = Calm()
    first = [said(calm, 10.0) for _ in range(MOST)]
    assert first[:-1] == ["no: x"] * (MOST - 1)
    assert first[-1] == "no: x (more of this kind are counted, not shown)"
    assert [said(calm, 10.9) for _ in range(123)] == [None] * 123
    assert said(calm, 11.0) == "no: x (and 123 more)"
    assert said(calm, 11.1) == "no: x"


def test_another_kind_and_what_is_no_warning_are_written_all_the_same() -> None:
    calm = Calm()
    while said(calm, 10.0) is not None:
        pass
    assert said(calm, 10.0, line=8) == "no: x"
    assert [said(calm, 10.0, level=logging.INFO) for _ in range(2 * MOST)] == ["no: x"] * 2 * MOST


def test_a_clock_that_is_set_back_silences_nobody() -> None:
    calm = Calm()
    while said(calm, 10.0) is not None:
        pass
    assert said(calm, 5.0) == "no: x (and 1 more)"
