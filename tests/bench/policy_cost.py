"""What a decision of the policy library costs with few and with many grants, and what a listing.

It starts an OPA of its own on a unix socket with the real library and generated grants, asks it
over HTTP the way the sidecar does, and prints two times for each question: the round trip, and the
part of it that OPA's own handler took.

    python -m tests.bench.policy_cost
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parents[2] / "policies" / "mcp"
CACHED_OPA = Path.home() / ".cache" / "mcp-opa-sidecar" / "bin" / "opa"
QUERY = "/v1/data/mcp/authz/decision?strict-builtin-errors=true&metrics=true"
ROUNDS = 1000
LISTING_ROUNDS = 200
OWN_GRANTS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """The milliseconds of many askings of one question."""

    label: str
    round_trips: list[float]
    handler: list[float]

    def row(self) -> str:
        cells = [quantile(times, q) for times in (self.round_trips, self.handler) for q in (50, 99)]
        return f"{self.label:<46}" + "".join(f"{cell:>10.2f}" for cell in cells)


def main() -> None:
    """Measure and print the table."""
    print(f"{'milliseconds':<46}" + "".join(f"{each:>10}" for each in HEADER))
    few = measure("decision, 10 grants in the file", grants_for_many(10), call(), ROUNDS)
    many = measure("decision, 1,000 grants in the file", grants_for_many(1000), call(), ROUNDS)
    print(few.row())
    print(many.row())
    print(f"{'  ratio of the medians':<46}{median_ratio(few, many):>10.2f}")
    for label, grants in LISTINGS.items():
        print(measure(label, grants, listing(), LISTING_ROUNDS).row())


def measure(label: str, grants: dict[str, Any], question: dict[str, Any], rounds: int) -> Cost:
    """Ask one question `rounds` times, after a tenth of that to warm up."""
    with asking(grants) as ask:
        for _ in range(rounds // 10):
            ask(question)
        answers = [ask(question) for _ in range(rounds)]
    return Cost(label, [each[0] for each in answers], [each[1] for each in answers])


def grants_for_many(total: int) -> dict[str, Any]:
    """`total` grants in the file, of which the caller holds five."""
    principals = {"ana": {f"own-{n}": grant(f"tool_{n}") for n in range(OWN_GRANTS)}}
    for n in range(total - OWN_GRANTS):
        principals[f"other-{n}"] = {f"grant-{n}": grant(f"tool_{n % 200}")}
    return {"humans": {"principals": principals}}


def grants_for_one(patterns: list[str]) -> dict[str, Any]:
    """As many grants as patterns, all held by the caller."""
    own = {f"own-{n}": grant(pattern) for n, pattern in enumerate(patterns)}
    return {"humans": {"principals": {"ana": own}}}


def grant(pattern: str) -> dict[str, Any]:
    return {"tools": [pattern], "owner": "bench"}


HEADER = ("p50", "p99", "OPA p50", "OPA p99")
LISTINGS = {
    "listing of 200 tools, 200 grants by name": grants_for_one([f"tool_{n}" for n in range(200)]),
    "listing of 200 tools, 200 grants by prefix": grants_for_one(
        [f"tool_{n}*" for n in range(200)]
    ),
    "listing of 200 tools, 180 names and 20 globs": grants_for_one(
        [f"tool_{n}" for n in range(180)] + [f"*_[{n % 10}]{n}?" for n in range(20)]
    ),
}


def call() -> dict[str, Any]:
    name = f"tool_{OWN_GRANTS - 1}"
    tool = {"name": name, "arguments": {"id": 1}, "annotations": {}, "known": True}
    return question("tools/call", {"type": "tool", "name": name}) | {"tool": tool}


def listing() -> dict[str, Any]:
    items = [
        {"target": {"type": "tool", "name": f"tool_{n}"}, "annotations": {}, "digest": f"{n:064x}"}
        for n in range(200)
    ]
    return question("tools/list", {"type": "listing", "name": "tools"}) | {
        "listing": {"kind": "tools", "items": items}
    }


def question(method: str, target: dict[str, str]) -> dict[str, Any]:
    ana = {"type": "human", "id": "ana", "issuer": "static", "key": "static|ana"}
    ana |= {"groups": ["support"], "scopes": [], "claims": {}}  # type: ignore[dict-item]
    return {
        "version": 1,
        "enforcer": {"version": "0.0.0", "obligations": []},
        "actor": ana | {"assurance": 1, "sources": ["static"], "chain": [ana]},
        "mcp": {
            "method": method,
            "kind": "request",
            "direction": "client_to_server",
            "era": "modern",
            "transport": "http",
        },
        "target": target,
        "server": {"name": "bench"},
        "context": {"time": "2026-11-22T10:15:00Z", "unverified": {"headers": {}}},
    }


def opa_binary() -> str:
    """The OPA to measure, found as the sidecar finds its own."""
    found = os.environ.get("MCP_SIDECAR_OPA_BIN") or shutil.which("opa")
    if found is None and CACHED_OPA.exists():
        found = str(CACHED_OPA)
    if found is None:
        raise SystemExit("There is no opa: make setup, or set MCP_SIDECAR_OPA_BIN.")
    return found


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


class _Asker:
    """Asks over one kept-alive connection, as the sidecar does."""

    def __init__(self, connection: _UnixConnection) -> None:
        self._connection = connection

    def __call__(self, document: dict[str, Any]) -> tuple[float, float]:
        """The milliseconds of the round trip, and those within OPA's handler."""
        body = json.dumps({"input": document})
        start = time.perf_counter()
        self._connection.request("POST", QUERY, body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        elapsed = (time.perf_counter() - start) * 1e3
        parsed = json.loads(answer)
        if response.status != 200 or not parsed["result"]["allow"]:
            raise RuntimeError(f"OPA answered {response.status}: {answer[:500]!r}")
        return elapsed, parsed["metrics"]["timer_server_handler_ns"] / 1e6


@contextmanager
def asking(grants: dict[str, Any]) -> Iterator[_Asker]:
    """An OPA with the library and these grants, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "opa.sock"
        data = Path(folder) / "data.json"
        data.write_text(json.dumps({"mcp": {"grants": grants, "revision": "bench"}}))
        command = [opa_binary(), "run", "--server", "--addr", f"unix://{path}"]
        command += ["--log-level", "error", "--skip-version-check", "--ignore", "*_test.rego"]
        process = subprocess.Popen([*command, str(LIBRARY), str(data)], stderr=subprocess.DEVNULL)
        try:
            yield _Asker(_connected(path, process))
        finally:
            process.terminate()
            process.wait(10)


def _connected(path: Path, process: subprocess.Popen[bytes]) -> _UnixConnection:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        connection = _UnixConnection(path)
        try:
            connection.connect()
        except OSError:
            time.sleep(0.02)
        else:
            return connection
    raise RuntimeError("OPA did not come up.")


def quantile(times: list[float], percent: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def median_ratio(few: Cost, many: Cost) -> float:
    return quantile(many.handler, 50) / quantile(few.handler, 50)


if __name__ == "__main__":
    main()
