"""The record of a call."""

from __future__ import annotations

from sidecar.conversation import Call, Conversation, Origin, Server
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session
from sidecar.recording import Books
from tests.support.calls import operation
from tests.support.fakes import ANA, NullTracer, RecordingRecorder


def begun(tracer: NullTracer, *recorders: RecordingRecorder) -> tuple[Books, Call]:
    books = Books(tracer, recorders)
    conversation = Conversation(Session(MethodTable.of()), Server("tickets"), "http")
    origin = Origin(ANA, "10.1.2.3", {"traceparent": "t"})
    return books, books.call(conversation, operation(params={"_meta": {"key": 1}}), origin)


def test_a_call_begins_with_who_where_and_an_id_of_its_own() -> None:
    tracer = NullTracer()
    _, call = begun(tracer)
    _, other = begun(tracer)
    assert (call.actor, call.source_address) == (ANA, "10.1.2.3")
    assert (call.server, call.transport) == ("tickets", "http")
    assert call.received > 0
    assert call.decision_id != other.decision_id
    assert tracer.began_with[0] == ({"key": 1}, {"traceparent": "t"})


def test_only_the_first_end_counts() -> None:
    recorder = RecordingRecorder()
    books, call = begun(NullTracer(), recorder)
    assert books.finish(call, "success")
    assert not books.finish(call, "cancelled", (1, "late"))
    assert (call.outcome, call.rpc_error) == ("success", None)
    assert recorder.finished_calls == [call]


def test_what_can_not_be_written_down_is_refused() -> None:
    written, broken = RecordingRecorder(), RecordingRecorder(broken=True)
    books, call = begun(NullTracer(), written)
    assert books.decided(call) is None
    books, call = begun(NullTracer(), written, broken)
    refusal = books.decided(call)
    assert refusal is not None
    assert (refusal.verdict, refusal.reasons[0].code) == ("error", "audit_failed")
