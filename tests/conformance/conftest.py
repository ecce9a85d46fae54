"""The suite as a fixture, and its table at the end of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.runner import HEADING, Suite
from tests.conftest import MISSING

ROWS: list[str] = []


@pytest.fixture(scope="session")
def suite(node_parts: Path) -> Suite:
    """The official conformance suite."""
    found = Suite(node_parts)
    if not found.usable():
        pytest.skip(
            f"{MISSING} the Node of the conformance suite (its builds do not run on this machine)"
        )
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the scores, also when everything is well."""
    if ROWS:
        terminalreporter.section("conformance")
        terminalreporter.line(HEADING)
        for line in ROWS:
            terminalreporter.line(line)
