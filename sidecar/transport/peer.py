"""What a pipe and the server behind it are to each other, whatever kind of server it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from sidecar.conversation import Call
from sidecar.errors import ProtocolError, UpstreamError
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.jsonrpc import Message, RequestId, Response
from sidecar.transport.child import Child


class Hearer(Protocol):
    """Who hears what the server says."""

    async def heard(self, message: Message, frame: bytes) -> None:
        """The server said `message`; `frame` is what it said, in one line."""

    async def lost(self, request_id: RequestId, error: UpstreamError) -> None:
        """The server will not answer that request."""

    def malformed(self, error: ProtocolError) -> None:
        """The server said something that is no message."""

    async def admits(self, action: Literal["open", "resume", "close"]) -> bool:
        """Whether a stream of the server's messages may be opened, resumed or closed."""

    def holding(
        self, action: Literal["open", "resume"], end: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """Keep such a stream for as long as it may be open; `end` closes it before that."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended: our exit code, and what those hear who still wait for an answer."""

    code: int
    why: str


class Peer(Protocol):
    """The server's side of a pipe."""

    @property
    def gone(self) -> bool:
        """Whether it will answer nothing any more."""

    @property
    def sees_the_end(self) -> bool:
        """Whether it learns by itself that its client will say no more."""

    async def send(self, permitted: Permitted, call: Call | None, sent: Callable[[], None]) -> None:
        """Put a permitted message on its way; `sent` is called once the next one may follow.

        `sent` is called in any case, maybe more than once.

        Raises:
            UpstreamError: the server can not be reached.
        """

    async def ask(self, permitted: Permitted) -> Response:
        """Put the sidecar's own request to the server.

        Raises:
            UpstreamError: there will be no answer.
        """

    async def read(self, hearer: Hearer) -> None:
        """Let `hearer` hear everything, until there is no more."""

    async def stop(self) -> Ended:
        """Bring it down; what it still says is still read."""

    def fail_asked(self, error: UpstreamError) -> None:
        """The sidecar's own questions will not be answered."""


class ChildPeer:
    """A `Peer` that is our child: it reads its stdin, and sees it closed."""

    sees_the_end = True

    def __init__(self, child: Child, message_limit: int) -> None:
        self._child = child
        self._limit = message_limit
        self.ask = child.ask
        self.fail_asked = child.fail_asked

    @property
    def gone(self) -> bool:
        """Whether it reads and writes no more."""
        return self._child.gone

    async def send(self, permitted: Permitted, call: Call | None, sent: Callable[[], None]) -> None:
        """Write a permitted message; whoever sends waits until the server has read enough.

        Raises:
            UpstreamError: the server is gone; nothing was sent.
        """
        try:
            self._child.send(permitted)
        finally:
            sent()
        await self._child.drain()

    async def read(self, hearer: Hearer) -> None:
        """Read its stdout to the end."""
        await self._child.read(self._limit, hearer.heard, hearer.malformed)

    async def stop(self) -> Ended:
        """Close its stdin, and end it if that does not."""
        code = await self._child.stop()
        return Ended(code, f"the server exited with {code}")
