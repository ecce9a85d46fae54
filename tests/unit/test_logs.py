"""Logs are one JSON object a line, whatever they say."""

from __future__ import annotations

import json
import logging
import sys

from sidecar.logs import JsonFormatter


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
