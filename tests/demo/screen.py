"""What the demo prints: progress while it runs, the table, and the span trees."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from tests.demo.stage import MODES, Answer, Transport
from tests.demo.story import LIST, Actor, Step
from tests.demo.verdict import Done, is_fine
from tests.support.otlp import Span
from tests.support.ticket_desk import LISTED

PLAIN: Mapping[str, str] = {}
COLOURS: Mapping[str, str] = {
    "allow": "\x1b[32m",
    "deny": "\x1b[33m",
    "wrong": "\x1b[1;31m",
    "faint": "\x1b[2m",
    "bold": "\x1b[1m",
}
RESET = "\x1b[0m"
COLUMNS = (
    ("ACTOR", 17),
    ("ACTION", 25),
    ("DECISION", 8),
    ("REASON", 24),
    ("SERVER EXECUTED", 15),
    ("STDIO", 8),
    ("HTTP", 8),
)
SPOKEN = "The client is the official one: over stdio with a handshake, over HTTP stateless."
# What the server span says, in this order; the rest of a trace is for Jaeger.
SHOWN = (
    "actor.type",
    "actor.id",
    "actor.on_behalf_of",
    "authz.decision",
    "authz.outcome",
    "authz.reason",
    "authz.rule",
    "authz.owner",
    "authz.resource",
    "authz.policy_revision",
    "authz.decision_id",
)


class Screen:
    """Prints to stdout; progress goes to stderr, and only where somebody watches."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        coloured = sys.stdout.isatty() and not environ.get("NO_COLOR")
        self._colours = COLOURS if coloured else PLAIN
        self._watched = sys.stderr.isatty()

    def progress(self, what: str) -> None:
        """One line, for whoever waits."""
        if self._watched:
            print(f"· {what} …", file=sys.stderr, flush=True)

    def say(self, line: str = "", style: str = "") -> None:
        """One line."""
        print(self._in(style, line))

    def table(self, answers: Sequence[Answer], done: Done) -> None:
        """One row for what an actor did over both transports, two where they differ."""
        self.say(_row(name for name, _ in COLUMNS), "bold")
        for actor, rows in groupby(_rows(answers, done), key=lambda row: row[0].actor):
            self.say("─" * (sum(width for _, width in COLUMNS) + len(COLUMNS) - 1), "faint")
            names = _wrapped(actor)
            for answer, times, effects in rows:
                self._line(next(names, ""), answer, times, effects, fine=is_fine(answer, done))
        self.say()
        self.say(f"Times are milliseconds. {SPOKEN}", "faint")
        self.say()

    def _line(
        self,
        name: str,
        answer: Answer,
        times: Mapping[Transport, float],
        effects: Sequence[tuple[str, dict[str, Any]]],
        *,
        fine: bool,
    ) -> None:
        cells = (
            name,
            answer.step.title,
            answer.decision,
            _reason(answer),
            ", ".join(effect for effect, _ in effects) or "–",
            *(f"{times[each]:8.1f}" if each in times else " " * 8 for each in MODES),
        )
        style = answer.decision if fine else "wrong"
        self.say(_row(cells) + ("" if fine else "  ✗"), style)

    def tree(self, title: str, spans: Sequence[Span], style: str) -> None:
        """The spans of one trace, each below its parent."""
        self.say(title, "bold")
        known = {span.span_id for span in spans}
        roots = [span for span in spans if span.parent_id not in known]
        for root in roots:
            self._branch(root, spans, style, "", "")
        self.say()

    def _branch(self, span: Span, spans: Sequence[Span], style: str, lead: str, rest: str) -> None:
        what = f"{lead}{span.service}: {span.name}"
        said = {**span.attributes} if span.kind == "SERVER" else {}
        coloured = style if "authz.decision" in said else ""
        self.say(
            f"{what:<72} {span.kind.lower():<8} {(span.end - span.start) / 1e6:8.1f} ms", coloured
        )
        below = sorted((s for s in spans if s.parent_id == span.span_id), key=lambda s: s.start)
        bar = "│  " if below else "   "
        for name in SHOWN:
            if name in said:
                self.say(f"{rest}{bar}  {name} = {said[name]}", "faint")
        for child in below:
            last = child is below[-1]
            self._branch(
                child,
                spans,
                style,
                f"{rest}{'└─ ' if last else '├─ '}",
                f"{rest}{'   ' if last else '│  '}",
            )

    def _in(self, style: str, text: str) -> str:
        colour = self._colours.get(style)
        return f"{colour}{text}{RESET}" if colour and text else text


def _row(cells: Iterable[str]) -> str:
    widths = (width for _, width in COLUMNS)
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _wrapped(actor: Actor) -> Iterator[str]:
    first, middle, last = actor.title.partition(" for ")
    yield first
    if middle:
        yield f"  for {last}"


def _reason(answer: Answer) -> str:
    if answer.step.method == LIST and answer.decision == "allow":
        return f"{len(answer.listed)} of {len(LISTED)} shown"
    return answer.reason


Row = tuple[Answer, dict[Transport, float], Sequence[tuple[str, dict[str, Any]]]]


def _rows(answers: Sequence[Answer], done: Done) -> Iterator[Row]:
    """What came of each step; transports that agree share a row."""
    by_step: dict[tuple[str, Step], list[Answer]] = {}
    for answer in answers:
        by_step.setdefault((answer.actor.name, answer.step), []).append(answer)
    for group in by_step.values():
        seen: list[tuple[object, Row]] = []
        for answer in group:
            effects = done.get(answer.trace_id, ())
            outcome = (answer.decision, answer.reason, answer.listed, list(effects))
            same = next((row for other, row in seen if other == outcome), None)
            if same is not None:
                same[1][answer.transport] = answer.milliseconds
            else:
                row = (answer, {answer.transport: answer.milliseconds}, effects)
                seen.append((outcome, row))
        yield from (row for _, row in seen)
