"""`python -m tests.conformance`: the table, and the differences; exit code 1 where there is one.

With `--bridge` the sidecar stands in front of a stdio server instead of an HTTP server.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conformance.runner import (
    HEADING,
    SETS,
    Suite,
    arena,
    row,
    through_bridge,
    through_sidecar,
)
from tests.support.processes import ROOT


def main(bridge: bool) -> int:
    installed = subprocess.run(
        [ROOT / ".ci" / "install-node-parts"], stdout=subprocess.PIPE, text=True, check=True
    )
    differences: list[str] = []
    print(HEADING, flush=True)
    way = through_bridge if bridge else through_sidecar
    with arena(Suite(Path(installed.stdout.strip())), way) as both:
        for each in SETS:
            compared = both.compare(each)
            print(row(compared, "by bridge" if bridge else ""), flush=True)
            differences += [f"{each.name}: {line}" for line in compared.differences]
    print("\n".join(["", *differences]) if differences else "no check is different")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main("--bridge" in sys.argv[1:]))
