"""Which message goes where when a stdio server is on Streamable HTTP: byte by byte, and by ids."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import puppet_server
from tests.support.processes import (
    ALLOW_ALL,
    Served,
    alive,
    bridge,
    patient,
    wait_until,
)
from tests.support.puppet_server import heard
from tests.support.raw import (
    JSON_HEADERS,
    Object,
    Wire,
    call,
    code,
    dump,
    initialize,
    mirrors,
    modern,
    post,
    post_modern,
    read_event,
    request,
)

EVENTS = "text/event-stream"
NOTE = {"method": "notifications/message", "params": {"level": "info", "data": "hello"}}
QUESTION = {
    "id": "q1",
    "method": "sampling/createMessage",
    "params": {"messages": [], "maxTokens": 1},
}
PROGRESS = {
    "method": "notifications/progress",
    "params": {"progressToken": "$token", "progress": 1},
}
SHARED = {"MCP_SIDECAR_BRIDGE__SHARED": "true"}
NO_SAMPLING = """package mcp.custom

allow contains {"rule": "everything", "any": true}

deny contains {"code": "no_sampling", "message": "Think for yourself."} if {
	input.target.type == "sampling"
}
"""


def say(number: object, *before: Object, then: str = "answer", token: Any = None) -> Object:
    message = call(number, "say", before=list(before), then=then)
    if token is not None:
        message["params"]["_meta"] = {"progressToken": token}
    return message


def enveloped(message: Object) -> Object:
    """The message of the stateless revision, with its progress token."""
    token = message["params"].get("_meta", {})
    whole = modern(message)
    whole["params"]["_meta"] |= token
    return whole


@dataclass
class Client:
    """A handshake client in its session, or about to have one."""

    url: str
    session: str = ""

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [("Mcp-Session-Id", self.session)] if self.session else []

    def greet(self) -> Object:
        answer = post(self.url, initialize())
        self.session = answer.headers["mcp-session-id"]
        assert self.tell({"jsonrpc": "2.0", "method": "notifications/initialized"}) == 202
        return answer.message

    def tell(self, message: Object) -> int:
        return post(self.url, message, self.headers).status

    def ask(self, message: Object) -> Object:
        return post(self.url, message, self.headers).message

    @contextmanager
    def posting(self, message: Object) -> Iterator[HTTPResponse]:
        """The answer to a POST, as it comes."""
        with Wire(self.url) as wire:
            wire.request(dump(message), (*JSON_HEADERS, *self.headers))
            yield wire.begin()
            wire.hang_up()

    @contextmanager
    def listening(self) -> Iterator[HTTPResponse]:
        """The session's own stream."""
        with Wire(self.url) as wire:
            wire.request(headers=(("Accept", EVENTS), *self.headers), verb="GET")
            yield wire.begin("GET")
            wire.hang_up()

    def end(self) -> int:
        with Wire(self.url) as wire:
            wire.request(headers=self.headers, verb="DELETE")
            return wire.answer("DELETE").status


def event(response: HTTPResponse) -> Object:
    """The message of the next event."""
    return dict(json.loads(read_event(response).removeprefix(b"data: ")))


class Puppets:
    """Puppet servers behind a sidecar."""

    def __init__(self, folder: Path, opa: Path, stack: ExitStack) -> None:
        self.folder, self.log = folder, folder / "log"
        self._env, self._stack = patient(opa), stack

    def serve(self, policy: Path = ALLOW_ALL, /, **settings: str) -> Served:
        command = puppet_server.command(self.log)
        env = {**self._env, **settings}
        return self._stack.enter_context(bridge(command, "--policy", policy, env=env))

    def client(self, policy: Path = ALLOW_ALL) -> Client:
        client = Client(self.serve(policy).url)
        client.greet()
        return client

    def without_sampling(self) -> Path:
        folder = self.folder / "policy"
        folder.mkdir()
        (folder / "custom.rego").write_text(NO_SAMPLING, encoding="utf-8")
        return folder

    def wait(self, method: str | None, count: int = 1, timeout: float = 20.0) -> list[Object]:
        """The messages of a method that the server has heard, once there are so many."""

        def enough() -> list[Object]:
            found = heard(self.log, method)
            return found if len(found) >= count else []

        return wait_until(enough, f"{count} × {method}", timeout)


@pytest.fixture
def puppets(tmp_path: Path, opa_bin: Path) -> Iterator[Puppets]:
    with ExitStack() as stack:
        yield Puppets(tmp_path, opa_bin, stack)


# ── Sessions ──────────────────────────────────────────────────────────────────────────────────────


def test_a_session_has_an_id_that_nobody_can_guess(puppets: Puppets) -> None:
    served = puppets.serve()
    first, second = Client(served.url), Client(served.url)
    assert first.greet()["result"]["protocolVersion"] == "2025-11-25"
    second.greet()
    assert first.session != second.session
    assert min(len(first.session), len(second.session)) >= 40
    assert len({each["pid"] for each in heard(puppets.log)}) == 2


def test_only_a_known_session_is_served(puppets: Puppets) -> None:
    client = puppets.client()
    for session in ("x", client.session[:-1], client.session + "x"):
        stranger = Client(client.url, session)
        assert post(client.url, say(1), stranger.headers).status == 404
        assert stranger.tell({"jsonrpc": "2.0", "method": "notifications/initialized"}) == 404
        assert stranger.end() == 404
        with stranger.listening() as response:
            assert response.status == 404
    assert not heard(puppets.log, "tools/call")


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(say(1), id="call"),
        pytest.param(request(1, "tools/list"), id="list"),
        pytest.param({"jsonrpc": "2.0", "method": "notifications/initialized"}, id="notification"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "result": {}}, id="answer"),
    ],
)
def test_without_a_session_one_can_only_shake_hands(puppets: Puppets, message: Object) -> None:
    answer = post(puppets.serve().url, message)
    assert answer.status == 400
    assert "Mcp-Session-Id" in answer.message["error"]["message"]
    assert not puppets.log.exists()


@pytest.mark.parametrize(("version", "status"), [("2025-11-25", 400), ("2026-07-28", 405)])
@pytest.mark.parametrize("verb", ["GET", "DELETE"])
def test_streams_and_ends_are_for_sessions(
    puppets: Puppets, verb: str, version: str, status: int
) -> None:
    with Wire(puppets.serve().url) as wire:
        headers = (("Accept", EVENTS), ("MCP-Protocol-Version", version))
        wire.request(headers=headers, verb=verb)
        assert wire.answer(verb).status == status


def test_who_can_not_read_events_is_told_so(puppets: Puppets) -> None:
    url = puppets.serve().url
    with Wire(url) as wire:
        headers = (("Content-Type", "application/json"), ("Accept", "application/json"))
        wire.request(dump(initialize()), headers)
        assert wire.answer().status == 406
    assert not puppets.log.exists()


def test_a_handshake_that_fails_opens_no_session(puppets: Puppets) -> None:
    served = puppets.serve()
    answer = post(served.url, initialize(version="refused"))
    assert code(answer.message) == -32602
    assert "mcp-session-id" not in answer.headers
    [greeting] = puppets.wait("initialize")
    wait_until(lambda: not alive(greeting["pid"]), "its server has ended")


def test_delete_ends_the_session_for_everybody_who_waits(puppets: Puppets) -> None:
    client = puppets.client()
    with client.listening() as stream, Wire(client.url) as wire:
        wire.request(dump(say(1, then="nothing")), (*JSON_HEADERS, *client.headers))
        [waiting] = puppets.wait("tools/call")
        assert client.end() == 204
        answer = wire.answer().message
        assert (answer["id"], code(answer)) == (1, -31502)
        assert read_event(stream) == b""
    assert client.end() == 404
    assert post(client.url, say(2), client.headers).status == 404
    wait_until(lambda: not alive(waiting["pid"]), "the server has ended")


def test_a_server_that_dies_ends_its_session_alone(puppets: Puppets) -> None:
    served = puppets.serve()
    client, other = Client(served.url), Client(served.url)
    client.greet()
    other.greet()
    with client.listening() as stream:
        answer = client.ask(say(1, then="die"))
        assert (answer["id"], code(answer)) == (1, -31502)
        assert "may have executed" in answer["error"]["message"]
        assert read_event(stream) == b""
    assert post(client.url, say(2), client.headers).status == 404
    assert "result" in other.ask(say(2))


@pytest.mark.parametrize("shared", [False, True])
def test_a_shutdown_answers_for_calls_that_do_not_end(puppets: Puppets, shared: bool) -> None:
    served = puppets.serve(MCP_SIDECAR_LIMITS__DRAIN="1", **SHARED)
    client, never = Client(served.url), say(1, then="nothing")
    client.greet()
    with Wire(served.url) as wire:
        mine = mirrors(never) if shared else client.headers
        wire.request(dump(enveloped(never) if shared else never), (*JSON_HEADERS, *mine))
        puppets.wait("tools/call")
        pids = {each["pid"] for each in heard(puppets.log)}
        served.process.signal(signal.SIGTERM)
        answer = wire.answer().message
    assert (answer["id"], code(answer)) == (1, -31502)
    assert served.process.wait() == 0
    assert not [each for each in pids if alive(each)]


def test_what_a_server_says_last_is_still_heard(puppets: Puppets) -> None:
    client = puppets.client()
    last = {"id": "$id", "result": {"content": []}}
    assert client.ask(say(1, last, then="die"))["result"] == {"content": []}


# ── Answers: JSON, or a stream ────────────────────────────────────────────────────────────────────


def test_an_answer_alone_is_json(puppets: Puppets) -> None:
    client = puppets.client()
    with client.posting(say("a")) as response:
        assert response.headers["Content-Type"].startswith("application/json")
        assert json.loads(response.read())["id"] == "a"


def test_what_comes_before_the_answer_makes_it_a_stream(puppets: Puppets) -> None:
    client = puppets.client()
    with client.posting(say(1, PROGRESS, NOTE, token=7)) as response:
        assert response.headers["Content-Type"] == EVENTS
        assert event(response)["params"] == {"progressToken": 7, "progress": 1}
        assert event(response)["params"]["data"] == "hello"
        assert event(response)["id"] == 1
        assert read_event(response) == b""


def test_ids_of_two_types_are_two_ids(puppets: Puppets) -> None:
    client = puppets.client()
    with Wire(client.url) as wire:
        wire.request(dump(say(1, then="nothing")), (*JSON_HEADERS, *client.headers))
        puppets.wait("tools/call")
        assert client.ask(say("1"))["id"] == "1"
        assert wire.peek() == b""


def test_a_server_whose_message_holds_a_carriage_return_is_one_event(puppets: Puppets) -> None:
    client = puppets.client()
    text = {"method": "notifications/message", "params": {"level": "info", "data": "a\r\nb"}}
    with client.posting(say(1, text)) as response:
        assert event(response)["params"]["data"] == "a\r\nb"


def test_a_call_that_is_taken_back_ends_also_when_its_server_says_nothing(
    puppets: Puppets,
) -> None:
    client = puppets.client()
    with Wire(client.url) as wire:
        wire.request(dump(say(1, then="nothing")), (*JSON_HEADERS, *client.headers))
        puppets.wait("tools/call")
        params = {"requestId": 1}
        cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
        assert client.tell(cancel) == 202
        [heard_of] = puppets.wait("notifications/cancelled")
        assert heard_of["params"] == params
        assert read_event(wire.begin()) == b""


def test_a_call_that_was_taken_back_is_not_answered_for_when_the_session_ends(
    puppets: Puppets,
) -> None:
    client = puppets.client()
    with Wire(client.url) as wire:
        wire.request(dump(say(1, then="nothing")), (*JSON_HEADERS, *client.headers))
        puppets.wait("tools/call")
        cancel = {"method": "notifications/cancelled", "params": {"requestId": 1}}
        assert client.tell({"jsonrpc": "2.0", **cancel}) == 202
        assert client.end() == 204
        assert read_event(wire.begin()) == b""


def test_a_handshake_client_that_goes_away_takes_nothing_back(puppets: Puppets) -> None:
    client = puppets.client()
    with Wire(client.url) as wire:
        wire.request(dump(say(1, then="wait")), (*JSON_HEADERS, *client.headers))
        puppets.wait("tools/call")
        wire.hang_up()
    assert "result" in client.ask(say(2))
    assert not heard(puppets.log, "notifications/cancelled")


# ── What answers nothing ──────────────────────────────────────────────────────────────────────────


def test_a_question_goes_to_the_only_call_that_waits_and_its_answer_comes_back(
    puppets: Puppets,
) -> None:
    client = puppets.client()
    with client.listening(), client.posting(say(1, QUESTION, then="wait")) as response:
        assert event(response)["id"] == "q1"
        answer = {"jsonrpc": "2.0", "id": "q1", "result": {"role": "assistant"}}
        assert client.tell(answer) == 202
        assert "assistant" in event(response)["result"]["content"][0]["text"]


def test_a_question_that_the_policy_denies_is_answered_by_the_sidecar(puppets: Puppets) -> None:
    client = puppets.client(puppets.without_sampling())
    answer = client.ask(say(1, QUESTION, then="wait"))
    assert "result" in answer
    [refused] = [each for each in heard(puppets.log) if "method" not in each]
    assert (refused["id"], code(refused)) == ("q1", -31403)


def test_of_several_calls_none_gets_what_belongs_to_the_session(puppets: Puppets) -> None:
    client = puppets.client()
    with client.listening() as stream, Wire(client.url) as first, Wire(client.url) as second:
        for number, wire in enumerate((first, second)):
            wire.request(dump(say(number, then="nothing")), (*JSON_HEADERS, *client.headers))
            puppets.wait("tools/call", number + 1)
        with client.posting(say(3, NOTE)) as response:
            assert json.loads(response.read())["id"] == 3
        assert event(stream)["params"]["data"] == "hello"
        with client.posting(say(4, PROGRESS, token="p")) as response:
            assert event(response)["params"]["progressToken"] == "p"


def test_without_a_stream_it_goes_to_the_call_that_waits_longest(puppets: Puppets) -> None:
    client = puppets.client()
    with Wire(client.url) as wire:
        wire.request(dump(say(1, then="nothing")), (*JSON_HEADERS, *client.headers))
        puppets.wait("tools/call")
        assert client.ask(say(2, NOTE))["id"] == 2
        assert event(wire.begin())["params"]["data"] == "hello"


def test_what_nobody_came_for_is_kept_until_somebody_does(puppets: Puppets) -> None:
    client = puppets.client()
    last = {"id": "$id", "result": {"content": []}}
    client.ask(say(1, last, NOTE, then="nothing"))
    time.sleep(0.2)
    with client.listening() as stream:
        assert event(stream)["params"]["data"] == "hello"


def test_a_session_has_one_stream_at_a_time(puppets: Puppets) -> None:
    client = puppets.client()
    with client.listening() as first:
        assert first.status == 200
        assert first.headers["Content-Type"] == EVENTS
        with client.listening() as second:
            assert second.status == 409

    def free() -> bool:
        with client.listening() as response:
            return bool(response.status == 200)

    wait_until(free, "another stream may be opened")


MANY, LARGE = 3000, "x" * 5000


def test_a_client_that_reads_late_gets_everything_in_order_and_holds_up_its_own_session_alone(
    puppets: Puppets,
) -> None:
    served = puppets.serve()
    client, other = Client(served.url), Client(served.url)
    client.greet()
    other.greet()
    flood = [
        {**PROGRESS, "params": {"progressToken": "$token", "progress": n}} for n in range(MANY)
    ]
    with client.posting(say(1, *flood, token=LARGE)) as response:
        first = event(response)
        before = psutil.Process(served.pid).memory_info().rss
        for number in range(5):
            assert other.ask(say(number))["id"] == number
        assert psutil.Process(served.pid).memory_info().rss - before < 8 * 2**20
        rest = [event(response) for _ in range(MANY - 1)]
        assert [each["params"]["progress"] for each in (first, *rest)] == list(range(MANY))
        assert event(response)["id"] == 1


# ── The shared server ─────────────────────────────────────────────────────────────────────────────


def stateless(url: str, message: Object) -> Object:
    return post(url, enveloped(message), mirrors(message)).message


@contextmanager
def posting(url: str, message: Object) -> Iterator[Wire]:
    with Wire(url) as wire:
        wire.request(dump(enveloped(message)), (*JSON_HEADERS, *mirrors(message)))
        yield wire


def test_the_same_ids_of_two_clients_are_two_calls(puppets: Puppets) -> None:
    url = puppets.serve(**SHARED).url
    with posting(url, say(1, then="wait", token="t")) as first:
        [before] = puppets.wait("tools/call")
        with posting(url, say(1, PROGRESS, token="t")) as second:
            response = second.begin()
            assert event(response)["params"]["progressToken"] == "t"
            assert event(response)["id"] == 1
        [_, after] = puppets.wait("tools/call", 2)
        assert first.peek() == b""
    ids = [before["id"], after["id"]]
    assert len({1, *ids}) == 3
    assert [each["params"]["_meta"]["progressToken"] for each in (before, after)] == ids


def test_a_client_that_goes_away_takes_its_call_back_and_no_other(puppets: Puppets) -> None:
    url = puppets.serve(**SHARED).url
    with posting(url, say(1, then="nothing")) as staying, posting(url, say(1)) as other:
        assert other.answer().status == 200
        with posting(url, say(1, then="nothing")) as leaving:
            calls = puppets.wait("tools/call", 3)
            leaving.hang_up()
        [cancel] = puppets.wait("notifications/cancelled", timeout=1.0)
        assert cancel["params"]["requestId"] == calls[-1]["id"]
        assert staying.peek() == b""
    [_, another] = puppets.wait("notifications/cancelled", 2)
    assert another["params"]["requestId"] in {each["id"] for each in calls[:2]}


def test_a_client_can_not_take_back_the_call_of_another_one(puppets: Puppets) -> None:
    url = puppets.serve(**SHARED).url
    with posting(url, say(1, then="nothing")):
        [waiting] = puppets.wait("tools/call")
        params = {"requestId": waiting["id"]}
        cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
        assert post_modern(url, cancel).status == 202
        assert "result" in stateless(url, say(2))
        assert not heard(puppets.log, "notifications/cancelled")


def test_questions_of_a_shared_server_are_refused(puppets: Puppets) -> None:
    url = puppets.serve(**SHARED).url
    answer = stateless(url, say(1, QUESTION, then="wait"))
    assert "result" in answer
    [refused] = [each for each in heard(puppets.log) if "method" not in each]
    assert (refused["id"], code(refused)) == ("q1", -32601)


def test_a_client_that_does_not_read_holds_up_nobody_else(puppets: Puppets) -> None:
    url = puppets.serve(**SHARED).url
    with posting(url, say(1, *[PROGRESS] * MANY, token=LARGE)) as wire:
        puppets.wait("tools/call")
        assert stateless(url, say(2))["id"] == 2
        response = wire.begin()
        while event(response).get("id") != 1:
            pass


def test_a_probe_whose_header_contradicts_an_unknown_revision_is_refused(puppets: Puppets) -> None:
    url = puppets.serve(**SHARED).url
    probe = request(1, "server/discover", {})
    answer = post(url, modern(probe, "2099-01-01"), mirrors(probe))
    assert (answer.status, code(answer.message)) == (400, -32020)
    assert not puppets.log.exists()


@pytest.mark.parametrize(
    ("error", "status"), [(-32601, 404), (-32602, 400), (-32021, 400), (-1, 200)]
)
def test_a_protocol_error_of_the_server_has_its_status(
    puppets: Puppets, error: int, status: int
) -> None:
    url = puppets.serve(**SHARED).url
    message = say(1, {"id": "$id", "error": {"code": error, "message": "no"}}, then="nothing")
    answer = post(url, enveloped(message), mirrors(message))
    assert (answer.status, code(answer.message), answer.message["id"]) == (status, error, 1)


def test_what_is_nobodys_is_dropped(puppets: Puppets) -> None:
    url = puppets.serve(**SHARED).url
    strange = {"method": "notifications/progress", "params": {"progressToken": "x", "progress": 1}}
    unasked = {"id": "never-asked", "result": {}}
    answer = post(url, enveloped(say(1, NOTE, strange, unasked)), mirrors(say(1)))
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.message["id"] == 1


def test_a_subscription_is_known_by_the_clients_own_id(puppets: Puppets) -> None:
    url = puppets.serve(**SHARED).url
    key = "io.modelcontextprotocol/subscriptionId"
    about = {"_meta": {key: "$id"}}
    script: list[Object] = [
        {"method": "notifications/subscriptions/acknowledged", "params": about},
        {"method": "notifications/tools/list_changed", "params": about},
        {"method": "notifications/cancelled", "params": {"requestId": "$id"}},
        {"id": "$id", "result": {"resultType": "complete", **about}},
    ]
    listen = request(7, "subscriptions/listen", {"notifications": {"toolsListChanged": True}})
    listen["params"]["arguments"] = {"before": script, "then": "nothing"}
    with posting(url, listen) as wire:
        response = wire.begin()
        for method in ("subscriptions/acknowledged", "tools/list_changed"):
            told = event(response)
            assert told["method"] == f"notifications/{method}"
            assert told["params"]["_meta"] == {key: 7}
        assert event(response)["params"] == {"requestId": 7}
        ended = event(response)
        assert ended["id"] == 7
        assert ended["result"]["_meta"] == {key: 7}
        assert read_event(response) == b""
