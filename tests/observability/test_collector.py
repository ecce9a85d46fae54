"""collector.yaml on a real Collector: denials and errors come through, the rest is sampled."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import inject
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Tracer

from sidecar.config import Telemetry as Settings
from sidecar.conversation import Call, TraceContext
from sidecar.telemetry import Telemetry, build
from tests.observability.documents import FOLDER
from tests.observability.running import Collector, collector
from tests.observability.stage import looked_at
from tests.support import calls
from tests.support.otlp import Sink, Span
from tests.support.processes import wait_until

ALLOWED, FEWEST, MOST = 400, 8, 90
"""Of 400 traces, a tenth is kept, give or take: 5 standard deviations and more."""

Make = Callable[[TraceContext], Call]

pytestmark = pytest.mark.timeout(120)


@dataclass
class Senders:
    """Two sidecars and a client: whoever exports to a Collector."""

    sidecars: tuple[Telemetry, Telemetry]
    tracer: Tracer
    provider: TracerProvider
    sent: int = 0

    def send(self, make: Make, carrier: dict[str, str] | None = None) -> str:
        """A call by one of the sidecars, in a new trace or in an earlier one: its context."""
        self.sent += 1
        telemetry = self.sidecars[self.sent % 2]
        if carrier is None:
            carrier = {}
            with self.tracer.start_as_current_span("agent"):
                inject(carrier)
        trace = telemetry.begin(carrier, {})
        telemetry.finished(make(trace))
        return carrier["traceparent"]

    def flush(self) -> None:
        """Have the client send what it has; sidecars do so by themselves."""
        self.provider.force_flush()


@contextmanager
def senders(url: str) -> Iterator[Senders]:
    settings = Settings(exporter="otlp", otlp=url)
    provider = TracerProvider(resource=Resource({"service.name": "client"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{url}/v1/traces")))
    with ExitStack() as stack:
        stack.callback(provider.shutdown)
        both = build(settings, version="1"), build(settings, version="1")
        for each in both:
            stack.callback(each.shutdown)
        yield Senders(both, provider.get_tracer("client"), provider)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")


def trace_of(traceparent: str) -> str:
    return traceparent.split("-")[1]


def of(sink: Sink, traceparent: str) -> list[Span]:
    return sink.trace(trace_of(traceparent))


def kinds(spans: list[Span]) -> Counter[str]:
    return Counter(f"{span.service} {span.kind} {span.name}" for span in spans)


DENIED = Counter(
    [
        "client INTERNAL agent",
        "mcp-opa-sidecar SERVER tools/call get_ticket",
        "mcp-opa-sidecar CLIENT policy.evaluate mcp/authz",
    ]
)
LIFTED = DENIED + Counter(["mcp-opa-sidecar CLIENT tools/call get_ticket"])


def lifted(trace: TraceContext) -> Call:
    """A denial in shadow mode: nothing failed."""
    forwarded = calls.START + 4 * calls.MILLISECOND
    return calls.denied(
        trace, mode="shadow", outcome="success", rpc_error=None, forwarded=forwarded
    )


REFUSED: dict[Make, Counter[str]] = {
    calls.denied: DENIED,
    calls.undecided: DENIED,
    lifted: LIFTED,
}


def test_the_configuration_is_valid(collector_bin: Path) -> None:
    done = subprocess.run(
        [collector_bin, "validate", "--config", FOLDER / "collector.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_denials_and_errors_are_kept_and_the_rest_is_sampled(collector_bin: Path) -> None:
    with (
        Sink() as sink,
        collector(collector_bin, sink.url, DECISION_WAIT="4s") as running,
        senders(running.url) as both,
    ):
        allowed = [both.send(calls.allowed) for _ in range(ALLOWED)]
        refused = {both.send(make): spans for make, spans in REFUSED.items() for _ in range(20)}
        both.flush()

        def whole() -> bool:
            return all(kinds(of(sink, each)) == spans for each, spans in refused.items())

        wait_until(whole, "what was refused, and the rest of its traces")
        kept = [each for each in allowed if of(sink, each)]
        assert FEWEST <= len(kept) <= MOST
        wait_until(lambda: all(len(of(sink, each)) == 4 for each in kept), "whole traces")
    assert whole(), "nothing came twice"


def test_a_denial_comes_through_after_its_trace_was_given_up(collector_bin: Path) -> None:
    """An agent's trace lasts for minutes, and the sampler judges it long before."""
    with (
        Sink() as sink,
        collector(collector_bin, sink.url, DECISION_WAIT="3s", SAMPLED_PERCENT="0") as running,
        senders(running.url) as both,
    ):
        first = both.send(calls.allowed)
        both.flush()
        judged = both.send(calls.denied)
        both.flush()
        wait_until(lambda: kinds(of(sink, judged)) == DENIED, "what came later was judged")
        both.send(calls.denied, {"traceparent": first})
        wait_until(lambda: len(of(sink, first)) == 2, "the late denial")
    assert {span.attributes["authz.decision"] for span in of(sink, first)} == {"deny"}


def test_a_failure_of_a_server_is_kept(collector_bin: Path) -> None:
    def failed(trace: TraceContext) -> Call:
        return calls.allowed(trace, outcome="upstream_error", rpc_error=(-31502, "gone"))

    with (
        Sink() as sink,
        collector(collector_bin, sink.url, DECISION_WAIT="3s", SAMPLED_PERCENT="0") as running,
        senders(running.url) as both,
    ):
        trace = both.send(failed)
        both.flush()
        wait_until(lambda: len(of(sink, trace)) == 4, "the whole trace")
        assert len(sink.spans) == 4


def test_what_a_real_sidecar_and_its_opa_send(
    collector_bin: Path, opa_bin: Path, tmp_path: Path
) -> None:
    """Denials with OPA's part in them, no allowed call; and metrics, named as for Prometheus."""
    variables = {"OTEL_METRIC_EXPORT_INTERVAL": "500", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with (
        Sink() as sink,
        collector(collector_bin, sink.url, DECISION_WAIT="4s", SAMPLED_PERCENT="0") as running,
        looked_at(tmp_path / "sidecar", opa_bin, "--otlp", running.url, **variables) as looked,
    ):
        looked.calls()
        sink.wait_for(1, where=lambda span: span.service == "opa", within=20)
        wait_until(lambda: not missing(looked.metrics(), running), "all metrics")
    sent = [span for span in sink.spans if span.service == "mcp-opa-sidecar"]
    assert {span.attributes.get("authz.decision") for span in sent} == {"deny"}
    assert {span.trace_id for span in sink.spans} == {span.trace_id for span in sent}


def missing(series: dict[str, frozenset[str]], running: Collector) -> list[str]:
    """What is on a sidecar's own page and not on the Collector's, names and labels."""
    there = running.metrics()
    return [
        name
        for name, labels in series.items()
        if not {*labels, "job", "instance"} <= there.get(name, frozenset())
        and name != "target_info"
    ]
