"""The official client, set up to talk to a sidecar, and what it got back in few words."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, EmptyResult, Request, RequestParams

from tests.support.processes import ROOT, environment

LEGACY = "legacy"
MODERN = "2026-07-28"
ERAS = (LEGACY, MODERN)
TIMEOUT = 20.0


class Unspecified(Request[RequestParams | None, str]):
    """A request by a method that is in no revision."""

    method: str
    params: RequestParams | None = None


@asynccontextmanager
async def over_stdio(
    command: Sequence[str],
    mode: str,
    *,
    env: Mapping[str, str] | None = None,
    errors: Path | None = None,
    **more: Any,
) -> AsyncIterator[Client]:
    """A client of a command; what the command says on stderr goes to the file `errors`."""
    server = StdioServerParameters(
        command=command[0],
        args=list(command[1:]),
        env=dict(env if env is not None else environment()),
        cwd=ROOT,
    )
    with (errors or Path(os.devnull)).open("a", encoding="utf-8") as log:
        transport = stdio_client(server, errlog=log if errors else sys.stderr)
        async with _connected(transport, mode, **more) as client:
            yield client


@asynccontextmanager
async def over_http(
    url: str,
    mode: str,
    *,
    headers: Mapping[str, str] | None = None,
    tls: Any = None,
    **more: Any,
) -> AsyncIterator[Client]:
    """A client of an address of this machine, which no proxy is asked about."""
    said: dict[str, Any] = {"timeout": httpx2.Timeout(30, read=300), "headers": headers}
    async with httpx2.AsyncClient(trust_env=False, verify=tls or True, **said) as http:
        transport = streamable_http_client(url, http_client=http)
        async with _connected(transport, mode, **more) as client:
            yield client


@asynccontextmanager
async def over_sse(url: str, mode: str, **more: Any) -> AsyncIterator[Client]:
    """A client of an address of this machine, by the legacy HTTP+SSE transport."""

    def http(
        headers: dict[str, str] | None = None,
        timeout: httpx2.Timeout | None = None,
        auth: httpx2.Auth | None = None,
    ) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(trust_env=False, timeout=timeout, headers=headers, auth=auth)

    transport = sse_client(url, httpx_client_factory=http)
    async with _connected(transport, mode, **more) as client:
        yield client


@asynccontextmanager
async def _connected(transport: Any, mode: str, **more: Any) -> AsyncIterator[Client]:
    """The client; an error within comes out as it is, not in the groups of the SDK's tasks."""
    try:
        async with Client(transport, mode=mode, read_timeout_seconds=TIMEOUT, **more) as client:
            yield client
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None


async def tools_of(client: Client) -> list[str]:
    """The names that the client is shown, asked of the server and not of a cache."""
    return [tool.name for tool in (await client.list_tools(cache_mode="bypass")).tools]


async def ask(client: Client, method: str) -> EmptyResult:
    """Send a request by any method."""
    return await client.session.send_request(Unspecified(method=method), EmptyResult)


async def error_of(awaitable: Awaitable[object]) -> MCPError:
    """The error that the official client raises."""
    try:
        answer = await awaitable
    except MCPError as error:
        return error
    raise AssertionError(f"no error was raised, the answer is {answer!r}")


def codes(error: MCPError) -> list[str]:
    """The reason codes of a denial."""
    return [reason["code"] for reason in error.data["reasons"]]


def text_of(result: CallToolResult) -> str:
    """The text of a tool's result."""
    return "".join(getattr(block, "text", "") for block in result.content)
