"""The table of clients and ways at the end of the run."""

from __future__ import annotations

import pytest

from tests.clients.matrix import CLIENTS, LEGEND, Client, heading, line

CELLS: dict[Client, dict[str, str]] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show it, also when everything is well."""
    if not CELLS:
        return
    terminalreporter.section("clients")
    terminalreporter.line(heading())
    for client in CLIENTS:
        if client in CELLS:
            terminalreporter.line(line(client, CELLS[client]))
    for text in LEGEND:
        terminalreporter.line(text)
