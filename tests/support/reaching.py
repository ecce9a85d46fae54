"""What others get who reach for a pod by its address."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx2
from mcp import MCPError

from tests.support.client import LEGACY, over_http, tools_of

PORT = 8080


def call(host: str, name: str, headers: Mapping[str, str] | None = None, **arguments: Any) -> int:
    """0, or the code of the error, by the official client."""
    codes: list[int] = []

    async def once() -> None:
        async with over_http(_url(host), LEGACY, headers=headers) as client:
            try:
                await client.list_tools()  # else it asks for them after the call
                await client.call_tool(name, arguments)
                codes.append(0)
            except MCPError as error:
                codes.append(error.code)

    try:
        with suppress(httpx2.ConnectError):  # a session that can't be closed: the pod has ended
            asyncio.run(once())
    except MCPError as error:  # who is revoked gets no session
        return error.code
    return codes[0]


def tools(host: str) -> list[str]:
    """What is listed."""

    async def once() -> list[str]:
        async with over_http(_url(host), LEGACY) as client:
            return await tools_of(client)

    return asyncio.run(once())


def follow_the_starter(host: str) -> None:
    """Whoever is taken for ana gets what the starter policy grants her, and nothing else."""
    assert tools(host) == ["search_tickets", "get_ticket", "create_ticket", "refund_ticket"]
    assert call(host, "get_ticket", id=4711) == 0
    assert call(host, "delete_ticket", id=4711) == -31403
    assert call(host, "export_all") == -31403
    assert call(host, "refund_ticket", id=4711, amount=101) == -31403


def _url(host: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{PORT}/mcp"


def asked(host: str, method: str, port: int, path: str, body: str = "") -> int:
    """What is answered: the status."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()


def connects(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def got(host: str, port: int, path: str) -> bytes:
    """What is answered: all of it."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()
