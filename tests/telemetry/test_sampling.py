"""Denials are always there, the rest by ratio, and nobody but the sidecar chooses.

Through the public surface and the SDK's own batches: what is exported is what left for a collector.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from sidecar.config import Telemetry as Settings
from sidecar.conversation import TraceContext
from sidecar.telemetry import Telemetry, build
from sidecar.telemetry.tracecontext import read_remote
from tests.support import calls, permissive_server
from tests.support.otlp import Sink, Span
from tests.support.permissive_server import records
from tests.support.processes import (
    LISTENING,
    Process,
    Served,
    http_sidecar,
    patient,
    wait_until,
)
from tests.support.raw import Wire, call, code, dump

pytestmark = pytest.mark.timeout(180)

RATIO = 0.01
DECISIONS = 100_000
ONE_IN = 100
"""Every so many-th call is denied."""

SURE = 6
"""Standard deviations: chance alone breaks such a bound once in a thousand million runs."""


def about(count: int, ratio: float) -> tuple[float, float]:
    """Between what and what a binomial count lies."""
    mean, spread = count * ratio, (count * ratio * (1 - ratio)) ** 0.5
    return mean - SURE * spread, mean + SURE * spread


# ── What a client says of its trace ───────────────────────────────────────────────────────────────


def untraced(random_bits: Callable[[int], int]) -> dict[str, str]:
    return {}


def flagged(random_bits: Callable[[int], int]) -> dict[str, str]:
    """A trace that the client samples."""
    return {"traceparent": f"00-{random_bits(128) | 1:032x}-{random_bits(64) | 1:016x}-01"}


def crafted(random_bits: Callable[[int], int]) -> dict[str, str]:
    """An id that every sampler by ratio takes: the bits that it looks at are nearly none."""
    return {"traceparent": f"00-{random_bits(60) | 1:016x}{random_bits(8):016x}-{'b' * 16}-01"}


def unflagged(random_bits: Callable[[int], int]) -> dict[str, str]:
    """A trace that the client does not sample, with an id that no sampler by ratio takes."""
    return {"traceparent": f"00-{random_bits(63) | 1:016x}{'f' * 16}-{'b' * 16}-00"}


WAYS = (untraced, flagged, crafted, unflagged)


def says_sampled(carrier: Mapping[str, str]) -> bool:
    remote = read_remote(carrier)
    assert remote is not None
    return remote.sampled


# ── In one process ────────────────────────────────────────────────────────────────────────────────


class Counting(SpanExporter):
    """Counts the spans of each trace."""

    def __init__(self) -> None:
        self.spans = 0
        self.by_trace: Counter[str] = Counter()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for each in spans:
            context = each.get_span_context()
            assert context is not None
            self.by_trace[f"{context.trace_id:032x}"] += 1
        self.spans += len(spans)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is kept open."""


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def telemetry(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    made = build(Settings(ratio=RATIO), version="1", exporter=counting)
    yield made
    made.shutdown()


def begun(telemetry: Telemetry) -> Iterator[tuple[Callable[..., object], TraceContext]]:
    """The traces of all the calls, and who began each."""
    bits = random.Random(4711).getrandbits
    for number in range(DECISIONS):
        way = WAYS[number // ONE_IN % len(WAYS)]
        yield way, telemetry.begin(way(bits), {})


def test_of_100_000_decisions_every_denial_is_exported_and_of_the_rest_the_ratio(
    telemetry: Telemetry, counting: Counting
) -> None:
    denied, chosen, allowed = set[str](), set[str](), Counter[Callable[..., object]]()
    of_way = Counter[Callable[..., object]]()
    due = 0
    for number, (way, trace) in enumerate(begun(telemetry)):
        assert trace.trace_id is not None
        flag = says_sampled(trace.to_opa)
        assert flag is says_sampled(trace.to_upstream)
        if number % ONE_IN == 0:
            denied.add(trace.trace_id)
            due += 2
            telemetry.finished(calls.denied(trace))
        else:
            allowed[way] += 1
            due += 3 * flag
            if flag:
                chosen.add(trace.trace_id)
                of_way[way] += 1
            telemetry.finished(calls.allowed(trace))
        if number % 10_000 == 0:
            wait_until(lambda due=due: counting.spans == due, "the queue is empty")  # type: ignore[misc]
    telemetry.shutdown()

    assert len(denied) == DECISIONS // ONE_IN
    assert counting.by_trace == {**dict.fromkeys(denied, 2), **dict.fromkeys(chosen, 3)}
    print(f"{len(denied)} denied, {len(chosen)} of {allowed.total()} chosen")
    low, high = about(allowed.total(), RATIO)
    assert low < len(chosen) < high
    for way in WAYS:  # it is the same for all, whatever they say
        low, high = about(allowed[way], RATIO)
        assert low < of_way[way] < high, way


def test_two_sidecars_choose_differently_and_one_always_the_same(counting: Counting) -> None:
    bits = random.Random(1).getrandbits
    traces = [crafted(bits) for _ in range(2000)]
    one, other = (build(Settings(ratio=0.5), version="1", exporter=counting) for _ in range(2))

    def chosen(telemetry: Telemetry) -> list[bool]:
        return [says_sampled(telemetry.begin(each, {}).to_opa) for each in traces]

    assert chosen(one) == chosen(one)
    low, high = about(len(traces), 0.5)
    assert low < sum(a is b for a, b in zip(chosen(one), chosen(other), strict=True)) < high
    one.shutdown()
    other.shutdown()


# ── End to end ────────────────────────────────────────────────────────────────────────────────────

SHARE, CALLS, EVERY = 0.1, 500, 5
POLICY = """package mcp.custom

allow contains {"rule": "all", "any": true}

deny contains {"code": "no_danger"} if input.target.name == "danger"
"""


@pytest.fixture
def served(tmp_path: Path, opa_bin: Path) -> Iterator[tuple[Served, Sink, Path]]:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "custom.rego").write_text(POLICY, encoding="utf-8")
    env = {
        **patient(opa_bin),
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "MCP_SIDECAR_TELEMETRY__RATIO": str(SHARE),
    }
    log = tmp_path / "log"
    with (
        Sink() as sink,
        Process(permissive_server.command(log, "--transport", "http")) as server,
        http_sidecar(
            server.wait_for(LISTENING)[1],
            *("--policy", tmp_path / "policy", "--otlp", sink.url),
            env=env,
        ) as sidecar,
    ):
        yield sidecar, sink, log


def test_over_http_it_is_so_and_everybody_is_told_the_same(
    served: tuple[Served, Sink, Path],
) -> None:
    sidecar, sink, log = served
    bits = random.Random(time.time_ns()).getrandbits
    denied, allowed = set[str](), set[str]()
    with Wire(sidecar.url) as wire:
        for number in range(CALLS):
            carrier = crafted(bits)
            message = call(number, "danger" if number % EVERY == 0 else "echo")
            message["params"]["_meta"] = carrier
            wire.request(dump(message))
            refused = code(wire.answer().message) is not None
            assert refused is (number % EVERY == 0)
            (denied if refused else allowed).add(carrier["traceparent"][3:35])
    told = {
        header[3:35]: header.endswith("-01")
        for each in records(log, "http")
        if (header := each["headers"].get("traceparent"))
    }
    chosen = {trace for trace in allowed if told[trace]}
    low, high = about(len(allowed), SHARE)
    assert low < len(chosen) < high

    def ours() -> Counter[str]:
        return _traces(sink.spans, "mcp-opa-sidecar")

    wanted = {**dict.fromkeys(denied, 2), **dict.fromkeys(chosen, 3)}
    wait_until(lambda: sum(ours().values()) >= sum(wanted.values()), "all of them have come")
    wait_until(lambda: chosen <= set(_traces(sink.spans, "opa")), "OPA's own have come")
    assert ours() == wanted
    _opa_samples_as_it_is_told(sink, denied, chosen)


def _opa_samples_as_it_is_told(sink: Sink, denied: set[str], chosen: set[str]) -> None:
    """A denial's trace has OPA's span when it was chosen before anybody knew, and else has not."""
    opas = set(_traces(sink.spans, "opa"))
    _, high = about(len(denied), SHARE)
    assert len(opas & denied) < high
    assert opas <= denied | chosen


def _traces(spans: Sequence[Span], service: str) -> Counter[str]:
    return Counter(each.trace_id for each in spans if each.service == service)
