from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from sidecar.conversation import Call, TraceContext
from sidecar.policy.decision import Decision, Reason
from sidecar.protocol.session import Target
from sidecar.telemetry.attributes import MAX_TEXT
from sidecar.telemetry.spans import Spans
from sidecar.telemetry.tracecontext import Remote, read_remote
from tests.support import calls
from tests.support.calls import MILLISECOND, START

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
RESOURCE = Resource({"service.name": "x"})


class Recording:
    """Spans with the list that they are exported to."""

    def __init__(self, ratio: float = 1.0) -> None:
        self.exported: list[ReadableSpan] = []
        self.spans = Spans(self.exported.extend, RESOURCE, ratio=ratio, version="1", opa="unix")

    def begin(self, meta: Mapping[str, object] | None = None) -> TraceContext:
        return self.spans.begin(read_remote(meta or {}), None, None)

    def record(self, call: Call) -> Sequence[ReadableSpan]:
        """The spans that this call adds."""
        before = len(self.exported)
        self.spans.record(call)
        return self.exported[before:]


def sent(flags: str = "01", **more: str) -> dict[str, object]:
    return {"traceparent": f"00-{TRACE}-{SPAN}-{flags}", **more}


def ids(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def parent(span: ReadableSpan) -> str | None:
    return f"{span.parent.span_id:016x}" if span.parent else None


def in_header(carrier: Mapping[str, str]) -> Remote:
    remote = read_remote(carrier)
    assert remote is not None
    return remote


def test_an_allowed_call_has_three_spans_with_their_true_times() -> None:
    recording = Recording()
    server, policy, upstream = recording.record(calls.allowed(recording.begin()))
    assert [(each.name, each.kind) for each in (server, policy, upstream)] == [
        ("tools/call get_ticket", SpanKind.SERVER),
        ("policy.evaluate mcp/authz", SpanKind.CLIENT),
        ("tools/call get_ticket", SpanKind.CLIENT),
    ]
    times = [(each.start_time, each.end_time) for each in (server, policy, upstream)]
    assert times == [
        (START, START + 10 * MILLISECOND),
        (START + 1 * MILLISECOND, START + 3 * MILLISECOND),
        (START + 4 * MILLISECOND, START + 10 * MILLISECOND),
    ]
    assert {each.status.status_code for each in (server, policy, upstream)} == {StatusCode.UNSET}
    assert server.resource == RESOURCE


def test_the_spans_have_the_ids_that_opa_and_the_server_were_told() -> None:
    recording = Recording()
    trace = recording.begin(sent())
    server, policy, upstream = recording.record(calls.allowed(trace))
    to_opa, to_upstream = in_header(trace.to_opa), in_header(trace.to_upstream)
    assert trace.trace_id == TRACE
    assert ids(policy) == (TRACE, to_opa.span_id)
    assert ids(upstream) == (TRACE, to_upstream.span_id)
    assert parent(server) == SPAN
    assert parent(policy) == parent(upstream) == ids(server)[1]
    assert len({ids(each)[1] for each in (server, policy, upstream)}) == 3


def test_without_a_parent_a_trace_begins_here() -> None:
    recording = Recording()
    first, second = recording.begin(), recording.begin()
    assert first.trace_id != second.trace_id
    assert parent(recording.record(calls.allowed(first))[0]) is None


def test_a_denied_call_has_no_upstream_span() -> None:
    recording = Recording()
    server, policy = recording.record(calls.denied(recording.begin()))
    assert server.status.status_code is StatusCode.ERROR
    assert server.status.description == "Denied by policy (not_granted)"
    assert policy.status.status_code is StatusCode.UNSET  # a denial is an answer


def test_a_policy_that_does_not_answer_is_an_error() -> None:
    recording = Recording()
    _, policy = recording.record(calls.undecided(recording.begin()))
    assert policy.status.status_code is StatusCode.ERROR
    assert policy.status.description == "OPA did not answer within 500 ms"


def test_what_the_table_decides_has_one_span() -> None:
    recording = Recording()
    (server,) = recording.record(calls.unknown("tools/destroy", recording.begin()))
    assert server.name == "_OTHER"
    assert (server.attributes or {})["mcp.method.name"] == "tools/destroy"
    assert server.status.status_code is StatusCode.UNSET  # the asker's mistake


def test_a_servers_words_are_in_no_span() -> None:
    recording = Recording()
    secret = calls.allowed(
        recording.begin(), outcome="upstream_error", rpc_error=(-32603, "no ticket TOP-SECRET")
    )
    spans = recording.record(secret)
    assert "TOP-SECRET" not in "".join(each.to_json() for each in spans)
    assert [each.status.status_code.name for each in spans] == ["ERROR", "UNSET", "ERROR"]


def test_our_own_words_are_short() -> None:
    recording = Recording()
    call = calls.denied(recording.begin(), rpc_error=(-31403, "x" * 5000))
    description = recording.record(call)[0].status.description
    assert len(description or "") == MAX_TEXT


def test_a_listing_reached_the_server_before_the_policy_was_asked() -> None:
    recording = Recording()
    listing = calls.allowed(
        recording.begin(),
        operation=calls.operation("tools/list", Target("listing", "tools")),
        forwarded=START + 1 * MILLISECOND,
        asked=START + 5 * MILLISECOND,
        answered=START + 6 * MILLISECOND,
    )
    server, _, upstream = recording.record(listing)
    assert server.name == upstream.name == "tools/list"
    assert upstream.end_time == START + 5 * MILLISECOND


def test_no_span_ends_before_it_starts() -> None:
    recording = Recording()
    set_back = calls.allowed(recording.begin(), finished=START - 5 * MILLISECOND)
    assert all(
        (each.end_time or 0) >= (each.start_time or 0) for each in recording.record(set_back)
    )


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({"tool_known": False}, id="not listed"),
        pytest.param({"tool_known": None}, id="nobody knows"),
    ],
)
def test_names_that_a_caller_invents_are_not_in_span_names(call: dict[str, Any]) -> None:
    recording = Recording()
    server = recording.record(calls.denied(recording.begin(), **call))[0]
    assert server.name == "tools/call"
    assert (server.attributes or {})["gen_ai.tool.name"] == "get_ticket"


def test_the_number_of_span_names_is_bounded() -> None:
    recording = Recording()
    for n in range(500):
        target = Target("tool", f"tool-{n}")
        recording.record(calls.allowed(recording.begin(), operation=calls.operation(target=target)))
    assert len({each.name for each in recording.exported}) == 202  # and policy.evaluate, tools/call


def test_the_tracestate_of_the_caller_goes_on() -> None:
    recording = Recording()
    trace = recording.begin(sent(tracestate="rojo=1,congo=2"))
    assert trace.to_opa["tracestate"] == trace.to_upstream["tracestate"] == "rojo=1,congo=2"
    context = recording.record(calls.allowed(trace))[0].get_span_context()
    assert context is not None
    assert dict(context.trace_state) == {"rojo": "1", "congo": "2"}


def test_baggage_goes_to_the_server_and_not_to_opa() -> None:
    trace = Recording().spans.begin(None, None, "tenant=a")
    assert trace.to_upstream["baggage"] == "tenant=a"
    assert "baggage" not in trace.to_opa


def test_the_other_context_is_a_link() -> None:
    recording = Recording()
    link = Remote("", "a" * 32, "b" * 16, True)
    spans = recording.record(calls.allowed(recording.spans.begin(None, link, None)))
    (linked,) = spans[0].links
    assert (linked.context.trace_id, linked.context.span_id) == (
        int("a" * 32, 16),
        int("b" * 16, 16),
    )
    assert linked.context.is_remote
    assert [len(each.links) for each in spans] == [1, 0, 0]


# ------------------------------------------------------------------------------- what is exported


def simple(trace: TraceContext) -> Call:
    return calls.allowed(trace)


@pytest.mark.parametrize("flags", ["00", "01"])
@pytest.mark.parametrize(("ratio", "spans", "flag"), [(1.0, 3, True), (0.0, 0, False)])
def test_the_clients_flag_changes_nothing(flags: str, ratio: float, spans: int, flag: bool) -> None:
    recording = Recording(ratio)
    trace = recording.begin(sent(flags))
    assert in_header(trace.to_opa).sampled is in_header(trace.to_upstream).sampled is flag
    assert len(recording.record(simple(trace))) == spans


def shadowed(trace: TraceContext) -> Call:
    refused = Decision(allow=False, reasons=(Reason("not_granted"),))
    return calls.allowed(trace, decision=refused, verdict="deny", mode="shadow")


def cancelled(trace: TraceContext) -> Call:
    return calls.allowed(trace, outcome="cancelled")


def failed(trace: TraceContext) -> Call:
    return calls.allowed(trace, outcome="tool_error")


def unanswered(trace: TraceContext) -> Call:
    return calls.allowed(trace, outcome="upstream_error", rpc_error=(-31504, ""))


@pytest.mark.parametrize(
    "make", [calls.denied, calls.undecided, shadowed, cancelled, failed, unanswered]
)
def test_what_is_not_simply_allowed_and_done_is_always_exported(make: Any) -> None:
    recording = Recording(0.0)
    trace = recording.begin(sent())
    assert not in_header(trace.to_opa).sampled  # OPA's own span is not: it is judged too early
    assert recording.record(make(trace))
    flags = [each.get_span_context() for each in recording.exported]
    assert all(each is not None and each.trace_flags.sampled for each in flags)


def test_the_ratio_is_kept() -> None:
    recording = Recording(0.1)
    chosen = 0
    for _ in range(5000):
        trace = recording.begin()
        exported = recording.record(simple(trace))
        assert bool(exported) is in_header(trace.to_upstream).sampled
        chosen += bool(exported)
    assert 380 < chosen < 620


def test_the_choice_is_not_to_be_foreseen_from_the_trace_id() -> None:
    one, other = Recording(0.5), Recording(0.5)
    traces = [f"{n:032x}" for n in range(1, 200)]

    def chosen(recording: Recording) -> list[bool]:
        made = [recording.begin({"traceparent": f"00-{each}-{SPAN}-01"}) for each in traces]
        return [in_header(each.to_opa).sampled for each in made]

    assert chosen(one) == chosen(one)  # all calls of a trace, or none
    assert chosen(one) != chosen(other)  # two processes, two keys


# ── An action that goes on with another ───────────────────────────────────────────────────────────


def test_without_a_context_of_its_own_it_is_below_its_cause() -> None:
    recording = Recording()
    cause = recording.begin(sent(tracestate="vendor=1"))
    again = recording.spans.begin(None, None, None, cause)
    first, *_ = recording.record(calls.allowed(cause))
    then, *_ = recording.record(calls.allowed(again))
    assert ids(then)[0] == TRACE
    assert parent(then) == ids(first)[1]
    assert then.links == ()
    assert again.to_upstream["tracestate"] == "vendor=1"


def test_in_a_trace_of_its_own_it_has_its_cause_as_a_link() -> None:
    recording = Recording()
    cause = recording.begin()
    again = recording.spans.begin(read_remote(sent()), None, None, cause)
    first, *_ = recording.record(calls.allowed(cause))
    then, *_ = recording.record(calls.allowed(again))
    assert (ids(then)[0], parent(then)) == (TRACE, SPAN)
    (link,) = then.links
    assert (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") == ids(first)


def test_in_the_trace_of_its_cause_it_needs_no_link() -> None:
    recording = Recording()
    cause = recording.begin(sent())
    again = recording.spans.begin(read_remote(sent()), None, None, cause)
    then, *_ = recording.record(calls.allowed(again))
    assert (parent(then), then.links) == (SPAN, ())


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_it_is_exported_with_its_cause_or_not_at_all(ratio: float) -> None:
    recording = Recording(ratio)
    cause = recording.begin(sent())
    again = recording.spans.begin(None, None, None, cause)
    both = recording.record(calls.allowed(cause)), recording.record(calls.allowed(again))
    assert [len(each) for each in both] == ([3, 3] if ratio else [0, 0])
    assert again.to_opa["traceparent"][-2:] == ("01" if ratio else "00")
