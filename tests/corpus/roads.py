"""How a case travels: over connections, over a pipe, or over an old pair of stream and posts.

A road sends a step and says in a word what came back: `result`, `denied`, an HTTP status and the
code of an error, `closed`, or `none`. It keeps all that the client heard.
"""

from __future__ import annotations

import base64
import io
import json
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from http.client import HTTPException, HTTPResponse
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

from tests.corpus.cases import MODERN, Step, Words, make, text_of
from tests.support.permissive_server import make_sense
from tests.support.raw import (
    CAPABILITIES_KEY,
    VERSION_KEY,
    Object,
    Pipe,
    Wire,
    initialize,
    post,
    read_event,
)
from tests.support.raw import MODERN as REVISION

DENIED = -31403
SILENCE = 10.0
NOTHING = frozenset({"none", "202"})
ENVELOPE = f',"_meta":{{"{VERSION_KEY}":"{REVISION}","{CAPABILITIES_KEY}":{{}}}}'
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}

Starter = Callable[[], AbstractContextManager[Pipe]]


class Road(Protocol):
    """A client's way to a server; `heard` is every message that came back so far."""

    name: str
    heard: list[Object]

    def send(self, step: Step, number: int, *, waits: bool) -> list[str]:
        """Send a step, whose `$ID` is `number`, and say what came back for it."""

    def ask(self, text: str, number: int) -> str:
        """Put an ordinary request, and say what came back; the road is mended before if need be."""

    def close(self) -> None:
        """Leave."""


def envelope(road: str) -> Words:
    """The envelope of the stateless revision, where it is spoken: behind other params, or alone."""
    text = ENVELOPE if road in MODERN else ""
    return {"$META": text, "$ONLYMETA": text.removeprefix(",")}


def word_of(message: Object, status: int = 200) -> str:
    """What an answer is, in a word."""
    if "error" not in message:
        return "result" if "result" in message else str(status)
    code = message["error"]["code"]
    return "denied" if code == DENIED else f"{status} {code}"


def line_word(message: Object) -> str:
    """The same where there is no status."""
    return word_of(message).removeprefix("200 ")


def said(step: Step, words: Words) -> str:
    """The call that has a server say something word for word."""
    wanted = {"say": base64.b64encode(make(step.part, words)).decode()}
    wanted |= {key: step.options[key] for key in ("pieces", "media") if key in step.options}
    return text_of("$ECHO", words).replace('"arguments":{}', f'"arguments":{json.dumps(wanted)}')


# ── Connections ───────────────────────────────────────────────────────────────────────────────────


class _Kept(io.BufferedReader):
    """A reader that several responses come from, one after the other."""

    def makefile(self, *_: object) -> _Kept:
        return self

    def close(self) -> None:
        """A response that has ended is not the end of the connection."""


class HttpRoad:
    """Every case on a connection of its own, which stays open as long as the road does."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self._url = name, url
        self.heard: list[Object] = []
        self._wires: list[Wire] = []
        self._session = ""
        self._greet()

    def _greet(self) -> None:
        if self.name not in ("session", "bridge-http"):
            return
        greeting = post(self._url, initialize())
        self._session = greeting.headers["mcp-session-id"]
        post(self._url, INITIALIZED, self._usual({}))

    def _usual(self, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The headers that belong to a proper request on this road, less what a step changes."""
        headers: dict[str, str] = {}
        if self._session:
            headers["Mcp-Session-Id"] = self._session
        if self.name in MODERN:
            headers["MCP-Protocol-Version"] = REVISION
            headers["Mcp-Method"] = options.get("method", "tools/call")
            headers["Mcp-Name"] = options.get("mirror", "danger")
        return [(name, value) for name, value in headers.items() if value]

    def _words(self, step: Step, number: int) -> Words:
        wire_head = [
            "Host: $HOST",
            "Content-Type: application/json",
            "Accept: application/json, text/event-stream",
            *(f"{n}: {v}" for n, v in self._usual(step.options)),
        ]
        host = self._url.split("/")[2]
        return {
            "$HEAD": "\r\n".join(wire_head).replace("$HOST", host),
            "$HOST": host,
            "$SESSION": self._session or "none",
            **envelope(self.name),
            "$ID": str(number),
        }

    def send(self, step: Step, number: int, *, waits: bool) -> list[str]:
        words = self._words(step, number)
        wire = Wire(self._url, timeout=SILENCE)
        self._wires.append(wire)
        if step.kind == "says":
            echo = Step("body", said(step, words), {"mirror": "echo"})
            wire.send(self._request(echo, {}, self._words(echo, number)))
        elif step.kind == "raw":
            self._raw(wire, step, words)
        else:
            wire.send(self._request(step, step.part if step.kind == "request" else {}, words))
        count = step.options.get("wait", 1)
        if count == 0:
            wire.hang_up()
            return []
        verb = step.part.get("verb", "POST") if step.kind == "request" else "POST"
        return list(self._answers(wire, count, verb))

    def _raw(self, wire: Wire, step: Step, words: Words) -> None:
        data, size = make(step.part, words), step.options.get("pieces", 1 << 20)
        for start in range(0, len(data), size):
            if not wire.send(data[start : start + size]):
                return

    def _request(self, step: Step, unusual: Any, words: Words) -> bytes:
        """A proper request, but for what the step says of it."""
        body = make(unusual.get("body", "$CALL") if step.kind == "request" else step.part, words)
        if unusual.get("verb", "POST") in ("GET", "HEAD", "DELETE", "OPTIONS"):
            body = make(unusual.get("body", ""), words)
        without = {each.lower() for each in unusual.get("without", ())}
        lines = [
            f"{unusual.get('verb', 'POST')} {unusual.get('target', '/mcp')} HTTP/1.1",
            *(
                line
                for line in words["$HEAD"].split("\r\n")
                if line.partition(":")[0].lower() not in without
            ),
            *(f"{name}: {value}" for name, value in unusual.get("headers", ())),
        ]
        if "content-length" not in without:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join(text_of(each, words) for each in lines)
        return head.encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body

    def _answers(self, wire: Wire, count: int, verb: str) -> Iterator[str]:
        reader = _Kept(wire.socket.makefile("rb", buffering=0))
        for _ in range(count):
            try:
                response = HTTPResponse(reader, method=verb)  # type: ignore[arg-type]
                response.begin()
                media = response.getheader("content-type", "")
                stream = media.startswith("text/event-stream")
                body = b"" if stream and verb == "GET" else response.read()
            except TimeoutError:
                yield "silence"
                return
            except (HTTPException, OSError):
                yield "closed"
                return
            yield self._note(response.status, body, stream)

    def _note(self, status: int, body: bytes, stream: bool) -> str:
        """Keep what came, read as leniently as can be; the word for the last of it."""
        texts = list(_event_data(body)) if stream else [body]
        found = [each for text in texts for each in make_sense(text)]
        self.heard += found
        answers = [each for each in found if "method" not in each]
        return word_of(answers[-1], status) if answers else str(status)

    def ask(self, text: str, number: int) -> str:
        word = self._ask(text, number)
        if word.startswith("404"):
            self._greet()
            word = self._ask(text, number)
        return word

    def _ask(self, text: str, number: int) -> str:
        listing = text == "$LIST"
        options = {"method": "tools/list", "mirror": ""} if listing else {"mirror": "echo"}
        step = Step("body", text, options)
        with Wire(self._url, timeout=SILENCE) as wire:
            wire.send(self._request(step, {}, self._words(step, number)))
            return next(self._answers(wire, 1, "POST"))

    def close(self) -> None:
        for wire in self._wires:
            wire.hang_up()


def _event_data(body: bytes) -> Iterator[bytes]:
    """What a lenient reader makes of a stream: each event, also one that does not end, each line
    of several for itself, and what stands in no field at all."""
    block: list[bytes] = []
    for line in (*re.split(rb"\r\n|\r|\n", body.removeprefix(b"\xef\xbb\xbf")), b""):
        name, _, value = line.partition(b":")
        if name == b"data":
            block.append(value.removeprefix(b" "))
            continue
        if not line and block:
            yield b"\n".join(block)
            if len(block) > 1:
                yield from (b"".join(block), *block)
            block = []


# ── Pipes ─────────────────────────────────────────────────────────────────────────────────────────


class PipeRoad:
    """All cases on one pipe, and a new one where a case has ended it."""

    def __init__(self, name: str, start: Starter) -> None:
        self.name, self._start = name, start
        self.heard: list[Object] = []
        self._context: AbstractContextManager[Pipe] | None = None
        self._pipe = self._open()

    def _open(self) -> Pipe:
        self._context = self._start()
        pipe = self._context.__enter__()
        if self.name not in MODERN:
            pipe.greet()
        return pipe

    def _words(self, number: int) -> Words:
        return {**envelope(self.name), "$ID": str(number)}

    def send(self, step: Step, number: int, *, waits: bool) -> list[str]:
        words = self._words(number)
        self._pipe.forget()
        if step.kind == "says":
            self._pipe.send(said(step, words).encode())
        else:
            data = make(step.part, words)
            self._write(data if step.kind == "pipe" else data + b"\n", step)
        if step.options.get("end"):
            self._pipe.end()
            self._pipe.wait_for_end()
        elif waits:
            self._wait(number if step.kind == "says" else None)
        words_back = [line_word(each) for each in self._hear() if "method" not in each]
        return [*words_back, "closed"] if self._pipe.ended else words_back

    def _write(self, data: bytes, step: Step) -> None:
        size = step.options.get("pieces", 1 << 20)
        for start in range(0, len(data), size):
            if not self._pipe.write(data[start : start + size]):
                return

    def _wait(self, number: int | None) -> None:
        """Until something came, or the answer with that number, or the end."""
        with suppress(AssertionError):
            if number is None:
                self._pipe.first(lambda message: True, SILENCE)
            else:
                self._pipe.answer(number, SILENCE)

    def _hear(self) -> list[Object]:
        found = [message for line in self._pipe.lines for message in make_sense(line)]
        self.heard += found
        return found

    def ask(self, text: str, number: int) -> str:
        word = self._ask(text, number)
        if self._pipe.ended:
            self.close()
            self._pipe = self._open()
            word = self._ask(text, number)
        return word

    def _ask(self, text: str, number: int) -> str:
        self._pipe.forget()
        with suppress(ValueError):  # our end is closed
            self._pipe.send(text_of(text, self._words(number)).encode())
        self._wait(number)
        found = self._hear()
        answers = [each for each in found if "method" not in each and each.get("id") == number]
        return line_word(answers[0]) if answers else "silence"

    def close(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)


# ── A stream, and posts beside it ─────────────────────────────────────────────────────────────────


class SseRoad:
    """The transport of 2024-11-05: answers come on the stream, whatever a post is told."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self._url = name, url
        self.heard: list[Object] = []
        self._came: queue.SimpleQueue[Object] = queue.SimpleQueue()
        self._wire = Wire(url, SILENCE)
        self._wire.request(verb="GET", headers=(("Accept", "text/event-stream"),))
        self._stream = self._wire.begin("GET")
        endpoint = read_event(self._stream).decode().split("data: ")[1].strip()
        self._endpoint = urljoin(url, endpoint)
        self._wire.socket.settimeout(None)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._post(json.dumps(initialize("init")).encode())
        self._wait("init")
        self._post(json.dumps(INITIALIZED).encode())

    def _read(self) -> None:
        with suppress(OSError, ValueError, HTTPException):
            event = b""
            while line := self._stream.readline():
                event += line
                if not line.strip():
                    for data in _event_data(event):
                        for message in make_sense(data):
                            self._came.put(message)
                    event = b""

    def _post(self, body: bytes) -> str:
        with Wire(self._endpoint, SILENCE) as wire:
            parts = urlsplit(self._endpoint)
            wire.request(body, target=f"{parts.path}?{parts.query}")
            try:
                answer = wire.answer()
            except (HTTPException, OSError):
                return "closed"
        found = make_sense(answer.body) if answer.status >= 400 else []
        return line_word(found[-1]) if found else str(answer.status)

    def _wait(self, number: object = None) -> list[Object]:
        """What came, up to the first message, or up to the answer with that id."""
        found: list[Object] = []
        with suppress(queue.Empty):
            while not found or (number is not None and found[-1].get("id") != number):
                found.append(self._came.get(timeout=SILENCE))
        self.heard += found
        return found

    def send(self, step: Step, number: int, *, waits: bool) -> list[str]:
        status = self._post(make(step.part, {**envelope(self.name), "$ID": str(number)}))
        if status != "202":
            return [status]
        found = self._wait() if waits else []
        return [line_word(each) for each in found if "method" not in each]

    def ask(self, text: str, number: int) -> str:
        words = {**envelope(self.name), "$ID": str(number)}
        self._post(text_of(text, words).encode())
        found = self._wait(number)
        return line_word(found[-1]) if found and found[-1].get("id") == number else "silence"

    def close(self) -> None:
        self._wire.hang_up()
        self._reader.join(SILENCE)
        self._stream.close()
