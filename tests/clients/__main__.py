"""`python -m tests.clients`: the table, and the differences; exit code 1 where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.clients.matrix import CLIENTS, LEGEND, WAYS, heading, line, matrix
from tests.support.processes import ROOT


def _install(script: str) -> Path:
    """What an install script installs, or finds to be there."""
    done = subprocess.run([ROOT / ".ci" / script], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def main() -> int:
    wrong: list[str] = []
    parts, opa = _install("install-node-parts"), _install("install-opa")
    print(heading(), flush=True)
    with matrix(parts, opa) as tours:
        for client in CLIENTS:
            verdicts = {way.name: tours.verdict(way, client) for way in WAYS if way.takes(client)}
            cells = {name: verdict.cell for name, verdict in verdicts.items()}
            print(line(client, cells), flush=True)
            wrong += [
                f"{client.name}, {name}: {each}"
                for name, verdict in verdicts.items()
                for each in verdict.wrong
            ]
    print("\n".join(["", *LEGEND, "", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
