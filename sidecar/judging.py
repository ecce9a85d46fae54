"""Putting an action to the policy: the question, the answer, and whether it stands in the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from sidecar.conversation import Call, Conversation, Decider
from sidecar.errors import DecisionError
from sidecar.policy import document, enforcement
from sidecar.policy.decision import Decision, combine
from sidecar.policy.enforcement import Refusal, Rules
from sidecar.protocol.catalog import Named
from sidecar.protocol.jsonrpc import JsonObject, Response
from sidecar.protocol.methods import Listing
from sidecar.protocol.session import Target

PAGE = 1000
"""Items that are asked about at once, where no server says how many."""


class Judge:
    """Asks the decider, and writes its answer, or that there was none, into the call.

    `deadline` and `listing_deadline` are seconds.
    """

    def __init__(
        self,
        *,
        decider: Decider,
        rules: Rules,
        version: str,
        deadline: float,
        listing_deadline: float,
        pod: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._decider = decider
        self._rules = rules
        self._version = version
        self._deadline = deadline
        self._listing_deadline = listing_deadline
        self._pod = pod

    async def action(self, conversation: Conversation, call: Call) -> Refusal | None:
        """Ask about every target of the operation; None when nothing stands in the way."""
        try:
            decisions = [
                await self._decide(conversation, call, each) for each in call.operation.targets
            ]
        except DecisionError as error:
            return _undecided(call, error)
        return self._decided(call, combine(decisions))

    async def negotiation(self, conversation: Conversation, call: Call) -> None:
        """Ask, and go on without an answer: only a revocation will refuse it."""
        with suppress(DecisionError):
            call.decision = await self._decide(conversation, call, call.operation.targets[0])

    async def page(
        self, conversation: Conversation, call: Call, listing: Listing, response: Response
    ) -> Refusal | None:
        """Ask about one page of a listing's answer; None when (some of) it may be shown."""
        question = document.build_listing(
            call.operation,
            listing,
            enforcement.page_items(response, listing),
            call.actor,
            self._environment(conversation, call),
            tasks=conversation.server.tasks,
            pins=conversation.server.offers.pins,
        )
        try:
            decision = await self._query(call, question, self._listing_deadline)
        except DecisionError as error:
            return _undecided(call, error)
        return self._decided(call, decision)

    async def visible(
        self, conversation: Conversation, call: Call, listing: Listing, entries: Sequence[Named]
    ) -> set[str]:
        """The names that the call would be shown of what the catalog has. Raises DecisionError."""
        shown: set[str] = set()
        for start in range(0, len(entries), PAGE):
            page = entries[start : start + PAGE]
            question = document.build_relisting(
                call.operation,
                listing,
                page,
                call.actor,
                self._environment(conversation, call),
                pins=conversation.server.offers.pins,
            )
            decision = await self._query(call, question, self._listing_deadline)
            names = {each.name for each in page}
            if self._decided(call, decision) is not None:
                continue
            unfiltered = decision.visible is None or enforcement.shadowed(decision, self._rules)
            shown |= names if unfiltered else names & (decision.visible or frozenset())
        return shown

    def _decided(self, call: Call, decision: Decision) -> Refusal | None:
        refusal, call.mode = enforcement.judge(decision, self._rules)
        call.decision = decision
        call.verdict = "allow" if decision.allow and refusal is None else "deny"
        call.reasons = refusal.reasons if refusal else decision.reasons
        return refusal

    async def _decide(self, conversation: Conversation, call: Call, target: Target) -> Decision:
        facts = conversation.server.facts(call.operation, target, conversation.offer)
        call.tool_known, call.tool_pinned = facts.tool.known, facts.tool.pinned
        call.resource = facts.resource
        environment = self._environment(conversation, call)
        question = document.build(call.operation, target, call.actor, environment, facts)
        return await self._query(call, question, self._deadline)

    async def _query(self, call: Call, question: JsonObject, deadline: float) -> Decision:
        call.asked = call.asked or time.time_ns()
        try:
            return await self._decider.decide(
                question, deadline=deadline, headers=call.trace.to_opa
            )
        finally:
            call.answered = time.time_ns()

    def _environment(self, conversation: Conversation, call: Call) -> document.Environment:
        return document.Environment(
            enforcer_version=self._version,
            server=conversation.server.name,
            transport=conversation.transport,
            time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            source_address=call.source_address,
            unverified=call.unverified,
            trace_id=call.trace.trace_id,
            pod=self._pod(),
        )


def _undecided(call: Call, error: DecisionError) -> Refusal:
    refusal = enforcement.refusal_of(error)
    call.error, call.verdict, call.reasons = error, "error", refusal.reasons
    return refusal
