"""What a client says of its trace, and of anything else, neither breaks nor poisons what is traced.

A value that is not what the grammars allow is as if it had not been said: the call is answered, its
spans are there, and neither the server nor OPA is told what was made up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from sidecar.config import Telemetry as Settings
from sidecar.policy.decision import Decision, Reason
from sidecar.protocol.jsonrpc import Request
from sidecar.protocol.methods import Era
from sidecar.protocol.session import Target
from sidecar.telemetry import build
from tests.support import calls, puppet_server, scripted
from tests.support.otlp import Sink, Span, read_spans
from tests.support.processes import ALLOW_ALL, http_sidecar, patient
from tests.support.raw import JSON_HEADERS, Object, Wire, call, code, dump, stdio_sidecar
from tests.support.scripted import Asked, Scripted

pytestmark = pytest.mark.timeout(180)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"
CONTEXT = ("traceparent", "tracestate", "baggage")

MADE_UP: Mapping[str, Object] = {
    "a number": {"traceparent": 5, "tracestate": 6, "baggage": 7},
    "objects and lists": {"traceparent": {"a": [GOOD]}, "tracestate": [], "baggage": {}},
    "nothing": {"traceparent": None, "tracestate": None, "baggage": None},
    "empty": {"traceparent": "", "tracestate": "", "baggage": ""},
    "upper case": {"traceparent": GOOD.upper()},
    "zeros": {"traceparent": f"00-{'0' * 32}-{'0' * 16}-01"},
    "a version that is none": {"traceparent": f"ff-{TRACE}-{SPAN}-01"},
    "more than there is": {"traceparent": f"{GOOD}-and-more"},
    "very long": {"traceparent": "0" * 100_000, "baggage": "a=" + "b" * 100_000},
    "another header": {"traceparent": f"{GOOD}\r\nX-Evil: 1", "baggage": "a=1\r\nX-Evil: 1"},
    "other digits": {"traceparent": f"00-{TRACE[:-1]}\uff11-{SPAN}-01"},
    "other keys": {"Traceparent": GOOD, "TRACESTATE": "a=1", "traceParent": GOOD},
}
"""None of these is a parent, and nothing of them goes on under the names that count."""

BESIDE_A_PARENT: Mapping[str, Object] = {
    "a state that is none": {"tracestate": "A=1,=,a=1,a=2"},
    "a state with a header": {"tracestate": "a=1\r\nX-Evil: 1"},
    "a state of a thousand": {"tracestate": ",".join(f"k{n}=v" for n in range(1000))},
    "baggage that is none": {"baggage": "a b c"},
    "baggage with a header": {"baggage": "a=1\r\nX-Evil: 1"},
    "baggage of a thousand": {"baggage": ",".join(f"k{n}=v" for n in range(1000))},
}
"""They are dropped, and the parent is kept."""


# ── Two roads to a server ─────────────────────────────────────────────────────────────────────────


class Road(Protocol):
    """A sidecar with a client before it and a server behind it."""

    def ask(self, message: Object) -> Object:
        """Call a tool; the answer."""

    def told(self, number: object) -> Iterator[Mapping[str, Any]]:
        """Where the server was told of the trace of that call: `_meta`, and headers."""


@dataclass
class Http:
    """Over HTTP on both sides."""

    wire: Wire
    server: Scripted

    def ask(self, message: Object) -> Object:
        self.wire.request(dump(message), JSON_HEADERS)
        return self.wire.answer().message

    def told(self, number: object) -> Iterator[Mapping[str, Any]]:
        for asked in self.server.seen("tools/call"):
            if asked.message["id"] == number:
                yield asked.message["params"]["_meta"]
                yield asked.headers


@dataclass
class Pipes:
    """Over pipes on both sides."""

    pipe: Any
    log: Path

    def ask(self, message: Object) -> Object:
        answer: Object = self.pipe.ask(message)
        return answer

    def told(self, number: object) -> Iterator[Mapping[str, Any]]:
        for heard in puppet_server.heard(self.log, "tools/call"):
            if heard["id"] == number:
                yield heard["params"]["_meta"]


async def plainly(server: Scripted, http: web.Request, asked: Asked) -> None:
    """As a plain server."""


@contextmanager
def http_road(folder: Path, sink: Sink, env: Mapping[str, str]) -> Iterator[Road]:
    arguments = ("--policy", ALLOW_ALL, "--otlp", sink.url)
    with (
        scripted.scripted(plainly) as server,
        http_sidecar(server.url, *arguments, env=env) as served,
        Wire(served.url) as wire,
    ):
        yield Http(wire, server)


@contextmanager
def pipe_road(folder: Path, sink: Sink, env: Mapping[str, str]) -> Iterator[Road]:
    log, arguments = folder / "heard", ("--policy", ALLOW_ALL, "--otlp", sink.url)
    with stdio_sidecar(puppet_server.command(log), *arguments, env=env) as pipe:
        pipe.greet()
        yield Pipes(pipe, log)


@pytest.fixture(params=[http_road, pipe_road], ids=["http", "stdio"])
def road(
    request: pytest.FixtureRequest, tmp_path: Path, opa_bin: Path, sink: Sink
) -> Iterator[Road]:
    env = {**patient(opa_bin), "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with request.param(tmp_path, sink, env) as made:
        yield made


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as made:
        yield made


def spans_of(sink: Sink, number: str) -> dict[str, Span]:
    """The sidecar's spans of one call, once they are there, by kind and what they are."""
    (served,) = sink.wait_for(
        1,
        where=lambda span: (
            span.kind == "SERVER" and span.attributes.get("jsonrpc.request.id") == number
        ),
    )
    trace = sink.wait_for(
        2, where=lambda span: span.kind == "CLIENT" and span.parent_id == served.span_id
    )
    return {"server": served, **{each.name.partition(" ")[0]: each for each in trace}}


def meta_of(said: Object, number: str) -> Object:
    message = call(number)
    message["params"]["_meta"] = said
    return message


def test_what_is_made_up_is_as_if_nothing_had_been_said(road: Road, sink: Sink) -> None:
    for number, said in MADE_UP.items():
        assert code(road.ask(meta_of(said, number))) is None, number
        spans = spans_of(sink, number)
        assert spans["server"].parent_id is None, number
        assert spans["server"].links == ()
        assert TRACE not in {each.trace_id for each in spans.values()}
        _is_told_of_ours_alone(road, number, spans["tools/call"])


def test_what_is_made_up_beside_a_parent_is_dropped_alone(road: Road, sink: Sink) -> None:
    for number, said in BESIDE_A_PARENT.items():
        assert code(road.ask(meta_of({"traceparent": GOOD, **said}, number))) is None, number
        spans = spans_of(sink, number)
        assert (spans["server"].trace_id, spans["server"].parent_id) == (TRACE, SPAN), number
        assert spans["server"].tracestate == ""
        _is_told_of_ours_alone(road, number, spans["tools/call"])


def _is_told_of_ours_alone(road: Road, number: str, upstream: Span) -> None:
    """The server's parent is the span that was exported; nothing that was made up came along."""
    told = list(road.told(number))
    assert told
    for carrier in told:
        assert carrier["traceparent"] == f"00-{upstream.trace_id}-{upstream.span_id}-01"
        assert not {"tracestate", "baggage", "x-evil"} & set(carrier)


def test_what_is_right_goes_on_as_it_came(road: Road, sink: Sink) -> None:
    said = {"traceparent": GOOD, "tracestate": "a=1,b=2", "baggage": "user=ana"}
    assert code(road.ask(meta_of(said, "good"))) is None
    spans = spans_of(sink, "good")
    assert spans["server"].tracestate == "a=1,b=2"
    for carrier in road.told("good"):
        assert (carrier["tracestate"], carrier["baggage"]) == ("a=1,b=2", "user=ana")


HEADERS: Sequence[tuple[str, str]] = (
    ("traceparent", "garbage"),
    ("traceparent", GOOD.upper()),
    ("traceparent", f"{GOOD}, {GOOD}"),
    ("baggage", "x" * 4000),
    ("tracestate", "=" * 2000),
)


@pytest.mark.parametrize("road", [http_road], ids=["http"], indirect=True)
def test_headers_that_are_made_up_end_here(road: Road, sink: Sink) -> None:
    assert isinstance(road, Http)
    for index, header in enumerate(HEADERS):
        number = f"header {index}"
        road.wire.request(dump(call(number)), (*JSON_HEADERS, header))
        assert code(road.wire.answer().message) is None
        spans = spans_of(sink, number)
        assert spans["server"].parent_id is None
        _is_told_of_ours_alone(road, number, spans["tools/call"])


# ── Whatever else may be made up ──────────────────────────────────────────────────────────────────


class Encoding(SpanExporter):
    """As OTLP goes over the wire, and back."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        sent = encode_spans(spans).SerializeToString()
        self.spans += read_spans(ExportTraceServiceRequest.FromString(sent))
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is kept open."""


ODD = st.text(max_size=40) | st.sampled_from(
    ["\ud800", "\x00", "a\r\nb", "\u202e", "x" * 10**5, ""]
)
SCALARS = ODD | st.integers() | st.floats() | st.booleans()
META = st.dictionaries(st.sampled_from(CONTEXT) | ODD, SCALARS | st.lists(ODD) | st.none())


@given(META, st.lists(ODD, min_size=7, max_size=7), st.dictionaries(ODD, SCALARS, max_size=4))
def test_no_name_id_reason_or_remark_loses_a_span(
    meta: dict[str, Any], odd: list[str], remarks: dict[str, Any]
) -> None:
    name, identity, session, version, reason, rule, message = odd
    exporter = Encoding()
    made = build(Settings(), version="1", metrics=True, exporter=exporter)
    operation = calls.operation(
        target=Target("tool", name),
        message=Request(identity, "tools/call", {"name": name}),
        session_id=session,
        protocol_version=version,
        era=Era.LEGACY,
    )
    decision = Decision(False, (Reason(reason, message),), rule, rule, version, attributes=remarks)
    for make in (calls.allowed, calls.denied, calls.undecided):
        trace = made.begin(meta, {})
        made.finished(
            make(
                trace,
                operation=operation,
                decision=decision,
                reasons=decision.reasons,
                rpc_error=(-31403, message),
                forwarded=calls.START,
            )
        )
    assert made.render_metrics()
    made.shutdown()
    assert len(exporter.spans) == 9
    for span in exporter.spans:
        assert len(span.name) <= 200
        texts = [each for each in span.attributes.values() if isinstance(each, str)]
        assert max(map(len, texts)) <= 1024
        assert len(span.attributes) < 64
