from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sidecar.config import Telemetry as Settings
from sidecar.conversation import Recorder, TraceContext, Tracer
from sidecar.telemetry import Telemetry, build
from tests.support import calls

TRACE, SPAN, OTHER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "b" * 16
IN_META = f"00-{TRACE}-{SPAN}-01"
IN_HTTP = f"00-{'a' * 32}-{OTHER_SPAN}-00"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def telemetry(exporter: InMemorySpanExporter) -> Iterator[Telemetry]:
    made = build(Settings(), version="1", metrics=True, exporter=exporter)
    yield made
    made.shutdown()


def off() -> Telemetry:
    return build(Settings(), version="1")


_IS_WHAT_THE_PIPELINE_ASKS_FOR: tuple[type[Tracer], type[Recorder]] = (Telemetry, Telemetry)


# ---------------------------------------------------------------------------- whose child it is


def test_the_parent_is_the_one_in_meta_and_that_of_http_is_a_link(
    telemetry: Telemetry, exporter: InMemorySpanExporter
) -> None:
    trace = telemetry.begin({"traceparent": IN_META}, {"traceparent": IN_HTTP})
    assert trace.trace_id == TRACE
    telemetry.finished(calls.allowed(trace))
    telemetry.shutdown()
    (link,) = exporter.get_finished_spans()[0].links
    assert f"{link.context.span_id:016x}" == OTHER_SPAN


@pytest.mark.parametrize(
    "meta",
    [{}, {"traceparent": 5}, {"traceparent": "garbage"}, {"traceparent": {"a": []}}],
)
def test_else_it_is_that_of_http(telemetry: Telemetry, meta: dict[str, object]) -> None:
    assert telemetry.begin(meta, {"traceparent": IN_HTTP}).trace_id == "a" * 32


def test_the_same_span_twice_is_no_link(telemetry: Telemetry) -> None:
    trace = telemetry.begin({"traceparent": IN_META}, {"traceparent": IN_META})
    assert trace.state.links == ()


def test_when_nothing_is_traced_what_the_caller_sent_goes_on() -> None:
    sent = {"traceparent": IN_META, "tracestate": "a=1", "baggage": "b=2"}
    trace = off().begin(sent, {"traceparent": IN_HTTP})
    assert trace.trace_id == TRACE
    assert trace.to_upstream == sent
    assert trace.to_opa == {"traceparent": IN_META, "tracestate": "a=1"}


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"traceparent": 5, "tracestate": 6, "baggage": 7},
        {"traceparent": "x", "tracestate": "a=1"},
    ],
)
def test_when_nothing_is_traced_garbage_does_not_go_on(meta: dict[str, object]) -> None:
    assert off().begin(meta, {}) == TraceContext()


def test_baggage_needs_no_parent(telemetry: Telemetry) -> None:
    assert off().begin({"baggage": "b=2"}, {}) == TraceContext(to_upstream={"baggage": "b=2"})
    assert telemetry.begin({"baggage": "b=2"}, {}).to_upstream["baggage"] == "b=2"


# ----------------------------------------------------------------------------- what is recorded


def test_a_call_is_a_trace_and_a_count(
    telemetry: Telemetry, exporter: InMemorySpanExporter
) -> None:
    call = calls.denied(telemetry.begin({}, {}))
    telemetry.decided(call)
    telemetry.finished(call)
    telemetry.malformed("malformed_message")
    telemetry.observe("authz.calls.active", lambda: 2)
    text = telemetry.render_metrics().decode()
    telemetry.shutdown()
    assert [each.name for each in exporter.get_finished_spans()] == [
        "tools/call get_ticket",
        "policy.evaluate mcp/authz",
    ]
    assert 'authz_decision="deny"' in text
    assert 'authz_messages_malformed_total{error_type="malformed_message"} 1.0' in text
    assert "authz_calls_active 2.0" in text
    assert "authz_spans_dropped_total 0.0" in text


def test_the_policy_span_says_how_opa_is_reached(exporter: InMemorySpanExporter) -> None:
    made = build(Settings(), version="1", opa="tcp", exporter=exporter)
    made.finished(calls.allowed(made.begin({}, {})))
    made.shutdown()
    policy = exporter.get_finished_spans()[1]
    assert (policy.attributes or {})["network.transport"] == "tcp"


def test_a_call_that_began_untraced_leaves_no_span(
    telemetry: Telemetry, exporter: InMemorySpanExporter
) -> None:
    telemetry.finished(calls.denied(TraceContext()))
    telemetry.shutdown()
    assert exporter.get_finished_spans() == ()


def test_off_everything_is_accepted_and_nothing_done() -> None:
    telemetry = off()
    call = calls.allowed(telemetry.begin({}, {}))
    telemetry.decided(call)
    telemetry.finished(call)
    telemetry.malformed("x")
    telemetry.observe("authz.calls.active", lambda: 1)
    assert telemetry.render_metrics() == b""
    telemetry.shutdown()


@pytest.mark.parametrize("value", ["true", " TRUE "])
def test_the_sdk_can_be_disabled(value: str, exporter: InMemorySpanExporter) -> None:
    environ = {"OTEL_SDK_DISABLED": value}
    made = build(Settings(), version="1", metrics=True, environ=environ, exporter=exporter)
    made.finished(calls.denied(made.begin({}, {})))
    made.shutdown()
    assert exporter.get_finished_spans() == ()
    assert made.render_metrics() == b""


def test_what_goes_wrong_is_logged_and_no_matter_of_the_calls(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    broken = calls.allowed(telemetry.begin({}, {}), actor=None)
    with caplog.at_level(logging.ERROR):
        telemetry.finished(broken)
    assert caplog.messages == ["a call could not be recorded"]


# --------------------------------------------------------------------------------------- the end


def hang() -> None:
    threading.Event().wait(5)


@pytest.mark.parametrize("closing", [(hang,), (hang, hang, hang)])
def test_shutdown_gives_up_in_time(closing: tuple[Callable[[], None], ...]) -> None:
    start = time.monotonic()
    Telemetry(closing=closing).shutdown(0.1)
    assert time.monotonic() - start < 1


def test_shutdown_waits_for_all_that_can_be_sent() -> None:
    done: list[int] = []
    Telemetry(closing=(partial(done.append, 1), partial(done.append, 2))).shutdown()
    assert sorted(done) == [1, 2]


@pytest.mark.allow_io("only a process of its own has imported nothing yet")
def test_nothing_of_opentelemetry_is_imported_before_it_is_needed() -> None:
    code = """
import sys
from sidecar.config import Telemetry as Settings
from sidecar.telemetry import build
telemetry = build(Settings(), version="1")
telemetry.begin({}, {})
telemetry.shutdown()
print([name for name in sys.modules if name.startswith(("opentelemetry", "prometheus", "grpc"))])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "[]\n"
