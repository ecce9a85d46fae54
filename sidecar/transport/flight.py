"""Requests on their way to a server behind HTTP, and what they have in common."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from multidict import CIMultiDict

from sidecar.protocol.framing import Event
from sidecar.protocol.jsonrpc import Request, RequestId
from sidecar.transport.headers import SESSION, VERSION

EVENTS = "text/event-stream"
JSON = "application/json"

RETRY, MIN_RETRY, MAX_RETRY = 1.0, 0.01, 30.0


@dataclass(slots=True)
class Cursor:
    """Where a stream was when it ended, and how long its server wants us to wait (seconds)."""

    last: str | None = None
    retry: float = RETRY

    def note(self, event: Event) -> None:
        """Take an event's id, and its wish."""
        if event.id:
            self.last = event.id
        if event.retry is not None and event.retry.isascii() and event.retry.isdigit():
            self.retry = max(int(event.retry[:9]) / 1000, MIN_RETRY)

    def patience(self, failures: int) -> float:
        """As long as the server wants, and longer each time that it was of no use."""
        return max(self.retry, min(self.retry * 2.0 ** min(failures, 16), MAX_RETRY))


@dataclass(slots=True, eq=False)
class Link:
    """What the requests of one client have in common: the session, once there is one.

    `modern` is the revision of the latest message with an envelope, `streamed` says that there was
    a GET stream.
    """

    session: str | None = None
    version: str | None = None
    modern: str | None = None
    gone: bool = False
    streamed: bool = False
    greeted: asyncio.Event = field(default_factory=asyncio.Event)
    listening: asyncio.Task[None] | None = None

    def headers(self) -> dict[str, str]:
        """What a message without an envelope is sent with."""
        headers = {} if self.session is None else {SESSION: self.session}
        version = self.version or self.modern
        return headers if version is None else {**headers, VERSION: version}

    def stream_headers(self, cursor: Cursor | None = None) -> CIMultiDict[str]:
        """What a request without a message is sent with."""
        headers = CIMultiDict({"Accept": EVENTS, "Accept-Encoding": "identity", **self.headers()})
        if cursor is not None and cursor.last is not None:
            headers["Last-Event-ID"] = cursor.last
        return headers


@dataclass(slots=True, eq=False)
class Flight:
    """A request on its way: one POST, and the stream of its answer. `left`: its bytes have."""

    request: Request
    modern: bool
    link: Link
    cursor: Cursor = field(default_factory=Cursor)
    answered: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[type, RequestId]:
        """What it is found by."""
        return key_of(self.request.id)

    @property
    def resumable(self) -> bool:
        """Whether a stream that ended before its answer can be gone on with."""
        return not self.modern and not self.link.gone and self.cursor.last is not None

    def end(self) -> None:
        """Close its connection."""
        if self.task is not None:
            self.task.cancel()


def key_of(request_id: RequestId) -> tuple[type, RequestId]:
    """Ids as JSON has them: `1` and `"1"` are two."""
    return type(request_id), request_id
