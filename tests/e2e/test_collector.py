"""A collector that is dead, slow or refusing costs spans, and nothing else."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest

from tests.support import permissive_server
from tests.support.otlp import Mode, Sink
from tests.support.permissive_server import executed
from tests.support.processes import ALLOW_ALL, LISTENING, Process, environment, http_sidecar
from tests.support.raw import Wire, call, code, dump, stdio_sidecar

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


@pytest.fixture(params=["http/protobuf", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def show(what: str, times: list[float], ended: float) -> None:
    slowest = max(times)
    print(
        f"MEASURED {what}: calls median {median(times):.1f} ms, slowest {slowest:.1f} ms; ", end=""
    )
    print(f"ended {ended:.2f} s after SIGTERM")
    assert median(times) < SANE_MS


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        ("dead", "http/protobuf"),
        ("hung", "http/protobuf"),
        ("refusing", "http/protobuf"),
        ("rejecting", "http/protobuf"),
        ("dead", "grpc"),
    ],
)
def test_over_http_calls_work_and_sigterm_ends_it_in_time(
    env: dict[str, str], tmp_path: Path, kind: str, protocol: str
) -> None:
    log, times = tmp_path / "log", list[float]()
    env["OTEL_EXPORTER_OTLP_PROTOCOL"] = protocol
    with (
        collector(kind) as url,
        Process(permissive_server.command(log, "--transport", "http")) as server,
        http_sidecar(
            server.wait_for(LISTENING)[1], "--policy", ALLOW_ALL, "--otlp", url, env=env
        ) as served,
    ):
        with Wire(served.url) as wire:
            for number in range(CALLS):
                began = time.perf_counter()
                wire.request(dump(call(number)))
                assert code(wire.answer().message) is None
                times.append(1000 * (time.perf_counter() - began))
        began = time.monotonic()
        served.process.signal(signal.SIGTERM)
        assert served.process.wait(END) == 0
        show(f"{kind}, {protocol}, http", times, time.monotonic() - began)
        assert not any("Traceback" in each for each in served.process.lines)
    assert len(executed(log)) == CALLS


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
        show(f"{kind}, stdio, {how}", times, time.monotonic() - began)
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
