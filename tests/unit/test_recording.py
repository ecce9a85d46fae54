"""The record of a call."""

from __future__ import annotations

import pytest

from sidecar.conversation import Call, Conversation, Origin, Server
from sidecar.policy.masking import Masking
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session
from sidecar.recording import Books, Content
from tests.support import calls
from tests.support.calls import operation
from tests.support.fakes import ANA, NullTracer, RecordingRecorder


def begun(tracer: NullTracer, *recorders: RecordingRecorder) -> tuple[Books, Call]:
    books = Books(tracer, recorders)
    server = Server("tickets", ("tickets", 9000))
    conversation = Conversation(Session(MethodTable.of()), server, "http")
    origin = Origin(ANA, "10.1.2.3", {"traceparent": "t"})
    return books, books.call(conversation, operation(params={"_meta": {"key": 1}}), origin)


def test_a_call_begins_with_who_where_and_an_id_of_its_own() -> None:
    tracer = NullTracer()
    _, call = begun(tracer)
    _, other = begun(tracer)
    assert (call.actor, call.source_address) == (ANA, "10.1.2.3")
    assert call.server_address == ("tickets", 9000)
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


def test_what_ended_holds_on_to_no_result_and_no_connection() -> None:
    recorder = RecordingRecorder()
    books, call = begun(NullTracer(), recorder)
    call.result, call.withdraw = {"big": "x"}, _unused
    assert books.finish(call, "success")
    held: list[object] = [call.result, call.withdraw]
    assert held == [None, None]


async def _unused(_: object) -> None:
    """Never awaited."""


CALL = calls.allowed(result={"content": []})


@pytest.mark.parametrize(
    ("content", "call", "found"),
    [
        (Content(), CALL, (None, None)),
        (Content(arguments=True), CALL, ({"id": "<string 10>"}, None)),
        (Content(results=True), CALL, (None, {"content": []})),
        (Content(arguments=True), calls.allowed(operation=operation()), ({}, None)),
        (Content(results=True), calls.denied(), (None, None)),
        (
            Content(True, True, Masking(("arguments.id",))),
            calls.denied(),
            ({"id": "TOP-SECRET"}, None),
        ),
        (
            Content(True, True),
            calls.allowed(operation=operation("resources/read", params={"uri": "x"}), result={}),
            (None, None),
        ),
    ],
)
def test_content_is_what_was_switched_on(content: Content, call: Call, found: object) -> None:
    assert (content.arguments_of(call), content.result_of(call)) == found
