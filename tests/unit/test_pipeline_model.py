"""One conversation, whatever is said in it and in whatever order it is decided."""

from __future__ import annotations

from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidecar.errors import DecisionInvalid
from sidecar.policy.decision import Decision
from sidecar.protocol.jsonrpc import (
    JsonObject,
    Message,
    Notification,
    Request,
    RequestId,
    Response,
)
from sidecar.protocol.methods import Direction
from tests.support.fakes import ALLOWED, DENIED, REVOKED, modern
from tests.support.messages import ANSWERS, IDS, MESSAGES, TABLE, good_messages
from tests.support.talk import LATE, Answer, Said, State, Talk

T = TypeVar("T")

UNDEFINED = DecisionInvalid("there is no decision", detail="undefined_decision")
VISIBLE = Decision(allow=True, visible=frozenset({"a", "c"}))
DECISIONS: st.SearchStrategy[Answer] = st.sampled_from(
    [ALLOWED, ALLOWED, VISIBLE, DENIED, REVOKED, LATE, UNDEFINED]
)

SUBJECTS: JsonObject = {
    "name": "a",
    "uri": "file:///a",
    "taskId": "t",
    "ref": {"type": "ref/prompt", "name": "p"},
    "notifications": {"toolsListChanged": True, "taskIds": ["t"]},
    "arguments": {"id": 7},
}
SAID = st.sampled_from(
    [SUBJECTS, {**SUBJECTS, "name": "b", "_meta": {"progressToken": 1, "traceparent": "x"}}]
)
FEW_IDS: st.SearchStrategy[RequestId] = st.sampled_from([0, 1, "0"])
LISTINGS = st.sampled_from([row.name for row in TABLE.rows.values() if row.listing])
CALLS = st.one_of(
    good_messages(Direction.FROM_CLIENT, "request", SAID, FEW_IDS),
    st.builds(Request, FEW_IDS, st.just("tools/call"), SAID),
    st.builds(lambda key, said: modern("tools/call", key, **said), FEW_IDS, SAID),
    st.builds(lambda key, said: modern("subscriptions/listen", key, **said), FEW_IDS, SAID),
    st.builds(lambda key: modern("server/discover", key), FEW_IDS),
    st.builds(Request, FEW_IDS, LISTINGS),
)
KEYS = ("tools", "resources", "resourceTemplates", "prompts", "tasks")
BESIDE = {"cacheScope": "public", "ttlMs": 60_000, "beside": [1, None]}
PAGES = st.text("abcd", max_size=5).map(lambda names: _page(list(map(_item, names, range(5)))))
TASK = {"task": {"taskId": "t", "status": "working"}}
RESULTS = PAGES | st.sampled_from([{}, {"tools": None}, [1], "text", True, TASK])
ANYONE = st.integers(0, 7)


def _page(items: list[JsonObject]) -> JsonObject:
    """The answer to any listing."""
    return {**dict.fromkeys(KEYS, items), **BESIDE}


def _item(name: str, number: int) -> JsonObject:
    return {"name": name, "uri": name, "uriTemplate": name, "taskId": name, "number": number}


class ConversationModel(RuleBasedStateMachine):
    """What anybody can do next."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = Talk(lasting=True)
        self.numbers = 0

    @initialize(lasting=st.booleans(), greets=st.booleans())
    def begin(self, lasting: bool, greets: bool) -> None:
        self.talk.conversation.lasting = lasting
        if not greets:
            return
        hello = {"protocolVersion": "2025-11-25", "capabilities": {}}
        self.client(Request("hello", "initialize", hello), False)
        self.decide(0, ALLOWED)
        self.server(Response("hello", {"protocolVersion": "2025-11-25"}))
        self.client(Notification("notifications/initialized"), False)

    # ---------------------------------------------------------------- the client

    @rule(message=CALLS, slow=st.booleans())
    def client(self, message: Message, slow: bool) -> None:
        self.talk.client_says(message, slow)
        self.talk.settle()

    @rule(message=CALLS)
    def client_is_let_through(self, message: Message) -> None:
        self.client(message, False)
        self.decide_all([ALLOWED])

    @rule(message=good_messages(Direction.FROM_CLIENT, "notification", SAID) | MESSAGES)
    def client_says_anything(self, message: Message) -> None:
        self.client(message, False)

    @rule(request_id=FEW_IDS)
    def client_takes_back(self, request_id: RequestId) -> None:
        self.client(Notification("notifications/cancelled", {"requestId": request_id}), False)

    @rule(answer=ANSWERS)
    def client_answers(self, answer: Response) -> None:
        self.client(answer, False)

    @precondition(lambda self: self.those("waiting", "forwarded", "answering"))
    @rule(which=ANYONE)
    def client_goes_away(self, which: int) -> None:
        self.talk.abandon(_one_of(self.those("waiting", "forwarded", "answering"), which))
        self.talk.settle()

    @precondition(lambda self: self.talk.writing)
    @rule()
    def bytes_leave(self) -> None:
        self.talk.write_all()
        self.talk.settle()

    # ---------------------------------------------------------------- the policy

    @precondition(lambda self: self.talk.decider.open)
    @rule(which=ANYONE, answer=DECISIONS)
    def decide(self, which: int, answer: Answer) -> None:
        self.talk.decide(_one_of(self.talk.decider.open, which), answer)
        self.talk.settle()

    @precondition(lambda self: self.talk.decider.open)
    @rule(answers=st.lists(DECISIONS, min_size=1, max_size=3))
    def decide_all(self, answers: list[Answer]) -> None:
        """In turn, and also what is asked because of that."""
        for number, question in enumerate(self.talk.decider.open):
            self.talk.decide(question, answers[number % len(answers)])
        self.talk.settle()
        if self.talk.decider.open:
            self.decide_all(answers[1:] + answers[:1])

    # ---------------------------------------------------------------- the server

    @precondition(lambda self: self.those("forwarded", "late"))
    @rule(which=ANYONE, result=RESULTS)
    def server_answers(self, which: int, result: Any) -> None:
        said = _one_of(self.those("forwarded", "late"), which)
        assert isinstance(said.message, Request)
        self.server(Response(said.message.id, result))

    @precondition(lambda self: self.those("forwarded", "late"))
    @rule(which=ANYONE, questions=st.integers(1, 3))
    def server_answers_with_questions(self, which: int, questions: int) -> None:
        asked = {}
        for _ in range(questions):
            self.numbers += 1
            params = {"messages": [], "maxTokens": self.numbers}
            asked[str(self.numbers)] = {"method": "sampling/createMessage", "params": params}
        said = _one_of(self.those("forwarded", "late"), which)
        assert isinstance(said.message, Request)
        result = {"resultType": "input_required", "inputRequests": asked}
        self.server(Response(said.message.id, result))

    @rule(key=FEW_IDS, method=LISTINGS, page=PAGES, answer=DECISIONS)
    def a_page_is_listed(
        self, key: RequestId, method: str, page: JsonObject, answer: Answer
    ) -> None:
        self.client(Request(key, method), False)
        self.server(Response(key, page))
        self.decide_all([answer])

    @rule(key=FEW_IDS, answer=DECISIONS)
    def the_server_wants_something(self, key: RequestId, answer: Answer) -> None:
        self.server(Request(key, "sampling/createMessage", {"messages": []}))
        self.decide_all([answer])

    @rule(key=FEW_IDS, answer=DECISIONS)
    def a_conversation_is_begun(self, key: RequestId, answer: Answer) -> None:
        self.client(modern("server/discover", key), False)
        self.decide_all([answer])

    @rule(answer=ANSWERS)
    def server_answers_anybody(self, answer: Response) -> None:
        self.server(answer)

    @rule(message=good_messages(Direction.FROM_SERVER, None, SAID) | MESSAGES)
    def server(self, message: Message) -> None:
        self.talk.server_says(message)
        self.talk.settle()

    @rule(request_id=IDS)
    def server_takes_back(self, request_id: RequestId) -> None:
        self.server(Notification("notifications/cancelled", {"requestId": request_id}))

    @precondition(lambda self: self.those("forwarded"))
    @rule(which=ANYONE)
    def server_fails(self, which: int) -> None:
        self.talk.fail(_one_of(self.those("forwarded"), which))
        self.talk.settle()

    # ---------------------------------------------------------------- always, and at the end

    def those(self, *states: State) -> list[Said]:
        said = [each for each in self.talk.said if isinstance(each.message, Request)]
        return [each for each in said if each.state in states]

    @invariant()
    def each_call_ends_once(self) -> None:
        finished = self.talk.recorder.finished_calls
        assert len({id(each) for each in finished}) == len(finished)
        assert self.talk.pipeline.in_flight >= 0

    def teardown(self) -> None:
        self.talk.close()
        self.each_call_ends_once()
        assert self.talk.pipeline.in_flight == 0
        finished = {id(each) for each in self.talk.recorder.finished_calls}
        assert {id(each) for each in self.talk.recorder.decided_calls} <= finished
        for said in self.those("refused", "answered"):
            assert said.answers == 1
        assert self.those("waiting", "answering") == []
        assert all(each.call is None or each.call.outcome for each in self.talk.said)


def _one_of(things: list[T], which: int) -> T:
    return things[which % len(things)]


TestConversation = ConversationModel.TestCase
TestConversation.settings = settings(stateful_step_count=40)
