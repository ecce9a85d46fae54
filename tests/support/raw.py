"""Clients that say what they like, byte by byte, over a pipe or a TCP connection.

They wait for conditions, never for time to pass; what they wait for has a bound. `counted` starts a
sidecar that says how many asyncio tasks it has.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from anyio.from_thread import start_blocking_portal

from tests.support.processes import Process, sidecar, wait_until

PATIENCE = 20.0
MODERN = "2026-07-28"
VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
CAPABILITIES_KEY = "io.modelcontextprotocol/clientCapabilities"

Object = dict[str, Any]
Value = TypeVar("Value")


# ── Messages ──────────────────────────────────────────────────────────────────────────────────────


def request(number: object, method: str, params: Object | None = None) -> Object:
    message = {"jsonrpc": "2.0", "id": number, "method": method}
    return message if params is None else {**message, "params": params}


def call(number: object, name: str = "echo", **arguments: Any) -> Object:
    return request(number, "tools/call", {"name": name, "arguments": arguments})


def modern(message: Object, version: str = MODERN) -> Object:
    """The message in the envelope of the stateless revision."""
    meta = {VERSION_KEY: version, CAPABILITIES_KEY: {}}
    return {**message, "params": {**message.get("params", {}), "_meta": meta}}


def initialize(number: object = "init", version: str = "2025-11-25") -> Object:
    client = {"name": "raw", "version": "1"}
    params = {"protocolVersion": version, "capabilities": {}, "clientInfo": client}
    return request(number, "initialize", params)


def dump(message: object) -> bytes:
    return message if isinstance(message, bytes) else json.dumps(message).encode()


def code(answer: Object) -> int | None:
    """The JSON-RPC error code of an answer, None for a result."""
    return answer["error"]["code"] if "error" in answer else None


# ── stdio ─────────────────────────────────────────────────────────────────────────────────────────


class Pipe:
    """A client on a sidecar's stdin and stdout. A thread reads; every line is kept."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.ended = False
        self._lines: list[bytes] = []
        self._news = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def write(self, data: bytes) -> bool:
        """Write bytes as they are; whether somebody took them all."""
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self.process.stdin.fileno(), view) :]
        except BrokenPipeError:
            return False
        return True

    def send(self, *messages: object) -> None:
        """Write messages, or bytes, a line each, at once."""
        self.write(b"".join(dump(each) + b"\n" for each in messages))

    def end(self) -> None:
        """Close our end, as a client does that is done."""
        self.process.stdin.close()

    def greet(self, version: str = "2025-11-25") -> Object:
        """Shake hands."""
        self.send(initialize(version=version))
        answer = self.answer("init")
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return answer

    @property
    def lines(self) -> list[bytes]:
        """What came so far."""
        with self._news:
            return list(self._lines)

    def messages(self) -> list[Object]:
        """What came so far; a line that is no message fails the test."""
        return [json.loads(each) for each in self.lines]

    def ask(self, message: Object, timeout: float = PATIENCE) -> Object:
        """Send a request, and wait for its answer."""
        self.send(message)
        return self.answer(message["id"], timeout)

    def answer(self, number: object, timeout: float = PATIENCE) -> Object:
        """The first answer with that id."""
        return self.first(
            lambda each: "method" not in each and each.get("id") == number, timeout, f"id {number}"
        )

    def first(
        self, fits: Callable[[Object], bool], timeout: float = PATIENCE, what: str = "a message"
    ) -> Object:
        """The first message that fits, also one that was there before."""
        deadline, seen = time.monotonic() + timeout, 0
        with self._news:
            while True:
                for line in self._lines[seen:]:
                    seen += 1
                    message: Object = json.loads(line)
                    if fits(message):
                        return message
                left = deadline - time.monotonic()
                if self.ended or left <= 0:
                    raise AssertionError(
                        f"{what} did not come; {len(self._lines)} lines, "
                        f"{'ended' if self.ended else 'open'}:\n{self.process.tail()}"
                    )
                self._news.wait(left)

    def forget(self) -> None:
        """Start anew with what is kept."""
        with self._news:
            self._lines.clear()

    def forget_first(self) -> None:
        """Keep one line less: a test of many long ones need not hold them all."""
        with self._news:
            del self._lines[0]

    def wait_for_end(self, timeout: float = PATIENCE) -> int:
        """Until its stdout has ended and it has, too; the exit code."""
        code = self.process.wait(timeout)
        self.reader.join(timeout)
        assert self.ended
        return code

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self.ended = True
            self._news.notify_all()


@contextmanager
def stdio_sidecar(
    server: Sequence[str],
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
) -> Iterator[Pipe]:
    """A sidecar in front of the command `server`, and a raw client in front of the sidecar."""
    whole = [*(command or sidecar("stdio")), *map(str, arguments), "--", *server]
    with Process(whole, env=env, pipes=True) as process:
        pipe = Pipe(process)
        try:
            yield pipe
        finally:
            process.stop()
            pipe.reader.join(PATIENCE)


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────

Headers = Iterable[tuple[str, str]]
JSON_HEADERS = (
    ("Content-Type", "application/json"),
    ("Accept", "application/json, text/event-stream"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def message(self) -> Object:
        """The JSON-RPC message in the body, or in the last event of it."""
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return dict(json.loads(self.body))
        return dict(json.loads(self.body.rpartition(b"data: ")[2]))


class Wire:
    """One connection to an address such as `http://127.0.0.1:PORT/mcp`, in TLS if asked for."""

    def __init__(
        self, url: str, timeout: float = PATIENCE, tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(url)
        self.path = parts.path
        self.authority = parts.netloc
        assert parts.hostname is not None
        assert parts.port is not None
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname=parts.hostname)

    def send(self, data: bytes) -> bool:
        """Whether somebody took all of it."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def request(
        self,
        body: bytes = b"",
        headers: Headers = JSON_HEADERS,
        *,
        verb: str = "POST",
        target: str | None = None,
        host: str | None = None,
        length: int | None = None,
    ) -> None:
        """Send a request; `length` is what it says of its body."""
        self.send(
            b"\r\n".join(
                (
                    f"{verb} {target or self.path} HTTP/1.1".encode(),
                    f"Host: {host or self.authority}".encode(),
                    *(f"{name}: {value}".encode("latin-1") for name, value in headers),
                    f"Content-Length: {len(body) if length is None else length}".encode(),
                    b"",
                    body,
                )
            )
        )

    def begin(self, verb: str = "POST") -> HTTPResponse:
        """Status and headers of the answer; its body can be read piece by piece."""
        response = HTTPResponse(self.socket, method=verb)
        response.begin()
        return response

    def answer(self, verb: str = "POST") -> Answer:
        """The whole answer."""
        response = self.begin(verb)
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())

    def peek(self) -> bytes:
        """All that has come so far, of which nothing is taken."""
        self.socket.setblocking(False)
        try:
            return self.socket.recv(1 << 20, socket.MSG_PEEK)
        except BlockingIOError:
            return b""

    def hang_up(self) -> None:
        """Go away without a word."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def post(
    url: str,
    body: object,
    headers: Headers = (),
    *,
    tls: Any = None,
    **more: Any,
) -> Answer:
    """POST a message, or bytes, on a connection of its own."""
    with Wire(url, tls=tls) as wire:
        wire.request(dump(body), (*JSON_HEADERS, *headers), **more)
        return wire.answer()


def post_modern(url: str, message: Object, **more: Any) -> Answer:
    """POST a message of the stateless revision, with the headers that mirror it."""
    return post(url, modern(message), mirrors(message), **more)


def mirrors(message: Object) -> list[tuple[str, str]]:
    """The headers that a modern message is sent with."""
    headers = [("MCP-Protocol-Version", MODERN), ("Mcp-Method", message["method"])]
    name = message.get("params", {}).get("name")
    return [*headers, ("Mcp-Name", name)] if name else headers


def read_event(response: HTTPResponse) -> bytes:
    """The next event of a stream, with the empty line that ends it; empty at the end."""
    event = b""
    while not event.endswith((b"\n\n", b"\r\n\r\n")):
        line = response.readline()
        if not line:
            return event
        event += line
    return event


def free_port() -> int:
    """A port of the loopback address that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# ── OPA doubles are asynchronous, these clients are not ───────────────────────────────────────────


@contextmanager
def beside(context: AbstractAsyncContextManager[Value]) -> Iterator[Value]:
    """Keep an asynchronous context in a loop of its own, in a thread of its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(context) as value:
        yield value


# ── A sidecar that says how many tasks it has ─────────────────────────────────────────────────────


def counted(file: Path, mode: str) -> list[str]:
    """The command line of a sidecar that writes its asyncio tasks to `file` on SIGUSR1."""
    return [sys.executable, "-m", "tests.support.raw", str(file), mode]


def tasks_of(pid: int, file: Path) -> list[str]:
    """The tasks of a sidecar that was started as `counted`, by what they run."""
    file.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    wait_until(file.exists, f"{file}, the tasks of {pid}", PATIENCE)
    return list(json.loads(file.read_text(encoding="utf-8")))


def _main(file: Path, arguments: list[str]) -> int:
    import uvloop

    from sidecar.cli import main

    loops: list[asyncio.AbstractEventLoop] = []
    make = uvloop.new_event_loop

    def new_event_loop() -> asyncio.AbstractEventLoop:
        loops.append(make())
        return loops[-1]

    def show(*_: object) -> None:
        names = sorted(_name(task) for loop in loops for task in asyncio.all_tasks(loop))
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(names), encoding="utf-8")
        draft.replace(file)

    uvloop.new_event_loop = new_event_loop  # type: ignore[assignment]
    signal.signal(signal.SIGUSR1, show)
    return main(arguments)


def _name(task: asyncio.Task[Any]) -> str:
    return str(getattr(task.get_coro(), "__qualname__", task.get_coro()))


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2:]))
