"""`make bench`: what a call costs, as ratios of figures taken in one run on this machine.

direct is client and server alone, pass-through the sidecar with a decider that says yes at once,
full path the sidecar with its own OPA and the starter policy; with a token the same, where the
caller is known by a bearer token, which is verified once and remembered until it expires. What it
costs to be watched (metrics, and spans at two ratios) is a table of its own: `telemetry_cost`.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.bench import policy_cost, telemetry_cost
from tests.bench.load import Cold, Measured, over_http, over_stdio
from tests.support.identity import Idp, idp, policy
from tests.support.issuing import claims

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "policies" / "starter"
SIDECAR = [sys.executable, "-m", "sidecar"]
ECHO = [sys.executable, "-m", "tests.bench.echo_server"]
ROUNDS = 3
CALLS = 1500
CLIENTS = (1, 16)


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended by its own id, whatever happens."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(15)


def port_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def sidecar_port(process: subprocess.Popen[bytes]) -> int:
    """The port in the sidecar's log line `listening on http://127.0.0.1:PORT/…`."""
    assert process.stderr is not None
    for line in process.stderr:
        if b"listening on" in line:
            return int(line.partition(b"127.0.0.1:")[2].partition(b"/")[0])
    raise RuntimeError("the sidecar did not come up")


def best(rounds: list[Measured]) -> Measured:
    return max(rounds, key=lambda each: each.rate)


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def believing(folder: Path, issuer: Idp) -> list[str]:
    """What makes a sidecar believe the issuer's tokens, as the starter policy does then."""
    file = folder / "sidecar.yaml"
    file.write_text(json.dumps({"identity": {"jwt": [issuer.believed()]}}), encoding="utf-8")
    return ["--config", str(file), "--policy", str(policy(folder, issuer.url))]


def http_table() -> None:
    with running([*ECHO, "http"]) as echo, TemporaryDirectory() as folder, idp() as issuer:
        upstream = port_of(echo)
        url = f"http://127.0.0.1:{upstream}/mcp"
        serving = [*SIDECAR, "http", "--admin", "off", "--listen", "127.0.0.1:0", "--upstream", url]
        static = ["--policy", str(STARTER), "--actor", "human:ana"]
        said = claims(sub="ana", client_id="desk-web", groups=["support"])
        token = b"Authorization: Bearer %s\r\n" % issuer.token(said).encode()
        with (
            running([sys.executable, "-m", "tests.bench.pass_through", url]) as passing,
            running([*serving, *static]) as sidecar,
            running([*serving, *believing(Path(folder), issuer)]) as asking,
        ):
            ways = {
                "direct": (upstream, b""),
                "pass-through": (port_of(passing), b""),
                "full path": (sidecar_port(sidecar), b""),
                "full path, token": (sidecar_port(asking), token),
            }
            for port, more in ways.values():
                asyncio.run(over_http(port, clients=4, calls=200, more=more))
            _http_rows(ways)
            _cpu_rows(ways["full path"][0], psutil.Process(sidecar.pid))


def _http_rows(ways: dict[str, tuple[int, bytes]]) -> None:
    _heading("HTTP, tools/call", "clients")
    for clients in CLIENTS:
        taken: dict[str, list[Measured]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, (port, more) in ways.items():
                measured = over_http(port, clients=clients, calls=CALLS, more=more)
                taken[name].append(asyncio.run(measured))
        direct = best(taken["direct"])
        for name, rounds in taken.items():
            _row(name, clients, best(rounds), direct)


def _heading(what: str, clients: str) -> None:
    columns = f"{clients:>8}{'calls/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'rate':>8}{'p50':>8}"
    print(f"\n{what:22}{columns}   (ratios to direct)")


def _row(name: str, clients: int, found: Measured, direct: Measured) -> None:
    print(
        f"{name:22}{clients:8}{found.rate:10.0f}{found.p50:9.2f}{found.p99:9.2f}"
        f"{found.rate / direct.rate:8.2f}{found.p50 / direct.p50:8.1f}"
    )


def _cpu_rows(port: int, sidecar: psutil.Process) -> None:
    opa = next(each for each in sidecar.children(recursive=True) if "opa" in each.name())
    before = cpu(sidecar), cpu(opa)
    asyncio.run(over_http(port, clients=8, calls=CALLS))
    spent = cpu(sidecar) - before[0], cpu(opa) - before[1]
    print(f"\n{'one call costs':22}{'CPU µs':>10}{'resident MiB':>14}")
    for name, process, seconds in (("sidecar", sidecar, spent[0]), ("OPA", opa, spent[1])):
        resident = process.memory_info().rss / 2**20
        print(f"{name:22}{1e6 * seconds / CALLS:10.0f}{resident:14.1f}")


def stdio_table() -> None:
    wrapped = [*SIDECAR, "stdio", "--policy", str(STARTER), "--actor", "human:ana", "--"]
    ways = {"direct": [*ECHO, "stdio"], "full path": [*wrapped, *ECHO, "stdio"]}
    _heading("stdio, tools/call", "at once")
    cold: dict[str, list[Cold]] = {name: [] for name in ways}
    for clients in CLIENTS:
        taken: dict[str, list[Measured]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, command in ways.items():
                found, first = asyncio.run(over_stdio(command, clients=clients, calls=CALLS))
                taken[name].append(found)
                cold[name].append(first)
        for name, rounds in taken.items():
            _row(name, clients, best(rounds), best(taken["direct"]))
    print(f"\n{'stdio, cold start (ms)':22}{'first byte forwarded':>22}{'first call answered':>22}")
    for name, seconds in cold.items():
        forwarded = statistics.median(each.forwarded for each in seconds)
        answered = statistics.median(each.answered for each in seconds)
        print(f"{name:22}{1000 * forwarded:22.0f}{1000 * answered:22.0f}")


def import_row() -> None:
    """What of a cold start is Python and its imports."""
    began = time.perf_counter()
    subprocess.run([*SIDECAR, "--version"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    print(f"{'mcp-sidecar --version':22}{1000 * (time.perf_counter() - began):22.0f}")


def main() -> None:
    os.environ.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
    os.environ["PYTHONPATH"] = str(ROOT)
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; best of {ROUNDS} rounds")
    http_table()
    stdio_table()
    import_row()
    telemetry_cost.main()
    print()
    policy_cost.main()


if __name__ == "__main__":
    main()
