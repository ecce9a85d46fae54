"""What others get who reach for a pod by its address: clients on the node."""

from __future__ import annotations

import asyncio
import http.client
import socket
from contextlib import suppress
from typing import Any

import httpx2
from mcp import MCPError

from tests.support.client import LEGACY, over_http, tools_of

PORT = 8080


def call(host: str, name: str, **arguments: Any) -> int:
    """0, or the code of the error, by the official client."""
    codes: list[int] = []

    async def once() -> None:
        async with over_http(f"http://{host}:{PORT}/mcp", LEGACY) as client:
            try:
                await client.list_tools()  # else it asks for them after the call
                await client.call_tool(name, arguments)
                codes.append(0)
            except MCPError as error:
                codes.append(error.code)

    with suppress(httpx2.ConnectError):  # a session that can not be closed: the pod has ended
        asyncio.run(once())
    return codes[0]


def tools(host: str) -> list[str]:
    """What is listed."""

    async def once() -> list[str]:
        async with over_http(f"http://{host}:{PORT}/mcp", LEGACY) as client:
            return await tools_of(client)

    return asyncio.run(once())


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
