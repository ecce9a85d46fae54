"""An MCP server that does nothing, as fast as Python can: what is measured in front of it is ours.

`python -m tests.bench.echo_server http` prints its port on stdout; `… stdio` serves its pipes.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

TOOLS = [{"name": "search_tickets", "inputSchema": {"type": "object"}}]
RESULT = {"content": [{"type": "text", "text": "x" * 400}], "isError": False}
LISTING = {"tools": TOOLS, "ttlMs": 0, "cacheScope": "private"}


def answer(body: bytes, first: int = 0) -> bytes:
    """The answer to any request; `first` is when the first byte of all came in, in nanoseconds."""
    message = json.loads(body)
    result = LISTING if message["method"] == "tools/list" else RESULT
    reply = {
        "jsonrpc": "2.0",
        "id": message["id"],
        "result": {**result, "resultType": "complete", "_meta": {"first": first}},
    }
    return json.dumps(reply, separators=(",", ":")).encode()


class HttpEcho(asyncio.Protocol):
    """Keep-alive HTTP/1.1 with Content-Length, and nothing else."""

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(self._buffer) < end + 4 + length:
                return
            body = answer(self._buffer[end + 4 : end + 4 + length])
            self._buffer = self._buffer[end + 4 + length :]
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )


async def serve_http() -> None:
    server = await asyncio.get_running_loop().create_server(HttpEcho, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def serve_stdio() -> None:
    first = 0
    for line in sys.stdin.buffer:
        first = first or time.time_ns()
        sys.stdout.buffer.write(answer(line, first) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    if sys.argv[1] == "http":
        asyncio.run(serve_http())
    else:
        serve_stdio()
