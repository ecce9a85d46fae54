"""What every test can rely on.

Real parts (OPA, Jaeger, …) are looked up, never installed here: ``make test`` does that. One that
is not there skips its tests with a reason that begins with ``missing:``; with ``CI=true`` such a
skip is a failure. Tests in ``tests/unit`` do no I/O: starting a process or connecting fails them,
also where the code under test swallows the error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings as hypothesis_settings

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("unit", "contract", "e2e", "bench", "cluster")
MISSING = "missing:"

hypothesis_settings.register_profile("fast", max_examples=50, deadline=None)
hypothesis_settings.register_profile("ci", max_examples=200, deadline=None, print_blob=True)
hypothesis_settings.register_profile("deep", max_examples=5000, deadline=None, print_blob=True)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("true", "1")


hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if _in_ci() else "fast"))


# ── Real parts ────────────────────────────────────────────────────────────────────────────────────


def _find(script: str) -> Path | None:
    """Ask an install script for what is there already."""
    done = subprocess.run(
        [ROOT / ".ci" / script, "--find"], capture_output=True, text=True, timeout=30, check=False
    )
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def require(part: str, found: Path | None, mend: str) -> Path:
    """Give ``found``, or leave the test out, saying what is missing and how to get it."""
    if found is None:
        pytest.skip(f"{MISSING} {part} ({mend})")
    return found


@pytest.fixture(scope="session")
def opa_bin() -> Path:
    """The path of an OPA that can be used."""
    return require("OPA", _find("install-opa"), "make setup")


@pytest.fixture(scope="session")
def jaeger_bin() -> Path:
    """The path of a Jaeger that can be used."""
    return require("Jaeger", _find("install-jaeger"), "make jaeger")


@pytest.fixture(scope="session")
def prometheus_bin() -> Path:
    """The folder of a ``prometheus`` and a ``promtool``."""
    return require("Prometheus", _find("install-prometheus"), "make test")


@pytest.fixture(scope="session")
def collector_bin() -> Path:
    """The path of an OpenTelemetry Collector with the parts that ours is configured to have."""
    return require("the OpenTelemetry Collector", _find("install-collector"), "make test")


@pytest.fixture(scope="session")
def cluster_parts() -> Path:
    """The folder of a control plane (etcd, API server, controller manager) and its kubectl."""
    return require("the Kubernetes control plane", _find("install-cluster"), "make test-cluster")


@pytest.fixture(scope="session")
def containerd_parts() -> Path:
    """The folder of a containerd, and of what it runs on a node."""
    return require("containerd", _find("install-containerd"), "make test-kubelet")


@pytest.fixture(scope="session")
def nft_usr() -> Path:
    """The folder that has ``nft``, as a container's /usr."""
    return require("nft", _find("install-nft"), "make test")


@pytest.fixture(scope="session")
def helm_bin() -> Path:
    """The path of a Helm that can be used."""
    return require("Helm", _find("install-helm"), "make test-cluster")


@pytest.fixture(scope="session")
def node_parts() -> Path:
    """The folder whose ``node_modules`` holds the reference MCP server."""
    mend = "make test" if shutil.which("node") else "install Node 18 or later"
    return require("the Node parts", _find("install-node-parts"), mend)


@pytest.fixture(scope="session")
def everything_server(node_parts: Path) -> list[str]:
    """The command of the reference MCP server; its first argument is the transport."""
    package = node_parts / "node_modules" / "@modelcontextprotocol" / "server-everything"
    return [shutil.which("node") or "node", str(package / "dist" / "index.js")]


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    where = report.longrepr
    text = where[2] if isinstance(where, tuple) else str(where)
    return text.removeprefix("Skipped: ")


def _fail_if_missing(report: Report) -> Report:
    if _in_ci() and report.skipped and _skip_reason(report).startswith(MISSING):
        report.longrepr = f"CI=true, and this test was left out. {_skip_reason(report)}"
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI nothing is left out for want of a real part."""
    return _fail_if_missing((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In CI no module is left out either."""
    return _fail_if_missing((yield))


# ── Unit tests do no I/O ──────────────────────────────────────────────────────────────────────────


class _Guard:
    """An audit hook: it sees what patched functions miss. It cannot be removed, only opened."""

    FORBIDDEN = frozenset(
        {
            "os.exec",
            "os.fork",
            "os.forkpty",
            "os.posix_spawn",
            "os.system",
            "socket.bind",
            "socket.connect",
            "socket.getaddrinfo",
            "socket.gethostbyname",
            "socket.sendto",
            "subprocess.Popen",
        }
    )

    def __init__(self) -> None:
        self.closed = False
        self.calls: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.closed and event in self.FORBIDDEN:
            call = f"{event}{arguments!r:.200}"
            self.calls.append(call)
            raise AssertionError(f"must not be called: {call}: unit tests do no I/O")


_guard = _Guard()


@pytest.fixture(autouse=True)
def _no_io(request: pytest.FixtureRequest) -> Iterator[None]:
    in_unit = request.path.is_relative_to(ROOT / "tests" / "unit")
    if not in_unit or request.node.get_closest_marker("allow_io"):
        yield
        return
    _guard.calls.clear()
    _guard.closed = True
    try:
        yield
    finally:
        _guard.closed = False
    if _guard.calls:
        pytest.fail(f"must not be called: {', '.join(_guard.calls)}: unit tests do no I/O", False)


# ── What ran ──────────────────────────────────────────────────────────────────────────────────────


def _folder(node_id: str) -> str:
    parts = Path(node_id.partition("::")[0]).parts
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else "other"


def _counts(reporter: pytest.TerminalReporter) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {folder: Counter() for folder in FOLDERS}
    words = {"error": "failed", "xfailed": "expected failures", "xpassed": "failed"}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in reporter.stats.get(outcome, []):
            counts.setdefault(_folder(report.nodeid), Counter())[words.get(outcome, outcome)] += 1
    return counts


def _real_parts() -> Iterator[str]:
    opa = _find("install-opa")
    if opa is None:
        yield "OPA: not here"
    else:
        answer = subprocess.run([opa, "version"], capture_output=True, text=True, check=False)
        version = re.search(r"^Version: *(\S+)", answer.stdout, re.MULTILINE)
        yield f"OPA {version[1] if version else '(unknown version)'} at {opa}"
    yield f"Jaeger at {_find('install-jaeger') or 'no place'}"
    yield f"Prometheus at {_find('install-prometheus') or 'no place'}"
    yield f"OpenTelemetry Collector at {_find('install-collector') or 'no place'}"
    yield f"Kubernetes control plane at {_find('install-cluster') or 'no place'}"
    yield f"Helm at {_find('install-helm') or 'no place'}"
    yield f"containerd at {_find('install-containerd') or 'no place'}"
    node = shutil.which("node")
    if node is None:
        yield "Node: not here"
    else:
        answer = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
        parts = _find("install-node-parts")
        yield f"Node {answer.stdout.strip()}, parts {f'at {parts}' if parts else 'not installed'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say per folder what ran and what did not, and which real parts took part."""
    counts = {folder: count for folder, count in _counts(terminalreporter).items() if count}
    if not counts:
        return
    terminalreporter.section("what ran")
    for folder, count in counts.items():
        terminalreporter.line(
            f"{folder:<9} " + ", ".join(f"{number} {word}" for word, number in count.items())
        )
        reasons = Counter(
            _skip_reason(report)
            for report in terminalreporter.stats.get("skipped", [])
            if _folder(report.nodeid) == folder
        )
        for reason, number in reasons.most_common():
            terminalreporter.line(f"{'':<9}   {number} × {reason}")
    if set(counts) - {"unit"}:
        for line in _real_parts():
            terminalreporter.line(line)
