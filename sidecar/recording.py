"""The record of a call: its beginning, what was decided about it, and its one end."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from sidecar.conversation import (
    Call,
    Conversation,
    Doorkeeper,
    End,
    Origin,
    Recorder,
    Stranger,
    TraceContext,
    Tracer,
    decision_id,
)
from sidecar.errors import AuditError
from sidecar.policy import enforcement
from sidecar.policy.enforcement import Refusal
from sidecar.policy.identity import Actor
from sidecar.policy.masking import MAX_BYTES, Masking
from sidecar.protocol.catalog import digest
from sidecar.protocol.jsonrpc import Json, JsonObject
from sidecar.protocol.methods import Direction
from sidecar.protocol.session import Bounded, Operation

log = logging.getLogger("sidecar.pipeline")

WITH_CONTENT = frozenset({"tools/call", "prompts/get"})
"""Methods whose arguments and results can be written down."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is written down of a call's content: nothing unless switched on, and then masked."""

    arguments: bool = False
    results: bool = False
    masking: Masking = field(default_factory=Masking)

    def arguments_of(self, call: Call, limit: int = MAX_BYTES) -> Json:
        """The masked arguments; None where they are not to be written down."""
        if not self.arguments or call.operation.message.method not in WITH_CONTENT:
            return None
        return self.masking.mask("arguments", call.operation.params.get("arguments", {}), limit)

    def result_of(self, call: Call, limit: int = MAX_BYTES) -> Json:
        """The masked result that the server gave; None where it is not to be written down."""
        if not self.results or call.operation.message.method not in WITH_CONTENT:
            return None
        return None if call.result is None else self.masking.mask("result", call.result, limit)


NO_CONTENT = Content()

MAX_CAUSES = 2000


class Causes:
    """Which action a later one goes on with: that which made its task, or its earlier round.

    Only for the same actor, since ids and states can be told. A question of a server's belongs to
    the one call that it has not answered, where there is one.
    """

    def __init__(self) -> None:
        self._known: Bounded[tuple[str, Hashable, str], TraceContext] = Bounded(MAX_CAUSES)

    def remember(self, call: Call, result: JsonObject) -> None:
        """Learn from a result what messages that go on with it will name."""
        for name in _named_by(result):
            self._known.remember((call.server, call.actor.keys, name), call.trace)

    def of(
        self, conversation: Conversation, operation: Operation, actor: Actor
    ) -> TraceContext | None:
        """The context of the action that this one goes on with."""
        if operation.direction is Direction.FROM_SERVER:
            waiting = [each for each in conversation.calls if each.forwarded]
            return waiting[0].trace if len(waiting) == 1 else None
        known = (
            self._known.get((conversation.server.name, actor.keys, name))
            for name in _goes_on_with(operation)
        )
        return next((context for context in known if context is not None), None)


def _named_by(result: JsonObject) -> Iterator[str]:
    made = result if result.get("resultType") == "task" else result.get("task")
    if isinstance(made, dict) and isinstance(made.get("taskId"), str):
        yield f"task:{made['taskId']}"
    if result.get("resultType") == "input_required" and "requestState" in result:
        yield f"state:{digest(result['requestState'])}"


def _goes_on_with(operation: Operation) -> Iterator[str]:
    for target in operation.targets:
        if "task" in (target.type, target.kind):
            yield f"task:{target.name}"
    if "requestState" in operation.params:
        yield f"state:{digest(operation.params['requestState'])}"


class Books:
    """Makes calls, and has them written down."""

    def __init__(self, tracer: Tracer, recorders: tuple[Recorder, ...]) -> None:
        self.tracer = tracer
        self._recorders = recorders
        self._causes = Causes()

    def call(self, conversation: Conversation, operation: Operation, origin: Origin) -> Call:
        """An action that begins now."""
        return Call(
            operation=operation,
            actor=origin.actor,
            server=conversation.server.name,
            transport=conversation.transport,
            decision_id=decision_id(),
            trace=self._begin(conversation, operation, origin),
            source_address=origin.source_address,
            server_address=conversation.server.address,
            unverified=origin.unverified,
            received=time.time_ns(),
        )

    def _begin(
        self, conversation: Conversation, operation: Operation, origin: Origin
    ) -> TraceContext:
        """The trace of an action. What a server asks has nothing to do with a client's headers."""
        meta = operation.params.get("_meta")
        cause = origin.cause or self._causes.of(conversation, operation, origin.actor)
        within = cause is not None and operation.direction is Direction.FROM_SERVER
        return self.tracer.begin(
            meta if isinstance(meta, dict) else {}, {} if within else origin.headers, cause
        )

    def answered(self, call: Call, result: JsonObject) -> None:
        """Later messages may go on with this call, by what its result says."""
        self._causes.remember(call, result)

    def decided(self, call: Call) -> Refusal | None:
        """Write the decision down before anything is let through: no evidence, no action."""
        try:
            for recorder in self._recorders:
                recorder.decided(call)
        except AuditError as error:
            log.error("audit record could not be written: %s", error)
            return enforcement.refusal_of(error)
        return None

    def refused(self, stranger: Stranger) -> None:
        """Write down who was not let in."""
        for recorder in self._recorders:
            if isinstance(recorder, Doorkeeper):
                recorder.refused(stranger)

    def finish(self, call: Call, outcome: End, rpc_error: tuple[int, str] | None = None) -> bool:
        """Write down the end of a call, once; only the first end counts. Whether this was it."""
        if call.outcome is not None:
            return False
        call.outcome, call.rpc_error, call.finished = outcome, rpc_error, time.time_ns()
        for recorder in self._recorders:
            recorder.finished(call)
        call.result = call.withdraw = None  # who remembers the call holds on to neither
        return True
