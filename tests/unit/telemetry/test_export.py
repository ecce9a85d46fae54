from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from sidecar.config import Telemetry as Settings
from sidecar.errors import ConfigError
from sidecar.telemetry import export
from sidecar.telemetry.export import Queue
from sidecar.telemetry.spans import Spans
from tests.support import calls

LONG = 600_000.0


class Collector(SpanExporter):
    """Takes spans, refuses them, breaks, or hangs until it is let go."""

    def __init__(self, result: SpanExportResult | Exception = SpanExportResult.SUCCESS) -> None:
        self.result = result
        self.names: list[str] = []
        self.free = threading.Event()
        self.free.set()
        self.busy = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.busy.set()
        self.free.wait()
        if isinstance(self.result, Exception):
            raise self.result
        if self.result is SpanExportResult.SUCCESS:
            self.names += [each.name for each in spans]
        return self.result


def spans(**changes: Any) -> list[ReadableSpan]:
    made: list[ReadableSpan] = []
    maker = Spans(made.extend, Resource({}), ratio=1.0, version="1", opa="unix")
    maker.record(calls.allowed(maker.begin(None, None, None), **changes))
    return made


def test_what_waits_is_exported_at_the_end() -> None:
    collector = Collector()
    queue = Queue(collector, delay=LONG)
    queue.add(spans())
    queue.shutdown()
    assert collector.names == [
        "tools/call get_ticket",
        "policy.evaluate mcp/authz",
        "tools/call get_ticket",
    ]
    assert queue.dropped == 0


@pytest.mark.parametrize("result", [SpanExportResult.FAILURE, RuntimeError("broken")])
def test_what_a_collector_does_not_take_is_counted(result: Any) -> None:
    queue = Queue(Collector(result), delay=LONG)
    queue.add(spans())
    queue.shutdown()
    assert queue.dropped == 3


def test_a_full_queue_takes_whole_traces_or_nothing() -> None:
    collector = Collector()
    collector.free.clear()
    queue = Queue(collector, size=1000, delay=LONG)
    for _ in range(200):
        queue.add(spans())
    assert collector.busy.wait(5)  # with the first batch, and it hangs
    for _ in range(800):
        queue.add(spans())
    assert queue.dropped % 3 == 0
    collector.free.set()
    queue.shutdown()
    assert len(collector.names) + queue.dropped == 3000
    assert 1000 < len(collector.names) <= 1512


def test_there_is_room_again_when_a_collector_is_back() -> None:
    collector = Collector(SpanExportResult.FAILURE)
    queue = Queue(collector, size=512, delay=10.0)
    for _ in range(170):
        queue.add(spans())
    while queue.dropped < 510:
        threading.Event().wait(0.01)
    collector.result = SpanExportResult.SUCCESS
    queue.add(spans())
    queue.shutdown()
    assert (queue.dropped, len(collector.names)) == (510, 3)


def test_no_exporter_is_no_queue() -> None:
    assert export.queue(Settings(), {}) is None


@pytest.mark.parametrize("size", ["many", "3", "-1"])
def test_a_queue_size_that_can_not_be_is_a_configuration_error(size: str) -> None:
    with pytest.raises(ConfigError, match="telemetry: "):
        export.queue(Settings(exporter="console"), {"OTEL_BSP_MAX_QUEUE_SIZE": size})


@pytest.mark.allow_io("urllib3 tries an IPv6 address when it is imported")
@pytest.mark.parametrize(
    ("settings", "environ", "wanted"),
    [
        pytest.param(Settings(exporter="otlp", otlp="http://c:4318"), {}, True, id="named"),
        pytest.param(Settings(exporter="otlp"), {}, False, id="not named"),
        pytest.param(
            Settings(exporter="otlp"), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, True, id="both"
        ),
        pytest.param(
            Settings(exporter="otlp"),
            {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c"},
            True,
            id="metrics alone",
        ),
        pytest.param(
            Settings(exporter="otlp"),
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"},
            False,
            id="traces alone",
        ),
        pytest.param(
            Settings(exporter="otlp", otlp="http://c:4318"),
            {"OTEL_METRICS_EXPORTER": "none"},
            False,
            id="turned off",
        ),
        pytest.param(Settings(exporter="console", otlp="http://c"), {}, False, id="console"),
    ],
)
def test_metrics_go_to_a_collector_that_is_named_for_them(
    settings: Settings, environ: dict[str, str], wanted: bool
) -> None:
    reader = export.metric_reader(settings, environ)
    assert (reader is not None) is wanted
    if reader is not None:
        reader.shutdown()


def test_the_resource_says_what_and_which_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    attributes = "k8s.pod.name=p1,service.name=theirs,service.instance.id=one"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", attributes)
    found = export.resource(Settings(service_name="ours"), "1.2").attributes
    names = ("service.name", "service.version", "service.instance.id", "k8s.pod.name")
    assert [found[each] for each in names] == ["ours", "1.2", "one", "p1"]


def test_each_process_is_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES", raising=False)
    assert len(str(export.resource(Settings(), "1").attributes["service.instance.id"])) == 36


def test_a_collector_that_stays_away_is_news_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=iter((5.0, 10.0, 64.0, 65.0, 66.0)).__next__)
    monkeypatch.setattr("sidecar.telemetry.export.time", clock)
    seldom, record = export.Seldom(), logging.makeLogRecord({})
    assert [seldom.filter(record) for _ in range(5)] == [True, False, False, True, False]


def test_a_span_is_one_line_that_paints_nothing() -> None:
    hostile = calls.operation(params={"uri": "x"}, protocol_version="\x1b[31m\nforged")
    server = spans(operation=hostile)[0]
    line = export.line(server)
    assert line.isascii()
    assert line.count("\n") == 1
    assert line.startswith('span SERVER "tools/call get_ticket" 10.000 ms UNSET trace="')
    assert "\x1b" not in line
    assert 'authz.decision="allow"' in line
