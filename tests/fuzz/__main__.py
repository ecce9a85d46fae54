"""`make fuzz`: every target side by side, each in a process of its own.

What a target fails on is kept in the folder that is printed, and the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.seeds import SEEDS, dictionary
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
SPARE = 60
"""Seconds that a target may take beyond its time: to start, and to end what it is at."""

OPTIONS = ("-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1")
LENGTHS = {"events": 256, "lines": 256}
"""The longest inputs, 2048 bytes unless said here: what is also fed byte by byte takes longer."""

DONE = re.compile(r"^#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)
SPEED = re.compile(r"stat::average_exec_per_sec:\s+(\d+)")


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of one target: its exit code, what libFuzzer counted, and what it found."""

    target: str
    code: int
    executions: int
    per_second: int
    branches: int
    features: int
    inputs: int
    findings: tuple[Path, ...]
    output: str

    @property
    def fine(self) -> bool:
        return self.code == 0 and self.executions > 0 and not self.findings

    def __str__(self) -> str:
        return (
            f"{self.target:<10}{self.executions:>10}{self.per_second:>10}{self.branches:>10}"
            f"{self.features:>10}{self.inputs:>8}{len(self.findings):>10}"
        )


HEADING = (
    f"{'target':<10}{'runs':>10}{'per s':>10}{'branches':>10}{'features':>10}{'inputs':>8}"
    f"{'findings':>10}"
)


def run(seconds: int, targets: Sequence[str], findings: Path, corpus: Path) -> list[Ran]:
    """Let each target search that long, all at once; `corpus` is what earlier searches kept."""
    with ExitStack() as running:
        started = [
            running.enter_context(_start(each, seconds, findings, corpus)) for each in targets
        ]
        try:
            codes = [process.wait(seconds + SPARE) for process in started]
        finally:
            for process in started:
                process.kill()
    return [_ran(each, code, findings) for each, code in zip(targets, codes, strict=True)]


def _start(target: str, seconds: int, findings: Path, corpus: Path) -> subprocess.Popen[bytes]:
    kept, found = corpus / target, findings / target
    for folder in (kept, found):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]):
        (kept / f"seed-{number}").write_bytes(seed)
    words = corpus / f"{target}.dict"
    words.write_text(dictionary(target), encoding="ascii")
    limits = [
        f"-max_total_time={seconds}",
        f"-max_len={LENGTHS.get(target, 2048)}",
        f"-dict={words}",
        f"-artifact_prefix={found}/",
    ]
    with _log(target, findings).open("wb") as log:
        return subprocess.Popen(
            [*_worker(target), *OPTIONS, *limits, str(kept)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _log(target: str, findings: Path) -> Path:
    return findings / f"{target}.log"


def _ran(target: str, code: int, findings: Path) -> Ran:
    output = _log(target, findings).read_text(encoding="utf-8", errors="replace")
    done, speed = DONE.search(output), SPEED.search(output)
    executions, branches, features, inputs = map(int, done.groups()) if done else (0, 0, 0, 0)
    return Ran(
        target,
        code,
        executions,
        int(speed[1]) if speed else 0,
        branches,
        features,
        inputs,
        tuple(sorted((findings / target).iterdir())),
        output,
    )


def report(ran: Sequence[Ran]) -> str:
    """A table, and what there is to say of each target that is not fine."""
    text = [HEADING, *map(str, ran)]
    for each in ran:
        if each.fine:
            continue
        text += ["", f"{each.target}: exit code {each.code}. The end of its output:"]
        text += [f"  | {line}" for line in each.output.splitlines()[-25:]]
        text += [f"again: {shlex.join(again(each, file))}" for file in each.findings]
    return "\n".join(text)


def again(ran: Ran, finding: Path) -> list[str]:
    """The command that runs a target on one finding."""
    return [*_worker(ran.target), str(finding)]


def _worker(target: str) -> list[str]:
    return [sys.executable, "-m", "tests.fuzz.worker", target]


def main() -> int:
    """Run as the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="for all of them, side by side")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one")
    parser.add_argument("--corpus", type=Path, help="a folder to keep what is worth keeping in")
    arguments = parser.parse_args()
    findings = Path(tempfile.mkdtemp(prefix="mcp-opa-sidecar-findings-"))
    print(f"findings go to {findings}", flush=True)
    with tempfile.TemporaryDirectory() as passing:
        corpus = arguments.corpus or Path(passing)
        ran = run(arguments.seconds, arguments.target or list(TARGETS), findings, corpus)
    print(report(ran))
    if all(each.fine for each in ran):
        shutil.rmtree(findings)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
