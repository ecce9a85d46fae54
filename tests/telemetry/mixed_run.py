"""A long mixed run: both eras, pipes and HTTP, everything that can come of an action.

Real sidecars stand between raw clients and servers that say what they are told to. A real OPA
decides, and a server that only claims to be one where no decision shall come. All of it is exported
to one collector.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from sidecar.protocol import pins
from tests.support import opa as opas
from tests.support import puppet_server, scripted
from tests.support.identity import Idp, idp
from tests.support.issuing import claims
from tests.support.opa import FakeOpa, answer, write
from tests.support.otlp import Sink
from tests.support.processes import (
    Process,
    Served,
    bridge,
    get,
    http_sidecar,
    patient,
    sidecar,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    Object,
    Pipe,
    Wire,
    beside,
    call,
    code,
    dump,
    initialize,
    modern,
    post,
    post_modern,
    request,
    stdio_sidecar,
)
from tests.support.scripted import Asked, Scripted

DENIED, UNDECIDED = -31403, -31503
SESSION = "Mcp-Session-Id"

POLICY = """package mcp.custom

allow contains {"rule": "all-but-danger", "owner": "desk-team", "any": true}

deny contains {"code": "too_dangerous", "rule": "no-danger", "owner": "security-team"} if {
	contains(input.target.name, "danger")
}

attributes := {"risk": 3, "score": 0.5, "internal": true, "team": "desk"}
"""
REVOKED = {"mcp_revoked": {"principals": {"static|clerk": "left"}}}


@dataclass
class Run:
    """Where it happens, and what came of it: the collector, and the Prometheus texts."""

    sink: Sink
    folder: Path
    env: Mapping[str, str]
    texts: list[str] = field(default_factory=list)

    def place(self, name: str) -> Path:
        """A folder of its own, with the policy in it."""
        folder = self.folder / name
        write(folder / "policy", {"custom.rego": POLICY})
        return folder

    def arguments(self, folder: Path, *more: str, **config: Any) -> list[str]:
        """What a sidecar is told."""
        file = folder / "sidecar.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")
        return ["--config", str(file), "--otlp", self.sink.url, *more]

    def scrape(self, served: Served) -> str:
        """Read the Prometheus text, as long as it is there."""
        self.texts.append(get(f"{served.admin}/metrics")[1].decode())
        return self.texts[-1]

    def scrape_until(self, served: Served, *lines: str) -> None:
        """Read it until it says so."""
        wait_until(lambda: set(lines) <= set(self.scrape(served).splitlines()), f"{lines}")


def mixed(folder: Path, opa: Path) -> Run:
    """Everything, one after the other."""
    quick = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_METRIC_EXPORT_INTERVAL": "500"}
    with Sink() as sink:
        run = Run(sink, folder, {**patient(opa), **quick})
        for part in (
            agent_over_pipes,
            human_over_a_bridge,
            service_over_http,
            callers_with_tokens,
            nobody_and_a_policy_that_fails,
            results_in_place_of_errors,
            pipes_to_http,
            a_record_that_can_not_be_written,
        ):
            part(run)
        return run


# ── What is said ──────────────────────────────────────────────────────────────────────────────────


def tell(method: str, number: object, result: Object | None = None, **params: Any) -> Object:
    """A request whose server answers with `result`; the script for it is in the arguments."""
    script = {"before": [{"id": "$id", "result": result or {}}], "then": "nothing"}
    return request(number, method, {**params, "arguments": script})


def say(number: object, *before: Object, then: str = "nothing", name: str = "say") -> Object:
    """A call of a tool that does so."""
    return call(number, name, before=list(before), then=then)


def pinned(folder: Path, name: str, **more: str) -> str:
    """A file with one pinned tool; the servers say nothing of it but its name."""
    listed = {"name": name, "inputSchema": {"type": "object", **more}}
    text = pins.write(pins.pin("server", [listed]))
    return str(write(folder, {"pins.json": text}) / "pins.json")


def notify(method: str, **params: Any) -> Object:
    return {"jsonrpc": "2.0", "method": f"notifications/{method}", "params": params}


def asked(number: object, method: str, **params: Any) -> Object:
    """A question of a server's."""
    return {"id": number, "method": method, "params": params}


def failed(number: int) -> Object:
    return {"id": "$id", "error": {"code": number, "message": "no"}}


BOTH_ERAS = (
    tell("tools/list", "both-1", {"tools": []}),
    tell("resources/list", "both-2", {"resources": [{"uri": "file:///a", "name": "a"}]}),
    tell("resources/templates/list", "both-3", {"resourceTemplates": []}),
    tell("resources/read", "both-4", {"contents": []}, uri="file:///a"),
    tell("prompts/list", "both-5", {"prompts": [{"name": "brief"}, {"name": "danger"}]}),
    tell("prompts/get", "both-6", {"messages": []}, name="brief"),
    tell("tasks/get", "both-8", {}, taskId="t-1"),
    tell("tasks/cancel", "both-9", {}, taskId="t-1"),
    tell("vendor/reindex", "both-10"),
    tell(
        "completion/complete",
        "both-7",
        {"completion": {"values": []}},
        ref={"type": "ref/prompt", "name": "brief"},
        argument={"name": "a", "value": "b"},
    ),
    say("both-11", {"id": "$id", "result": {"content": []}}),
    say("both-12", {"id": "$id", "result": {"content": [], "isError": True}}),
    say("both-13", failed(-32603)),
    say("both-14", failed(-32602)),
)
LEGACY = (
    request("old-1", "ping"),
    tell("logging/setLevel", "old-2", level="info"),
    tell("resources/subscribe", "old-3", uri="file:///a"),
    tell("resources/unsubscribe", "old-4", uri="file:///a"),
    tell("tasks/list", "old-5", {"tasks": []}),
    tell("tasks/result", "old-6", taskId="t-1"),
)
NEW = (
    tell("server/discover", "new-1", {"supportedVersions": ["2026-07-28"], "capabilities": {}}),
    tell("tasks/update", "new-2", taskId="t-1"),
)
REFUSED = (
    call("no-1", "danger"),
    request("no-2", "resources/read", {"uri": "danger://a"}),
    request("no-3", "prompts/get", {"name": "danger"}),
    request("no-4", "completion/complete", {"ref": {"type": "ref/prompt", "name": "danger"}}),
)
NOTIFIED = (
    notify("progress", progressToken="t", progress=1),
    notify("roots/list_changed"),
    notify("tasks/status", taskId="t-1", status="working"),
    notify("nobody/knows"),
)
QUESTIONS: tuple[tuple[Object, Object], ...] = (
    (asked("q-1", "sampling/createMessage", messages=[], maxTokens=1), {"result": {"role": "x"}}),
    (asked("q-2", "elicitation/create", message="?", requestedSchema={}), {"result": {}}),
    (asked("q-3", "roots/list"), {"result": {"roots": []}}),
    (asked("q-4", "ping"), {"result": {}}),
    (asked("q-5", "tasks/get", taskId="c-1"), {"result": {}}),
    (asked("q-6", "tasks/list"), {"result": {"tasks": []}}),
    (asked("q-7", "tasks/result", taskId="c-1"), {"result": {}}),
    (asked("q-8", "tasks/cancel", taskId="c-1"), {"error": {"code": -1, "message": "no"}}),
)
NOT_TO_BE_ASKED = (
    asked("q-9", "elicitation/create", mode="danger"),
    asked("q-10", "vendor/secret"),
)
TOLD = (
    notify("message", level="info", data="x"),
    notify("progress", progressToken="t", progress=1),
    notify("tools/list_changed"),
    notify("prompts/list_changed"),
    notify("resources/list_changed"),
    notify("resources/updated", uri="file:///a"),
    notify("elicitation/complete", elicitationId="e"),
)
NO_MESSAGES = (
    b'{"jsonrpc": "2.0", "id": 1, "method": ',
    b'{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}',
    b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]',
    b'{"jsonrpc":"2.0","id":9,"method":"tools/call","params":{"Name":"x","name":"y"}}',
)


# ── An agent, for somebody, over pipes ────────────────────────────────────────────────────────────


def agent_over_pipes(run: Run) -> None:
    """Everything of the handshake revisions, and a server that ends in the middle of a call.

    This sidecar alone is to record arguments and results.
    """
    folder = run.place("pipes")
    log = folder / "heard"
    arguments = run.arguments(
        folder,
        *("--policy", str(folder / "policy"), "--audit", str(folder / "audit")),
        identity={
            "static": {"type": "agent", "id": "bot", "on_behalf_of": {"type": "human", "id": "ana"}}
        },
        catalog={"pins": pinned(folder, "say"), "validate": True},
        protocol={"methods": ["vendor/reindex"]},
        resources={"say": "desk:{then}"},
        telemetry={"arguments": True, "results": True},
    )
    with stdio_sidecar(puppet_server.command(log), *arguments, env=run.env) as pipe:
        pipe.greet()
        pipe.send(*NO_MESSAGES)
        for message in (*BOTH_ERAS, *LEGACY):
            pipe.ask(message)
        for message in REFUSED:
            assert code(pipe.ask(message)) == DENIED, message
        assert code(pipe.ask(request("no-5", "nobody/knows"))) == -32601
        pipe.send(*NOTIFIED)
        _the_server_asks(pipe)
        pipe.ask(say("told", *TOLD, {"id": "$id", "result": {"content": []}}))
        pipe.send(say("taken back", then="nothing"))
        wait_until(lambda: _heard(log, "taken back"), "the call is with the server")
        pipe.send(notify("cancelled", requestId="taken back"))
        pipe.ask(say("last", then="die"))
        pipe.process.wait()


def _heard(log: Path, number: object) -> bool:
    return any(each.get("id") == number for each in puppet_server.heard(log))


def _the_server_asks(pipe: Pipe) -> None:
    for number, (question, said) in enumerate(QUESTIONS):
        pipe.send(say(f"asking {number}", question, then="wait"))
        pipe.first(lambda each, q=question: each.get("method") == q["method"])  # type: ignore[misc]
        pipe.send({"jsonrpc": "2.0", "id": question["id"], **said})
        pipe.answer(f"asking {number}")
    for number, question in enumerate(NOT_TO_BE_ASKED):
        pipe.ask(say(f"asked in vain {number}", question, then="wait"))


# ── A person, over HTTP, with a server behind pipes ───────────────────────────────────────────────


def human_over_a_bridge(run: Run) -> None:
    """Both eras in one place; a question inside a result; subscriptions and streams."""
    folder = run.place("bridge")
    arguments = run.arguments(
        folder,
        *("--policy", str(folder / "policy"), "--actor", "human:bea"),
        protocol={"methods": ["vendor/reindex"]},
        bridge={"shared": True},
    )
    server = puppet_server.command(folder / "heard")
    with bridge(server, *arguments, env=run.env) as served:
        session = post(served.url, initialize()).headers[SESSION.lower()]
        in_session = [(SESSION, session)]
        post(served.url, notify("initialized"), in_session)
        for message in (*BOTH_ERAS, *LEGACY, *REFUSED):
            post(served.url, message, in_session)
        for message in (*BOTH_ERAS, *NEW, *REFUSED):
            _post_modern(served.url, message, in_session)
        assert code(post(served.url, request("u", "nobody/knows"), in_session).message) == -32601
        _asked_inside_a_result(served.url)
        _open_and_close(served.url, in_session)
        for body in NO_MESSAGES:
            assert post(served.url, body).status == 400
        run.scrape(served)


def _post_modern(url: str, message: Object, session: list[tuple[str, str]]) -> None:
    """The stateless revision has no sessions, whatever a header says."""
    params: Object = message.get("params", {})
    name = params.get("name") or params.get("uri") or params.get("taskId")
    headers = [("MCP-Protocol-Version", "2026-07-28"), ("Mcp-Method", message["method"])]
    post(url, modern(message), [*headers, *session, *([("Mcp-Name", name)] if name else [])])


def _asked_inside_a_result(url: str) -> None:
    for mode in ("form", "danger"):
        questions = {
            "a": {"method": "elicitation/create", "params": {"mode": mode}},
            "b": {"method": "roots/list", "params": {}},
        }
        result = {"resultType": "input_required", "inputRequests": questions, "requestState": "s"}
        post_modern(url, say(f"round {mode}", {"id": "$id", "result": result}))


def _open_and_close(url: str, session: list[tuple[str, str]]) -> None:
    """A stream and a subscription that are open for a moment, and a session that is closed."""
    with Wire(url) as wire, Wire(url) as other:
        wire.request(headers=[("Accept", "text/event-stream"), *session], verb="GET")
        wire.begin("GET")
        listening = request(
            "sub", "subscriptions/listen", {"notifications": {"toolsListChanged": True}}
        )
        headers = [("MCP-Protocol-Version", "2026-07-28"), ("Mcp-Method", "subscriptions/listen")]
        other.request(dump(modern(listening)), (*JSON_HEADERS, *headers))
        other.hang_up()
    with Wire(url) as wire:
        wire.request(headers=session, verb="DELETE")
        wire.answer("DELETE")


# ── A service, over HTTP on both sides ────────────────────────────────────────────────────────────


class Moody:
    """Answers plainly, holds what it is told to hold, and opens streams."""

    async def __call__(
        self, server: Scripted, http: web.Request, said: Asked
    ) -> web.StreamResponse | None:
        params: Object = said.message.get("params", {})
        if said.verb == "GET" or said.method == "subscriptions/listen":
            return await self._forever(http, ": here")
        if params.get("name") == "hold":
            await asyncio.Event().wait()
        if params.get("name") == "asking":
            question = scripted.event(asked("q", "roots/list") | {"jsonrpc": "2.0"})
            return await self._forever(http, question)
        if params.get("name") == "failing":
            body = {"jsonrpc": "2.0", "id": said.message["id"]}
            return web.json_response({**body, "error": {"code": -32000, "message": "no"}})
        return None

    async def _forever(self, http: web.Request, *events: str) -> web.StreamResponse:
        await scripted.stream(http, *events)
        await asyncio.Event().wait()
        raise AssertionError


def service_over_http(run: Run) -> None:
    """Streams that are opened and resumed, and somebody who is revoked while a call is held."""
    folder = run.place("http")
    arguments = run.arguments(
        folder,
        *("--policy", str(folder / "policy"), "--actor", "service:clerk"),
        server={"name": "tickets"},
        catalog={"pins": pinned(folder, "echo", description="as it was")},
    )
    with ExitStack() as stack:
        server = stack.enter_context(scripted.scripted(Moody()))
        served = stack.enter_context(http_sidecar(server.url, *arguments, env=run.env))
        post(served.url, initialize())
        session = [(SESSION, "the-session")]
        post(served.url, notify("initialized"), session)
        for name in ("echo", "failing", "danger"):
            post(served.url, call(f"s {name}", name), session)
            post_modern(served.url, call(f"m {name}", name))
        for more in ([], [("Last-Event-ID", "1")]):
            wire = stack.enter_context(Wire(served.url))
            wire.request(headers=[("Accept", "text/event-stream"), *session, *more], verb="GET")
            assert wire.begin("GET").status == 200
        subscribed = stack.enter_context(Wire(served.url))
        listening = {"notifications": {"resourceSubscriptions": ["file:///a"]}}
        _begin_modern(subscribed, request("sub", "subscriptions/listen", listening))
        for name in ("asking", "gone"):
            wire = stack.enter_context(Wire(served.url))
            wire.request(dump(call(name, "asking")), (*JSON_HEADERS, *session))
            server.wait_for("tools/call")
            wire.hang_up()
        held = stack.enter_context(Wire(served.url))
        held.request(dump(call("held", "hold")), (*JSON_HEADERS, *session))
        wait_until(lambda: _holds(server), "the server holds the call")
        run.scrape(served)
        write(folder / "policy", {"data.json": json.dumps(REVOKED)})
        assert code(held.answer().message) == DENIED


def _holds(server: Scripted) -> bool:
    return any(each.message.get("id") == "held" for each in server.seen("tools/call"))


def _begin_modern(wire: Wire, message: Object) -> None:
    headers = [("MCP-Protocol-Version", "2026-07-28"), ("Mcp-Method", message["method"])]
    wire.request(dump(modern(message)), (*JSON_HEADERS, *headers))
    assert wire.begin().status == 200


# ── Callers who show tokens, good ones and others ─────────────────────────────────────────────────


def callers_with_tokens(run: Run) -> None:
    folder = run.place("tokens")
    with ExitStack() as stack:
        issuer: Idp = stack.enter_context(idp())
        server = stack.enter_context(scripted.scripted(Moody()))
        arguments = run.arguments(
            folder,
            *("--policy", str(folder / "policy")),
            identity={"jwt": [issuer.believed()], "resource": "https://tickets.example.com/mcp"},
        )
        served = stack.enter_context(http_sidecar(server.url, *arguments, env=run.env))
        good = issuer.token(claims(sub="ana", client_id="desk-web"))
        late = issuer.token(claims(sub="ana", client_id="desk-web"), exp=1)
        for number, token in enumerate(("", "x", "a.b.c", late, good)):
            shown = [("Authorization", f"Bearer {token}")] if token else []
            found = post(served.url, call(f"token {number}", "echo"), shown)
            assert found.status == (200 if token == good else 401)
        run.scrape(served)


# ── Nobody, and an OPA that gives no decision ─────────────────────────────────────────────────────

NO_DECISIONS: Mapping[str, bytes | None] = {
    "timeout": opas.HUNG,
    "undefined_decision": opas.EMPTY,
    "bad_response": opas.NO_JSON,
    "server_error": opas.FAILING,
    "connection_error": opas.CLOSED,
    "evaluation_error": answer(
        {"code": "internal_error", "errors": [{"code": "eval_conflict_error"}]},
        status="500 Internal Server Error",
    ),
}
"""What OPA answers, by the cause that is told."""


@asynccontextmanager
async def _opa_over_tcp() -> AsyncIterator[FakeOpa]:
    fake = FakeOpa("", opas.ALLOWED)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    fake.url = f"http://{host}:{port}"
    try:
        yield fake
    finally:
        server.close()


def nobody_and_a_policy_that_fails(run: Run) -> None:
    """No decision of any kind; what is only noted; and a server that is late, and then gone."""
    folder = run.place("failing")
    with ExitStack() as stack:
        opa = stack.enter_context(beside(_opa_over_tcp()))
        gone = stack.enter_context(ExitStack())
        server = gone.enter_context(scripted.scripted(Moody()))
        arguments = run.arguments(
            folder,
            *("--opa", opa.url),
            enforcement={"shadow": "allowed"},
            limits={"response": 0.5},
            policy={"deadline": 0.3, "listing_deadline": 0.3},
        )
        env = {key: value for key, value in run.env.items() if "DEADLINE" not in key}
        served = stack.enter_context(http_sidecar(server.url, *arguments, env=env))

        def ask(name: str) -> int | None:
            return code(post_modern(served.url, call(name, name)).message)

        assert ask("echo") is None
        noted = {"allow": False, "reasons": [{"code": "noted", "message": "No."}], "mode": "shadow"}
        opa.answer = answer({"result": noted})
        assert ask("echo") is None
        opa.answer = opas.ALLOWED
        assert ask("hold") == -31504
        for cause, said in NO_DECISIONS.items():
            opa.answer = said
            assert ask("echo") == UNDECIDED, cause
            post_modern(served.url, request(f"list {cause}", "tools/list"))
        run.scrape_until(served, "authz_opa_up 0.0", "authz_ready 0.0")
        opa.answer = opas.ALLOWED
        run.scrape_until(served, "authz_opa_up 1.0", "authz_ready 1.0")
        gone.close()
        assert ask("echo") == -31502
        run.scrape(served)


# ── Denials that models can read ──────────────────────────────────────────────────────────────────


def results_in_place_of_errors(run: Run) -> None:
    folder = run.place("results")
    arguments = run.arguments(
        folder, "--policy", str(folder / "policy"), enforcement={"denial": "result"}
    )
    with stdio_sidecar(puppet_server.command(folder / "heard"), *arguments, env=run.env) as pipe:
        pipe.greet()
        assert pipe.ask(call("no", "danger"))["result"]["isError"]
        pipe.end()
        pipe.process.wait()


# ── A client behind pipes, a server behind HTTP ───────────────────────────────────────────────────


def pipes_to_http(run: Run) -> None:
    folder = run.place("across")
    who = ("--policy", str(folder / "policy"), "--actor", "human:dora")
    with scripted.scripted(Moody()) as server:
        command = [*sidecar("stdio"), *run.arguments(folder, *who), "--upstream", server.url]
        with Process(command, env=run.env, pipes=True) as process:
            pipe = Pipe(process)
            pipe.greet()
            assert code(pipe.ask(call("across", "echo"))) is None
            pipe.end()
            pipe.wait_for_end()


# ── A disk that is full ───────────────────────────────────────────────────────────────────────────


def a_record_that_can_not_be_written(run: Run) -> None:
    """What can not be recorded is not let through, whatever the policy said."""
    folder = run.place("full")
    arguments = run.arguments(folder, "--policy", str(folder / "policy"), "--audit", "/dev/full")
    with stdio_sidecar(puppet_server.command(folder / "heard"), *arguments, env=run.env) as pipe:
        pipe.greet()
        assert code(pipe.ask(call("full", "say"))) == UNDECIDED
        pipe.end()
        pipe.process.wait()
