"""Where the demo's spans go: to a collector of its own, and from there to yours."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Tracer

from tests.demo.story import Cell
from tests.support.otlp import Sink

CLIENT = "demo-client"
SIDECAR, OPA = "mcp-opa-sidecar", "opa"
TRACES = "/v1/traces"


class Collector(Sink):
    """Keeps what it is sent, to pass it on."""

    def __init__(self) -> None:
        super().__init__()
        self._bodies: list[bytes] = []

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Keep the spans as they came."""
        if path == TRACES:
            self._bodies.append(body)
        return super().answer(path, body)

    def cells(self) -> dict[str, Cell]:
        """What the sidecars have written down, by trace."""
        told = [span for span in self.spans if (span.service, span.kind) == (SIDECAR, "SERVER")]
        return {span.trace_id: Cell.of(span.attributes) for span in told}

    def pass_on(self, url: str) -> str | None:
        """Send everything to the collector at `url`; why not, if that fails."""
        for body in self._bodies:
            request = urllib.request.Request(
                url.rstrip("/") + TRACES, body, {"Content-Type": "application/x-protobuf"}
            )
            try:
                with urllib.request.urlopen(request, timeout=5):
                    pass
            except OSError as error:
                return str(error)
        return None


@contextmanager
def caller_spans(url: str) -> Iterator[Tracer]:
    """A tracer for the callers, whose spans are with the collector at the end."""
    provider = TracerProvider(resource=Resource.create({"service.name": CLIENT}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url + TRACES)))
    try:
        yield provider.get_tracer(__name__)
    finally:
        provider.shutdown()
