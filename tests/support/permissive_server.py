"""A server without scruples, and a witness. No SDK: it executes whatever it can make sense of.

Case of keys, duplicates, batches, encodings, ids of any kind, several messages in a line, carriage
returns as line ends: all is well. Whatever it executes is a line of JSON in its log, before it is
answered. The name of the called tool says how to answer, and most names are ways to misbehave.

    python -m tests.support.permissive_server --log FILE [--transport stdio|http]

Over HTTP it says `listening on http://127.0.0.1:PORT/mcp` on stderr once clients can come.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

HARMLESS = {
    *("initialize", "ping", "server/discover"),
    # What the sidecar asks for as a client of its own, to know what there is.
    *("tools/list", "resources/list", "resources/templates/list", "prompts/list"),
}
LONG = 80 * 1000 * 1000
MODERN_KEY = "io.modelcontextprotocol/protocolVersion"
ELSEWHERE = "/elsewhere"
SESSION = "a-session-of-this-server"

Object = dict[str, Any]


# ── Reading the log, for tests ────────────────────────────────────────────────────────────────────


def records(log: Path, what: str | None = None) -> list[Object]:
    """What it wrote down, of one kind or of every kind, in order."""
    if not log.exists():
        return []
    whole, _, _ = log.read_text(encoding="utf-8").rpartition("\n")  # not a line half written
    found = [json.loads(line) for line in whole.split("\n") if line]
    return [each for each in found if what in (None, each["what"])]


def executed(log: Path) -> list[Object]:
    """The messages that did something: no negotiation, no listing, no notification."""
    return [each for each in records(log, "message") if acts(each)]


def acts(record: Object) -> bool:
    """Whether the message of a record did something."""
    method = str(record["method"])
    return method not in HARMLESS and not method.startswith("notifications/")


def command(log: Path, *arguments: str) -> list[str]:
    """Its command line."""
    return [sys.executable, "-m", "tests.support.permissive_server", "--log", str(log), *arguments]


# ── Reading messages, whatever they look like ─────────────────────────────────────────────────────


def make_sense(data: bytes) -> list[Object]:
    """Every message in `data`, as the most forgiving reader would find them."""
    try:
        encoding = json.detect_encoding(data)
    except IndexError:
        encoding = "utf-8"
    text = data.decode(encoding, "replace").lstrip("\ufeff")
    found: list[Any] = []
    with suppress(ValueError, RecursionError):
        while text := text.strip().lstrip(","):
            value, end = json.JSONDecoder().raw_decode(text)
            text = text[end:]
            found += value if isinstance(value, list) else [value]
    return [
        {key.lower(): part for key, part in each.items()}
        for each in found
        if isinstance(each, dict)
    ]


def tool_of(message: Object) -> str:
    params = message.get("params")
    return str(params.get("name")) if isinstance(params, dict) else "-"


def arguments_of(message: Object) -> Object:
    params = message.get("params")
    arguments = params.get("arguments") if isinstance(params, dict) else None
    return arguments if isinstance(arguments, dict) else {}


class Server:
    """What both transports have in common."""

    def __init__(self, log: Path) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.released = asyncio.Event()

    def note(self, what: str, **more: Any) -> None:
        record = {"what": what, "pid": os.getpid(), "at": time.time(), **more}
        os.write(self._log, (json.dumps(record) + "\n").encode())

    def take(self, message: Object) -> None:
        """Execute it, which is to write it down."""
        if "method" not in message:
            self.note("answer", message=message)
            return
        method, name = message["method"], tool_of(message)
        self.note("message", method=method, name=name, id=message.get("id"))
        if name == "release":
            self.released.set()

    def result(self, message: Object) -> Object:
        """The answer of an honest server."""
        params = message.get("params") if isinstance(message.get("params"), dict) else {}
        modern = MODERN_KEY in (params or {}).get("_meta", {})
        envelope = {"resultType": "complete"} if modern else {}
        return {"jsonrpc": "2.0", "id": message["id"], "result": {**envelope, **_result(message)}}


def _result(message: Object) -> Object:
    match message["method"]:
        case "initialize":
            return {
                "protocolVersion": "2025-11-25",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "permissive", "version": "1"},
            }
        case "server/discover":
            cached = {"ttlMs": 0, "cacheScope": "private"}
            return {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}, **cached}
        case "tools/list":
            tools = [{"name": each, "inputSchema": {"type": "object"}} for each in ("echo", "hold")]
            return {"tools": tools, "ttlMs": 0, "cacheScope": "private"}
        case "ping":
            return {}
        case _:
            arguments = arguments_of(message)
            text = "x" * arguments["size"] if "size" in arguments else json.dumps(arguments)
            return {"content": [{"type": "text", "text": text}]}


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def words_of(message: Object) -> tuple[bytes, int] | None:
    """What a call wants to hear, word for word, and in pieces of how many bytes."""
    arguments = arguments_of(message)
    if "say" not in arguments:
        return None
    return base64.b64decode(arguments["say"]), int(arguments.get("pieces", LONG))


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


# ── stdio ─────────────────────────────────────────────────────────────────────────────────────────


class Stdio(Server):
    """Lines in, lines out."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self._held: list[Object] = []
        self._asking: Object | None = None

    def run(self) -> None:
        """Read until the end, also a last line that does not end."""
        rest = b""
        while data := os.read(0, 65536):
            *lines, rest = re.split(rb"[\r\n]", rest + data)
            for line in lines:
                self._line(line)
        self._line(rest)

    def _line(self, line: bytes) -> None:
        for message in make_sense(line):
            self.take(message)
            if "method" not in message:
                self._answered(message)
            elif "id" in message:
                self._act(message)

    def _act(self, message: Object) -> None:
        answer = self.result(message)
        behaviour = MISBEHAVIOUR.get(tool_of(message))
        if words := words_of(message):
            for piece in pieces(*words):
                os.write(1, piece)
            write(dump(answer))
        elif tool_of(message) in ("hold", "ask", "ask_unknown"):
            self._later(message, answer)
        elif behaviour is not None:
            behaviour(answer)
        else:
            write(dump(answer))
        if tool_of(message) == "release":
            for each in self._held:
                write(dump(each))
            self._held.clear()

    def _later(self, message: Object, answer: Object) -> None:
        """Keep the answer back until `release` is called, or until its question is answered."""
        if tool_of(message) == "hold":
            self._held.append(answer)
            return
        self._asking = answer
        method = "sampling/createMessage" if tool_of(message) == "ask" else "vendor/secret"
        question = {"jsonrpc": "2.0", "id": "question-1", "method": method}
        write(dump({**question, "params": {"messages": [], "maxTokens": 1}}))

    def _answered(self, message: Object) -> None:
        if self._asking is not None and message.get("id") == "question-1":
            answer, self._asking = self._asking, None
            write(dump(answer))


def write(line: bytes) -> None:
    view = memoryview(line + b"\n")
    while view:
        view = view[os.write(1, view) :]


def _wrong_id(answer: Object) -> None:
    write(dump({**answer, "id": "of-somebody-else"}))


def _unsolicited(answer: Object) -> None:
    write(dump({**answer, "id": 987654, "result": {"stolen": True}}))
    write(dump(answer))


def _twice(answer: Object) -> None:
    write(dump(answer))
    write(dump({**answer, "result": {"second": True}}))


def _noise(answer: Object) -> None:
    """Everything that is no message, and then the answer."""
    for line in (
        b"Server ready, press Ctrl-C to stop",
        b'{"jsonrpc": "2.0", "id": 1, "result": ',
        b"\xff\xfe\x00",
        b"[" + dump({**answer, "result": {"in_a_batch": True}}) + b"]",
        dump({**answer, "method": "ping"}),
        dump({**answer, "error": {"code": 1, "message": "both"}}),
        b'{"jsonrpc":"2.0","id":1,"id":2,"result":{}}',
        b"null",
        b"",
    ):
        write(line)
    write(dump(answer))


def _long_line(answer: Object) -> None:
    write(dump({**answer, "result": {"text": "x" * LONG}}))


def _deaf(answer: Object) -> None:
    """Hear nothing until the file that the call names is there."""
    text = answer["result"]["content"][0]["text"]
    while not Path(json.loads(text)["until"]).exists():
        time.sleep(0.01)
    write(dump(answer))


def _exit(answer: Object) -> None:
    os._exit(3)


def _nothing(answer: Object) -> None:
    """No answer, ever."""


MISBEHAVIOUR: dict[str, Callable[[Object], None]] = {
    "wrong_id": _wrong_id,
    "unsolicited": _unsolicited,
    "twice": _twice,
    "noise": _noise,
    "long_line": _long_line,
    "deaf": _deaf,
    "exit": _exit,
    "silent": _nothing,
}


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────


class Http(Server):
    """Streamable HTTP, written by hand so that it can be written wrong."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        print(f"listening on http://127.0.0.1:{port}/mcp", file=sys.stderr, flush=True)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while await Exchange(self, reader, writer).serve():
                pass
        writer.close()


class Exchange:
    """One request and its answer."""

    def __init__(
        self, server: Http, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._server, self._reader, self._writer = server, reader, writer
        self._name = "-"

    async def serve(self) -> bool:
        """Answer it; whether the connection can be used for another one."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        verb, target, _ = head[0].split(" ", 2)
        headers = {
            name.lower(): value for name, _, value in (each.partition(": ") for each in head[1:])
        }
        body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        self._server.note("http", verb=verb, target=target, headers=headers)
        if target == ELSEWHERE:
            self._server.note("message", method="elsewhere", name="-", id=None)
        if verb == "GET":
            return await self._stream()
        if verb == "DELETE":
            return await self._send(b"", status="200 OK")
        self._believe(headers)
        if headers.get("content-encoding") == "gzip":
            with suppress(OSError):
                body = gzip.decompress(body)
        return await self._messages(make_sense(body))

    def _believe(self, headers: dict[str, str]) -> None:
        """Execute what the headers alone ask for, as one does that routes by them."""
        if headers.get("mcp-method") == "tools/call" and "danger" in headers.get("mcp-name", ""):
            self._server.note("message", method="tools/call", name="danger", id=None)

    async def _messages(self, messages: list[Object]) -> bool:
        for message in messages:
            self._server.take(message)
        wanted = [each for each in messages if "id" in each and "method" in each]
        if not wanted:
            # As the official Python SDK acknowledges: a media type, and nothing of it.
            return await self._send(b"", status="202 Accepted")
        message = wanted[0]
        answer, self._name = self._server.result(message), tool_of(message)
        if message["method"] == "initialize":
            return await self._send(dump(answer), more=f"Mcp-Session-Id: {SESSION}\r\n")
        if words := words_of(message):
            return await self._say(message, *words)
        return await self._act(answer)

    async def _say(self, message: Object, data: bytes, size: int) -> bool:
        """Word for word, as a stream of events or as the body that the call wants it to be."""
        if media := arguments_of(message).get("media"):
            return await self._send(data, media=media)
        await self._events(b"")
        for piece in pieces(data, size):
            await self._chunk(piece)
        return await self._end_events()

    async def _act(self, answer: Object) -> bool:
        if plain := PLAIN.get(self._name):
            return await self._send(**plain(answer))
        if events := EVENTS.get(self._name):
            await self._events(events(answer))
            return await self._end_events()
        special = {
            "no_answer": self._close,
            "cut_head": self._cut_head,
            "cut_body": self._cut_body,
            "hold": self._until_gone,
            "hold_until_released": self._hold,
            "events_cut": self._cut_events,
            "events_dribbled": self._dribble,
            "events_gated": self._gated,
            "events_forever": self._forever,
        }
        if self._name in special:
            return await special[self._name](answer)
        return await self._send(dump(answer))

    async def _close(self, answer: Object) -> bool:
        return False

    async def _cut_head(self, answer: Object) -> bool:
        return await self._write(b"HTTP/1.1 200 OK\r\nContent-Ty")

    async def _cut_body(self, answer: Object) -> bool:
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999"
        return await self._write(head.encode() + b"\r\n\r\n" + dump(answer))

    async def _hold(self, answer: Object) -> bool:
        await self._server.released.wait()
        return await self._send(dump(answer))

    async def _cut_events(self, answer: Object) -> bool:
        await self._events(event(progress(1)) + b"data: {")
        return False

    async def _forever(self, answer: Object) -> bool:
        await self._events(event(progress(1)))
        return await self._until_gone()

    async def _dribble(self, answer: Object) -> bool:
        """Byte by byte, each in a piece of its own."""
        await self._events(b"")
        whole = b"".join(event(progress(each)) for each in (1, 2, 3)) + event(dump(answer))
        for index in range(len(whole)):
            await self._chunk(whole[index : index + 1])
        return await self._end_events()

    async def _gated(self, answer: Object) -> bool:
        """One event, and no other before somebody who has seen it calls `release`."""
        await self._events(b"")
        for number in (1, 2, 3):
            self._server.released.clear()
            await self._chunk(event(progress(number)))
            await self._server.released.wait()
        await self._chunk(event(dump(answer)))
        return await self._end_events()

    async def _stream(self) -> bool:
        self._name = "GET"
        await self._events(b": open\n\n")
        return await self._until_gone()

    async def _until_gone(self, answer: Object | None = None) -> bool:
        """Say nothing more, and note when the other side has gone."""
        with suppress(OSError):
            await self._reader.read()
        self._server.note("gone", name=self._name)
        return False

    async def _send(
        self,
        body: bytes,
        *,
        status: str = "200 OK",
        media: str = "application/json",
        more: str = "",
    ) -> bool:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n"
        await self._write((head + more + "\r\n").encode() + body)
        return True

    async def _events(self, first: bytes) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked"
        await self._write(head.encode() + b"\r\n\r\n")
        await self._chunk(first)

    async def _end_events(self) -> bool:
        await self._write(b"0\r\n\r\n")
        return True

    async def _chunk(self, data: bytes) -> None:
        if data:
            await self._write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def _write(self, data: bytes) -> bool:
        self._writer.write(data)
        await self._writer.drain()
        return False


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def progress(number: int) -> bytes:
    params = {"progressToken": "t", "progress": number}
    return dump({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})


def _stranger(answer: Object) -> bytes:
    return dump({**answer, "id": "of-somebody-else"})


def _between_noise(answer: Object) -> bytes:
    stolen = dump({"jsonrpc": "2.0", "id": 987654, "result": {"stolen": True}})
    noise = (stolen, b"no message", dump([answer]))
    right = dump(answer)
    return b"".join(map(event, noise)) + b": a comment\n\n" + event(right) + event(right)


PLAIN: dict[str, Callable[[Object], dict[str, Any]]] = {
    "redirect": lambda answer: {
        "body": b"",
        "status": "307 Temporary Redirect",
        "more": f"Location: {ELSEWHERE}\r\n",
    },
    "gzip": lambda answer: {
        "body": gzip.compress(dump(answer)),
        "more": "Content-Encoding: gzip\r\n",
    },
    "html": lambda answer: {"body": b"<html>hello</html>", "media": "text/html"},
    "no_json": lambda answer: {"body": b"this is no JSON"},
    "empty": lambda answer: {"body": b""},
    "batch": lambda answer: {"body": dump([answer])},
    "failing": lambda answer: {
        "body": b"<html>oops</html>",
        "status": "500 Internal Server Error",
        "media": "text/html",
    },
    "wrong_id": lambda answer: {"body": _stranger(answer)},
    "long_line": lambda answer: {"body": dump({**answer, "result": {"text": "x" * LONG}})},
}
EVENTS: dict[str, Callable[[Object], bytes]] = {
    "events": lambda answer: event(progress(1)) + event(progress(2)) + event(dump(answer)),
    "events_wrong_id": lambda answer: event(_stranger(answer)),
    "events_noise": _between_noise,
    "events_none": lambda answer: b": nothing comes\n\n",
    "events_long": lambda answer: b"data: " + b"x" * LONG,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="permissive_server")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE")
    parser.add_argument("--transport", choices=["stdio", "http"], default="stdio")
    parser.add_argument("--banner", action="store_true", help="chat on stdout before all else")
    parser.add_argument("--exit", type=int, metavar="CODE", help="end at once")
    parser.add_argument("--long-line", action="store_true", help="begin with a line of 80 MB")
    options = parser.parse_args()
    if options.banner:
        write(b"Permissive server 1.0\n{not json}\n\nready")
    if options.long_line:
        write(b"x" * LONG)
    if options.exit is not None:
        sys.exit(options.exit)
    if options.transport == "stdio":
        Stdio(options.log).run()
    else:
        asyncio.run(Http(options.log).run())


if __name__ == "__main__":
    main()
