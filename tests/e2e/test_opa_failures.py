"""OPA fails, in every way it can: what is asked meanwhile is denied, and nothing is executed.

Each figure is measured at the client and printed: the deadline is 500 ms, and a denial may take
100 ms more. The server and the client's connection stay the same ones throughout.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import opa as doubles
from tests.support import permissive_server
from tests.support.opa import (
    ALLOWED,
    CLOSED,
    EMPTY,
    FAILING,
    GARBAGE,
    HUNG,
    NO_JSON,
    NULL,
    FakeOpa,
    answer,
    fake_opa,
    real_opa,
    write,
)
from tests.support.permissive_server import executed, records
from tests.support.processes import (
    ADMIN,
    ALLOW_ALL,
    LISTENING,
    Process,
    descendants,
    environment,
    get,
    http_sidecar,
    wait_ready,
    wait_until,
)
from tests.support.raw import (
    Object,
    Pipe,
    Wire,
    beside,
    call,
    code,
    dump,
    initialize,
    request,
    stdio_sidecar,
)

UNAVAILABLE = -31503
DEADLINE_MS = 500
SANE = 2.0
BACK = 10.0
TRANSPORTS = ("stdio", "http")

INTERNAL = {"code": "internal_error", "message": "x", "errors": [{"code": "eval_conflict_error"}]}
EVALUATION = answer(INTERNAL, status="500 Internal Server Error")

# What it is, what OPA answers, whether the caller may try again.
FAILURES: list[tuple[str, bytes | None, bool]] = [
    ("hung", HUNG, True),
    ("500", FAILING, True),
    ("503", answer({}, status="503 Service Unavailable"), True),
    ("closed", CLOSED, True),
    ("garbage", GARBAGE, False),
    ("half a head", b"HTTP/1.1 200 OK\r\nContent-", True),
    ("no JSON", NO_JSON, False),
    ("a list", answer([True]), False),
    ("empty object", EMPTY, False),
    ("null", NULL, False),
    ("a text", answer({"result": "allow"}), False),
    ("allow as a text", answer({"result": {"allow": "true"}}), False),
    ("an unknown key", answer({"result": {"allow": True, "alow": True}}), False),
    ("allow twice", answer(b'{"result":{"allow":false,"allow":true}}'), False),
    ("404", answer({"result": True}, status="404 Not Found"), False),
    ("a redirect", answer({"result": True}, status="302 Found"), False),
    ("an evaluation error", EVALUATION, False),
]


@dataclass
class Guarded:
    """A sidecar before the permissive server, and one connection of one client to it."""

    transport: str
    log: Path
    sidecar: int
    admin: str
    connection: Pipe | Wire
    numbers: int = 0

    def ask(self, message: Object) -> Object:
        if isinstance(self.connection, Pipe):
            return self.connection.ask(message)
        self.connection.request(dump(message))
        return self.connection.answer().message

    def call(self) -> Object:
        self.numbers += 1
        return self.ask(call(self.numbers))

    def timed(self) -> tuple[Object, float]:
        """The answer to a call, and the milliseconds that it took."""
        began = time.perf_counter()
        reply = self.call()
        return reply, 1000 * (time.perf_counter() - began)

    def back(self) -> float:
        """The seconds until a call works; until then each one is denied for want of a decision."""
        began = time.monotonic()

        def works() -> bool:
            reply = self.call()
            assert code(reply) in (None, UNAVAILABLE), reply
            return code(reply) is None

        wait_until(works, "a call works", BACK)
        return time.monotonic() - began

    def server(self) -> int:
        """The process that did what was done last."""
        return int(records(self.log, "message")[-1]["pid"])

    def ready(self) -> int:
        return get(f"{self.admin}/readyz")[0]

    def opa(self) -> int | None:
        """The process id of the own OPA."""
        for pid in descendants(self.sidecar):
            with suppress(psutil.NoSuchProcess):
                # `opa check` of an edit is an OPA as well.
                if psutil.Process(pid).cmdline()[1:2] == ["run"]:
                    return pid
        return None


def freeze(pid: int) -> None:
    """Stop a process; it has stopped on return."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it is frozen")


def guard(
    stack: ExitStack, transport: str, folder: Path, env: dict[str, str], *how: Any
) -> Guarded:
    log = folder / "log"
    if transport == "stdio":
        server = permissive_server.command(log)
        pipe = stack.enter_context(stdio_sidecar(server, "--admin", "127.0.0.1:0", *how, env=env))
        admin = pipe.process.wait_for(ADMIN)[1]
        wait_ready(admin)
        pipe.greet()
        return Guarded(transport, log, pipe.process.pid, admin, pipe)
    behind = stack.enter_context(Process(permissive_server.command(log, "--transport", "http")))
    upstream = behind.wait_for(LISTENING)[1]
    served = stack.enter_context(http_sidecar(upstream, *how, env=env))
    wire = stack.enter_context(Wire(served.url))
    return Guarded(transport, log, served.pid, served.admin, wire)


def denied(reply: Object, *, retryable: bool, took: float) -> None:
    """It is a denial that says whether asking again may help, and it came in time."""
    assert code(reply) == UNAVAILABLE, reply
    assert reply["error"]["data"]["retryable"] is retryable
    assert reply["error"]["data"]["decision_id"]
    assert took < 1000 * SANE, f"{took:.0f} ms"


def show(what: str, times: list[float], back: float) -> None:
    figures = ", ".join(f"{each:.0f}" for each in times)
    late = max(times) > DEADLINE_MS + 100
    print(f"MEASURED {what}: denied in {figures} ms{' (LATE)' * late}; back in {back:.3f} s")


# ── A co-located OPA that answers anything but a decision ─────────────────────────────────────────


@pytest.fixture(scope="module")
def fakes(
    tmp_path_factory: pytest.TempPathFactory, opa_bin: Path
) -> Iterator[dict[str, tuple[Guarded, FakeOpa]]]:
    """For each transport one sidecar that lives through the whole table."""
    with ExitStack() as stack:
        env, found = environment(opa_bin, MCP_SIDECAR_POLICY__CANARY="0.2"), {}
        for transport in TRANSPORTS:
            fake = stack.enter_context(beside(fake_opa(ALLOWED)))
            folder = tmp_path_factory.mktemp(transport)
            found[transport] = guard(stack, transport, folder, env, "--opa", fake.url), fake
        yield found


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("reply", "retryable"),
    [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in FAILURES],
)
def test_what_is_no_decision_is_a_denial_in_time_and_is_over_when_opa_is_back(
    fakes: dict[str, tuple[Guarded, FakeOpa]],
    transport: str,
    reply: bytes | None,
    retryable: bool,
    request: pytest.FixtureRequest,
) -> None:
    guarded, fake = fakes[transport]
    fake.answer = ALLOWED
    guarded.back()
    before, server, times = len(executed(guarded.log)), guarded.server(), []
    fake.answer = reply
    try:
        for _ in range(3):
            said, took = guarded.timed()
            denied(said, retryable=retryable, took=took)
            times.append(took)
        assert len(executed(guarded.log)) == before
        wait_until(lambda: guarded.ready() == 503, "not ready")
    finally:
        fake.answer = ALLOWED
    back = guarded.back()
    wait_until(lambda: guarded.ready() == 200, "ready")
    assert guarded.server() == server
    assert len(executed(guarded.log)) == before + 1
    show(request.node.callspec.id, times, back)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("reply", [HUNG, EMPTY], ids=["hung", "undefined"])
def test_without_opa_negotiation_and_pings_pass_and_a_listing_is_no_empty_list(
    fakes: dict[str, tuple[Guarded, FakeOpa]], transport: str, reply: bytes | None
) -> None:
    guarded, fake = fakes[transport]
    fake.answer = reply
    try:
        assert "serverInfo" in guarded.ask(initialize(f"again {reply!r}"))["result"]
        assert guarded.ask(request(f"ping {reply!r}", "ping"))["result"] == {}
        assert code(guarded.ask(request(f"list {reply!r}", "tools/list"))) == UNAVAILABLE
    finally:
        fake.answer = ALLOWED
    guarded.back()


def test_fifty_calls_at_once_are_all_denied_in_time(
    fakes: dict[str, tuple[Guarded, FakeOpa]],
) -> None:
    guarded, fake = fakes["stdio"]
    assert isinstance(guarded.connection, Pipe)
    guarded.back()
    before = len(executed(guarded.log))
    fake.answer = HUNG
    try:
        names = [f"at once {number}" for number in range(50)]
        began = time.perf_counter()
        guarded.connection.send(*(call(name) for name in names))
        replies = [guarded.connection.answer(name) for name in names]
        took = 1000 * (time.perf_counter() - began)
    finally:
        fake.answer = ALLOWED
    for each in replies:
        denied(each, retryable=True, took=took)
    assert len(executed(guarded.log)) == before
    show("50 calls at once, hung", [took], guarded.back())


# ── A real OPA that is killed or frozen ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_co_located_opa_that_is_killed_or_frozen(
    opa_bin: Path, tmp_path: Path, transport: str
) -> None:
    policy = write(tmp_path / "policy", {"all.rego": doubles.ALLOW_ALL})
    socket = tmp_path / "opa.sock"
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        opa = first.enter_context(beside(real_opa(opa_bin, policy, socket=socket)))
        guarded = guard(stack, transport, tmp_path, environment(opa_bin), "--opa", opa.url)
        guarded.back()
        server, before = guarded.server(), len(executed(guarded.log))

        freeze(opa.process.pid)
        frozen, took = guarded.timed()
        denied(frozen, retryable=True, took=took)
        assert len(executed(guarded.log)) == before
        os.kill(opa.process.pid, signal.SIGCONT)
        show(f"{transport}, frozen", [took], guarded.back())

        before = len(executed(guarded.log))
        os.kill(opa.process.pid, signal.SIGKILL)
        killed, took = guarded.timed()
        first.close()
        gone, took_gone = guarded.timed()
        for reply in (killed, gone):
            denied(reply, retryable=True, took=max(took, took_gone))
        assert len(executed(guarded.log)) == before
        socket.unlink(missing_ok=True)
        with beside(real_opa(opa_bin, policy, socket=socket)):
            show(f"{transport}, killed", [took, took_gone], guarded.back())
            assert guarded.server() == server


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_own_opa_that_is_killed_or_frozen(opa_bin: Path, tmp_path: Path, transport: str) -> None:
    with ExitStack() as stack:
        guarded = guard(stack, transport, tmp_path, environment(opa_bin), "--policy", ALLOW_ALL)
        guarded.back()
        server, opa = guarded.server(), guarded.opa()
        assert opa is not None

        before = len(executed(guarded.log))
        freeze(opa)
        frozen, took = guarded.timed()
        denied(frozen, retryable=True, took=took)
        assert len(executed(guarded.log)) == before

        os.kill(opa, signal.SIGKILL)
        show(f"{transport}, own OPA frozen, then killed", [took], guarded.back())
        wait_until(lambda: guarded.ready() == 200, "ready")
        assert guarded.opa() not in (None, opa)
        assert guarded.server() == server
