"""The ticket desk over HTTP, for those who come through the sidecar, and nobody else.

python -m tests.support.guarded_desk --log FILE --audience NAME [--sse] PUBLIC_KEY [PUBLIC_KEY]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.only_by_sidecar import OnlyBySidecar
from tests.support.processes import LISTENING, Process, Served
from tests.support.ticket_desk import Log, build, serve


@contextmanager
def guarded_desk(log: Path, audience: str, *keys: Path, sse: bool = False) -> Iterator[Served]:
    """The desk, as a process."""
    command = [sys.executable, "-m", "tests.support.guarded_desk", "--log", str(log)]
    more = ["--audience", audience, *(["--sse"] if sse else []), *map(str, keys)]
    with Process([*command, *more]) as process:
        yield Served(process, process.wait_for(LISTENING)[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="guarded_desk")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--audience", required=True)
    parser.add_argument("--sse", action="store_true")
    parser.add_argument("keys", type=Path, nargs="+")
    options = parser.parse_args()
    server = build(Log(options.log))
    app = server.sse_app() if options.sse else server.streamable_http_app()
    keys = [each.read_bytes() for each in options.keys]
    app.add_middleware(OnlyBySidecar, audience=options.audience, keys=keys)
    serve(app, 0, "/sse" if options.sse else "/mcp")


if __name__ == "__main__":
    main()
