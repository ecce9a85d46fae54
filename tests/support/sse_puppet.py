"""A server of the legacy HTTP+SSE transport, in a thread of the test, that says what it is told to.

It writes `opening` on each stream, keeps every POST, and answers it `status`. With `answers` it
answers requests on the stream as a server does: every tool call with the name of the tool.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from tests.support.processes import wait_until

Object = dict[str, Any]
ENDPOINT = b"event: endpoint\ndata: /messages?session_id=secret\n\n"
END = b""


@dataclass(frozen=True, slots=True)
class Posted:
    """A POST that came in."""

    path: str
    headers: dict[str, str]
    message: Object


def event(message: Object) -> bytes:
    return b"event: message\ndata: " + json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n\n"


@dataclass
class Puppet:
    """What it does, and what was done to it. `say` writes on the newest stream, `END` ends it."""

    opening: tuple[bytes, ...] = (ENDPOINT,)
    status: int = 202
    get_status: int = 200
    body: bytes = b"Accepted"
    media: str = "text/plain"
    answers: bool = True
    posted: list[Posted] = field(default_factory=list)
    gets: list[dict[str, str]] = field(default_factory=list)
    streams: list[queue.Queue[bytes]] = field(default_factory=list)
    closed: int = 0
    url: str = ""

    def say(self, *parts: bytes) -> None:
        for part in parts:
            self.streams[-1].put(part)

    def methods(self) -> list[str | None]:
        """The methods that came in; an answer has none."""
        return [each.message.get("method") for each in self.posted]

    def wait_for(self, method: str | None) -> Object:
        """The first message of that method."""

        def find() -> Object | None:
            found = [each.message for each in self.posted if each.message.get("method") == method]
            return found[0] if found else None

        message = wait_until(find, f"a message {method}")
        assert message is not None
        return message

    def answer(self, message: Object) -> None:
        """Say on the stream what a server answers."""
        params = message.get("params", {})
        results: dict[str, Callable[[], Object]] = {
            "initialize": lambda: {
                "protocolVersion": params["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "puppet", "version": "1"},
            },
            "tools/list": lambda: {"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]},
            "tools/call": lambda: {"content": [{"type": "text", "text": params["name"]}]},
        }
        result = results.get(message.get("method", ""), dict)()
        if "method" in message and "id" in message:
            self.say(event({"id": message["id"], "result": result}))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def puppet(self) -> Puppet:
        return cast("_Server", self.server).puppet

    def do_GET(self) -> None:
        puppet = self.puppet
        puppet.gets.append({name.lower(): value for name, value in self.headers.items()})
        says: queue.Queue[bytes] = queue.Queue()
        puppet.streams.append(says)
        self.send_response(puppet.get_status)
        media = "text/event-stream" if puppet.get_status == 200 else "text/plain"
        self.send_header("Content-Type", media)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for part in puppet.opening:
            says.put(part)
        with suppress(OSError):
            while puppet.get_status == 200 and (part := says.get()) != END:
                self.wfile.write(part)
                self.wfile.flush()
        puppet.closed += 1

    def do_POST(self) -> None:
        puppet = self.puppet
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        message = json.loads(body)
        puppet.posted.append(Posted(self.path, headers, message))
        status = puppet.status if message.get("method") == "tools/call" else 202
        self.send_response(status)
        self.send_header("Content-Type", puppet.media)
        self.send_header("Content-Length", str(len(puppet.body)))
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(puppet.body)
        if puppet.answers and status < 300:
            puppet.answer(message)

    def log_message(self, *_: object) -> None:
        """Not on stderr."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    puppet: Puppet


@contextmanager
def sse_puppet(**what: Any) -> Iterator[Puppet]:
    """A puppet that listens."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.puppet = puppet = Puppet(**what)
        puppet.url = f"http://127.0.0.1:{server.server_port}/sse"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield puppet
        finally:
            for each in puppet.streams:
                each.put(END)
            server.shutdown()
            thread.join()
