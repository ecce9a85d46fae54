"""Where spans and metrics go. A dead, slow or refusing collector costs what it does not take.

`Queue` is bounded, never waits, and counts what is lost. What the SDK reads from the environment
itself (endpoints, headers, TLS, timeouts, intervals) stays its own business; `environ` is for what
is decided here.

Sources: OpenTelemetry, "Environment Variable Specification", "OTLP Exporter Configuration".
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from sidecar.errors import ConfigError
from sidecar.protocol.jsonrpc import dump_json

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    from sidecar.config import Telemetry as Settings

MAX_QUEUE = 2048
CONSOLE_DELAY_MS = 200.0

QUIET = 60.0

_QUEUE_SIZE = "OTEL_BSP_MAX_QUEUE_SIZE"
_METRICS_EXPORTER = "OTEL_METRICS_EXPORTER"
_METRICS_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")

_LOGGERS = tuple(
    f"opentelemetry.exporter.otlp.proto.{name}"
    for name in ("http.trace_exporter", "http.metric_exporter", "grpc.exporter")
)


class Queue:
    """Spans on their way out, in batches by a thread of the SDK's."""

    def __init__(
        self, exporter: SpanExporter, *, size: int = MAX_QUEUE, delay: float | None = None
    ) -> None:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

        self._size, self._added, self._refused = size, 0, 0
        self._counted = _Counted(exporter, SpanExportResult.SUCCESS)
        # By shape, not by inheritance: a base class of the SDK would have to be imported first.
        self._batches = BatchSpanProcessor(
            cast("SpanExporter", self._counted), max_queue_size=size, schedule_delay_millis=delay
        )

    @property
    def dropped(self) -> int:
        """Spans that were lost: no room, or not taken by the collector."""
        return self._refused + self._counted.failed

    def add(self, spans: Sequence[ReadableSpan]) -> None:
        """Take all the spans of a call, or none: half a trace misleads."""
        if self._added - self._counted.taken + len(spans) > self._size:
            self._refused += len(spans)
            return
        self._added += len(spans)
        for span in spans:
            self._batches.on_end(span)

    def shutdown(self) -> None:
        """Export what waits. It may take as long as the SDK waits for a collector."""
        self._batches.shutdown()  # type: ignore[no-untyped-call]


class _Counted:
    """An exporter, and what became of the spans that it was given."""

    def __init__(self, exporter: SpanExporter, success: SpanExportResult) -> None:
        self._exporter, self._success = exporter, success
        self.taken = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        result = None
        try:
            result = self._exporter.export(spans)
            return result
        finally:
            if result is not self._success:
                self.failed += len(spans)

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class Seldom(logging.Filter):
    """One line a minute: a collector that stays away is news once, not with every retry."""

    def __init__(self) -> None:
        super().__init__()
        self._last = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a minute has passed since the last line."""
        now = time.monotonic()
        if now - self._last < QUIET:
            return False
        self._last = now
        return True


def queue(settings: Settings, environ: Mapping[str, str]) -> Queue | None:
    """The way out that the settings name; None when they name none.

    Raises:
        ConfigError: the exporter can not be made of what the settings and the environment say.

    """
    try:
        size = int(environ.get(_QUEUE_SIZE) or MAX_QUEUE)
        match settings.exporter:
            case "otlp":
                return Queue(_otlp(settings), size=size)
            case "console":
                return Queue(_console(), size=size, delay=CONSOLE_DELAY_MS)
            case "none":
                return None
    except ValueError as error:
        raise ConfigError(f"telemetry: {error}") from error


def metric_reader(settings: Settings, environ: Mapping[str, str]) -> MetricReader | None:
    """Metrics go over OTLP as well when a collector is named for them, unless turned off."""
    named = settings.otlp is not None or any(environ.get(each) for each in _METRICS_ENDPOINTS)
    wanted = environ.get(_METRICS_EXPORTER, "otlp") == "otlp"
    if settings.exporter != "otlp" or not (named and wanted):
        return None
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    if settings.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (
            OTLPMetricExporter as Grpc,
        )

        return PeriodicExportingMetricReader(Grpc(endpoint=settings.otlp))
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

    return PeriodicExportingMetricReader(Http(endpoint=_below(settings.otlp, "v1/metrics")))


def resource(settings: Settings, version: str) -> Resource:
    """What emits: our defaults, then `OTEL_RESOURCE_ATTRIBUTES`, then the configured name."""
    from opentelemetry.sdk.resources import Resource

    ours = {"service.version": version, "service.instance.id": str(uuid.uuid4())}
    named = {"service.name": settings.service_name}
    return Resource(ours).merge(Resource.create()).merge(Resource(named))


def _otlp(settings: Settings) -> SpanExporter:
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(Seldom())
    if settings.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=settings.otlp)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    return Http(endpoint=_below(settings.otlp, "v1/traces"))


def _below(base: str | None, path: str) -> str | None:
    """The URL of a signal; None leaves it to the SDK, which reads the environment."""
    return None if base is None else f"{base.rstrip('/')}/{path}"


def _console() -> SpanExporter:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    return ConsoleSpanExporter(out=sys.stderr, formatter=line)


def line(span: ReadableSpan) -> str:
    """A span in one line. Values are JSON in ASCII: none can end the line or paint the terminal."""
    context, parent = span.get_span_context(), span.parent
    milliseconds = ((span.end_time or 0) - (span.start_time or 0)) / 1e6
    fields = {
        "trace": f"{context.trace_id:032x}" if context else None,
        "span": f"{context.span_id:016x}" if context else None,
        "parent": f"{parent.span_id:016x}" if parent else None,
        **(span.attributes or {}),
    }
    shown = " ".join(f"{key}={dump_json(value).decode()}" for key, value in fields.items() if value)
    name, kind = dump_json(span.name).decode(), span.kind.name
    return f"span {kind} {name} {milliseconds:.3f} ms {span.status.status_code.name} {shown}\n"
