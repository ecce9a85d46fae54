"""The reference server of the MCP project behind a sidecar that allows all: no difference."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from mcp import Client
from mcp.client.session import ClientRequestContext
from mcp.types import (
    CreateMessageRequestParams,
    CreateMessageResult,
    ElicitRequestFormParams,
    ElicitRequestURLParams,
    ElicitResult,
    ListRootsResult,
    LoggingMessageNotificationParams,
    PromptReference,
    Root,
    TextContent,
)

from tests.support.client import LEGACY, over_http, over_stdio, text_of
from tests.support.processes import (
    ALLOW_ALL,
    Process,
    bridge,
    http_sidecar,
    patient,
    sidecar,
)

Open = Callable[..., AbstractAsyncContextManager[Client]]
LONG = "trigger-long-running-operation"
NO_SAMPLING = """package mcp.custom

allow contains {"rule": "everything", "any": true}

deny contains {"code": "no_sampling", "message": "Think for yourself."} if {
	input.target.type == "sampling"
}
"""


@dataclass
class Reference:
    """The reference server on a transport: bare, and behind a sidecar with some policy."""

    bare: Open
    allowing: Open
    without_sampling: Open


@pytest.fixture(params=["stdio", "http", "bridge", "pipe"])
def reference(
    request: pytest.FixtureRequest, everything_server: list[str], opa_bin: Path, tmp_path: Path
) -> Iterator[Reference]:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "custom.rego").write_text(NO_SAMPLING, encoding="utf-8")
    errors = tmp_path / "stderr"
    starts = {"stdio": _over_stdio, "http": _over_http, "bridge": _over_bridge, "pipe": _over_pipe}
    with ExitStack() as stack:
        start = starts[request.param]
        yield start(everything_server, patient(opa_bin), tmp_path, stack)
        print(errors.read_text(encoding="utf-8") if errors.exists() else "")  # shown on a failure


def _over_stdio(server: list[str], env: dict[str, str], folder: Path, _: ExitStack) -> Reference:
    command = [*server, "stdio"]

    def opener(command: list[str]) -> Open:
        return partial(over_stdio, command, mode=LEGACY, env=env, errors=folder / "stderr")

    def guarded(policy: Path) -> Open:
        return opener([*sidecar("stdio", "--policy", policy, "--"), *command])

    return Reference(opener(command), guarded(ALLOW_ALL), guarded(folder / "policy"))


def _over_http(server: list[str], env: dict[str, str], folder: Path, stack: ExitStack) -> Reference:
    url = _listening(server, env, stack)

    def guarded(policy: Path) -> Open:
        served = stack.enter_context(http_sidecar(url, "--policy", policy, env=env))
        return partial(over_http, served.url, mode=LEGACY)

    return Reference(
        partial(over_http, url, mode=LEGACY), guarded(ALLOW_ALL), guarded(folder / "policy")
    )


def _over_bridge(
    server: list[str], env: dict[str, str], folder: Path, stack: ExitStack
) -> Reference:
    command = [*server, "stdio"]

    def guarded(policy: Path) -> Open:
        served = stack.enter_context(bridge(command, "--policy", policy, env=env))
        return partial(over_http, served.url, mode=LEGACY)

    bare = partial(over_stdio, command, mode=LEGACY, env=env, errors=folder / "stderr")
    return Reference(bare, guarded(ALLOW_ALL), guarded(folder / "policy"))


def _over_pipe(server: list[str], env: dict[str, str], folder: Path, stack: ExitStack) -> Reference:
    url = _listening(server, env, stack)

    def guarded(policy: Path) -> Open:
        command = sidecar("stdio", "--policy", policy, "--upstream", url)
        return partial(over_stdio, command, mode=LEGACY, env=env, errors=folder / "stderr")

    return Reference(
        partial(over_http, url, mode=LEGACY), guarded(ALLOW_ALL), guarded(folder / "policy")
    )


def _listening(server: list[str], env: dict[str, str], stack: ExitStack) -> str:
    process = stack.enter_context(Process([*server, "streamableHttp"], env={**env, "PORT": "0"}))
    process.wait_for("listening")
    listening = [each.laddr.port for each in _sockets(process.pid) if each.status == "LISTEN"]
    return f"http://127.0.0.1:{listening[0]}/mcp"


def _sockets(pid: int) -> Any:
    """It says the port that it was told, and that was 0."""
    return psutil.Process(pid).net_connections(kind="tcp")


async def test_it_lists_calls_reads_and_prompts_as_it_does_without_a_sidecar(
    reference: Reference,
) -> None:
    async with reference.bare() as client:
        bare = [each async for each in _everything(client)]
    async with reference.allowing() as client:
        judged = [each async for each in _everything(client)]
    assert judged == bare
    assert len(bare) == 9


async def _everything(client: Client) -> AsyncIterator[dict[str, Any]]:
    """What a client can do without waiting for anything."""
    yield (await client.list_tools()).model_dump()
    yield (await client.list_resources()).model_dump()
    yield (await client.list_resource_templates()).model_dump()
    yield (await client.list_prompts()).model_dump()
    yield (await client.call_tool("echo", {"message": "Grüße, 世界 🌍"})).model_dump()
    yield (await client.call_tool("get-tiny-image")).model_dump()
    yield (await client.read_resource(ARCHITECTURE)).model_dump()
    yield (await client.get_prompt("args-prompt", {"city": "Lisbon"})).model_dump()
    yield (await client.complete(TEAM, {"name": "department", "value": "S"})).model_dump()


ARCHITECTURE = "demo://resource/static/document/architecture.md"
TEAM = PromptReference(type="ref/prompt", name="completable-prompt")


async def test_echo_says_what_it_was_told(reference: Reference) -> None:
    async with reference.allowing() as client:
        assert text_of(await client.call_tool("echo", {"message": "hello"})) == "Echo: hello"


async def test_the_newest_client_falls_back_to_the_handshake(reference: Reference) -> None:
    async with reference.allowing(mode="auto") as client:
        assert client.protocol_version == "2025-11-25"
        assert text_of(await client.call_tool("echo", {"message": "hello"})) == "Echo: hello"


async def test_progress_arrives_while_the_operation_runs(reference: Reference) -> None:
    seen: list[tuple[float, float | None]] = []
    first = asyncio.Event()

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total))
        first.set()

    async with reference.allowing() as client:
        await client.list_tools()  # else the client would, within its call
        arguments = {"duration": 2, "steps": 4}
        call = asyncio.create_task(client.call_tool(LONG, arguments, progress_callback=note))
        await first.wait()
        assert not call.done()
        result = await call
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "completed" in text_of(result)


async def test_a_notice_that_belongs_to_no_request_arrives(reference: Reference) -> None:
    notices: asyncio.Queue[LoggingMessageNotificationParams] = asyncio.Queue()
    async with reference.allowing(logging_callback=notices.put) as client:
        await client.call_tool("toggle-simulated-logging")
        assert "message" in str((await notices.get()).data)


async def test_questions_of_the_server_reach_the_client_and_its_answers_the_server(
    reference: Reference,
) -> None:
    async with reference.allowing(**CALLBACKS) as client:
        sampled = await client.call_tool("trigger-sampling-request", {"prompt": "why?"})
        elicited = await client.call_tool("trigger-elicitation-request")
        roots = await client.call_tool("get-roots-list")
    assert "because" in text_of(sampled)
    assert "Ana" in text_of(elicited)
    assert "file:///handbook" in text_of(roots)


async def test_a_question_that_the_policy_denies_is_answered_by_the_sidecar(
    reference: Reference,
) -> None:
    asked: list[CreateMessageRequestParams] = []

    async def sample(
        context: ClientRequestContext, params: CreateMessageRequestParams
    ) -> CreateMessageResult:
        asked.append(params)
        return await _sample(context, params)

    async with reference.without_sampling(**{**CALLBACKS, "sampling_callback": sample}) as client:
        sampled = await client.call_tool("trigger-sampling-request", {"prompt": "why?"})
        elicited = await client.call_tool("trigger-elicitation-request")
    assert sampled.is_error
    assert "no_sampling" in text_of(sampled)
    assert "Ana" in text_of(elicited)
    assert asked == []


async def _sample(
    _: ClientRequestContext, params: CreateMessageRequestParams
) -> CreateMessageResult:
    content = TextContent(type="text", text="because")
    return CreateMessageResult(role="assistant", content=content, model="test")


async def _elicit(
    _: ClientRequestContext, params: ElicitRequestFormParams | ElicitRequestURLParams
) -> ElicitResult:
    return ElicitResult(action="accept", content={"name": "Ana"})


async def _roots(_: ClientRequestContext) -> ListRootsResult:
    return ListRootsResult(roots=[Root(uri="file:///handbook", name="handbook")])  # type: ignore[arg-type]


CALLBACKS: dict[str, Any] = {
    "sampling_callback": _sample,
    "elicitation_callback": _elicit,
    "list_roots_callback": _roots,
}
