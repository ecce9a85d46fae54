"""Whether what happened is what should have happened: the exit code of the demo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.demo.stage import Answer
from tests.demo.story import ALLOWED, LIST, VISIBLE, Cell, expected, written

Done = Mapping[str, Sequence[tuple[str, dict[str, Any]]]]
"""What the server executed, by trace."""

Cells = Mapping[str, Cell]
"""What the sidecar has written down, by trace."""


def problems(answers: Sequence[Answer], done: Done, cells: Cells) -> list[str]:
    """Everything that is not as the story has it, in words; nothing means all is well."""
    found = [problem for answer in answers for problem in _of(answer, done, cells)]
    ours = {answer.trace_id for answer in answers}
    for trace_id, effects in done.items():
        if trace_id not in ours:
            found += [f"the server executed {name}, which nobody asked for" for name, _ in effects]
    return found


def is_fine(answer: Answer, done: Done, cells: Cells) -> bool:
    """Whether this one answer is as the story has it."""
    return not list(_of(answer, done, cells))


def _of(answer: Answer, done: Done, cells: Cells) -> Iterator[str]:
    actor, step, effects = answer.actor, answer.step, done.get(answer.trace_id, ())
    what = f"{actor.title} over {answer.transport}, {step.title}"
    should = expected(actor, step)
    came_of_it = ALLOWED if answer.decision == "allow" else answer.reason
    if came_of_it != should:
        yield f"{what}: {came_of_it}, and should be {should}"
    if answer.decision == "allow" and answer.reason:
        yield f"{what}: the server answered {answer.reason}"
    right = [step.effect] if should == ALLOWED and step.effect is not None else []
    if list(effects) != right:
        yield f"{what}: the server executed {_said(effects)}, and should have {_said(right)}"
    cell, right_cell = cells.get(answer.trace_id), written(actor, step, should)
    if cell != right_cell:
        yield f"{what}: the span says {cell}, and should say {right_cell}"
    if step.method == LIST and answer.listed != VISIBLE[actor]:
        yield f"{what}: saw {', '.join(answer.listed)}, and should see {', '.join(VISIBLE[actor])}"


def _said(effects: Sequence[tuple[str, dict[str, Any]]]) -> str:
    return " and ".join(f"{name} {arguments}" for name, arguments in effects) or "nothing"
