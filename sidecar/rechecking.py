"""What is open is asked again when the policy changes: calls in flight, streams, sessions.

Each is held with the action that began it, and is put to the policy anew by that. A stream ends
with any refusal, a call or a session with a revocation only. No decision changes nothing, and comes
again. A few are asked at a time, so that those who call meanwhile hardly notice.

A stream also ends, and nobody is asked, when the evidence of whoever opened it is good no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

from sidecar.conversation import Call, Conversation, End, Origin, decision_id
from sidecar.due import Due, few_at_a_time
from sidecar.errors import Unauthenticated
from sidecar.judging import Judge
from sidecar.policy import enforcement
from sidecar.policy.decision import Reason
from sidecar.policy.enforcement import Refusal, Rules
from sidecar.protocol.jsonrpc import Notification
from sidecar.protocol.methods import Direction, Governed, Method
from sidecar.protocol.session import Operation, Target
from sidecar.recording import Books

log = logging.getLogger("sidecar.pipeline")

AT_ONCE = 8
"""Questions at a time."""

TO_CLOSE = 1.0
"""Seconds that a client and its server have to take the end of a call."""

WITHDRAWN = "what was allowed before is refused now"
"""What servers and logs are told."""

EXPIRED = Refusal(
    "deny",
    (Reason("credential_expired", "the credential that opened it has expired"),),
    Unauthenticated.rpc_code,
)

STREAM = Method("stream", "stream", "client", (), Governed.DECISION, "stream")

Action = Literal["open", "resume", "close"]


class Kind(IntEnum):
    """What is held, in the order in which it is ended: answers go out before streams close."""

    CALL = 0
    STREAM = 1
    SESSION = 2


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Something open: the action that began it, and how it is ended.

    A call in flight is ended by what its transport has put into it.
    """

    kind: Kind
    conversation: Conversation
    call: Call
    end: Callable[[], None] | None = None

    @property
    def key(self) -> Call | Conversation:
        """What it is known by to those who say that it is over."""
        return self.conversation if self.kind is Kind.SESSION else self.call

    @property
    def in_flight(self) -> bool:
        """Whether it is a request without an answer, the end of which is its own record's."""
        return self.kind is not Kind.SESSION and self.call.request_id is not None

    @property
    def question(self) -> Hashable:
        """What is alike is asked about once: the sessions of one client may be very many."""
        if self.kind is not Kind.SESSION:
            return self
        actor = self.call.actor
        return actor.keys, actor.token.id if actor.token else None, self.conversation.server.name


Finish = Callable[[Call, End, tuple[int, str]], None]
"""As `Pipeline.finish`."""


class Rechecking:
    """Keeps what is open, and asks about all of it again after each `change`.

    `lag` is how long (in seconds) an answer of the policy before the change may still be on its
    way: what it has let begin is asked about as well.
    """

    def __init__(
        self, judge: Judge, books: Books, rules: Rules, *, finish: Finish, lag: float
    ) -> None:
        self._judge = judge
        self._books = books
        self._rules = rules
        self._finish = finish
        self._lag = int(lag * 1e9)
        self._changed = 0
        self._held: dict[Call | Conversation, Held] = {}
        self._due: Due[Held, None] = Due()
        self._closing: set[asyncio.Task[None]] = set()
        self._expiring: dict[Call | Conversation, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._held)

    # ------------------------------------------------------------------ what is open

    def hold_call(self, conversation: Conversation, call: Call) -> None:
        """A request is being judged, and then on its way; a subscription lasts as a stream does."""
        if call.request_id is not None:
            lasts = call.operation.method.target == "subscription"
            kind = Kind.STREAM if lasts else Kind.CALL
            self._hold(Held(kind, conversation, call))

    def hold_session(self, conversation: Conversation, call: Call) -> None:
        """A handshake has gone well: a session is there, if its transport can end one."""
        if conversation.end is not None:
            self._hold(Held(Kind.SESSION, conversation, call, conversation.end))

    def hold_pipe(self, conversation: Conversation, origin: Origin) -> None:
        """Somebody has been let through on a pipe that no handshake has begun."""
        if conversation.end is not None and conversation not in self._held:
            call = self._books.call(conversation, stream_operation(conversation, "open"), origin)
            self._hold(Held(Kind.SESSION, conversation, call, conversation.end))

    @contextmanager
    def stream(
        self, conversation: Conversation, action: Action, origin: Origin, end: Callable[[], None]
    ) -> Iterator[None]:
        """A stream is open, which `end` closes."""
        origin = replace(origin, cause=conversation.opened)
        call = self._books.call(conversation, stream_operation(conversation, action), origin)
        self._hold(Held(Kind.STREAM, conversation, call, end))
        try:
            yield
        finally:
            self.release(call)

    def release(self, key: Call | Conversation) -> None:
        """It is over."""
        self._held.pop(key, None)
        if (timer := self._expiring.pop(key, None)) is not None:
            timer.cancel()

    def _hold(self, held: Held) -> None:
        """Keep it. A request is held before it is asked about, anything else only after that."""
        self._held[held.key] = held
        ends = held.call.actor.expires_at
        if held.kind is Kind.STREAM and ends is not None:
            left = max(0.0, ends - time.time())
            self._expiring[held.key] = asyncio.get_running_loop().call_later(
                left, self._expire, held
            )
        if not held.in_flight and held.call.received < self._changed + self._lag:
            self._due.add({held: None})

    def _is_open(self, held: Held) -> bool:
        return self._held.get(held.key) is held

    # ------------------------------------------------------------------ asking again

    def change(self) -> None:
        """The policy or its data is not what it was: everything is to be asked about."""
        self._changed = time.time_ns()
        self._due.add(dict.fromkeys(self._held.values()))

    async def step(self) -> None:
        """Wait until something is due, and ask about it; to be done for as long as we live."""
        await self._due.wait()
        await self.sweep()

    async def sweep(self) -> None:
        """Ask once about all that is due; what got no decision stays due."""
        due = self._due.take()
        for kind in Kind:
            alike: dict[Hashable, list[Held]] = defaultdict(list)
            for held in due:
                if held.kind is kind:
                    alike[held.question].append(held)
            await few_at_a_time(alike.values(), AT_ONCE, self._try)
            if self._closing:
                await asyncio.wait(set(self._closing))

    async def _try(self, group: list[Held]) -> None:
        try:
            await self._ask(group)
        except Exception:
            log.exception("what is open could not be asked about")
            self._due.put_back(dict.fromkeys(group))

    async def _ask(self, group: list[Held]) -> None:
        """Ask about the first of those that are alike, and end all of them if that is so."""
        still = [each for each in group if self._is_open(each)]
        if not still:
            return
        asked = self._again(still[0])
        refusal = await self._judge.action(still[0].conversation, asked)
        if refusal is None:
            return
        if refusal.verdict == "error":
            self._due.put_back(dict.fromkeys(still))
            return
        revoked = asked.decision is not None and asked.decision.revoked
        if revoked or still[0].kind is Kind.STREAM:
            for held in filter(self._is_open, still):
                self._end(held, asked if held is still[0] else self._again(held), refusal)

    def _again(self, held: Held) -> Call:
        """The same action, now: with a record of its own, unless that of the call is open."""
        call, begin = held.call, self._books.tracer.begin
        return replace(
            call,
            decision_id=call.decision_id if held.in_flight else decision_id(),
            trace=begin({}, {}, call.trace) if held.kind is Kind.SESSION else call.trace,
            received=time.time_ns(),
            asked=0,
            answered=0,
            forwarded=0,
            finished=0,
            decision=None,
            error=None,
            verdict="allow",
            reasons=(),
            outcome=None,
            rpc_error=None,
        )

    # ------------------------------------------------------------------ ending

    def _expire(self, held: Held) -> None:
        if self._is_open(held):
            self._end(held, self._again(held), EXPIRED)

    def _end(self, held: Held, asked: Call, refusal: Refusal) -> None:
        code = refusal.reasons[0].code
        log.warning("ending a %s that is refused now: %s", held.kind.name.lower(), code)
        self.release(held.key)
        if held.in_flight:
            self._withdraw(held, asked, refusal)
            return
        asked.verdict, asked.reasons = refusal.verdict, refusal.reasons
        self._books.decided(asked)
        self._books.finish(asked, "denied", (refusal.rpc_code, code))
        if held.end is not None:
            held.end()

    def _withdraw(self, held: Held, asked: Call, refusal: Refusal) -> None:
        """End a call in flight. One that waits to be forwarded is refused when its turn comes."""
        call = held.call
        call.withdrawn = refusal
        if not call.forwarded:
            return
        call.decision, call.mode = asked.decision, asked.mode
        call.asked, call.answered = asked.asked, asked.answered
        call.verdict, call.reasons = refusal.verdict, refusal.reasons
        self._books.decided(call)
        told = enforcement.too_late(refusal) if held.kind is Kind.CALL else refusal
        reply = enforcement.reply(call.operation, told, call.decision_id, self._rules)
        waiting, withdraw = held.conversation.calls, call.withdraw
        if waiting.get(call.request_id) is call:
            waiting.answer(call.request_id)
        self._finish(call, "denied", (refusal.rpc_code, refusal.reasons[0].code))
        if withdraw is not None and reply is not None:
            self._close(withdraw(reply))

    def _close(self, work: Awaitable[None]) -> None:
        task = asyncio.get_running_loop().create_task(_within(TO_CLOSE, work))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def stream_operation(conversation: Conversation, action: Action) -> Operation:
    """A stream is opened, resumed or closed."""
    message, target = Notification(f"stream/{action}"), Target("stream", action)
    return conversation.session.unread(message, STREAM, Direction.FROM_CLIENT, target)


async def _within(seconds: float, work: Awaitable[None]) -> None:
    """Do `work`, for as long as it may take; what goes wrong is no matter of anybody else's."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        log.warning("the end of a call was not taken in time")
    except Exception:
        log.exception("a call could not be ended")
