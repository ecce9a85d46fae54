"""A collector that is dead, slow, refusing or now this, now that costs spans, and nothing else.

Latencies are printed beside those of a sidecar that exports nothing, which is called in turns with
the other; what fails is a call without an answer, a loss that is not counted, or a hang.
"""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import pytest

from tests.support import permissive_server
from tests.support.otlp import Mode, Sink
from tests.support.permissive_server import executed
from tests.support.processes import (
    ALLOW_ALL,
    LISTENING,
    Process,
    Served,
    environment,
    get,
    http_sidecar,
    wait_until,
)
from tests.support.raw import Wire, call, code, dump, stdio_sidecar

pytestmark = pytest.mark.timeout(180)

CALLS = 50
SANE_MS = 1000
END = 10.0
"""Far above the 2 s that a flush may take: a figure is printed, a hang fails."""


@contextmanager
def collector(kind: str) -> Iterator[str]:
    """The URL of a collector that takes nothing."""
    modes: dict[str, Mode] = {"dead": "dead", "refusing": "refusing", "rejecting": "rejecting"}
    if kind in modes:
        with Sink(modes[kind]) as sink:
            yield sink.url
    else:
        # It accepts, which the kernel does for it, and never answers.
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def env(opa_bin: Path) -> dict[str, str]:
    return environment(opa_bin)


def show(what: str, times: list[float], beside: list[float], ended: float) -> None:
    ratio = median(times) / median(beside)
    print(
        f"MEASURED {what}: calls median {median(times):.1f} ms, {ratio:.2f} times that of none, "
        f"slowest {max(times):.1f} ms; ended {ended:.2f} s after SIGTERM"
    )
    assert median(times) < SANE_MS


def timed(wire: Wire, number: object, tool: str = "echo") -> float:
    """The milliseconds of a call that is answered, whatever the collector does."""
    began = time.perf_counter()
    wire.request(dump(call(number, tool)))
    assert code(wire.answer().message) is None
    return 1000 * (time.perf_counter() - began)


@dataclass
class Pair:
    """A sidecar that exports, and one in front of the same server that does not."""

    served: Served
    exporting: Wire
    silent: Wire

    def call(self, number: int) -> tuple[float, float]:
        return timed(self.exporting, number), timed(self.silent, number)

    def lost(self) -> int:
        """The spans that are counted as lost."""
        text = get(f"{self.served.admin}/metrics")[1].decode()
        found = re.search(r"^authz_spans_dropped_total (\S+)$", text, re.MULTILINE)
        return int(float(found[1])) if found else 0

    def resident(self) -> int:
        """The memory that it holds, in bytes."""
        return int(psutil.Process(self.served.pid).memory_info().rss)

    def end(self) -> float:
        """Tell it to stop; the seconds that it took."""
        began = time.monotonic()
        self.served.process.signal(signal.SIGTERM)
        assert self.served.process.wait(END) == 0
        assert not any("Traceback" in each for each in self.served.process.lines)
        return time.monotonic() - began


@contextmanager
def pair(env: dict[str, str], log: Path, url: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        command = permissive_server.command(log, "--transport", "http")
        upstream = stack.enter_context(Process(command)).wait_for(LISTENING)[1]
        served, silent = (
            stack.enter_context(http_sidecar(upstream, "--policy", ALLOW_ALL, *more, env=env))
            for more in (("--otlp", url), ())
        )
        wires = (stack.enter_context(Wire(each.url)) for each in (served, silent))
        yield Pair(served, *wires)


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        ("dead", "http/protobuf"),
        ("hung", "http/protobuf"),
        ("refusing", "http/protobuf"),
        ("rejecting", "http/protobuf"),
        ("dead", "grpc"),
        ("hung", "grpc"),
    ],
)
def test_over_http_calls_work_and_sigterm_ends_it_in_time(
    env: dict[str, str], tmp_path: Path, kind: str, protocol: str
) -> None:
    env["OTEL_EXPORTER_OTLP_PROTOCOL"] = protocol
    with collector(kind) as url, pair(env, tmp_path / "log", url) as both:
        times, beside = zip(*(both.call(number) for number in range(CALLS)), strict=True)
        show(f"{kind}, {protocol}, http", list(times), list(beside), both.end())
    assert len(executed(tmp_path / "log")) == 2 * CALLS


FLAPS: tuple[Mode, ...] = ("good", "refusing", "good", "dead", "slow", "rejecting", "dead", "good")
QUEUE, BATCH = 128, 32


def quick(env: dict[str, str]) -> dict[str, str]:
    """A small queue that is sent often, and a collector that is not waited for."""
    return {
        **env,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_BSP_MAX_QUEUE_SIZE": str(QUEUE),
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": str(BATCH),
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    }


def test_a_collector_that_flaps_costs_no_call_and_every_lost_span_is_counted(
    env: dict[str, str], tmp_path: Path
) -> None:
    """What has not come has been counted as lost: a call has three spans, and OPA its own."""
    times, beside = list[float](), list[float]()
    with Sink(delay=0.2) as sink, pair(quick(env), tmp_path / "log", sink.url) as both:
        for mode in FLAPS:
            sink.mode = mode
            for _ in range(CALLS):
                exporting, silent = both.call(len(times))
                times.append(exporting)
                beside.append(silent)
        made = 3 * len(times)

        def come() -> set[str]:
            return {each.span_id for each in sink.spans if each.service == "mcp-opa-sidecar"}

        wait_until(lambda: len(come()) + both.lost() >= made, "all are there, or counted as lost")
        assert come()
        assert both.lost() > 0
        again = f"again {len(times)}"
        both.exporting.request(dump(call(again)))
        assert code(both.exporting.answer().message) is None
        sink.wait_for(1, where=lambda span: span.attributes.get("jsonrpc.request.id") == again)
        show("flapping", times, beside, both.end())
    assert len(executed(tmp_path / "log")) == 2 * len(times) + 1


MANY, LONG = 2000, "a-long-name-" * 80
GROWTH = 6 * 2**20
"""Half of what the spans of so many calls take, with names as long as they may be."""


def test_memory_is_bounded_while_nobody_takes_the_spans(
    env: dict[str, str], tmp_path: Path
) -> None:
    with collector("hung") as url, pair(quick(env), tmp_path / "log", url) as both:
        for number in range(MANY // 4):
            timed(both.exporting, number, f"{LONG}{number}")
        before = both.resident()
        for number in range(MANY):
            timed(both.exporting, number, f"{LONG}{number}")
        grown, made = both.resident() - before, 3 * (MANY + MANY // 4)
        print(f"MEASURED hung: {made} spans made, memory grew by {grown / 2**20:.1f} MiB")
        assert grown < GROWTH
        # Those that are not lost yet wait in the queue, or are on their way.
        assert made - QUEUE - BATCH <= both.lost() <= made
        assert both.end() < END


@pytest.mark.parametrize(("kind", "how"), [("hung", "SIGTERM"), ("dead", "end of stdin")])
def test_over_stdio_calls_work_and_it_ends_in_time(
    env: dict[str, str], tmp_path: Path, kind: str, how: str
) -> None:
    log, times = tmp_path / "log", list[float]()
    server = permissive_server.command(log)
    with (
        collector(kind) as url,
        stdio_sidecar(server, "--policy", ALLOW_ALL, "--otlp", url, env=env) as pipe,
    ):
        pipe.greet()
        for number in range(CALLS):
            began = time.perf_counter()
            assert code(pipe.ask(call(number))) is None
            times.append(1000 * (time.perf_counter() - began))
            pipe.forget()
        began = time.monotonic()
        if how == "SIGTERM":
            pipe.process.signal(signal.SIGTERM)
        else:
            pipe.end()
        assert pipe.wait_for_end(END) == 0
        show(f"{kind}, stdio, {how}", times, times, time.monotonic() - began)
        assert not any("Traceback" in each for each in pipe.process.lines)
    assert len(executed(log)) == CALLS


def test_a_collector_that_comes_back_gets_what_comes_then(
    env: dict[str, str], tmp_path: Path
) -> None:
    env["OTEL_BSP_SCHEDULE_DELAY"] = "100"
    env["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1"
    log = tmp_path / "log"
    with (
        Sink("dead") as sink,
        stdio_sidecar(
            permissive_server.command(log), "--policy", ALLOW_ALL, "--otlp", sink.url, env=env
        ) as pipe,
    ):
        pipe.greet()
        assert code(pipe.ask(call("lost"))) is None
        sink.mode = "good"
        number = 0
        deadline = time.monotonic() + 20
        while not any(each.name == "tools/call echo" for each in sink.spans):
            assert time.monotonic() < deadline
            number += 1
            assert code(pipe.ask(call(f"again {number}"))) is None
            time.sleep(0.05)
