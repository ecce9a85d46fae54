"""What goes on with a call is in its trace: a server's questions, rounds, tasks.

The servers know nothing of traces, so that whatever joins theirs to the caller's is the sidecar.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support import puppet_server, scripted
from tests.support.otlp import Link, Sink, Span
from tests.support.processes import ALLOW_ALL, bridge, http_sidecar, patient
from tests.support.raw import (
    JSON_HEADERS,
    MODERN,
    Object,
    Pipe,
    Wire,
    call,
    dump,
    initialize,
    mirrors,
    modern,
    post,
    read_event,
    request,
    stdio_sidecar,
)
from tests.support.scripted import Asked, Scripted

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OTHER_TRACE = "0af7651916cd43dd8448eb211c80319c"
QUESTION = {"id": "q1", "method": "sampling/createMessage", "params": {"messages": []}}
WHO = {"method": "elicitation/create", "params": {"message": "who?"}}
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}
SAID = {"role": "assistant", "content": {"type": "text", "text": "yes"}, "model": "m"}


@dataclass
class OverPipe:
    """A client that answers what it is asked while it waits."""

    pipe: Pipe

    def greet(self) -> None:
        self.pipe.greet()

    def ask(self, message: Object) -> Object:
        self.pipe.forget()
        self.pipe.send(message)
        if message["params"].get("arguments", {}).get("then") == "wait":
            question = self.pipe.first(lambda each: each.get("method") == QUESTION["method"])
            self.pipe.send({"jsonrpc": "2.0", "id": question["id"], "result": SAID})
        return self.pipe.answer(message["id"])


@dataclass
class OverHttp:
    """The same over HTTP."""

    url: str
    session: tuple[tuple[str, str], ...] = ()

    def greet(self) -> None:
        answer = post(self.url, initialize())
        self.session = (("Mcp-Session-Id", answer.headers["mcp-session-id"]),)
        self.tell(INITIALIZED)

    def tell(self, message: Object) -> None:
        assert post(self.url, message, self.session).status == 202

    def ask(self, message: Object) -> Object:
        stateless = "protocolVersion" in str(message["params"].get("_meta"))
        with Wire(self.url) as wire:
            headers = mirrors(message) if stateless else self.session
            wire.request(dump(message), (*JSON_HEADERS, *headers))
            response = wire.begin()
            if not (response.getheader("Content-Type") or "").startswith("text/event-stream"):
                return dict(json.loads(response.read()))
            while True:
                came = message_of(read_event(response))
                if "method" not in came:
                    return came
                self.tell({"jsonrpc": "2.0", "id": came["id"], "result": SAID})


def message_of(event: bytes) -> Object:
    return dict(json.loads(event.partition(b"data: ")[2]))


@dataclass(frozen=True)
class Scene:
    """A puppet behind a sidecar, a client in front of it, and where the spans go."""

    client: OverPipe | OverHttp
    sink: Sink

    def served(self, name: str, number: int = 0) -> Span:
        """The sidecar's SERVER span of that name; the first to begin, or a later one."""

        def fits(span: Span) -> bool:
            return (span.kind, span.name) == ("SERVER", name) and span.service == "mcp-opa-sidecar"

        found = self.sink.wait_for(number + 1, where=fits)
        return sorted(found, key=lambda span: span.start)[number]


@pytest.fixture(params=["stdio", "http"])
def scene(request: pytest.FixtureRequest, tmp_path: Path, opa_bin: Path) -> Iterator[Scene]:
    command = puppet_server.command(tmp_path / "log")
    env = patient(opa_bin) | {"OTEL_BSP_SCHEDULE_DELAY": "100"}
    with ExitStack() as stack:
        sink = stack.enter_context(Sink())
        options = ("--policy", ALLOW_ALL, "--otlp", sink.url)
        if request.param == "stdio":
            pipe = stack.enter_context(stdio_sidecar(command, *options, env=env))
            yield Scene(OverPipe(pipe), sink)
        else:
            # Stateless revisions want a server that many clients share.
            env |= {"MCP_SIDECAR_BRIDGE__SHARED": "true"} if request.param == "shared" else {}
            served = stack.enter_context(bridge(command, *options, env=env))
            yield Scene(OverHttp(served.url), sink)


def say(number: int, *before: Object, then: str = "nothing", trace: str | None = None) -> Object:
    """A call of the puppet's tool, within a span of the caller's if that is named."""
    message = call(number, "say", before=list(before), then=then)
    return message if trace is None else within(message, trace)


def within(message: Object, trace: str) -> Object:
    message["params"].setdefault("_meta", {})["traceparent"] = f"00-{trace}-{SPAN}-01"
    return message


def answers(**result: Any) -> Object:
    """The puppet's answer to the call in which it is said."""
    return {"id": "$id", "result": result}


def test_a_servers_question_is_below_the_call_that_it_is_asked_for(scene: Scene) -> None:
    scene.client.greet()
    answer = scene.client.ask(say(1, QUESTION, then="wait", trace=TRACE))
    assert "yes" in str(answer["result"])
    served, asked = scene.served("tools/call say"), scene.served("sampling/createMessage")
    assert (served.trace_id, served.parent_id) == (TRACE, SPAN)
    assert (asked.trace_id, asked.parent_id) == (TRACE, served.span_id)
    assert served.start <= asked.start <= asked.end <= served.end


def test_what_is_asked_of_a_task_is_below_the_call_that_made_it(scene: Scene) -> None:
    scene.client.greet()
    task = {"taskId": "t1", "status": "working", "createdAt": "2026-11-22T10:15:00Z", "ttl": 1000}
    assert "task" in scene.client.ask(say(1, answers(task=task), trace=TRACE))["result"]
    scene.client.ask(request(2, "tasks/get", {"taskId": "t1"}))
    made, asked = scene.served("tools/call say"), scene.served("tasks/get")
    assert (asked.trace_id, asked.parent_id, asked.links) == (TRACE, made.span_id, ())


@pytest.mark.parametrize("scene", ["stdio", "shared"], indirect=True)
def test_rounds_and_what_they_ask_belong_to_the_first(scene: Scene) -> None:
    asks = {"resultType": "input_required", "inputRequests": {"q": WHO}, "requestState": "s1"}
    first = within(modern(say(1, answers(**asks))), TRACE)
    assert scene.client.ask(first)["result"]["resultType"] == "input_required"
    # The next round is in a trace of its caller's own.
    second = within(modern(say(2, then="answer")), OTHER_TRACE)
    second["params"] |= {"requestState": "s1", "inputResponses": {"q": {"action": "decline"}}}
    assert "content" in scene.client.ask(second)["result"]
    began, asked = scene.served("tools/call say"), scene.served("elicitation/create")
    went_on = scene.served("tools/call say", 1)
    assert (asked.trace_id, asked.parent_id) == (TRACE, began.span_id)
    assert (went_on.trace_id, went_on.parent_id) == (OTHER_TRACE, SPAN)
    assert went_on.links == (Link(TRACE, began.span_id),)
    assert went_on.attributes["mcp.protocol.version"] == MODERN


def test_of_two_calls_in_flight_a_question_is_below_that_in_whose_stream_it_is(
    tmp_path: Path, opa_bin: Path
) -> None:
    async def answer(
        server: Scripted, request: web.Request, asked: Asked
    ) -> web.StreamResponse | None:
        if asked.method != "tools/call":
            return None
        return await scripted.stream(request, scripted.event(QUESTION))

    env = patient(opa_bin) | {"OTEL_BSP_SCHEDULE_DELAY": "100"}
    with (
        Sink() as sink,
        scripted.scripted(answer) as server,
        http_sidecar(server.url, "--policy", ALLOW_ALL, "--otlp", sink.url, env=env) as served,
    ):
        client = OverHttp(served.url)
        client.greet()
        with Wire(served.url) as one, Wire(served.url) as other:
            for wire, trace in ((one, TRACE), (other, OTHER_TRACE)):
                body = dump(within(call(trace, "echo"), trace))
                wire.request(body, (*JSON_HEADERS, *client.session))
                question = message_of(read_event(wire.begin()))
                assert question["method"] == "sampling/createMessage"
                client.tell({"jsonrpc": "2.0", "id": question["id"], "result": SAID})

            def asked(span: Span) -> bool:
                return (span.kind, span.name) == ("SERVER", QUESTION["method"])

            sink.wait_for(2, where=asked)
        # The streams broke off, and the sidecar ends: both calls are over, and in the records.
    found = [span for span in sink.spans if span.kind == "SERVER"]
    calls = {span.trace_id: span.span_id for span in found if span.name == "tools/call echo"}
    assert {span.trace_id: span.parent_id for span in found if asked(span)} == calls
    assert set(calls) == {TRACE, OTHER_TRACE}
