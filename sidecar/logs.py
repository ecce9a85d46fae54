"""Logs on stderr: text for a terminal, one JSON object a line for everybody else.

What peers can cause is written at a bounded rate.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal


class JsonFormatter(logging.Formatter):
    """`{time, level, logger, message, error?}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


MOST = 20
"""Warnings and errors of one kind that are written in a second."""


@dataclass(slots=True)
class _Kind:
    """What one line of code has said: since when, how often, and how much of it was left out."""

    since: float = 0.0
    said: int = 0
    left_out: int = 0


class Calm(logging.Filter):
    """Lets a peer that is refused all the time fill neither disk nor log: the rest is counted."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, int], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write it; the first one after a flood says how many were not."""
        if record.levelno < logging.WARNING:
            return True
        kind = self._kinds.setdefault((record.pathname, record.lineno), _Kind())
        if not 0 <= record.created - kind.since < 1:
            kind.since, kind.said = record.created, 0
        kind.said += 1
        if kind.said > MOST:
            kind.left_out += 1
            return False
        if kind.said == MOST:
            record.msg = f"{record.msg} (more of this kind are counted, not shown)"
        elif kind.left_out:
            record.msg = f"{record.msg} (and {kind.left_out} more)"
            kind.left_out = 0
        return True


def set_up(kind: Literal["text", "json"] | None, level: str) -> None:
    """Send the logs of the whole process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if kind == "json" or (kind is None and not sys.stderr.isatty()):
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(levelname)-7s %(name)s: %(message)s"))
    handler.addFilter(Calm())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
