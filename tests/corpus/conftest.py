"""The table of the corpus, at the end of the run."""

from __future__ import annotations

import pytest

from tests.corpus.runner import Report

REPORTS: list[Report] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show how often nothing was executed."""
    if not REPORTS:
        return
    terminalreporter.section("corpus")
    terminalreporter.line(
        f"{'server':<18}{'transport':<22}{'policy':<12}{'cases':>6}{'executed':>10}"
    )
    runs = executed = 0
    for each in REPORTS:
        for road, count in each.runs.items():
            harm = each.executed[road]
            runs, executed = runs + count, executed + harm
            terminalreporter.line(
                f"{each.place.server:<18}{road:<22}{each.policy:<12}{count:>6}{harm:>10}"
            )
    terminalreporter.line(f"cases × servers × transports × policies: {runs}, executed: {executed}")
