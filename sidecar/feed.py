"""The records of the audit for whoever listens right now; the last ones are kept.

When nobody listens a call costs one append: it is kept as it is, and only becomes records when
somebody asks for it. One that holds much becomes records at once, whose size is bounded.

Who reads slowly misses records, and is told how many (`{"type": "missed", "count": 12}`); neither
the calls nor the other listeners wait for anybody.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sidecar.audit import decision_record, judged, line, outcome_record, stranger_record
from sidecar.conversation import Call, Stranger
from sidecar.errors import Overloaded
from sidecar.protocol.jsonrpc import FROM_SERVER, Json, JsonObject, dump_json, parse_json
from sidecar.recording import NO_CONTENT, Content

KEPT = 200
"""Actions that somebody who begins to listen can still be told of."""
MAX_LISTENERS = 16
MAX_WAITING = 1024 * 1024
"""Bytes that may wait for a listener that does not take them."""
LIGHT_TEXT, LIGHT_VALUES = 4096, 100
"""What a call that is kept as it is holds at most, in characters and in values."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records: globs; an empty one is everything."""

    actor: str = ""  # type, `type:id`, id or key of who acts; id or key of the one it acts for
    tool: str = ""  # name of a target
    decision: str = ""

    def __call__(self, record: JsonObject) -> bool:
        """Whether this record is wanted."""
        return (
            self.decision in ("", record.get("decision"))
            and _matches(self.actor, _names(record))
            and _matches(self.tool, [each["name"] for each in record.get("targets", ())])
        )


class Listener:
    """Somebody who is told; an asynchronous iterator over lines, several at a time."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._lines: deque[bytes] = deque()
        self._waiting, self._missed, self._ended = 0, 0, False
        self._news = asyncio.Event()

    def offer(self, record: JsonObject, text: bytes) -> None:
        """Tell of a record, unless it is not wanted, or there is no room."""
        if not self._wanted(record):
            return
        if self._waiting + len(text) > MAX_WAITING:
            self._missed += 1
        else:
            self._tell_missed()
            self._add(text)
        self._news.set()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._news.set()

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> bytes:
        await self._news.wait()
        self._tell_missed()
        if not self._lines and self._ended:
            raise StopAsyncIteration
        lines = b"".join(self._lines)
        self._lines.clear()
        self._waiting = 0
        if not self._ended:
            self._news.clear()
        return lines

    def _tell_missed(self) -> None:
        if self._missed:
            self._add(dump_json({"type": "missed", "count": self._missed}) + b"\n")
            self._missed = 0

    def _add(self, text: bytes) -> None:
        self._lines.append(text)
        self._waiting += len(text)


class Feed:
    """A recorder of the pipeline that tells listeners."""

    def __init__(self, content: Content = NO_CONTENT) -> None:
        self._content = content
        self._kept: deque[Call | tuple[bytes, ...]] = deque(maxlen=KEPT)
        self._listeners: list[Listener] = []

    def decided(self, call: Call) -> None:
        """Tell of a decision."""
        if self._listeners and judged(call):
            self._tell(decision_record(call, self._content))

    def finished(self, call: Call) -> None:
        """Tell of what came of it, and keep it."""
        if not judged(call):
            return
        as_it_is = not self._content.results and light(call.operation.message.params)
        self._kept.append(call if as_it_is else tuple(map(line, self._records(call))))
        if self._listeners:
            self._tell(outcome_record(call, self._content))

    def refused(self, stranger: Stranger) -> None:
        """Tell of somebody who was not let in; strangers push nothing out of what is kept."""
        if self._listeners:
            self._tell(stranger_record(stranger, time.time_ns(), 0))

    @contextmanager
    def listen(self, *, last: int = 0, **wanted: str) -> Iterator[Listener]:
        """Tell of the last so many actions that are wanted, then of those that come.

        Raises:
            Overloaded: too many listen already.
        """
        if len(self._listeners) >= MAX_LISTENERS:
            raise Overloaded("too many listen already")
        listener = Listener(Wanted(**wanted))
        for record in self._past(Wanted(**wanted), last):
            listener.offer(record, line(record))
        self._listeners.append(listener)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)

    def close(self) -> None:
        """Nobody is told any more."""
        for each in self._listeners:
            each.end()

    def _past(self, wanted: Wanted, last: int) -> list[JsonObject]:
        actions: deque[list[JsonObject]] = deque(maxlen=last)
        for kept in self._kept:
            records = self._records(kept) if isinstance(kept, Call) else map(_read, kept)
            if fit := [each for each in records if wanted(each)]:
                actions.append(fit)
        return [record for action in actions for record in action]

    def _records(self, call: Call) -> tuple[JsonObject, ...]:
        return decision_record(call, self._content), outcome_record(call, self._content)

    def _tell(self, record: JsonObject) -> None:
        text = line(record)
        for each in self._listeners:
            each.offer(record, text)


def light(value: Json) -> bool:
    """Whether little would be held on to with this value; it costs little to say."""
    text, values, left = LIGHT_TEXT, LIGHT_VALUES, [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            text -= len(each)
        elif isinstance(each, dict | list):
            values -= len(each)
            if values >= 0:
                left += each
                left += each.values() if isinstance(each, dict) else ()
        if text < 0 or values < 0:
            return False
    return True


def _read(text: bytes) -> JsonObject:
    record: JsonObject = parse_json(text, FROM_SERVER)
    return record


def _names(record: JsonObject) -> list[str]:
    actor = record.get("actor")
    if actor is None:
        return []
    kind, key, behind = actor["type"], actor["key"], actor.get("on_behalf_of")
    name = key.partition("|")[2]
    return [kind, f"{kind}:{name}", *_of(key), *(_of(behind) if behind else ())]


def _of(key: str) -> tuple[str, str]:
    return key, key.partition("|")[2]


def _matches(pattern: str, names: list[str]) -> bool:
    return not pattern or any(fnmatchcase(each, pattern) for each in names)
