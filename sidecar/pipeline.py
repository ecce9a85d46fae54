"""The one place that knows the order: message, operation, input, decision, outcome, record.

A transport hands every message of a `Conversation` to `Pipeline.from_client` or
`Pipeline.from_server`, and does what the outcome says. `await` stands between a message and its
outcome only where somebody is asked: OPA, or the server for its catalog.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from sidecar.conversation import (
    Ask,
    Call,
    Conversation,
    Decider,
    End,
    Origin,
    Recorder,
    Stranger,
    Ticket,
    Tracer,
)
from sidecar.errors import (
    Overloaded,
    ProtocolError,
    SidecarError,
    UnknownMethod,
    UpstreamError,
)
from sidecar.judging import Judge
from sidecar.learning import learn, observe
from sidecar.limits import Load, refuse_more_questions
from sidecar.offers import CHANGED
from sidecar.policy import enforcement
from sidecar.policy.enforcement import (
    AnswerServer,
    Deliver,
    Delivery,
    Drop,
    Forward,
    Grounds,
    Outcome,
    Permitted,
    Refusal,
    Reply,
    Rules,
)
from sidecar.protocol.jsonrpc import Message, Notification, Request, Response
from sidecar.protocol.methods import Direction, Governed, Listing, Method
from sidecar.protocol.session import Operation, Outstanding, embedded_questions
from sidecar.rechecking import Action, Rechecking, stream_operation
from sidecar.recording import Books
from sidecar.relisting import Relisting

log = logging.getLogger("sidecar.pipeline")

PASSING = frozenset({"ping", "notifications/cancelled", "notifications/progress"})
"""What does not wait for its turn behind requests that are being decided."""

UNKNOWN = Method("_OTHER", "request", "both", (), Governed.DECISION)


class Pipeline:
    """Message in, outcome out."""

    def __init__(
        self,
        *,
        decider: Decider,
        tracer: Tracer,
        recorders: tuple[Recorder, ...],
        rules: Rules,
        version: str,
        deadline: float = 0.5,
        listing_deadline: float = 2.0,
        catalog_wait: float = 2.0,
        load: Load | None = None,
        pod: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._judge = Judge(
            decider=decider,
            rules=rules,
            version=version,
            deadline=deadline,
            listing_deadline=listing_deadline,
            pod=pod,
        )
        self._tracer = tracer
        self._books = Books(tracer, recorders)
        self._rules = rules
        self._version = version
        self._catalog_wait = catalog_wait
        self.load = load or Load()
        self.lists = Relisting(self._judge)
        self.open = Rechecking(self._judge, self._books, rules, finish=self.finish, lag=deadline)

    @property
    def in_flight(self) -> int:
        """Calls that have begun and not ended, without those that last as long as a stream."""
        return self.load.in_flight

    async def from_client(
        self, conversation: Conversation, message: Message, origin: Origin, ask: Ask
    ) -> tuple[Outcome, Ticket | None, Call | None]:
        """The outcome of a client's message.

        A `Forward` comes with its call, to be ended when the server answers or can't be reached,
        and with a ticket, to be released once the bytes have left.

        Raises:
            ProtocolError: the message is refused before it is anybody's action.

        """
        if isinstance(message, Response):
            return self._answer_server(conversation, message), None, None
        try:
            operation = conversation.session.receive(message, Direction.FROM_CLIENT)
        except UnknownMethod as error:
            return self._unknown(conversation, message, origin, error), None, None
        call = self._open(conversation, operation, origin)
        ticket = None if operation.message.method in PASSING else conversation.turn.take()
        try:
            outcome = await self._govern(conversation, call, ask)
            if ticket is not None:
                await ticket.wait()
            outcome = self._settle(conversation, call, outcome)
        except BaseException:
            self.abandon(conversation, call)
            if ticket is not None:
                ticket.release()
            raise
        if not isinstance(outcome, Forward) and ticket is not None:
            ticket.release()
            ticket = None
        return outcome, ticket, call

    async def stream(
        self,
        conversation: Conversation,
        action: Action,
        origin: Origin,
    ) -> Refusal | None:
        """Ask whether a stream may be opened, resumed or closed; None when it may."""
        call = self._open(conversation, stream_operation(conversation, action), origin)
        conversation.opened = call.trace
        return await self._ask(conversation, call)

    async def from_server(
        self, conversation: Conversation, message: Message, origin: Origin
    ) -> Delivery:
        """What becomes of a server's message on its way to the client."""
        if isinstance(message, Response):
            return await self._answer_client(conversation, message)
        try:
            operation = conversation.session.receive(message, Direction.FROM_SERVER)
            if isinstance(message, Request):
                refuse_more_questions(conversation.server_calls)
        except SidecarError as error:
            return self._refuse_server(conversation, message, origin, error)
        if operation.method.governed is Governed.TABLE:
            if await self._judge_embedded(conversation, operation.params, origin) is not None:
                log.warning("dropped a message of the server, for what it asks")
                return Drop()
            return self._pass_from_server(conversation, operation, origin)
        return await self._question(conversation, operation, origin)

    def upstream_failed(
        self, conversation: Conversation, call: Call, error: UpstreamError | Overloaded
    ) -> Response | None:
        """End a permitted call that no server will answer; the reply for its caller."""
        self._forget(conversation, call)
        refusal = enforcement.refusal_of(error)
        call.reasons = refusal.reasons
        self.finish(call, "upstream_error", (refusal.rpc_code, str(error)))
        return enforcement.reply(call.operation, refusal, call.decision_id, self._rules)

    def abandon(self, conversation: Conversation, call: Call) -> None:
        """The client went away, or took its request back: what happened is recorded."""
        self._let_go(conversation, call)
        self._forget(conversation, call)
        self.finish(call, "cancelled")

    def suspend(self, conversation: Conversation, call: Call) -> None:
        """The stream of a call ended before its answer, which may come on one that resumes it.

        Its record stays open, and it weighs on nobody: who knows whether its client comes back.
        """
        if call.outcome is None and self._let_go(conversation, call):
            call.suspended = True
            self.load.end(call)
        else:
            self.abandon(conversation, call)

    def close(self, conversation: Conversation) -> None:
        """The conversation is over: nothing that it waits for will come."""
        for call in (*conversation.calls.drain(), *conversation.server_calls.drain()):
            self.finish(call, "cancelled")
        self.forget(conversation)

    def forget(self, conversation: Conversation) -> None:
        """Nobody can come back to this conversation: what is suspended in it is cancelled."""
        self.open.release(conversation)
        self.lists.forget(conversation)
        if conversation.lasting:
            conversation.server.offers.forget(conversation.caller)
        for call in conversation.calls.drain_abandoned():
            self.finish(call, "cancelled")

    def policy_changed(self) -> None:
        """The policy or its data is not what it was."""
        self.open.change()
        self.lists.change()

    def malformed(self, error: ProtocolError) -> None:
        """Note a message that was refused before it was anybody's action."""
        log.warning("refused a message: %s", error)
        self._tracer.malformed(error.code)

    def not_let_in(self, stranger: Stranger) -> None:
        """Note somebody whose credential is refused, or who has none and needs one."""
        self._books.refused(stranger)

    def finish(self, call: Call, outcome: End, rpc_error: tuple[int, str] | None = None) -> None:
        """Write down the end of a call, once; only the first end counts."""
        if self._books.finish(call, outcome, rpc_error):
            self.open.release(call)
            self.lists.release(call)
            if not call.suspended:
                self.load.end(call)

    # ------------------------------------------------------------------ client to server

    async def _govern(self, conversation: Conversation, call: Call, ask: Ask) -> Outcome:
        """Ask whom the method's row says must be asked."""
        operation = call.operation
        if (overloaded := self._overloaded(call)) is not None:
            return self._refuse(call, overloaded)
        match operation.method.governed:
            case Governed.DECISION:
                self.open.hold_call(conversation, call)
                ask = _on_behalf(call, ask)
                await learn(conversation, operation, ask, self._version, self._catalog_wait)
                refusal = await self._judge.action(conversation, call)
                if refusal is not None:
                    return self._refuse(call, refusal)
                return self._outcome(call, _permit(call, self._rules))
            case Governed.NEGOTIATION:
                await self._judge.negotiation(conversation, call)
                permitted = enforcement.by_table(operation, call.trace.to_upstream, call.decision)
                return self._outcome(call, permitted)
            case _:
                return self._outcome(call, enforcement.by_table(operation, call.trace.to_upstream))

    def _overloaded(self, call: Call) -> Refusal | None:
        error = self.load.exceeded(call)
        if error is None:
            return None
        refusal = enforcement.refusal_of(error)
        call.verdict, call.reasons = refusal.verdict, refusal.reasons
        return refusal

    def _outcome(self, call: Call, permitted: Permitted | Refusal) -> Outcome:
        if isinstance(permitted, Refusal):
            return self._refuse(call, permitted)
        refusal = self._books.decided(call)
        if refusal is not None:
            return self._refuse(call, refusal)
        return Forward(permitted.on(call.grounds))

    def _refuse(self, call: Call, refusal: Refusal) -> Outcome:
        call.verdict, call.reasons = refusal.verdict, refusal.reasons
        if call.decision is None or refusal.verdict == "deny":
            self._books.decided(call)
        response = enforcement.reply(call.operation, refusal, call.decision_id, self._rules)
        return Drop() if response is None else Reply(response, refusal.status)

    def _settle(self, conversation: Conversation, call: Call, outcome: Outcome) -> Outcome:
        """The last look before a message leaves, in its turn."""
        operation = call.operation
        if call.cancelled or call.outcome is not None:  # taken back, or answered for by now
            self._forget(conversation, call)
            self.finish(call, "cancelled")
            return Drop()
        if call.withdrawn is not None and isinstance(outcome, Forward):
            outcome = self._refuse(call, call.withdrawn)
        if not isinstance(outcome, Forward):
            self._forget(conversation, call)
            self.finish(call, _end_of(call), _rpc_error(outcome))
            return outcome
        call.forwarded = time.time_ns()
        if isinstance(operation.message, Notification):
            return self._settle_notification(conversation, call, outcome)
        if operation.message.method == "server/discover":
            conversation.discovering = asyncio.get_running_loop().create_future()
        return outcome

    def _settle_notification(
        self, conversation: Conversation, call: Call, outcome: Forward
    ) -> Outcome:
        params, method = call.operation.params, call.operation.message.method
        if method == "notifications/initialized":
            conversation.session.initialized = True
            conversation.greeted.set()
        if method == "notifications/cancelled" and self._cancel(
            conversation, params.get("requestId")
        ):
            self.finish(call, "cancelled")
            return Drop()
        self.finish(call, "success")
        return outcome

    def _cancel(self, conversation: Conversation, request_id: Any) -> bool:
        """Take a request back; True when the server has not seen it and need not hear of it."""
        if not isinstance(request_id, (str, int)):
            return False
        call = conversation.calls.get(request_id) or conversation.calls.abandoned(request_id)
        if call is None or call.operation.method.name == "initialize":
            return False
        if not call.forwarded:
            call.cancelled = True
            return True
        self.abandon(conversation, call)
        return False

    def _answer_server(self, conversation: Conversation, response: Response) -> Outcome:
        """A client's answer goes on only when the server asked for it."""
        call = _answered(conversation.server_calls, response)
        if call is None:
            log.warning("dropped an answer that no server asked for")
            return Drop()
        permitted = enforcement.answer_to_server(response, call.operation).on(call.grounds)
        self.finish(call, "success" if response.error is None else "tool_error", _error(response))
        return Forward(permitted)

    def _unknown(
        self,
        conversation: Conversation,
        message: Request | Notification,
        origin: Origin,
        error: UnknownMethod,
    ) -> Outcome:
        """A method outside the table: denied, recorded, and nobody is asked."""
        call = self._open_unknown(conversation, message, Direction.FROM_CLIENT, origin)
        outcome = self._refuse(call, enforcement.refusal_of(error))
        self._forget(conversation, call)
        self.finish(call, "denied", _rpc_error(outcome))
        return outcome

    # ------------------------------------------------------------------ server to client

    async def _answer_client(self, conversation: Conversation, response: Response) -> Delivery:
        """A server's answer: only to what was asked, and judged where the row says so."""
        call = _answered(conversation.calls, response)
        if call is None:
            if response.id is None and response.error is not None:
                return Deliver()
            log.warning("dropped an answer that no client asked for")
            return Drop()
        try:
            delivery = await self._judge_answer(conversation, call, response)
        except BaseException:
            self.finish(call, "cancelled")
            raise
        return Drop() if call.withdrawn is not None else delivery

    async def _judge_answer(
        self, conversation: Conversation, call: Call, response: Response
    ) -> Delivery:
        self._note(conversation, call, response)
        listing = call.operation.method.listing
        if listing is not None and response.error is None:
            return await self._judge_page(conversation, call, listing, response)
        origin = Origin(
            call.actor, call.source_address, unverified=call.unverified, cause=call.trace
        )
        result = response.result
        if (refusal := await self._judge_embedded(conversation, result, origin)) is not None:
            return self._fail_answer(call, refusal)
        self.finish(call, _end_of_response(response), _error(response))
        return Deliver()

    def _note(self, conversation: Conversation, call: Call, response: Response) -> None:
        """Learn from an answer what later messages will be judged by."""
        name, result = call.operation.message.method, response.result
        call.result = result
        if name == "initialize" and response.error is None:
            conversation.session.negotiated(response)
            self.open.hold_session(conversation, call)
        probe = conversation.discovering
        if name == "server/discover" and probe is not None and not probe.done():
            probe.set_result(response.error is None)
        observe(conversation, call.operation, response)
        if isinstance(result, dict):
            conversation.server.remember(call.operation, call.actor, result)
            self._books.answered(call, result)

    async def _judge_page(
        self, conversation: Conversation, call: Call, listing: Listing, response: Response
    ) -> Delivery:
        """Take out of a page what the actor may not see; a listing is never refused for policy.

        No decision about it is an error, never an empty list that looks like the truth.
        """
        refusal = await self._judge.page(conversation, call, listing, response)
        unwritten = self._books.decided(call)
        failed = refusal if refusal is not None and refusal.verdict == "error" else unwritten
        if failed is not None:
            return self._fail_answer(call, failed)
        self.finish(call, "success")
        assert call.decision is not None
        shown = response
        if refusal is not None:
            shown = enforcement.empty_page(response, listing)
        elif not enforcement.shadowed(call.decision, self._rules):
            shown = enforcement.filter_page(response, listing, call.decision)
        self.lists.shown(conversation, call, listing, shown)
        return Deliver(None if shown is response else shown)

    def _fail_answer(self, call: Call, refusal: Refusal) -> Delivery:
        """The client gets a refusal in place of the server's answer."""
        self.finish(call, _end_of(refusal), (refusal.rpc_code, refusal.reasons[0].code))
        return Deliver(enforcement.reply(call.operation, refusal, call.decision_id, self._rules))

    async def _judge_embedded(
        self, conversation: Conversation, value: Any, origin: Origin
    ) -> Refusal | None:
        """Judge the questions inside a result or a task's state like those of the server's own."""
        for question in embedded_questions(value) if isinstance(value, dict) else ():
            try:
                operation = conversation.session.receive_embedded(question)
            except SidecarError as error:
                return enforcement.refusal_of(error)
            refusal = await self._ask(conversation, self._open(conversation, operation, origin))
            if refusal is not None:
                return refusal
        return None

    async def _ask(self, conversation: Conversation, call: Call) -> Refusal | None:
        """Judge and record an action that is over once it is decided."""
        try:
            refusal = self._overloaded(call) or await self._judge.action(conversation, call)
        except BaseException:
            self.finish(call, "cancelled")
            raise
        unwritten = self._books.decided(call)
        refusal = refusal or unwritten
        self.finish(call, "success" if refusal is None else _end_of(refusal))
        return refusal

    def _pass_from_server(
        self, conversation: Conversation, operation: Operation, origin: Origin
    ) -> Delivery:
        if (family := CHANGED.get(operation.message.method)) is not None:
            conversation.offer.forget(family)
        if operation.message.method == "notifications/subscriptions/acknowledged":
            self.lists.subscribed(conversation, operation.params)
        if operation.message.method == "notifications/cancelled":
            self._taken_back(conversation, operation.params.get("requestId"))
        if isinstance(operation.message, Request):
            call = self._open(conversation, operation, origin, conversation.server_calls)
            call.forwarded = time.time_ns()
        return Deliver()

    def _taken_back(self, conversation: Conversation, request_id: Any) -> None:
        """The server waits no more for the answer to a question of its own."""
        if isinstance(request_id, (str, int)):
            call = conversation.server_calls.answer(request_id)
            if call is not None:
                self.finish(call, "cancelled")

    async def _question(
        self, conversation: Conversation, operation: Operation, origin: Origin
    ) -> Delivery:
        """A server's question to the client is an action; the actor stays the client."""
        call = self._open(conversation, operation, origin, conversation.server_calls)
        try:
            refusal = await self._judge.action(conversation, call)
        except BaseException:
            conversation.server_calls.answer(call.request_id)
            self.finish(call, "cancelled")
            raise
        if call.outcome is not None:  # the server has taken it back meanwhile
            return Drop()
        unwritten = self._books.decided(call)
        refusal = refusal or unwritten
        if refusal is None:
            call.forwarded = time.time_ns()
            return Deliver()
        return self._answer_refused(conversation, call, refusal)

    def _answer_refused(self, conversation: Conversation, call: Call, refusal: Refusal) -> Delivery:
        """The server gets an answer to a question that the client never sees."""
        conversation.server_calls.answer(call.request_id)
        self.finish(call, _end_of(refusal), (refusal.rpc_code, refusal.reasons[0].code))
        response = enforcement.reply(call.operation, refusal, call.decision_id, self._rules)
        if response is None:
            return Drop()
        answer = enforcement.answer_to_server(response, call.operation)
        return AnswerServer(answer.on(call.grounds))

    def _refuse_server(
        self,
        conversation: Conversation,
        message: Request | Notification,
        origin: Origin,
        error: SidecarError,
    ) -> Delivery:
        call = self._open_unknown(conversation, message, Direction.FROM_SERVER, origin)
        refusal = enforcement.refusal_of(error)
        call.verdict, call.reasons = refusal.verdict, refusal.reasons
        self._books.decided(call)
        return self._answer_refused(conversation, call, refusal)

    # ------------------------------------------------------------------ book-keeping

    def _open(
        self,
        conversation: Conversation,
        operation: Operation,
        origin: Origin,
        waiting: Outstanding[Call] | None = None,
    ) -> Call:
        call = self._books.call(conversation, operation, origin)
        if call.request_id is not None:
            (conversation.calls if waiting is None else waiting).ask(call.request_id, call)
        self.load.begin(call)
        return call

    def _open_unknown(
        self,
        conversation: Conversation,
        message: Request | Notification,
        direction: Direction,
        origin: Origin,
    ) -> Call:
        operation = conversation.session.unread(message, UNKNOWN, direction)
        from_client = direction is Direction.FROM_CLIENT
        waiting = conversation.calls if from_client else conversation.server_calls
        return self._open(conversation, operation, origin, waiting)

    def _let_go(self, conversation: Conversation, call: Call) -> bool:
        """Nobody waits for this answer now, which may still come; whether it is remembered."""
        waits = conversation.calls.get(call.request_id) is call
        if not (conversation.lasting and call.forwarded and waits):
            return False
        assert call.request_id is not None
        forgotten = conversation.calls.abandon(call.request_id)
        if forgotten is not None:
            self.finish(forgotten, "cancelled")
        return True

    def _forget(self, conversation: Conversation, call: Call) -> None:
        if conversation.calls.get(call.request_id) is call:
            conversation.calls.answer(call.request_id)
        probe = conversation.discovering
        if call.operation.message.method == "server/discover" and probe and not probe.done():
            probe.set_result(False)


def _answered(waiting: Outstanding[Call], response: Response) -> Call | None:
    """The call that this answers; one that has not been let through has not been asked."""
    call = waiting.get(response.id)
    return None if call is not None and not call.forwarded else waiting.answer(response.id)


def _on_behalf(call: Call, ask: Ask) -> Ask:
    """A way to ask that names the caller: a server may list to each what is for them."""
    grounds = Grounds(chain=call.actor.chain)
    return lambda permitted: ask(permitted.on(grounds))


def _permit(call: Call, rules: Rules) -> Permitted | Refusal:
    assert call.decision is not None
    return enforcement.by_decision(call.operation, call.decision, rules, call.trace.to_upstream)


def _end_of(refused: Refusal | Call) -> End:
    return "denied" if refused.verdict == "deny" else "policy_error"


def _end_of_response(response: Response) -> End:
    if response.error is not None:
        return "upstream_error"
    failed = isinstance(response.result, dict) and response.result.get("isError") is True
    return "tool_error" if failed else "success"


def _error(response: Response) -> tuple[int, str] | None:
    if response.error is None:
        return None
    return response.error["code"], str(response.error.get("message", ""))


def _rpc_error(outcome: Outcome) -> tuple[int, str] | None:
    return _error(outcome.response) if isinstance(outcome, Reply) else None
