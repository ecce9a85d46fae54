"""What the tests ask of a pod that runs: from outside, as other pods do, and from within."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
from mcp import MCPError

from sidecar.injector.injection import ADMIN_PORT
from tests.pods.network import POD_IP
from tests.pods.runner import Pod
from tests.support.client import LEGACY, over_http

PORT = 8080
URL = f"http://{POD_IP}:{PORT}/mcp"


def log(pod: Pod) -> Path:
    return pod.volumes["data"] / "log"


def call(pod: Pod, name: str, **arguments: Any) -> int:
    """0, or the code of the error, by the official client from outside."""
    codes: list[int] = []

    async def once() -> None:
        async with over_http(URL, LEGACY) as client:
            try:
                await client.list_tools()  # else it asks for them after the call
                await client.call_tool(name, arguments)
                codes.append(0)
            except MCPError as error:
                codes.append(error.code)

    with suppress(httpx2.ConnectError):  # a session that can not be closed: the pod has ended
        pod.network.from_outside(lambda: asyncio.run(once()))
    return codes[0]


def connects(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def asked(pod: Pod, method: str, port: int, path: str, body: str = "") -> int:
    """What a port of the pod answers to somebody outside: the status."""

    def ask() -> int:
        connection = http.client.HTTPConnection(POD_IP, port, timeout=5)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            return connection.getresponse().status
        finally:
            connection.close()

    return pod.network.from_outside(ask)


def readyz(pod: Pod) -> Any:
    def ask() -> Any:
        connection = http.client.HTTPConnection(POD_IP, ADMIN_PORT, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    return pod.network.from_outside(ask)


def python(pod: Pod, container: str, program: str) -> str:
    """What a program prints that runs in a container, as that container's user."""
    found = pod[container].container
    assert found is not None
    done = found.exec(["/usr/bin/env", "python3", "-c", program], 30)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()
