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
_FIELDS = (b"event", b"id", b"retry")


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
    _buffer: bytearray = field(default_factory=bytearray)

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
        if len(self._buffer) + len(part) > self.limit:
            raise FrameTooLarge(f"a message is larger than {self.limit} bytes")
        self._buffer += part

    def _take(self) -> bytes:
        line = bytes(self._buffer).removesuffix(b"\r")
        self._buffer.clear()
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
    What is given, put together, is what came, also where a piece ends between CR and LF. Lines are
    not kept one by one, since a block may be nothing but the shortest of them.
    """

    limit: int
    _buffer: bytearray = field(default_factory=bytearray)
    _raw: bytearray = field(default_factory=bytearray)
    _data: bytearray | None = None
    _fields: dict[bytes, bytes] = field(default_factory=dict)
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
        if len(self._raw) + len(self._buffer) > self.limit:
            raise FrameTooLarge(f"an event is larger than {self.limit} bytes")

    def _late_newline(self) -> Iterator[Event]:
        """The second half of a CRLF whose first half has ended a line already."""
        if not self._raw:
            yield Event(b"\n")
            return
        self._raw += b"\n"

    def _line(self, line: bytes) -> Iterator[Event]:
        if len(self._raw) + len(line) > self.limit:
            raise FrameTooLarge(f"an event is larger than {self.limit} bytes")
        text = line.rstrip(b"\r\n")
        if self._fresh:
            text, self._fresh = text.removeprefix(codecs.BOM_UTF8), False
        if not self._raw and (not text or text.startswith(b":")):
            yield Event(line)
            return
        self._raw += line
        if text:
            self._field(text)
        else:
            yield self._event()

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name != b"data":
            if name in _FIELDS:
                self._fields[name] = value
        elif self._data is None:
            self._data = bytearray(value)
        else:
            self._data += b"\n" + value

    def _event(self) -> Event:
        event = Event(
            raw=bytes(self._raw),
            data=_text(self._data),
            name=_text(self._fields.get(b"event")) or "message",
            id=_text(self._fields.get(b"id")),
            retry=_text(self._fields.get(b"retry")),
        )
        self._raw, self._data, self._fields = bytearray(), None, {}
        return event


def _text(value: bytes | bytearray | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


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


def event_of(line: bytes) -> Event:
    """A line that is a message, as if it had come in an event."""
    return Event(raw=line + b"\n", data=line.decode("utf-8", "surrogateescape"))


def encode_line(data: bytes, like: Event | None = None) -> bytes:
    """A line that carries `data`; there is nothing to be `like` another one in."""
    return data + b"\n"
