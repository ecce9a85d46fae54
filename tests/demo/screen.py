"""What the demo prints: progress while it runs, the table, and the span trees."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tests.demo.stage import MODES, Answer, Transport
from tests.demo.story import ACTORS, LIST, Actor, Cell, Step
from tests.demo.verdict import Cells, Done, is_fine
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
    ("RESOURCE", 19),
    ("DECISION", 8),
    ("REASON", 24),
    ("SERVER EXECUTED", 15),
    ("STDIO", 6),
    ("HTTP", 6),
)
ABSENT = Cell("(no span)", "", "", "", "", "")
SPOKEN = (
    "Actor, resource, decision and reason are from the sidecar's spans; times are milliseconds.",
    "The client is the official one. Over HTTP, stateless, each request has a token of its actor;",
    "over stdio, with a handshake, the configuration says who is there.",
)
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

    def table(self, answers: Sequence[Answer], done: Done, cells: Cells) -> None:
        """One row for what an actor did over both transports, two where they differ."""
        self.say(_row(name for name, _ in COLUMNS), "bold")
        for _, rows in groupby(_rows(answers, done, cells), key=lambda row: row.answer.actor):
            self.say("─" * (sum(width for _, width in COLUMNS) + len(COLUMNS) - 1), "faint")
            who, names = ABSENT, iter([""])
            for row in rows:
                if (row.cell.actor, row.cell.principal) != (who.actor, who.principal):
                    who, names = row.cell, _wrapped(row.cell)
                self._line(next(names, ""), row)
        self.say()
        for line in SPOKEN:
            self.say(line, "faint")
        self.say()

    def _line(self, name: str, row: Row) -> None:
        columns = (
            name,
            row.answer.step.title,
            row.cell.resource,
            row.cell.decision,
            _reason(row),
            ", ".join(effect for effect, _ in row.effects) or "–",
            *(f"{row.times[each]:6.1f}" if each in row.times else " " * 6 for each in MODES),
        )
        style = row.cell.decision if row.fine else "wrong"
        self.say(_row(columns) + ("" if row.fine else "  ✗"), style)

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


def _wrapped(cell: Cell) -> Iterator[str]:
    yield cell.actor
    if cell.principal:
        yield f"  for {cell.principal}"


def _reason(row: Row) -> str:
    if row.answer.step.method == LIST and row.answer.decision == "allow":
        return f"{len(row.answer.listed)} of {len(LISTED)} shown"
    return row.cell.reason


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one thing, and how long it took over each transport."""

    answer: Answer
    cell: Cell
    effects: Sequence[tuple[str, dict[str, Any]]]
    fine: bool
    times: dict[Transport, float]


def _rows(answers: Sequence[Answer], done: Done, cells: Cells) -> Iterator[Row]:
    """What came of each step; transports that agree share a row."""
    by_step: dict[tuple[Actor, Step], list[Answer]] = {}
    for answer in sorted(answers, key=lambda each: ACTORS.index(each.actor)):
        by_step.setdefault((answer.actor, answer.step), []).append(answer)
    for group in by_step.values():
        seen: list[tuple[object, Row]] = []
        for answer in group:
            cell, effects = cells.get(answer.trace_id, ABSENT), done.get(answer.trace_id, ())
            outcome = (cell, answer.decision, answer.reason, answer.listed, list(effects))
            same = next((row for other, row in seen if other == outcome), None)
            if same is not None:
                same.times[answer.transport] = answer.milliseconds
                continue
            times = {answer.transport: answer.milliseconds}
            row = Row(answer, cell, effects, is_fine(answer, done, cells), times)
            seen.append((outcome, row))
        yield from (row for _, row in seen)
