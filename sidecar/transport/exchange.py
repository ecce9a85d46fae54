"""What the front of an HTTP proxy and its back say to each other.

The front (`transport.http`) takes requests in and has them judged; a `Backend` brings what was
permitted to a server, of whatever kind, and its answers back to the client.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from aiohttp import web
from multidict import CIMultiDict

from sidecar.conversation import Ask, Call, Conversation, Origin, Server, Ticket
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.framing import Event
from sidecar.protocol.jsonrpc import Message, Response, encode
from sidecar.protocol.session import Bounded
from sidecar.transport.headers import SESSION

Frame = Callable[[bytes, Event | None], bytes]
"""How a message is written in a stream, in place of another one if there was one."""


class Sessions:
    """The sessions of one route, each bound to the chain of principals that opened it."""

    def __init__(self, most: int) -> None:
        self._known: Bounded[str, tuple[Conversation, tuple[str, ...]]] = Bounded(most)

    def open(
        self, session_id: str, conversation: Conversation, owner: tuple[str, ...]
    ) -> Conversation | None:
        """Remember a session that a server has opened; the one that is forgotten for it, if any."""
        conversation.lasting = True
        conversation.session.id = session_id
        replaced = self._known.pop(session_id, None)
        forgotten = self._known.remember(session_id, (conversation, owner)) or replaced
        return None if forgotten is None else forgotten[0]

    def find(self, session_id: str, owner: tuple[str, ...]) -> Conversation | None:
        """The session of that id and owner; None for one that is unknown or somebody else's."""
        conversation, opened_by = self._known.get(session_id) or (None, ())
        return conversation if opened_by == owner else None

    def forget(self, conversation: Conversation) -> None:
        """The session is over."""
        if conversation.session.id is not None:
            self._known.pop(conversation.session.id, None)

    def __iter__(self) -> Iterator[Conversation]:
        return iter([conversation for conversation, _ in self._known.values()])


@dataclass(slots=True)
class Exchange:
    """One HTTP request: where it came from and the conversation that it belongs to.

    `onward` gives the headers that go on to an HTTP server, with the trace context of a call.
    `resumable` says that the stream of its answer had an event id: another one may go on with it.
    `stream` is that stream once it has begun, and `frame` how a message is written in it.
    """

    request: web.Request
    origin: Origin
    conversation: Conversation
    sessions: Sessions
    modern: bool
    onward: Callable[[Call | None], CIMultiDict[str]]
    call: Call | None = None
    ticket: Ticket | None = None
    resumable: bool = False
    stream: web.StreamResponse | None = None
    frame: Frame | None = None

    @property
    def answers(self) -> bool:
        """Whether the client waits for an answer with an id."""
        return self.call is not None and self.call.request_id is not None

    @property
    def answering(self) -> Origin:
        """Where what the server says in its answer comes from: it belongs to the call."""
        return self.origin if self.call is None else replace(self.origin, cause=self.call.trace)

    @property
    def endless(self) -> bool:
        """Whether the answer is a stream that only ends when somebody ends it: nothing is due."""
        return self.call is None or self.call.operation.method.target == "subscription"

    @property
    def opening(self) -> Literal["open", "resume"]:
        """What a GET does to its stream."""
        return "resume" if "Last-Event-ID" in self.request.headers else "open"

    def sent(self) -> None:
        """The bytes have left: the next message of the conversation may follow."""
        if self.ticket is not None:
            self.ticket.release()


Replier = Callable[[Response, int], Awaitable[web.StreamResponse]]
"""How a client is answered in place of its server: the message, and the status that it goes by."""


class Backend(Protocol):
    """The server's side of a route, and how its clients talk."""

    @property
    def verbs(self) -> tuple[str, ...]:
        """The HTTP methods that there are."""

    @property
    def by_headers(self) -> bool:
        """Whether headers name session, revision and event, repeat the body and are held to it."""

    def session_id(self, request: web.Request, *, modern: bool) -> str | None:
        """The session that a request names; None for one that is in none, or opens one."""

    def replier(self, request: web.Request, owner: tuple[str, ...]) -> Replier:
        """How the one who sent this request is answered.

        Raises:
            ProtocolError: 404, there is no such session of this owner to be answered in.
        """

    def admit(self, exchange: Exchange, message: Message) -> None:
        """Refuse, by a ProtocolError, what there is no server for, before it is judged."""

    async def forward(self, exchange: Exchange, permitted: Permitted) -> web.StreamResponse:
        """Send what is permitted, and bring the answer back. Releases the exchange's ticket."""

    async def open_stream(self, exchange: Exchange) -> web.StreamResponse:
        """GET: the server's own messages to the session, as a stream."""

    async def end_session(self, exchange: Exchange) -> web.StreamResponse:
        """DELETE: the session is over."""

    def asker(self, exchange: Exchange) -> Ask:
        """A way to put the sidecar's own request to the server."""

    def close_streams(self) -> None:
        """End every open stream, so that a shutdown does not wait for them."""


class Streamable:
    """How clients of Streamable HTTP talk: what they are answered with is the response."""

    verbs = ("POST", "GET", "DELETE")
    by_headers = True

    def session_id(self, request: web.Request, *, modern: bool) -> str | None:
        """The session that the header names; the stateless revision has none."""
        return None if modern else request.headers.get(SESSION)

    def replier(self, request: web.Request, owner: tuple[str, ...]) -> Replier:
        """In the response."""
        return _in_the_response


async def _in_the_response(response: Response, status: int) -> web.StreamResponse:
    return web.json_response(body=encode(response), status=status)


@dataclass(frozen=True, slots=True)
class Route:
    """One server behind one path, and its sessions; `metadata` is the URL of what a token needs.

    `credentials` are the headers by which it knows its callers; `asserted`: it is told the actor.
    """

    backend: Backend
    server: Server
    sessions: Sessions
    metadata: str | None = None
    credentials: frozenset[str] = frozenset()
    asserted: bool = False
