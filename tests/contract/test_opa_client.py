"""The decision client in front of a real OPA, and in front of what is none."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import DecisionError, DecisionInvalid, DecisionUnavailable
from sidecar.opa import DecisionClient
from sidecar.policy.decision import Decision
from tests.support.opa import (
    ALLOWED,
    CALLERS,
    CLOSED,
    EMPTY,
    FAILING,
    GARBAGE,
    HUNG,
    NO_JSON,
    NULL,
    answer,
    eventually,
    fake_opa,
    open_files,
    real_opa,
    write,
)

DATA = '{"callers": {"ann": ["echo"]}, "mcp": {"revision": "r1"}}'
DEADLINE = 0.5


def asking(actor: str, tool: str) -> dict[str, Any]:
    return {"actor": {"id": actor}, "target": {"name": tool}}


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[DecisionClient]:
    client = DecisionClient(url)
    try:
        yield client
    finally:
        await client.close()


async def ask(
    client: DecisionClient, actor: str = "ann", tool: str = "echo", deadline: float = DEADLINE
) -> Decision:
    return await client.decide(asking(actor, tool), deadline=deadline, headers={})


async def refused(client: DecisionClient, deadline: float = DEADLINE) -> DecisionError:
    with pytest.raises(DecisionError) as caught:
        await ask(client, deadline=deadline)
    return caught.value


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write(tmp_path / "policy", {"callers.rego": CALLERS, "data.json": DATA})


# ── A real OPA ────────────────────────────────────────────────────────────────────────────────────


async def test_a_real_opa_allows_and_denies(opa_bin: Path, policy: Path) -> None:
    async with real_opa(opa_bin, policy) as opa, client_of(opa.url) as client:
        assert await ask(client) == Decision(allow=True, revision="r1")
        denied = await ask(client, tool="delete")
        assert (denied.allow, denied.reason, denied.revision) == (False, "not_granted", "r1")
        assert await client.revision(deadline=DEADLINE) == "r1"


async def test_an_undefined_decision_is_no_decision(opa_bin: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "policy", {"other.rego": "package other\n"})
    async with real_opa(opa_bin, folder) as opa, client_of(opa.url) as client:
        error = await refused(client)
        assert isinstance(error, DecisionInvalid)
        assert error.detail == "undefined_decision"


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        pytest.param('decision if regex.match("[", input.target.name)', "builtin", id="builtin"),
        pytest.param(
            "decision if input.target.name\ndecision := false if input.target.name",
            "conflict",
            id="conflict",
        ),
    ],
)
async def test_an_evaluation_error_is_no_decision(
    opa_bin: Path, tmp_path: Path, rule: str, code: str
) -> None:
    folder = write(tmp_path / "policy", {"bad.rego": f"package mcp.authz\n\n{rule}\n"})
    async with real_opa(opa_bin, folder) as opa, client_of(opa.url) as client:
        error = await refused(client)
        assert isinstance(error, DecisionInvalid)
        assert error.detail == "evaluation_error"
        assert code in str(error)


async def test_an_opa_that_wants_authorization_is_a_bad_response(
    opa_bin: Path, policy: Path
) -> None:
    write(policy, {"authz.rego": "package system.authz\n\ndefault allow := false\n"})
    async with (
        real_opa(opa_bin, policy, "--authorization=basic") as opa,
        client_of(opa.url) as client,
    ):
        error = await refused(client)
        assert (type(error), error.detail) == (DecisionInvalid, "bad_response")


async def test_the_revision_of_a_bundle_is_the_decisions(opa_bin: Path, tmp_path: Path) -> None:
    files = {
        "p.rego": "package mcp.authz\n\ndecision := true\n",
        ".manifest": '{"revision": "b7", "roots": ["mcp"]}',
    }
    folder = write(tmp_path / "bundle", files)
    async with real_opa(opa_bin, folder, "--bundle") as opa, client_of(opa.url) as client:
        assert (await ask(client)).revision == "b7"


async def test_a_decision_logs_id_is_kept(opa_bin: Path, policy: Path) -> None:
    logging = real_opa(opa_bin, policy, "--set=decision_logs.console=true")
    async with logging as opa, client_of(opa.url) as client:
        first, second = await ask(client), await ask(client)
        assert first.opa_id
        assert second.opa_id
        assert first.opa_id != second.opa_id


async def test_it_is_back_as_soon_as_opa_is(opa_bin: Path, policy: Path, tmp_path: Path) -> None:
    """Killed under traffic: every answer is a decision or unavailable, none is late."""
    socket, outcomes = tmp_path / "s", list[str]()

    async def traffic(client: DecisionClient) -> None:
        while True:
            began = time.monotonic()
            try:
                outcomes.append(str((await ask(client)).allow))
            except DecisionUnavailable as error:
                outcomes.append(error.detail)
            assert time.monotonic() - began < DEADLINE + 0.1
            await asyncio.sleep(0.002)

    async with (
        client_of(f"unix://{socket}") as client,
        real_opa(opa_bin, policy, socket=socket) as opa,
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(traffic(client)) for _ in range(5)]
        await eventually(lambda: outcomes.count("True") > 50, within=5)
        opa.process.kill()
        await eventually(lambda: outcomes.count("connection_error") > 20, within=5)
        async with real_opa(opa_bin, policy, socket=socket):
            seen = len(outcomes)
            await eventually(lambda: "True" in outcomes[seen:], within=2)
            for task in tasks:
                task.cancel()
    assert set(outcomes) == {"True", "connection_error"}


# ── What is none ──────────────────────────────────────────────────────────────────────────────────

CODES = {"code": "internal_error", "errors": [{"code": "eval_conflict_error", "message": "secret"}]}


@pytest.mark.parametrize(
    ("wire", "kind", "detail"),
    [
        pytest.param(HUNG, DecisionUnavailable, "timeout", id="hung"),
        pytest.param(FAILING, DecisionUnavailable, "server_error", id="500"),
        pytest.param(
            answer({}, status="429 Too Many Requests"),
            DecisionUnavailable,
            "server_error",
            id="429",
        ),
        pytest.param(
            answer(b"<", status="503 Unavailable"), DecisionUnavailable, "server_error", id="503"
        ),
        pytest.param(CLOSED, DecisionUnavailable, "connection_error", id="closed"),
        pytest.param(ALLOWED[:-2], DecisionUnavailable, "timeout", id="half an answer"),
        pytest.param(
            answer(CODES, status="500 Internal Server Error"),
            DecisionInvalid,
            "evaluation_error",
            id="evaluation error",
        ),
        pytest.param(GARBAGE, DecisionInvalid, "bad_response", id="garbage"),
        pytest.param(NO_JSON, DecisionInvalid, "bad_response", id="no JSON"),
        pytest.param(answer([]), DecisionInvalid, "bad_response", id="no object"),
        pytest.param(
            answer(b'{"result":true,"result":false}'), DecisionInvalid, "bad_response", id="twice"
        ),
        pytest.param(NULL, DecisionInvalid, "bad_response", id="null"),
        pytest.param(EMPTY, DecisionInvalid, "undefined_decision", id="empty"),
        pytest.param(
            answer({"result": {"allow": 1}}), DecisionInvalid, "bad_response", id="wrong type"
        ),
        pytest.param(answer({}, status="404 Not Found"), DecisionInvalid, "bad_response", id="404"),
        pytest.param(
            answer({}, status="302 Found\r\nLocation: http://opa/allow"),
            DecisionInvalid,
            "bad_response",
            id="redirect",
        ),
        pytest.param(
            answer(b'{"result":true,"x":"' + 9 * 1024 * 1024 * b"x" + b'"}'),
            DecisionInvalid,
            "bad_response",
            id="too long",
        ),
    ],
)
async def test_no_decision(wire: bytes | None, kind: type[DecisionError], detail: str) -> None:
    async with fake_opa(wire) as fake, client_of(fake.url) as client:
        began = time.monotonic()
        error = await refused(client)
        assert time.monotonic() - began < DEADLINE + 0.1
        assert (type(error), error.detail) == (kind, detail)
        assert "secret" not in str(error)


async def test_nobody_there_is_a_connection_error(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/none", "http://127.0.0.1:1"):
        async with client_of(url) as client:
            error = await refused(client)
            assert (type(error), error.detail) == (DecisionUnavailable, "connection_error")


async def test_a_cancelled_question_is_cancelled() -> None:
    async with fake_opa(HUNG) as fake, client_of(fake.url) as client:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(client))
            await eventually(lambda: fake.questions, within=1)
            task.cancel()
        assert task.cancelled()


async def test_a_stale_connection_is_asked_once_more() -> None:
    """A server that ends a connection just when it is used again."""
    async with fake_opa(ALLOWED, lives=1) as fake, client_of(fake.url) as client:
        for number in range(5):
            assert (await ask(client)).allow, number
    async with fake_opa(CLOSED) as fake, client_of(fake.url) as client:
        assert (await refused(client)).detail == "connection_error"
        assert len(fake.questions) == 2


async def test_one_connection_serves_many_questions() -> None:
    async with fake_opa(ALLOWED) as fake, client_of(fake.url) as client:
        for _ in range(20):
            await ask(client)
        assert fake.connections == 1


async def test_what_opa_is_sent() -> None:
    async with fake_opa(ALLOWED) as fake, client_of(fake.url) as client:
        document = asking("ann", "é\u2028")
        await client.decide(document, deadline=1, headers={"traceparent": "00-1-2-01"})
        line, headers, body = fake.questions[0]
    assert line == (
        "POST /v1/data/mcp/authz/decision?strict-builtin-errors=true&provenance=true HTTP/1.1"
    )
    assert body == {"input": document}
    assert set(headers) == {
        "host", "content-type", "content-length", "accept-encoding", "traceparent",
    }  # fmt: skip
    assert headers["traceparent"] == "00-1-2-01"
    assert headers["accept-encoding"] == "identity"


async def test_nothing_is_leaked_by_failures() -> None:
    async with fake_opa(HUNG) as hung, fake_opa(GARBAGE) as garbage, fake_opa(FAILING) as failing:
        fakes = (hung, garbage, failing)
        gc.collect()
        files, tasks = open_files(), len(asyncio.all_tasks())
        for fake in fakes:
            async with client_of(fake.url) as client:
                await asyncio.gather(*(refused(client, deadline=0.05) for _ in range(50)))
        # The fakes' ends of the connections go once they see that the client's have gone.
        await eventually(lambda: open_files() <= files, within=2)
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks, within=2)
