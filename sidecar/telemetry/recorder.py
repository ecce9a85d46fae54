"""What the pipeline talks to, and what makes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sidecar.conversation import Call, TraceContext
from sidecar.recording import NO_CONTENT, Content
from sidecar.telemetry import export
from sidecar.telemetry.export import Queue
from sidecar.telemetry.metrics import Metrics, Reading
from sidecar.telemetry.spans import OpaTransport, Spans
from sidecar.telemetry.tracecontext import Remote, read_baggage, read_remote
from sidecar.telemetry.tracecontext import headers as as_headers

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from sidecar.config import Telemetry as Settings

log = logging.getLogger("sidecar.telemetry")

SHUTDOWN = 1.5

_UNTRACED = TraceContext()


class Telemetry:
    """Tracer and recorder of the pipeline. Every part may be off, and then costs nearly nothing."""

    def __init__(
        self,
        spans: Spans | None = None,
        metrics: Metrics | None = None,
        closing: tuple[Callable[[], None], ...] = (),
    ) -> None:
        self._spans, self._metrics, self._closing = spans, metrics, closing
        self._flushing: list[threading.Thread] = []
        self._deadline = 0.0

    def begin(
        self,
        meta: Mapping[str, object],
        headers: Mapping[str, str],
        cause: TraceContext | None = None,
    ) -> TraceContext:
        """The context of one action, below the caller's: `_meta`'s, else that of the HTTP headers.

        Where neither has one it is below its cause; where the caller's is of another trace, the
        cause is a link.

        When nothing is traced, what the caller sent goes on as it came.
        """
        sent, ambient = read_remote(meta), read_remote(headers)
        baggage = read_baggage(meta) or read_baggage(headers)
        parent = sent or ambient
        if self._spans is None:
            return _passed_on(parent, baggage)
        twice = sent and ambient and sent.span_id != ambient.span_id
        return self._spans.begin(parent, ambient if twice else None, baggage, cause)

    def decided(self, call: Call) -> None:
        """Nothing: spans and counts are made of the whole call."""

    def finished(self, call: Call) -> None:
        """Record a call. Whatever goes wrong here is logged, and is no matter of the call's."""
        try:
            if self._metrics is not None:
                self._metrics.record(call)
            if self._spans is not None:
                self._spans.record(call)
        except Exception:
            log.exception("a call could not be recorded")

    def malformed(self, code: str) -> None:
        """Count a message that was refused before it was an action, by its error's code."""
        if self._metrics is not None:
            self._metrics.malformed(code)

    def observe(self, name: str, read: Callable[[], Reading]) -> None:
        """Have an observed metric of the table (`metrics.METRICS`) read by `read`, at any time."""
        if self._metrics is not None:
            self._metrics.observe(name, read)

    def render_metrics(self) -> bytes:
        """The Prometheus text (`metrics.CONTENT_TYPE`)."""
        return b"" if self._metrics is None else self._metrics.render()

    def close(self, within: float = SHUTDOWN) -> None:
        """Begin to send what waits: nothing is recorded any more.

        The SDK waits half a minute for a dead collector, so it does so in threads that end with the
        process.
        """
        closing, self._closing = self._closing, ()
        self._deadline = time.monotonic() + within
        self._flushing = [threading.Thread(target=each, daemon=True) for each in closing]
        for thread in self._flushing:
            thread.start()

    def shutdown(self, within: float = SHUTDOWN) -> None:
        """Have sent what waits; give up `within` seconds after `close`, which comes first."""
        if self._closing:
            self.close(within)
        for thread in self._flushing:
            thread.join(max(0.0, self._deadline - time.monotonic()))


def build(
    settings: Settings,
    *,
    version: str,
    metrics: bool = False,
    opa: OpaTransport = "unix",
    content: Content = NO_CONTENT,
    environ: Mapping[str, str] | None = None,
    exporter: SpanExporter | None = None,
) -> Telemetry:
    """The telemetry that the settings ask for.

    Args:
        settings: where spans go, and how many.
        version: of the sidecar, for `service.version`.
        metrics: whether somebody will ask for the Prometheus text.
        opa: how OPA is reached, for the policy span.
        content: what of a call's content is on its spans.
        environ: the environment, for `OTEL_*` that no setting covers; the SDK reads some itself.
        exporter: takes the place of the one that the settings name.

    Raises:
        ConfigError: the exporter can not be made of what the settings and the environment say.

    """
    environ = environ or {}
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Telemetry()
    queue = Queue(exporter) if exporter is not None else export.queue(settings, environ)
    pushed = export.metric_reader(settings, environ)
    if queue is None and pushed is None and not metrics:
        return Telemetry()
    resource = export.resource(settings, version)
    spans = counts = None
    closing: list[Callable[[], None]] = []
    if queue is not None:
        ratio = settings.ratio
        spans = Spans(queue.add, resource, ratio=ratio, version=version, opa=opa, content=content)
        closing.append(queue.shutdown)
    if metrics or pushed is not None:
        counts = Metrics(resource, version, pushed=pushed, scraped=metrics)
        closing.append(counts.shutdown)
        if queue is not None:
            lost = queue
            counts.observe("authz.spans.dropped", lambda: lost.dropped)
    return Telemetry(spans, counts, tuple(closing))


def _passed_on(parent: Remote | None, baggage: str | None) -> TraceContext:
    if parent is None and baggage is None:
        return _UNTRACED
    if parent is None:
        return TraceContext(to_upstream={"baggage": str(baggage)})
    return TraceContext(
        trace_id=parent.trace_id,
        to_opa=as_headers(parent.traceparent, parent.tracestate),
        to_upstream=as_headers(parent.traceparent, parent.tracestate, baggage),
    )
