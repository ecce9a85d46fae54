"""A conversation to play with: what was said, what left and what was decided, compared at each end.

A client, a server and a policy do what they like around the real pipeline, one step at a time. What
must never happen fails in the step in which it happens.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from hypothesis import note

from sidecar.conversation import Call, Conversation, Origin, Server, Ticket, TraceContext
from sidecar.errors import (
    DecisionError,
    DecisionUnavailable,
    ProtocolError,
    UpstreamError,
)
from sidecar.pipeline import PASSING, Pipeline
from sidecar.policy.decision import Decision
from sidecar.policy.enforcement import (
    AnswerServer,
    Deliver,
    Drop,
    Forward,
    Permitted,
    Reply,
    Rules,
)
from sidecar.protocol.jsonrpc import (
    JsonObject,
    Message,
    Notification,
    Request,
    RequestId,
    Response,
    decode,
    encode,
)
from sidecar.protocol.methods import Direction, Era, Governed, Listing
from sidecar.protocol.session import Session
from tests.support.fakes import (
    ANA,
    REVOKED,
    MemoryServer,
    RecordingRecorder,
    plain,
    tool,
)
from tests.support.messages import (
    TABLE,
    is_about,
)

T = TypeVar("T")
Key = tuple[type, RequestId]
Answer = Decision | DecisionError

LATE = DecisionUnavailable("OPA did not answer", detail="timeout")


def key_of(request_id: RequestId) -> Key:
    return type(request_id), request_id


# ── What the model remembers ──────────────────────────────────────────────────────────────────────


@dataclass(eq=False, slots=True)
class Question:
    """What the policy was asked, under the trace of its action, and what it said."""

    trace: str
    document: JsonObject
    future: asyncio.Future[Decision]
    answer: Answer | None = None

    @property
    def allowed(self) -> bool:
        return isinstance(self.answer, Decision) and self.answer.allow


@dataclass(slots=True)
class HeldDecider:
    """Answers when, and in the order that, the model says."""

    questions: list[Question] = field(default_factory=list)

    async def decide(
        self, document: JsonObject, *, deadline: float, headers: Mapping[str, str]
    ) -> Decision:
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        question = Question(headers["traceparent"], copy.deepcopy(document), future)
        self.questions.append(question)
        return await future

    @property
    def open(self) -> list[Question]:
        return [each for each in self.questions if not each.future.done()]

    def about(self, trace: TraceContext) -> list[Question]:
        return [each for each in self.questions if each.trace == trace.to_opa["traceparent"]]


@dataclass(slots=True)
class NumberingTracer:
    """Each action has a trace of its own, so that what left can be held to what was asked."""

    begun: int = 0

    def begin(
        self,
        meta: Mapping[str, object],
        headers: Mapping[str, str],
        cause: TraceContext | None = None,
    ) -> TraceContext:
        self.begun += 1
        parent = f"00-{self.begun:032x}-{self.begun:016x}-01"
        carrier = {"traceparent": parent}
        return TraceContext(f"{self.begun:032x}", carrier, carrier)

    def malformed(self, code: str) -> None:
        """Counted elsewhere."""


State = Literal["waiting", "refused", "forwarded", "answering", "answered", "late", "gone"]


@dataclass(eq=False, slots=True)
class Said:
    """A message of the client: what became of it, and how often it was answered."""

    number: int
    message: Message
    slow: bool
    state: State = "waiting"
    answers: int = 0
    taken_back: bool = False
    call: Call | None = None
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> Key | None:
        return key_of(self.message.id) if isinstance(self.message, Request) else None


@dataclass(eq=False, slots=True)
class Asked:
    """A question of the server's, until it is answered or taken back."""

    delivered: bool = False


# ── The conversation ──────────────────────────────────────────────────────────────────────────────


class Talk:
    """The pipeline between its scripted neighbours, and the checks at each of its ends."""

    def __init__(self, lasting: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.decider, self.recorder = HeldDecider(), RecordingRecorder()
        self.tracer, self.server = NumberingTracer(), MemoryServer(([tool("a"), tool("b")],))
        self.pipeline = Pipeline(
            decider=self.decider,
            tracer=self.tracer,
            recorders=(self.recorder,),
            rules=Rules(),
            version="0.0.0",
            catalog_wait=0,
        )
        self.conversation = Conversation(Session(TABLE), Server("tickets"), "stdio", lasting)
        self.origin = Origin(ANA)
        self.said: list[Said] = []
        self.asked: dict[Key, Asked] = {}
        self.writing: list[tuple[Said, Ticket]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.last_left = 0

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(coroutine)
        self.tasks.append(task)
        return task

    def settle(self) -> None:
        """Until nobody has anything to do; whatever failed, fails here."""

        async def idle() -> None:
            for _ in range(20 + 4 * len(self.tasks)):
                await asyncio.sleep(0)

        self.loop.run_until_complete(idle())
        done = [each for each in self.tasks if each.done()]
        self.tasks = [each for each in self.tasks if not each.done()]
        for each in done:
            if not each.cancelled():
                each.result()

    def close(self) -> None:
        """Decide what is undecided, write what is unwritten, and end the conversation."""
        try:
            while self.decider.open or self.writing:
                for question in self.decider.open:
                    self.decide(question, LATE)
                self.write_all()
                self.settle()
            assert self.tasks == []
            self.pipeline.close(self.conversation)
        finally:
            self.loop.close()

    # ---------------------------------------------------------------- the policy and the pipe

    def decide(self, question: Question, answer: Answer) -> None:
        question.answer = answer
        if isinstance(answer, Decision):
            question.future.set_result(answer)
        else:
            question.future.set_exception(answer)

    def write_all(self) -> None:
        for _, ticket in self.writing:
            ticket.release()
        self.writing.clear()

    # ---------------------------------------------------------------- client to server

    def client_says(self, message: Message, slow: bool = False) -> None:
        said = Said(len(self.said) + 1, copy.deepcopy(message), slow)
        self.said.append(said)
        said.task = self.start(self._from_client(said, message))

    async def _from_client(self, said: Said, message: Message) -> None:
        wanted = self._wanted(message) if isinstance(message, Response) else False
        try:
            outcome, ticket, said.call = await self.pipeline.from_client(
                self.conversation, message, self.origin, self.server.ask
            )
        except ProtocolError as error:
            self._is_a_fair_error(said, error)
            self._answered(said, "refused")
            return
        except asyncio.CancelledError:
            said.state = "gone"
            raise
        if isinstance(message, Notification) and message.method == "notifications/cancelled":
            self._take_back((message.params or {}).get("requestId"))
        match outcome:
            case Forward(permitted):
                assert not isinstance(message, Response) or wanted
                self._leaves(said, permitted, ticket)
            case Reply(response):
                self._is_a_fair_refusal(said, response)
                self._answered(said, "refused")
            case Drop():
                assert not isinstance(message, Request) or said.taken_back
                assert not wanted
                said.state = "gone"

    def _wanted(self, response: Response) -> bool:
        """Whether a server waits for this; then it does no more."""
        key = None if response.id is None else key_of(response.id)
        if key is None or key not in self.asked or not self.asked[key].delivered:
            return False
        del self.asked[key]
        return True

    def _take_back(self, request_id: Any) -> None:
        if not isinstance(request_id, (str, int)):
            return
        for said in self.said:
            if said.key == key_of(request_id):
                self._goes_away(said)

    def _goes_away(self, said: Said) -> None:
        """The client waits no more for its answer, which may come all the same on a pipe."""
        if isinstance(said.message, Request) and said.message.method == "initialize":
            return
        if said.state == "waiting":
            said.taken_back = True
        elif said.state == "forwarded":
            said.state = "late" if self.conversation.lasting else "gone"

    def abandon(self, said: Said) -> None:
        """The client's connection is gone: what waits is cancelled, what has left is abandoned."""
        if said.state in ("waiting", "answering"):
            assert said.task is not None
            said.task.cancel()
        elif said.state == "forwarded":
            assert said.call is not None
            self.pipeline.abandon(self.conversation, said.call)
            said.state = "late" if self.conversation.lasting else "gone"

    def fail(self, said: Said) -> None:
        """The server could not be reached."""
        assert said.call is not None
        error = UpstreamError("the server is gone", sent=True)
        response = self.pipeline.upstream_failed(self.conversation, said.call, error)
        assert response is not None
        assert key_of(response.id or 0) == said.key
        self._answered(said, "answered")

    def _leaves(self, said: Said, permitted: Permitted, ticket: Ticket | None) -> None:
        left = decode(permitted.frame)
        note(f"left: {left}")
        assert _bytes(plain(left)) == _bytes(plain(said.message))
        if isinstance(left, Response):
            return
        assert said.call is not None
        row = TABLE.rows[left.method]
        questions = self.decider.about(said.call.trace)
        if row.governed is Governed.DECISION:
            _was_judged(said.message, questions, said.call)
        if row.governed is Governed.NEGOTIATION:
            assert not [each for each in questions if each.answer is REVOKED]
        if left.method not in PASSING:
            assert self.last_left < said.number
            assert self.writing == []
            self.last_left = said.number
        if isinstance(left, Request):
            assert not said.taken_back or left.method == "initialize"
            assert [each for each in self._in_flight() if each.key == said.key] == []
            said.state = "forwarded"
        else:
            said.state = "answered"
        if ticket is not None and said.slow:
            self.writing.append((said, ticket))
        elif ticket is not None:
            ticket.release()

    def _in_flight(self) -> list[Said]:
        return [each for each in self.said if each.state in ("forwarded", "late")]

    def _is_a_fair_error(self, said: Said, error: ProtocolError) -> None:
        """It says who gets it; an id is in flight only when it is."""
        assert not isinstance(said.message, Request) or error.request_id == said.message.id
        if "in flight" in str(error):
            busy = ("waiting", "forwarded", "late")
            others = [each for each in self.said if each.key == said.key and each is not said]
            assert [each for each in others if each.state in busy]

    def _is_a_fair_refusal(self, said: Said, response: Response) -> None:
        """The policy said no, or nothing, or nobody knows the method."""
        assert isinstance(said.message, Request)
        assert key_of(response.id or 0) == said.key
        assert response.error is not None
        if said.call is None:
            assert response.error["code"] == -32601
            return
        answers = [each.answer for each in self.decider.about(said.call.trace)]
        denied = [each for each in answers if isinstance(each, Decision) and not each.allow]
        failed = [each for each in answers if isinstance(each, DecisionError)]
        assert response.error["code"] == (-31503 if failed else -31403)
        assert failed or denied

    def _answered(self, said: Said, state: State) -> None:
        if isinstance(said.message, Request):
            said.answers += 1
            assert said.answers == 1
        said.state = state

    # ---------------------------------------------------------------- server to client

    def server_says(self, message: Message) -> None:
        match message:
            case Response():
                self.start(self._server_answers(message))
            case _:
                self.start(self._server_asks(message))

    async def _server_answers(self, response: Response) -> None:
        said = self._waits_for(response.id)
        late = said is not None and said.state == "late"
        if said is not None:
            said.state, said.task = "answering", asyncio.current_task()
        try:
            delivery = await self.pipeline.from_server(
                self.conversation, copy.deepcopy(response), self.origin
            )
        except asyncio.CancelledError:
            assert said is not None
            said.state = "gone"
            raise
        if said is None:
            assert delivery == (Deliver() if _has_no_id(response) else Drop())
            return
        assert isinstance(delivery, Deliver)
        assert said.call is not None
        shown = response if delivery.replaced is None else delivery.replaced
        assert isinstance(shown, Response)
        assert key_of(shown.id or 0) == said.key
        self._was_shown_by_right(said.call, response, shown)
        if late:
            said.state = "gone"
        else:
            self._answered(said, "answered")

    def _waits_for(self, request_id: RequestId | None) -> Said | None:
        if request_id is None:
            return None
        waiting = [each for each in self._in_flight() if each.key == key_of(request_id)]
        assert len(waiting) <= 1
        return waiting[0] if waiting else None

    def _was_shown_by_right(self, call: Call, response: Response, shown: Response) -> None:
        questions = self.decider.about(call.trace)
        listing = call.operation.method.listing
        if listing is not None and response.error is None:
            _is_a_fair_page(listing, questions[-1].answer, response, shown)
            return
        inner = [
            question
            for number in _numbers_asked(response)
            for question in self.decider.questions
            if question.document.get("sampling", {}).get("max_tokens") == number
        ]
        if shown == response:
            assert [each.allowed for each in inner] == [True] * len(_numbers_asked(response))
        else:
            assert shown.error is not None
            assert not inner[-1].allowed

    async def _server_asks(self, message: Request | Notification) -> None:
        key = key_of(message.id) if isinstance(message, Request) else None
        asked, twice = Asked(), key in self.asked
        if key is not None and not twice:
            self.asked[key] = asked
        try:
            delivery = await self.pipeline.from_server(self.conversation, message, self.origin)
        except ProtocolError:
            assert twice
            return
        assert not twice
        if delivery == Deliver():
            self._may_be_asked(message)
            asked.delivered = True
            return
        taken_back = key is not None and self.asked.get(key) is not asked
        if key is not None and not taken_back:
            del self.asked[key]
        if isinstance(delivery, AnswerServer):
            answer = delivery.permitted.message
            assert isinstance(answer, Response)
            assert answer.error is not None
            assert isinstance(message, Request)
            assert key_of(answer.id or 0) == key
        else:
            assert isinstance(message, Notification) or taken_back

    def _may_be_asked(self, message: Request | Notification) -> None:
        """A question of the server's is let through when the policy, or the table, lets it."""
        if isinstance(message, Notification):
            if message.method == "notifications/cancelled":
                taken = (message.params or {}).get("requestId")
                if isinstance(taken, (str, int)):
                    self.asked.pop(key_of(taken), None)
            return
        row = TABLE.find(message.method, "request", Direction.FROM_SERVER, Era.LEGACY)
        assert row is not None
        if row.governed is Governed.DECISION:
            calls = self.recorder.decided_calls
            (call,) = [each for each in calls if each.operation.message is message]
            _was_judged(message, self.decider.about(call.trace), call)


def _bytes(message: Message | None) -> bytes:
    assert message is not None
    return encode(message)


def _has_no_id(response: Response) -> bool:
    return response.id is None and response.error is not None


def _was_judged(message: Message, questions: list[Question], call: Call) -> None:
    """Each target of what left was asked about, as it left, and each was allowed."""
    assert isinstance(message, (Request, Notification))
    assert [each.allowed for each in questions] == [True] * len(call.operation.targets)
    assert questions
    for question, target in zip(questions, call.operation.targets, strict=True):
        assert question.document["target"] == {"type": target.type, "name": target.name}
        assert is_about(question.document, message)


def _is_a_fair_page(
    listing: Listing, answer: Answer | None, response: Response, shown: Response
) -> None:
    """What may be seen of a page, in its order, and everything that stood beside it."""
    if not isinstance(answer, Decision):
        assert shown.error is not None
        assert shown.error["code"] == -31503
        return
    visible = answer.visible if answer.allow else frozenset[str]()
    if not isinstance(response.result, dict) or visible is None:
        assert _beside(shown.result, "") == _beside(response.result, "")
        return
    listed = response.result.get(listing.items)
    items = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    assert shown.result[listing.items] == [e for e in items if e.get(listing.item_name) in visible]
    assert _beside(shown.result, listing.items) == _beside(response.result, listing.items)


def _beside(result: Any, items: str) -> Any:
    """A result without its items, and without how long, and by whom, it may be kept."""
    if not isinstance(result, dict):
        return result
    return {key: each for key, each in result.items() if key not in (items, "ttlMs", "cacheScope")}


def _numbers_asked(response: Response) -> list[int]:
    """The numbers of the questions inside a result."""
    asked = response.result.get("inputRequests") if isinstance(response.result, dict) else None
    return [each["params"]["maxTokens"] for each in asked.values()] if asked else []
