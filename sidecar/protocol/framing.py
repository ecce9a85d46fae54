"""Bytes to frames: newline-delimited messages, and server-sent events.

Both decoders take bytes as they come, in any pieces, and give whole frames; what does not fit into
the bound is an error, so that a peer that never ends a line can not fill the memory.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from sidecar.errors import MalformedMessage

_LINE_END = re.compile(rb"\r\n|\r|\n")


class FrameTooLarge(MalformedMessage):
    """A frame is longer than the bound; the stream it came from can not be read on."""

    code = "message_too_large"
    status = 413


@dataclass(slots=True)
class LineDecoder:
    """Newline-delimited JSON (MCP stdio transport).

    Only a newline ends a line, and one carriage return before it is dropped. Frames are given
    without line end; empty lines are none.
    """

    limit: int
    _parts: list[bytes] = field(default_factory=list)
    _size: int = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that `data` completes.

        Raises:
            FrameTooLarge: a line is longer than `limit` bytes.
        """
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._add(end)
            line = self._take()
            if line:
                yield line
        self._add(rest)

    def finish(self) -> bytes | None:
        """What stood after the last newline, at the end of the stream."""
        return self._take() or None

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self.limit:
            raise FrameTooLarge(f"a message is larger than {self.limit} bytes")
        if part:
            self._parts.append(part)

    def _take(self) -> bytes:
        line = b"".join(self._parts).removesuffix(b"\r")
        self._parts.clear()
        self._size = 0
        return line if line.strip() else b""


def refuse_raw_returns(frame: bytes) -> bytes:
    """The frame itself, when no reader can split it in two.

    A raw carriage return is white space in JSON, and a line end to servers that read with universal
    newlines: one harmless line to us, an executed one to them.

    Raises:
        MalformedMessage: there is one.
    """
    if b"\r" in frame:
        raise MalformedMessage("a carriage return inside a line")
    return frame


@dataclass(frozen=True, slots=True)
class Event:
    """One block of an event stream: `raw` as it came; `data` is None for comments and the like."""

    raw: bytes
    data: str | None = None
    name: str = "message"
    id: str | None = None
    retry: str | None = None


@dataclass(slots=True)
class EventDecoder:
    """Server-sent events (WHATWG HTML, 9.2.6): lines end by CR, LF or CRLF, blocks by an empty one.

    A comment between blocks is given at once, as a block without data: it is somebody's keep-alive.
    What is given, put together, is what came, also where a piece ends between CR and LF.
    """

    limit: int
    _buffer: bytearray = field(default_factory=bytearray)
    _raw: list[bytes] = field(default_factory=list)
    _block: list[bytes] = field(default_factory=list)
    _size: int = 0
    _after_return: bool = False
    _fresh: bool = True

    def feed(self, data: bytes) -> Iterator[Event]:
        """The blocks that `data` completes.

        Raises:
            FrameTooLarge: a block is larger than `limit` bytes.
        """
        if not data:
            return
        if self._after_return and data.startswith(b"\n"):
            yield from self._late_newline()
            data = data[1:]
        self._after_return = data.endswith(b"\r")
        scan_from = len(self._buffer)
        self._buffer += data
        start = 0
        for end in _LINE_END.finditer(self._buffer, scan_from):
            line = bytes(self._buffer[start : end.end()])
            start = end.end()
            yield from self._line(line)
        del self._buffer[:start]
        if self._size + len(self._buffer) > self.limit:
            raise FrameTooLarge(f"an event is larger than {self.limit} bytes")

    def _late_newline(self) -> Iterator[Event]:
        """The second half of a CRLF whose first half has ended a line already."""
        if not self._raw:
            yield Event(b"\n")
            return
        self._raw.append(b"\n")
        self._size += 1

    def _line(self, line: bytes) -> Iterator[Event]:
        if self._size + len(line) > self.limit:
            raise FrameTooLarge(f"an event is larger than {self.limit} bytes")
        text = line.rstrip(b"\r\n")
        if self._fresh:
            text, self._fresh = text.removeprefix(codecs.BOM_UTF8), False
        if not self._raw and (not text or text.startswith(b":")):
            yield Event(line)
            return
        self._raw.append(line)
        self._size += len(line)
        if text:
            self._block.append(text)
        else:
            yield self._event()

    def _event(self) -> Event:
        raw = b"".join(self._raw)
        fields: dict[str, list[str]] = {}
        for line in self._block:
            name, _, value = line.decode("utf-8", "replace").partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
        self._raw, self._block, self._size = [], [], 0
        return Event(
            raw=raw,
            data="\n".join(fields["data"]) if "data" in fields else None,
            name=fields.get("event", ["message"])[-1] or "message",
            id=fields.get("id", [None])[-1],
            retry=fields.get("retry", [None])[-1],
        )


def encode_event(data: bytes, like: Event | None = None) -> bytes:
    """An event that carries `data` (one line), with the id, name and retry of another one."""
    lines = []
    if like is not None:
        if like.name != "message":
            lines.append(f"event: {like.name}".encode())
        if like.id is not None:
            lines.append(f"id: {like.id}".encode())
        if like.retry is not None:
            lines.append(f"retry: {like.retry}".encode())
    lines.append(b"data: " + data)
    return b"\n".join(lines) + b"\n\n"
