"""A collector for tests: OTLP over HTTP, real protobuf, on a free port of the loopback.

    with Sink() as sink:
        ...  # export to sink.url
        spans = sink.wait_for(3)

It can misbehave, and change its mind while it runs: `slow` answers after `delay` seconds,
`refusing` says 503, `rejecting` says 400, `dead` has nobody listening on its port.
"""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

Mode = Literal["good", "slow", "refusing", "rejecting", "dead"]


@dataclass(frozen=True)
class Link:
    """A span that another one points to."""

    trace_id: str
    span_id: str


@dataclass(frozen=True)
class Span:
    """One exported span. Ids are hex, `parent_id` is None for a root, times are nanoseconds."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start: int
    end: int
    attributes: Mapping[str, Any]
    status: str
    status_message: str
    links: tuple[Link, ...]
    resource: Mapping[str, Any]
    scope: str
    tracestate: str

    @property
    def service(self) -> str:
        """Who emitted it."""
        return str(self.resource.get("service.name"))


@dataclass(frozen=True)
class Point:
    """One series of a metric: its value, or a histogram's count, sum and buckets."""

    metric: str
    unit: str
    attributes: Mapping[str, Any]
    value: float
    count: int = 0
    bounds: tuple[float, ...] = ()
    kind: str = ""
    resource: Mapping[str, Any] = field(default_factory=dict)


class Sink:
    """The collector. `requests` are the paths of all exports, whatever they were answered."""

    def __init__(self, mode: Mode = "good", *, delay: float = 1.0) -> None:
        self.delay = delay
        self.requests: list[str] = []
        self.points: list[Point] = []
        self._mode = mode
        self._spans: list[Span] = []
        self._news = threading.Condition()
        self._stopped = threading.Event()
        self._server: _Server | None = None
        self._holder: socket.socket | None = None
        self.port = 0

    def __enter__(self) -> Self:
        if self._mode == "dead":
            self._hold()
        else:
            self._serve()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._stop()
        if self._holder is not None:
            self._holder.close()

    @property
    def url(self) -> str:
        """The base URL, for `--otlp` and `OTEL_EXPORTER_OTLP_ENDPOINT`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def mode(self) -> Mode:
        """How it behaves."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        before, self._mode = self._mode, mode
        if mode == "dead" != before:
            self._stop()
            self._hold()
        elif before == "dead" != mode:
            self._serve()

    @property
    def spans(self) -> list[Span]:
        """What has come so far."""
        with self._news:
            return list(self._spans)

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of one trace, in order of their start."""
        return sorted((s for s in self.spans if s.trace_id == trace_id), key=lambda s: s.start)

    def wait_for(
        self, count: int, *, where: Callable[[Span], bool] = lambda span: True, within: float = 10.0
    ) -> list[Span]:
        """The spans that fulfil `where`, once there are at least `count` of them.

        Raises:
            TimeoutError: there are not, `within` that many seconds.

        """
        deadline = time.monotonic() + within
        with self._news:
            while len(found := [each for each in self._spans if where(each)]) < count:
                if not self._news.wait(deadline - time.monotonic()):
                    names = [each.name for each in self._spans]
                    raise TimeoutError(f"{len(found)} of {count} spans; there are {names}")
            return found

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        """What an export is answered with."""
        self.requests.append(path)
        if self._mode == "slow":
            self._stopped.wait(self.delay)
        if self._mode in ("refusing", "rejecting"):
            return (503 if self._mode == "refusing" else 400), b""
        if path == "/v1/traces":
            self._take(ExportTraceServiceRequest.FromString(body))
            return 200, ExportTraceServiceResponse().SerializeToString()
        if path == "/v1/metrics":
            self.points += read_points(ExportMetricsServiceRequest.FromString(body))
            return 200, ExportMetricsServiceResponse().SerializeToString()
        return 404, b""

    def _take(self, request: ExportTraceServiceRequest) -> None:
        with self._news:
            self._spans += read_spans(request)
            self._news.notify_all()

    def _serve(self) -> None:
        if self._holder is not None:
            self._holder.close()
            self._holder = None
        self._server = _Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._server = None

    def _hold(self) -> None:
        """Keep the port without listening on it, so that nobody else does."""
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind(("127.0.0.1", self.port))
        self.port = self._holder.getsockname()[1]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], sink: Sink) -> None:
        self.sink = sink
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An exporter that gave up meanwhile is no matter of a test's output."""

    def hang_up(self) -> None:
        for connection in tuple(self._connections):
            self.shutdown_request(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status, answer = self.server.sink.answer(self.path, body)
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name it overrides)
        """Requests are in `Sink.requests`, not on stderr."""


def read_spans(request: ExportTraceServiceRequest) -> list[Span]:
    """The spans of an export, decoded."""
    return [
        _span(span, resource=_attributes(group.resource.attributes), scope=scope.scope.name)
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def read_points(request: ExportMetricsServiceRequest) -> list[Point]:
    """The series of an export, decoded."""
    return [
        replace(point, kind=_kind(metric), resource=_attributes(group.resource.attributes))
        for group in request.resource_metrics
        for scope in group.scope_metrics
        for metric in scope.metrics
        for point in _points(metric)
    ]


def _kind(metric: Metric) -> str:
    """`gauge`, `histogram`, `sum` or `monotonic sum`."""
    kind = str(metric.WhichOneof("data"))
    return f"monotonic {kind}" if kind == "sum" and metric.sum.is_monotonic else kind


def tree(spans: Iterable[Span]) -> list[str]:
    """A trace as indented lines, children below their parents."""
    ordered = sorted(spans, key=lambda span: span.start)
    ids = {each.span_id for each in ordered}
    lines: list[str] = []

    def add(span: Span, depth: int) -> None:
        milliseconds = (span.end - span.start) / 1e6
        lines.append(f"{'  ' * depth}{span.kind:<8} {span.name}  {milliseconds:.1f} ms")
        for each in ordered:
            if each.parent_id == span.span_id:
                add(each, depth + 1)

    for each in ordered:
        if each.parent_id not in ids:
            add(each, 0)
    return lines


def _span(span: ProtoSpan, *, resource: Mapping[str, Any], scope: str) -> Span:
    return Span(
        name=span.name,
        kind=ProtoSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        status=Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
        links=tuple(Link(each.trace_id.hex(), each.span_id.hex()) for each in span.links),
        resource=resource,
        scope=scope,
        tracestate=span.trace_state,
    )


def _points(metric: Metric) -> Iterator[Point]:
    for number in (*metric.sum.data_points, *metric.gauge.data_points):
        value = number.as_double if number.HasField("as_double") else float(number.as_int)
        yield Point(metric.name, metric.unit, _attributes(number.attributes), value)
    for each in metric.histogram.data_points:
        fields, bounds = _attributes(each.attributes), tuple(each.explicit_bounds)
        yield Point(metric.name, metric.unit, fields, each.sum, each.count, bounds)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind)
