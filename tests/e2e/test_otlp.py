"""Spans and metrics to a collector that speaks real OTLP, and to collectors that are none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sidecar.config import Telemetry as Settings
from sidecar.telemetry import Telemetry, build
from tests.support import calls
from tests.support.otlp import Mode, Sink, tree

PARENT = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")


@contextmanager
def telemetry(sink: Sink, *, named: bool = True) -> Iterator[Telemetry]:
    settings = Settings(exporter="otlp", otlp=sink.url if named else None)
    made = build(settings, version="1.2", metrics=True)
    try:
        yield made
    finally:
        made.shutdown()


def record(made: Telemetry) -> None:
    made.finished(
        calls.allowed(made.begin(PARENT, {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}))
    )


def test_a_trace_arrives_as_it_was_made() -> None:
    with Sink() as sink, telemetry(sink) as made:
        record(made)
        server, policy, upstream = sink.wait_for(3)
        assert [each.kind for each in (server, policy, upstream)] == ["SERVER", "CLIENT", "CLIENT"]
        assert {each.trace_id for each in (server, policy, upstream)} == {
            PARENT["traceparent"][3:35]
        }
        assert server.parent_id == PARENT["traceparent"][36:52]
        assert policy.parent_id == upstream.parent_id == server.span_id
        assert [each.trace_id for each in server.links] == ["a" * 32]
        assert (server.start, server.end) == (calls.START, calls.START + 10 * calls.MILLISECOND)
        assert server.attributes["actor.assurance"] == 1
        assert policy.attributes["actor.chain"] == ["agent:static|bot", "human:static|alice"]
        assert server.service == "mcp-opa-sidecar"
        assert server.resource["service.version"] == "1.2"


def test_a_trace_can_be_shown_as_a_tree() -> None:
    with Sink() as sink:
        with telemetry(sink) as made:
            record(made)
        assert tree(sink.spans) == [
            "SERVER   tools/call get_ticket  10.0 ms",
            "  CLIENT   policy.evaluate mcp/authz  2.0 ms",
            "  CLIENT   tools/call get_ticket  6.0 ms",
        ]


def test_metrics_arrive_at_the_end() -> None:
    with Sink() as sink:
        with telemetry(sink) as made:
            record(made)
        names = {each.metric for each in sink.points}
        assert {"authz.decisions", "mcp.server.operation.duration"} <= names
        (duration,) = [each for each in sink.points if each.metric == "authz.decision.duration"]
        assert (duration.count, duration.unit, duration.bounds[0]) == (1, "s", 0.0001)


def test_the_standard_variables_name_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sink() as sink:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        with telemetry(sink, named=False) as made:
            record(made)
            assert len(sink.wait_for(3)) == 3


@pytest.mark.parametrize("mode", ["dead", "slow", "refusing", "rejecting"])
def test_a_bad_collector_costs_its_spans_and_no_time(mode: Mode) -> None:
    with Sink(mode, delay=30.0) as sink, telemetry(sink) as made:
        for _ in range(2000):
            record(made)
        dropped = float(made.render_metrics().split(b"\nauthz_spans_dropped_total ")[1].split()[0])
        start = time.monotonic()
        made.shutdown()
        # The collector holds on for 30 s; what is recorded meanwhile, and the end, do not wait.
        assert time.monotonic() - start < 10
        assert dropped > 1000


def test_a_collector_that_comes_back_gets_what_comes_then() -> None:
    with Sink("rejecting") as sink, telemetry(sink) as made:
        record(made)
        while not sink.requests:
            time.sleep(0.01)
        sink.mode = "dead"
        sink.mode = "good"
        record(made)
        assert len(sink.wait_for(3)) == 3
