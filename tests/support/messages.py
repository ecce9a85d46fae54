"""Messages to be generated: what clients and servers say, well-formed or nearly so."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from sidecar.protocol.jsonrpc import (
    JsonObject,
    Message,
    Notification,
    Request,
    RequestId,
    Response,
    dump_json,
)
from sidecar.protocol.methods import Direction, Era, Method, MethodTable
from sidecar.protocol.session import VERSION_KEY
from tests.support.fakes import modern

TABLE = MethodTable.of(["acme/reindex"])
METHODS = st.sampled_from([*sorted(TABLE.rows), "nobody/knows", "$/x"])
TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
NAMES = st.sampled_from(["t", "u", "a\nb", "é", "", "rm -rf"])
PLAIN_NAMES = st.sampled_from(["t", "u", "é", "", "rm -rf"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=2)
TRACED = st.fixed_dictionaries(
    {}, optional={"traceparent": TEXT, "tracestate": TEXT, "baggage": TEXT, "progressToken": VALUES}
)
PARAMS = OBJECTS | st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES | VALUES,
        "uri": NAMES | VALUES,
        "taskId": NAMES,
        "ref": st.fixed_dictionaries({"type": st.just("ref/prompt"), "name": NAMES}) | VALUES,
        "arguments": OBJECTS | VALUES,
        "notifications": st.dictionaries(TEXT, st.booleans(), max_size=2) | VALUES,
        "requestId": st.integers(0, 3) | VALUES,
        "cursor": VALUES,
        "Name": VALUES,
        "_meta": st.fixed_dictionaries(
            {},
            optional={
                VERSION_KEY: st.sampled_from(["2026-07-28", "2025-06-18", "x"]),
                "traceparent": TEXT,
                "tracestate": TEXT,
                "progressToken": VALUES,
            },
        )
        | VALUES,
    },
)
SUBJECTS = st.fixed_dictionaries({"name": NAMES, "uri": NAMES, "taskId": NAMES})

REFS = st.fixed_dictionaries({"type": st.just("ref/prompt"), "name": PLAIN_NAMES}) | (
    st.fixed_dictionaries({"type": st.just("ref/resource"), "uri": PLAIN_NAMES})
)
LISTENED = st.fixed_dictionaries(
    {},
    optional={
        "resourceSubscriptions": st.lists(PLAIN_NAMES, max_size=2),
        "taskIds": st.lists(PLAIN_NAMES, max_size=2),
        "toolsListChanged": st.booleans(),
    },
)
GOOD_PARAMS = st.fixed_dictionaries(
    {
        "name": PLAIN_NAMES,
        "uri": PLAIN_NAMES,
        "taskId": PLAIN_NAMES,
        "ref": REFS,
        "notifications": LISTENED,
    },
    optional={
        "arguments": st.none() | OBJECTS,
        "argument": OBJECTS,
        "task": OBJECTS,
        "vendor": VALUES,
        "_meta": TRACED,
    },
)
"""What every method of the table can be called with."""

IDS: st.SearchStrategy[RequestId] = st.integers(0, 3) | st.sampled_from(["0", "x"])


def _modern(request_id: int | str, method: str, params: JsonObject) -> Request:
    return modern(method, request_id, **params)


MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Request, IDS, METHODS, st.none() | PARAMS),
    st.builds(_modern, IDS, METHODS, SUBJECTS),
    st.builds(Notification, METHODS, st.none() | PARAMS),
    st.builds(Response, IDS, VALUES),
)


def said_by(direction: Direction, era: Era) -> list[Method]:
    """The rows of what that side may say in that era."""
    found = (
        TABLE.find(row.name, row.kind, direction, era)
        for row in TABLE.rows.values()
        if row.kind != "stream"
    )
    return [row for row in found if row is not None]


@st.composite
def good_messages(
    draw: st.DrawFn,
    direction: Direction,
    kind: str | None = None,
    params: st.SearchStrategy[JsonObject] = GOOD_PARAMS,
    ids: st.SearchStrategy[RequestId] = IDS,
) -> Request | Notification:
    """A message that is known, and says what its method needs."""
    server = direction is Direction.FROM_SERVER
    era = Era.LEGACY if server else draw(st.sampled_from(Era))
    rows = [row for row in said_by(direction, era) if kind in (None, row.kind)]
    row, said = draw(st.sampled_from(rows)), draw(params)
    if row.kind == "notification":
        return Notification(row.name, said)
    if era is Era.MODERN:
        return _modern(draw(ids), row.name, said)
    return Request(draw(ids), row.name, said)


JUDGED: dict[str, Callable[[JsonObject], JsonObject]] = {
    "tool": lambda params: {"name": params["name"], "arguments": params.get("arguments") or {}},
    "prompt": lambda params: {"name": params["name"], "arguments": params.get("arguments") or {}},
    "resource": lambda params: {"uri": params["uri"]},
    "completion": lambda params: {"ref": params["ref"]},
    "task": lambda params: {"id": params["taskId"]},
    "method": lambda params: {"params": params},
}
"""What a question about a message must hold of it, by the type of its target."""


def is_about(question: JsonObject, message: Request | Notification) -> bool:
    """Whether this is the question that had to be asked about that message."""
    kind = question["target"]["type"]
    wanted = JUDGED[kind](message.params or {}) if kind in JUDGED else {}
    told = {key: question[kind][key] for key in wanted}
    return bool(
        question["mcp"]["method"] == message.method and dump_json(told) == dump_json(wanted)
    )


ERRORS = st.builds(lambda code: {"code": code, "message": "no"}, st.integers(-32800, -1))
ANSWERS = st.builds(Response, IDS, VALUES) | st.builds(
    lambda request_id, error: Response(request_id, error=error), IDS, ERRORS
)
