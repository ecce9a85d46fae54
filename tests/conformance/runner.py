"""The conformance suite against one server, directly and through the sidecar, check by check.

A check is the same when its status, its description and its message are: what fails must fail for
the same reason.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support.processes import (
    ADMIN,
    ALLOW_ALL,
    LISTENING,
    Process,
    environment,
    http_sidecar,
    sidecar,
    wait_ready,
)

FIXTURE = (sys.executable, "-m", "tests.conformance.fixture")
SCENARIO_MS = 15_000
SET_SECONDS = 200.0
STAMP = re.compile(r"^server-(.+)-\d{4}-\d\d-\d\dT[\d-]+Z$")


@dataclass(frozen=True, slots=True)
class ScenarioSet:
    """What the suite is asked to run, and how the fixture does. `failed` are unscored checks."""

    name: str
    options: tuple[str, ...]
    passed: int
    failed: int = 0


def _required(revision: str, passed: int, failed: int = 0) -> ScenarioSet:
    return ScenarioSet(f"requirements {revision}", ("--requirements", revision), passed, failed)


def _all(version: str, passed: int) -> ScenarioSet:
    options = ("--suite", "all", "--spec-version", version)
    return ScenarioSet(f"all at {version}", options, passed)


SETS = (
    _required("2025-11-25", 84),
    _required("2026-07-28", 169, failed=25),  # tasks are an extension that the SDK does not have
    _all("2025-03-26", 3),
    _all("2025-06-18", 56),
    _all("2025-11-25", 84),
    _all("2026-07-28", 152),
    _all("draft", 152),
)


class Key(NamedTuple):
    """Which check it is: `number` tells those of one name apart."""

    scenario: str
    id: str
    name: str
    number: int


class Result(NamedTuple):
    """What came of a check."""

    status: str
    description: str
    message: str | None


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a set: the suite's exit code, its checks, and the end of what it printed."""

    code: int
    checks: dict[Key, Result]
    output: str

    @property
    def passed(self) -> int:
        return self._count("SUCCESS")

    @property
    def failed(self) -> int:
        return self._count("FAILURE")

    @property
    def score(self) -> str:
        """As the suite puts it, with its exit code: the scored checks decide that one."""
        return f"{self.passed}/{self.failed} rc {self.code}"

    def _count(self, status: str) -> int:
        return sum(result.status == status for result in self.checks.values())


@dataclass(frozen=True, slots=True)
class Comparison:
    """One set, both ways."""

    of: ScenarioSet
    direct: Run
    sidecar: Run

    @property
    def different(self) -> list[Key]:
        """The checks that came out differently."""
        keys = [*self.direct.checks, *(self.sidecar.checks.keys() - self.direct.checks.keys())]
        both = [(key, self.direct.checks.get(key), self.sidecar.checks.get(key)) for key in keys]
        return [
            key
            for key, without, through in both
            if without != through and not (_is_note(without) and _is_note(through))
        ]

    @property
    def differences(self) -> list[str]:
        """The same as lines to read, and the exit code."""
        lines = [
            f"{key.scenario}: {key.id} ({key.name} {key.number})\n"
            f"  direct   {_shown(self.direct.checks.get(key))}\n"
            f"  sidecar  {_shown(self.sidecar.checks.get(key))}"
            for key in self.different
        ]
        if self.direct.code != self.sidecar.code:
            lines.append(f"exit codes: direct {self.direct.code}, sidecar {self.sidecar.code}")
        return lines


def _is_note(result: Result | None) -> bool:
    """Whether it is no result, but a line of the suite's log: how many there are is chance."""
    return result is None or result.status == "INFO"


def _shown(result: Result | None) -> str:
    if result is None:
        return "not there"
    return f"{result.status}: {result.message or result.description}"


# ── The suite ─────────────────────────────────────────────────────────────────────────────────────


class Suite:
    """The suite in the folder of the Node parts, run by the Node that came with it."""

    def __init__(self, parts: Path) -> None:
        modules = parts / "node_modules"
        self.package = modules / "@modelcontextprotocol" / "conformance"
        self._node = modules / ".bin" / "node"

    def usable(self) -> bool:
        """Whether the suite is there, with a Node that runs on this machine."""
        if not (self._node.exists() and self.package.exists()):
            return False
        return (
            subprocess.run([self._node, "--version"], capture_output=True, check=False).returncode
            == 0
        )

    def run(self, options: Sequence[str], url: str) -> Run:
        """Run the suite against `url`.

        Raises:
            subprocess.TimeoutExpired: it hangs.

        """
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            done = self._call(
                "--url", url, *options, "--timeout", str(SCENARIO_MS), "--output-dir", folder
            )
            checks = read_checks(Path(folder))
        return Run(done.returncode, checks, "\n".join(done.stdout.splitlines()[-40:]))

    def revisions(self) -> tuple[set[str], set[str]]:
        """What it knows by its own word: revisions with requirements, and versions of the spec."""
        required = {file.stem for file in (self.package / "requirements").glob("*.yaml")}
        refusal = self._call("--url", "http://localhost:1", "--spec-version", "none").stderr
        valid = re.search(r"^Valid versions: (.*)$", refusal, re.MULTILINE)
        assert valid is not None, refusal
        return required, set(re.findall(r"\d{4}-\d\d-\d\d|draft", valid[1]))

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._node, self.package / "dist" / "index.js", "server", *arguments],
            env=environment(NO_COLOR="1"),
            capture_output=True,
            text=True,
            timeout=SET_SECONDS,
            check=False,
        )


def read_checks(folder: Path) -> dict[Key, Result]:
    """Every check of a run, from the `checks.json` of each scenario."""
    checks: dict[Key, Result] = {}
    for file in sorted(folder.glob("*/checks.json")):
        stamped = STAMP.match(file.parent.name)
        scenario = stamped[1] if stamped else file.parent.name
        seen: Counter[tuple[str, str]] = Counter()
        for check in json.loads(file.read_text(encoding="utf-8")):
            named = (check["id"], check["name"])
            seen[named] += 1
            result = Result(check["status"], check["description"], check.get("errorMessage"))
            checks[Key(scenario, *named, seen[named])] = result
    return checks


# ── Both ways ─────────────────────────────────────────────────────────────────────────────────────


def _by_name(url: str) -> str:
    """The suite checks Host names, and wants to begin with a good one."""
    return url.replace("127.0.0.1", "localhost")


@contextmanager
def direct() -> Iterator[str]:
    """A fixture of its own."""
    with Process(FIXTURE) as process:
        yield _by_name(process.wait_for(LISTENING)[1])


@contextmanager
def through_sidecar() -> Iterator[str]:
    """A fixture of its own, and the sidecar with a policy that allows all, asked of a real OPA."""
    with (
        Process(FIXTURE) as process,
        http_sidecar(process.wait_for(LISTENING)[1], "--policy", ALLOW_ALL) as served,
    ):
        yield _by_name(served.url)


@contextmanager
def through_bridge() -> Iterator[str]:
    """The same sidecar in front of stdio fixtures: one a session, and one for the stateless era."""
    where = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--policy", ALLOW_ALL)
    command = sidecar("http", *where, "--", *FIXTURE, "--transport", "stdio")
    with Process(command, env=environment(MCP_SIDECAR_BRIDGE__SHARED="true")) as process:
        wait_ready(process.wait_for(ADMIN)[1])
        yield _by_name(process.wait_for(LISTENING)[1])


Way = Callable[[], AbstractContextManager[str]]


@dataclass(frozen=True, slots=True)
class Arena:
    """Both ways, open: the URL of each."""

    suite: Suite
    direct: str
    other: str

    def compare(self, of: ScenarioSet) -> Comparison:
        """Run a set both ways at once: the servers share nothing."""
        with ThreadPoolExecutor(2) as pool:
            runs = pool.map(lambda url: self.suite.run(of.options, url), (self.direct, self.other))
            return Comparison(of, *runs)


@contextmanager
def arena(suite: Suite, way: Way = through_sidecar) -> Iterator[Arena]:
    """Start what is compared."""
    with direct() as without, way() as through:
        yield Arena(suite, without, through)


HEADING = f"{'scenarios':33}{'direct':>14}{'sidecar':>14}{'different':>11}"


def row(compared: Comparison, where: str = "") -> str:
    """A line below `HEADING`; scores are passed/failed and the suite's exit code."""
    scores = f"{compared.direct.score:>14}{compared.sidecar.score:>14}"
    return f"{f'{compared.of.name} {where}':33}{scores}{len(compared.differences):11}"
