"""`make demo`: run it, print it, and say by the exit code whether all was as it should be."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from tests.demo import stage, story
from tests.demo.screen import Screen
from tests.demo.stage import Answer
from tests.demo.traces import OPA, SIDECAR, Collector, caller_spans
from tests.demo.verdict import Done, problems
from tests.support.jaeger import Jaeger, jaeger
from tests.support.processes import STARTER, wait_until

JAEGER = (
    "To see every call in Jaeger: make demo JAEGER=1; to send the spans to a collector of yours: "
    "make demo OTLP=http://localhost:4318"
)
DENIED_TO_AGENTS = {"actor.type": "agent", "authz.decision": "deny"}
SHOWN = (
    (story.BOT_FOR_ANA, "get_ticket", "allow", "ALLOWED: an agent reads a ticket for ana"),
    (story.BOT_FOR_ANA, "delete_ticket", "deny", "DENIED: the same agent deletes a ticket for ana"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 when the server executed exactly what the policy should allow."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    spans = parser.add_mutually_exclusive_group()
    spans.add_argument("--otlp", metavar="URL", help="a collector that gets the spans too")
    spans.add_argument("--jaeger", metavar="FILE", help="the same, Jaeger: started if none runs")
    parser.add_argument(
        "--policy",
        type=Path,
        default=STARTER,
        metavar="DIR",
        help="another policy: the demo will say what is not as the story has it",
    )
    options = parser.parse_args(arguments)
    screen, began = Screen(), time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="mcp-opa-sidecar-demo.") as folder,
        Collector() as collector,
    ):
        try:
            answers, done = _run(Path(folder), options.policy, collector, screen)
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            _explain(error, Path(folder))
            return 1
        cells = collector.cells()
        screen.table(answers, done, cells)
        found = problems(answers, done, cells) + _trees(screen, collector, answers)
        if options.jaeger is None:
            _where(screen, collector, options.otlp)
        code = _verdict(screen, answers, done, found, time.monotonic() - began)
        if options.jaeger is not None:
            _in_jaeger(screen, collector, options.jaeger)
    return code


def _run(
    folder: Path, policy: Path, collector: Collector, screen: Screen
) -> tuple[list[Answer], Done]:
    """Play it; afterwards every process has ended, and every span has come."""
    sidecars = 1 + len(story.PIPED)
    screen.progress(f"starting an issuer, a ticket desk and {sidecars} sidecars, each with an OPA")
    with (
        caller_spans(collector.url) as tracer,
        stage.set_up(folder, policy, collector.url, tracer) as scene,
    ):
        asked = partial(_wait_for_spans, collector)
        answers = asyncio.run(stage.play(scene, screen.progress, asked))
        screen.progress("stopping them")
    return answers, scene.done()


def _wait_for_spans(collector: Collector, answers: Sequence[Answer]) -> None:
    """An OPA that is ended forgets the spans that it has not sent yet."""
    asked = {each.trace_id for each in answers if each.step.method in (story.LIST, story.CALL)}

    def have_come() -> bool:
        return asked <= {span.trace_id for span in collector.spans if span.service == OPA}

    with suppress(TimeoutError):  # what is missing is said below the trees
        wait_until(have_come, "OPA has sent its spans", timeout=5)


def _trees(screen: Screen, collector: Collector, answers: Sequence[Answer]) -> list[str]:
    """Show two traces; what is wrong with them."""
    missing = []
    for actor, tool, style, title in SHOWN:
        answer = next(
            each
            for each in answers
            if (each.actor, each.step.tool, each.transport) == (actor, tool, "http")
        )
        spans = collector.trace(answer.trace_id)
        screen.tree(f"{title} (trace {answer.trace_id})", spans, style)
        if not {SIDECAR, OPA} <= {span.service for span in spans}:
            missing.append(f"the trace of {answer.step.title} lacks the sidecar's spans, or OPA's")
    return missing


def _where(screen: Screen, collector: Collector, otlp: str | None) -> None:
    """One line about Jaeger."""
    if otlp is None:
        screen.say(JAEGER)
        return
    failure = collector.pass_on(otlp)
    if failure is not None:
        screen.say(f"The spans could not be sent to {otlp}: {failure}", "wrong")
    else:
        screen.say(f"All spans were sent to {otlp}: look for the service {SIDECAR} there.")


def _in_jaeger(screen: Screen, collector: Collector, binary: str) -> None:
    """Send the spans to the Jaeger that runs, else to one that runs until Enter is pressed."""
    there = Jaeger.at(os.environ)
    ours = not there.answers
    with jaeger(binary, os.environ) if ours else nullcontext():
        _where(screen, collector, there.otlp)
        screen.say(f"What agents were denied: {there.search_page(SIDECAR, DENIED_TO_AGENTS)}")
        screen.say(f"The same without pages: {there.search_api(SIDECAR, DENIED_TO_AGENTS)}")
        if ours:
            screen.say("Jaeger runs until you press Enter.")
            with suppress(KeyboardInterrupt):
                sys.stdin.readline()


def _verdict(
    screen: Screen, answers: Sequence[Answer], done: Done, found: Sequence[str], seconds: float
) -> int:
    for problem in found:
        screen.say(f"✗ {problem}", "wrong")
    executed = sum(len(effects) for effects in done.values())
    if found:
        screen.say(f"{len(found)} things are not as the policy should have it.", "wrong")
        return 1
    screen.say(
        f"{len(answers)} requests; the server executed {executed} of them, exactly those that the "
        f"policy allows. {seconds:.0f} s.",
        "allow",
    )
    return 0


def _explain(error: BaseException, folder: Path) -> None:
    """Why the demo could not be played, with what the processes said last."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    print(f"The demo could not be played: {error}", file=sys.stderr)
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        for line in lines:
            print(f"  {log.stem} | {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
