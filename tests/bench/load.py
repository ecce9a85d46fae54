"""A load of tool calls over raw sockets and pipes, so that the client's own cost is small."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

VERSION = "2026-07-28"
ENVELOPE = {
    "io.modelcontextprotocol/protocolVersion": VERSION,
    "io.modelcontextprotocol/clientCapabilities": {},
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Calls per second, and latencies in milliseconds."""

    rate: float
    p50: float
    p99: float


def call(number: int) -> bytes:
    """A tool call of about 1 KB."""
    params = {
        "name": "search_tickets",
        "arguments": {"query": "refund " * 100},
        "_meta": ENVELOPE,
    }
    return json.dumps(
        {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}
    ).encode()


def http_request(number: int, more: bytes = b"") -> bytes:
    """The same over HTTP; `more` are header lines."""
    body = call(number)
    return (
        b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + more
        + b"Accept: application/json, text/event-stream\r\n"
        b"MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: tools/call\r\n"
        b"Mcp-Name: search_tickets\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


async def over_http(port: int, *, clients: int, calls: int, more: bytes = b"") -> Measured:
    """`calls` calls over `clients` kept-alive connections, one at a time on each."""
    latencies: list[float] = []
    began = time.perf_counter()
    share = calls // clients
    await asyncio.gather(*(_client(port, share, latencies, more) for _ in range(clients)))
    return _measured(latencies, time.perf_counter() - began)


async def _client(port: int, calls: int, latencies: list[float], more: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in range(calls):
        request = http_request(number, more)
        began = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        latencies.append(time.perf_counter() - began)
        if b'"result"' not in body:
            raise RuntimeError(f"a call was not answered with a result: {body[:300]!r}")
    writer.close()


@dataclass(frozen=True, slots=True)
class Cold:
    """Seconds from the start of a process: until the server got a byte, and until an answer."""

    forwarded: float
    answered: float


async def over_stdio(command: list[str], *, clients: int, calls: int) -> tuple[Measured, Cold]:
    """`calls` calls on one pipe, `clients` at a time; and what the first one took."""
    started = time.time()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(call(0) + b"\n")
    reply = json.loads(await process.stdout.readline())
    first = reply["result"]["_meta"]["first"] / 1e9
    cold = Cold(first - started, time.time() - started)
    sent: dict[int, float] = {}
    latencies: list[float] = []
    began = time.perf_counter()
    for number in range(1, calls + 1):
        if len(sent) >= clients:
            await _receive(process.stdout, sent, latencies)
        sent[number] = time.perf_counter()
        process.stdin.write(call(number) + b"\n")
    while sent:
        await _receive(process.stdout, sent, latencies)
    measured = _measured(latencies, time.perf_counter() - began)
    process.stdin.close()
    await process.wait()
    return measured, cold


async def _receive(
    stdout: asyncio.StreamReader, sent: dict[int, float], latencies: list[float]
) -> None:
    reply = json.loads(await stdout.readline())
    if "result" not in reply:
        raise RuntimeError(f"a call was not answered with a result: {reply}")
    latencies.append(time.perf_counter() - sent.pop(reply["id"]))


def _measured(latencies: list[float], seconds: float) -> Measured:
    ordered = sorted(latencies)

    def at(share: float) -> float:
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Measured(len(ordered) / seconds, at(0.5), at(0.99))
