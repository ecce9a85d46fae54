"""What it costs to be watched: nothing, metrics, and spans at two ratios, side by side.

One row for each, as ratios to a sidecar that tells nobody anything: the calls go to all of them in
turns. A collector in a process of its own takes whatever comes. The own OPA of a sidecar that sends
spans sends its own as well. Below it, what the recorder alone takes for a call, in one process.

    python -m tests.bench.telemetry_cost
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from sidecar.config import Telemetry as Settings
from sidecar.telemetry import Telemetry, build
from tests.bench.load import Measured, over_http
from tests.support import calls

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "policies" / "starter"
ROUNDS, CALLS, CLIENTS = 5, 1000, 8
RECORDED = 20_000


# ── Sidecars ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Way:
    """A sidecar, and its OPA."""

    port: int
    sidecar: psutil.Process
    opa: psutil.Process


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a round: calls a second, and CPU microseconds of a call."""

    measured: Measured
    sidecar: float
    opa: float


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(15)


@contextmanager
def ways() -> Iterator[dict[str, Way]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        echo = _port(stack, "tests.bench.echo_server", "http")
        sink = _port(stack, "tests.bench.telemetry_cost", "collect")
        otlp = f"http://127.0.0.1:{sink}"
        told: Mapping[str, tuple[str, dict[str, object]]] = {
            "nobody": ("off", {}),
            "metrics": ("127.0.0.1:0", {}),
            "spans at 0.01": ("off", {"otlp": otlp, "ratio": 0.01}),
            "spans at 1.0": ("off", {"otlp": otlp, "ratio": 1.0}),
        }
        yield {
            name: _sidecar(stack, folder / f"{number}.json", echo, *told[name])
            for number, name in enumerate(told)
        }


def _port(stack: ExitStack, module: str, *arguments: str) -> int:
    process = stack.enter_context(started([sys.executable, "-m", module, *arguments]))
    assert process.stdout is not None
    return int(process.stdout.readline())


def _sidecar(
    stack: ExitStack, file: Path, echo: int, admin: str, telemetry: dict[str, object]
) -> Way:
    file.write_text(json.dumps({"telemetry": telemetry}), encoding="utf-8")
    where = ("--listen", "127.0.0.1:0", "--upstream", f"http://127.0.0.1:{echo}/mcp")
    who = ("--policy", str(STARTER), "--actor", "human:ana", "--config", str(file))
    command = [sys.executable, "-m", "sidecar", "http", *where, *who, "--admin", admin]
    process = stack.enter_context(started(command))
    assert process.stderr is not None
    line = next(each for each in process.stderr if b"listening on" in each)
    port = int(line.partition(b"127.0.0.1:")[2].partition(b"/")[0])
    asyncio.run(over_http(port, clients=4, calls=300))
    running = psutil.Process(process.pid)
    opa = next(each for each in running.children(recursive=True) if "opa" in each.name())
    return Way(port, running, opa)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _round(way: Way) -> Cost:
    before = _cpu(way.sidecar), _cpu(way.opa)
    measured = asyncio.run(over_http(way.port, clients=CLIENTS, calls=CALLS))
    spent = _cpu(way.sidecar) - before[0], _cpu(way.opa) - before[1]
    return Cost(measured, 1e6 * spent[0] / CALLS, 1e6 * spent[1] / CALLS)


def _sidecar_rows() -> None:
    columns = f"{'calls/s':>10}{'p50 ms':>9}{'sidecar µs':>12}{'OPA µs':>9}"
    print(
        f"\n{'HTTP, who is told':22}{columns}{'rate':>8}{'p50':>7}{'CPU':>7}   (ratios to nobody)"
    )
    with ways() as all_of_them:
        taken: dict[str, list[Cost]] = {name: [] for name in all_of_them}
        for _ in range(ROUNDS):
            for name, way in all_of_them.items():
                taken[name].append(_round(way))
    best = {name: max(each, key=lambda cost: cost.measured.rate) for name, each in taken.items()}
    least = {name: min(cost.sidecar for cost in each) for name, each in taken.items()}
    for name, cost in best.items():
        base = best["nobody"].measured
        print(
            f"{name:22}{cost.measured.rate:10.0f}{cost.measured.p50:9.2f}"
            f"{least[name]:12.0f}{min(each.opa for each in taken[name]):9.0f}"
            f"{cost.measured.rate / base.rate:8.2f}{cost.measured.p50 / base.p50:7.2f}"
            f"{least[name] / least['nobody']:7.2f}"
        )


# ── The recorder alone ────────────────────────────────────────────────────────────────────────────


class Nowhere(SpanExporter):
    """Takes everything, and does nothing with it."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is kept open."""


def _recorders() -> dict[str, Callable[[], Telemetry]]:
    def with_spans(ratio: float) -> Telemetry:
        return build(Settings(ratio=ratio), version="0", exporter=Nowhere())

    return {
        "nobody": lambda: build(Settings(), version="0"),
        "metrics": lambda: build(Settings(), version="0", metrics=True),
        "a span that is not exported": lambda: with_spans(0.0),
        "spans at 0.01": lambda: with_spans(0.01),
        "spans at 1.0": lambda: with_spans(1.0),
    }


def _recorder_rows() -> None:
    print(f"\n{'the recorder alone':30}{'µs a call':>10}{'more than nobody':>20}")
    found: dict[str, float] = {}
    for name, make in _recorders().items():
        telemetry = make()
        found[name] = min(_recording(telemetry) for _ in range(ROUNDS))
        telemetry.shutdown()
        more = found[name] - found["nobody"]
        print(f"{name:30}{found[name]:10.1f}{more:20.1f}")


def _recording(telemetry: Telemetry) -> float:
    """The microseconds that the beginning and the end of an allowed call take."""
    call = calls.allowed()
    began = time.perf_counter()
    for _ in range(RECORDED // ROUNDS):
        call.trace = telemetry.begin({}, {})
        telemetry.finished(call)
    return 1e6 * (time.perf_counter() - began) / (RECORDED // ROUNDS)


# ── A collector that takes whatever comes ─────────────────────────────────────────────────────────


async def _take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    except (OSError, asyncio.IncompleteReadError):
        writer.close()


async def _collect() -> None:
    server = await asyncio.start_server(_take, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    os.environ.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
    _sidecar_rows()
    _recorder_rows()


if __name__ == "__main__":
    if sys.argv[1:] == ["collect"]:
        asyncio.run(_collect())
    else:
        main()
