"""How much may go on at once: calls in all, calls of one actor, and streams.

A subscription is a call whose answer may never come, so it counts as the stream that it is. Beyond
a bound a request is refused with `Overloaded`; nothing waits in a queue, and what is there goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from sidecar.conversation import Call
from sidecar.errors import Overloaded
from sidecar.protocol.methods import Direction
from sidecar.protocol.session import Outstanding

CALLS, STREAMS = "calls", "streams"

_TOO_MANY: dict[Hashable, str] = {
    CALLS: "too many calls in flight",
    STREAMS: "too many open streams",
}

MAX_QUESTIONS = 1000
"""Questions of one server that one client has not answered."""


class Load:
    """What goes on now, and the bounds on it."""

    def __init__(self, calls: int = 1000, per_actor: int = 500, streams: int = 10_000) -> None:
        self._most: dict[Hashable, int] = {CALLS: calls, STREAMS: streams}
        self._most_of_actor = per_actor
        self._now: Counter[Hashable] = Counter()
        self.in_flight = 0

    @property
    def streams(self) -> int:
        """Open streams and subscriptions."""
        return self._now[STREAMS]

    def begin(self, call: Call) -> None:
        """Count a call, also one that will be refused."""
        self.in_flight += not _lasts(call)
        self._now.update(_counted(call))

    def end(self, call: Call) -> None:
        """It is over."""
        self.in_flight -= not _lasts(call)
        for each in _counted(call):
            self._leave(each)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream, also one that will be refused, for as long as it is open."""
        self._now[STREAMS] += 1
        try:
            yield
        finally:
            self._leave(STREAMS)

    def exceeded(self, call: Call) -> Overloaded | None:
        """Why a call, which has been counted, is one too many; None when it is not."""
        for each in (STREAMS,) if _opens(call) else _counted(call):
            if self._now[each] > self._most.get(each, self._most_of_actor):
                return Overloaded(_TOO_MANY.get(each, "too many calls of one actor in flight"))
        return None

    def _leave(self, each: Hashable) -> None:
        self._now[each] -= 1
        if not self._now[each]:
            del self._now[each]


def refuse_more_questions(waiting: Outstanding[Call]) -> None:
    """Bound what a server can make us remember: its questions wait until its client answers.

    Raises:
        Overloaded: there are too many.
    """
    if len(waiting) >= MAX_QUESTIONS:
        raise Overloaded("too many questions of the server")


def _counted(call: Call) -> tuple[Hashable, ...]:
    """What a call counts as. A notification is over at once, and a server's question not ours."""
    if _lasts(call):
        return (STREAMS,)
    if call.request_id is None or call.operation.direction is Direction.FROM_SERVER:
        return ()
    return (CALLS, call.actor.keys)


def _lasts(call: Call) -> bool:
    return call.operation.method.target == "subscription" and call.request_id is not None


def _opens(call: Call) -> bool:
    """Whether it asks for a stream, which whoever holds it has counted."""
    targets = call.operation.targets
    return call.operation.method.target == "stream" and targets[0].name != "close"
