"""The record of a call: its beginning, what was decided about it, and its one end."""

from __future__ import annotations

import logging
import time

from sidecar.conversation import (
    Call,
    Conversation,
    End,
    Origin,
    Recorder,
    Tracer,
    decision_id,
)
from sidecar.errors import AuditError
from sidecar.policy import enforcement
from sidecar.policy.enforcement import Refusal
from sidecar.protocol.session import Operation

log = logging.getLogger("sidecar.pipeline")


class Books:
    """Makes calls, and has them written down."""

    def __init__(self, tracer: Tracer, recorders: tuple[Recorder, ...]) -> None:
        self.tracer = tracer
        self._recorders = recorders

    def call(self, conversation: Conversation, operation: Operation, origin: Origin) -> Call:
        """An action that begins now."""
        meta = operation.params.get("_meta")
        return Call(
            operation=operation,
            actor=origin.actor,
            server=conversation.server.name,
            transport=conversation.transport,
            decision_id=decision_id(),
            trace=self.tracer.begin(meta if isinstance(meta, dict) else {}, origin.headers),
            source_address=origin.source_address,
            unverified=origin.unverified,
            received=time.time_ns(),
        )

    def decided(self, call: Call) -> Refusal | None:
        """Write the decision down before anything is let through: no evidence, no action."""
        try:
            for recorder in self._recorders:
                recorder.decided(call)
        except AuditError as error:
            log.error("audit record could not be written: %s", error)
            return enforcement.refusal_of(error)
        return None

    def finish(self, call: Call, outcome: End, rpc_error: tuple[int, str] | None = None) -> bool:
        """Write down the end of a call, once; only the first end counts. Whether this was it."""
        if call.outcome is not None:
            return False
        call.outcome, call.rpc_error, call.finished = outcome, rpc_error, time.time_ns()
        for recorder in self._recorders:
            recorder.finished(call)
        return True
