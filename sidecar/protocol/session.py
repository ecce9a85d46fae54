"""One conversation: what its messages mean, and which answer belongs to which question.

A `Session` is a pipe, or an HTTP session of a handshake revision, or a single POST of the stateless
revision. `receive` turns a message into an `Operation` (what somebody is trying to do) or raises;
`Outstanding` remembers questions until they are answered, so that each id is answered once and an
answer nobody asked for is nobody's.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Generic, Literal, TypeGuard, TypeVar

from sidecar.errors import HeaderMismatch, MalformedMessage, UnknownMethod
from sidecar.protocol.jsonrpc import (
    INVALID_PARAMS,
    JsonObject,
    Message,
    Notification,
    Request,
    RequestId,
    Response,
    refuse_lone_surrogates,
)
from sidecar.protocol.methods import (
    LEGACY_REVISIONS,
    MODERN_REVISION,
    REVISIONS,
    Direction,
    Era,
    Governed,
    Method,
    MethodTable,
)

VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
CLIENT_INFO_KEY = "io.modelcontextprotocol/clientInfo"
CLIENT_CAPABILITIES_KEY = "io.modelcontextprotocol/clientCapabilities"

_KNOWN_PARAMS = {
    each.casefold(): each
    for each in (
        "name",
        "arguments",
        "uri",
        "ref",
        "type",
        "argument",
        "taskId",
        "task",
        "cursor",
        "notifications",
        "inputResponses",
        "requestState",
        "protocolVersion",
        "requestId",
        "_meta",
        VERSION_KEY,
    )
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SENTINEL = re.compile(r"=\?base64\?(.*)\?=", re.DOTALL)
_PLAIN = re.compile(r"[\x20-\x7e]*")
_REVISION = re.compile(r"[\x21-\x7e]{1,64}")

MAX_ABANDONED = 256

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """What an action acts on: its type and its name; `kind` says what a subscription is to."""

    type: str
    name: str
    kind: Literal["resource", "task", "listing"] | None = None


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What the client says it is. Display only: it is a claim, and no evidence."""

    name: str
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """What somebody is trying to do: a message and all that the conversation knows about it."""

    message: Request | Notification
    method: Method
    direction: Direction
    era: Era
    protocol_version: str | None
    targets: tuple[Target, ...]
    session_id: str | None = None
    client: ClientInfo | None = None

    @property
    def params(self) -> JsonObject:
        """The message's params, empty when it has none."""
        return self.message.params or {}


class Bounded(OrderedDict[K, T]):
    """A memory that forgets its oldest entry when it is full."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def remember(self, key: K, value: T) -> T | None:
        """Keep `value`, as the newest; the value that is forgotten for it, if any."""
        self[key] = value
        self.move_to_end(key)
        return self.popitem(last=False)[1] if len(self) > self._size else None


class Outstanding(Generic[T]):
    """Questions that wait for an answer, by id. The same id twice in flight is refused.

    A question whose asker went away is `abandoned`: its answer may still come (a resumed stream, a
    server that had not seen the cancel) and is judged then, so its id is not free for a question
    that is judged less. Nothing waits for it, so only the newest are remembered.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[type, RequestId], T] = {}
        self._abandoned: Bounded[tuple[type, RequestId], T] = Bounded(MAX_ABANDONED)

    def ask(self, request_id: RequestId, question: T) -> None:
        """Remember a question.

        Raises:
            MalformedMessage: the id already waits for an answer.

        """
        key = (type(request_id), request_id)
        if key in self._waiting or key in self._abandoned:
            raise MalformedMessage("the id is already in flight", request_id=request_id)
        self._waiting[key] = question

    def get(self, request_id: RequestId | None) -> T | None:
        """The question with that id; `1` and `"1"` are two ids."""
        return None if request_id is None else self._waiting.get((type(request_id), request_id))

    def answer(self, request_id: RequestId | None) -> T | None:
        """Take the question that this id answers; None when nobody asked."""
        if request_id is None:
            return None
        key = (type(request_id), request_id)
        return self._waiting.pop(key, None) or self._abandoned.pop(key, None)

    def abandon(self, request_id: RequestId) -> T | None:
        """Nobody waits for this answer any more; the question that is forgotten for it, if any."""
        key = (type(request_id), request_id)
        question = self._waiting.pop(key, None)
        return None if question is None else self._abandoned.remember(key, question)

    def abandoned(self, request_id: RequestId) -> T | None:
        """The abandoned question with that id."""
        return self._abandoned.get((type(request_id), request_id))

    def drain(self) -> list[T]:
        """Take all of them: the other side is gone."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        return waiting

    def drain_abandoned(self) -> list[T]:
        """Take all that nobody waits for: their answers can not come any more."""
        abandoned = list(self._abandoned.values())
        self._abandoned.clear()
        return abandoned

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(tuple(self._waiting.values()))


@dataclass(slots=True)
class Session:
    """The protocol state of one conversation, and the reading of its messages."""

    table: MethodTable
    id: str | None = None
    protocol_version: str | None = None
    client: ClientInfo | None = None
    initialized: bool = False
    capabilities: JsonObject | None = None

    def receive(self, message: Message, direction: Direction) -> Operation:
        """What this request or notification is about.

        Raises:
            UnknownMethod: no row for it, in this direction and era.
            MalformedMessage: its params are not what the method takes.

        """
        assert not isinstance(message, Response), "answers are matched by `Outstanding`"
        version = envelope_version(message)
        era = self._era(message, direction)
        row = self._row(message, direction, era)
        _refuse_lookalikes(message)
        if row.governed is Governed.DECISION:
            refuse_lone_surrogates(message.params)
        if row.name == "initialize":
            self._handshake(message)
        envelope_client = _client_info(_meta(message).get(CLIENT_INFO_KEY))
        return Operation(
            message=message,
            method=row,
            direction=direction,
            era=era,
            protocol_version=version or self.protocol_version,
            targets=_targets(row, message),
            session_id=self.id,
            client=envelope_client or self.client,
        )

    def receive_embedded(self, message: Notification) -> Operation:
        """What a question inside a result is about (2026-07-28, multi-round requests).

        Raises:
            UnknownMethod: not a question that a server may put to a client.
            MalformedMessage: its params are not what the method takes.

        """
        row = self.table.find(message.method, "request", Direction.FROM_SERVER, Era.MODERN)
        if row is None or row.governed is not Governed.DECISION:
            raise UnknownMethod(f"Method not found: {message.method}")
        refuse_lone_surrogates(message.params)
        return Operation(
            message=message,
            method=row,
            direction=Direction.FROM_SERVER,
            era=Era.MODERN,
            protocol_version=self.protocol_version or MODERN_REVISION,
            targets=_targets(row, message),
            session_id=self.id,
            client=self.client,
        )

    def unread(
        self, message: Request | Notification, row: Method, direction: Direction, *targets: Target
    ) -> Operation:
        """An operation of a method that is in no table: what is known goes without reading it."""
        return Operation(
            message=message,
            method=row,
            direction=direction,
            era=Era.LEGACY,
            protocol_version=self.protocol_version,
            targets=targets,
            session_id=self.id,
            client=self.client,
        )

    def negotiated(self, response: Response) -> None:
        """Take what the server chose and can do from the answer to `initialize`."""
        result = response.result if isinstance(response.result, dict) else {}
        version = result.get("protocolVersion")
        if is_revision(version):
            self.protocol_version = version
        capabilities = result.get("capabilities")
        self.capabilities = capabilities if isinstance(capabilities, dict) else None

    def _handshake(self, message: Request | Notification) -> None:
        version = (message.params or {}).get("protocolVersion")
        self.protocol_version = version if isinstance(version, str) else REVISIONS[0]
        self.client = _client_info(_child(message, "clientInfo"))

    def _era(self, message: Request | Notification, direction: Direction) -> Era:
        """A client's message says it; a server's have no envelope, and the handshake says it."""
        if direction is Direction.FROM_CLIENT:
            return Era.MODERN if is_modern(message) else Era.LEGACY
        return Era.MODERN if self.protocol_version is None else Era.LEGACY

    def _row(self, message: Request | Notification, direction: Direction, era: Era) -> Method:
        kind: Literal["request", "notification"] = (
            "request" if isinstance(message, Request) else "notification"
        )
        row = self.table.find(message.method, kind, direction, era)
        asked_by_server = direction is Direction.FROM_SERVER and isinstance(message, Request)
        if row is None or (asked_by_server and era is Era.MODERN):
            raise UnknownMethod(
                f"Method not found: {message.method}",
                request_id=message.id if isinstance(message, Request) else None,
                status=404 if era is Era.MODERN else 200,
            )
        return row


def embedded_questions(value: JsonObject) -> list[Notification]:
    """The questions in a result or in a task's state, whatever it calls itself.

    What is there and no question is one of an unknown method: who knows what a client makes of it.
    """
    task = value.get("task")
    holders = [value, task] if isinstance(task, dict) else [value]
    asked = [each["inputRequests"] for each in holders if each.get("inputRequests") is not None]
    flat = [one for each in asked for one in (each.values() if isinstance(each, dict) else [each])]
    return [_asked(each if isinstance(each, dict) else {}) for each in flat]


def _asked(value: JsonObject) -> Notification:
    params = value.get("params")
    return Notification(str(value.get("method")), params if isinstance(params, dict) else None)


def envelope_version(message: Message) -> str | None:
    """The revision that a modern message names in its envelope; None for the handshake revisions.

    Raises:
        MalformedMessage: the envelope is there and names no revision, or one that shakes hands.

    """
    if isinstance(message, Response) or VERSION_KEY not in _meta(message):
        return None
    version = _meta(message)[VERSION_KEY]
    if not is_revision(version) or version in LEGACY_REVISIONS:
        raise MalformedMessage(
            f"_meta {VERSION_KEY} must name a revision from {MODERN_REVISION} on",
            request_id=message.id if isinstance(message, Request) else None,
            rpc_code=INVALID_PARAMS,
        )
    return version


def is_revision(version: object) -> TypeGuard[str]:
    """Whether it is one word that a header can repeat as it is."""
    return isinstance(version, str) and _REVISION.fullmatch(version) is not None


def is_modern(message: Message) -> bool:
    """Whether a client's message is one of the stateless revision: its envelope says so.

    Raises:
        MalformedMessage: as `envelope_version`.

    """
    return envelope_version(message) is not None


def check_headers(message: Message, headers: Mapping[str, str], table: MethodTable) -> None:
    """Refuse headers that say something else than the body (MCP 2026-07-28, streamable-http).

    `headers` has lower-case names. The body decides; a server that routes by headers must not come
    to another reading of it, so a modern body without its headers is refused as well. What only
    negotiates is let through: it decides nothing, and real clients get it wrong.

    Raises:
        HeaderMismatch: a header is missing or differs.
        MalformedMessage: a modern header on a message that has no envelope.
        UnknownMethod: the same, and the modern revision has no such method.

    """
    if isinstance(message, Response):
        return
    version, claimed = envelope_version(message), headers.get("mcp-protocol-version")
    if version is None:
        _check_legacy_header(message, claimed, table)
        return
    if isinstance(message, Notification) or message.method == "server/discover":
        return
    expected = {"mcp-protocol-version": version, "mcp-method": message.method}
    for name, value in expected.items():
        if headers.get(name, "").strip(" \t") != value:
            raise HeaderMismatch(f"header {name} does not match the body", request_id=message.id)
    _check_name_header(message, headers, table)


def _check_legacy_header(
    message: Request | Notification, claimed: str | None, table: MethodTable
) -> None:
    if claimed is None or claimed in LEGACY_REVISIONS:
        return
    if isinstance(message, Notification):
        raise MalformedMessage(f"params._meta lacks {VERSION_KEY}", rpc_code=INVALID_PARAMS)
    if table.find(message.method, "request", Direction.FROM_CLIENT, Era.MODERN) is None:
        raise UnknownMethod(
            f"Method not found: {message.method}", request_id=message.id, status=404
        )
    raise MalformedMessage(
        f"params._meta lacks {VERSION_KEY}", request_id=message.id, rpc_code=INVALID_PARAMS
    )


def _check_name_header(message: Request, headers: Mapping[str, str], table: MethodTable) -> None:
    row = table.find(message.method, "request", Direction.FROM_CLIENT, Era.MODERN)
    if row is None or not row.header:
        return
    subject = (message.params or {}).get(row.subject[0])
    claimed = headers.get("mcp-name")
    if claimed is None or decode_sentinel(claimed) != subject:
        raise HeaderMismatch("header mcp-name does not match the body", request_id=message.id)


def decode_sentinel(value: str) -> str | None:
    """The text of a header value, None for a broken sentinel (streamable-http, Value Encoding)."""
    value = value.strip(" \t")
    match = _SENTINEL.fullmatch(value)
    if match is None:
        return value
    try:
        raw = base64.b64decode(match[1], validate=True)
        canonical = base64.b64encode(raw).decode() == match[1]
        return raw.decode("utf-8") if canonical else None
    except (binascii.Error, ValueError):
        return None


def encode_sentinel(text: str) -> str:
    """The header value that `decode_sentinel` reads as `text`: plain where a header carries it."""
    plain = _PLAIN.fullmatch(text) and text == text.strip(" ")
    if plain and not _SENTINEL.fullmatch(text):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


def _targets(row: Method, message: Request | Notification) -> tuple[Target, ...]:
    if row.target is None:
        return ()
    if not isinstance((message.params or {}).get("arguments"), (dict, NoneType)):
        raise _bad_params(message, "params.arguments must be an object")
    reader = _SUBJECTS.get(row.target)
    if reader is None:
        return (Target(row.target, _named(row, message)),)
    return reader(row, message)


def _named(row: Method, message: Request | Notification) -> str:
    """The string at the row's subject; a name with control characters is nobody's name."""
    if row.listing is not None:
        return row.listing.kind
    if not row.subject:
        return row.name
    name = (message.params or {}).get(row.subject[0])
    if not isinstance(name, str) or _CONTROL.search(name):
        raise _bad_params(message, f"params.{row.subject[0]} must be a plain string")
    return name


def _completion(row: Method, message: Request | Notification) -> tuple[Target, ...]:
    ref = _child(message, "ref")
    key = {"ref/prompt": "name", "ref/resource": "uri"}.get(str(ref.get("type")))
    if key is None or not isinstance(ref.get(key), str):
        raise _bad_params(message, "params.ref must be a ref/prompt or a ref/resource")
    return (Target("completion", ref[key]),)


def _subscription(row: Method, message: Request | Notification) -> tuple[Target, ...]:
    """Each URI, task and list kind is a target of its own: all of them must be allowed."""
    wanted = (message.params or {}).get("notifications", {})
    if not isinstance(wanted, dict):
        raise _bad_params(message, "params.notifications must be an object")
    targets: list[Target] = []
    for key, value in wanted.items():
        if key in _LISTENED and isinstance(value, list):
            targets += [_listened(message, key, each) for each in value]
        elif key not in _LISTENED and isinstance(value, bool):
            targets += [Target("subscription", key, "listing")] if value else []
        else:
            raise _bad_params(message, f"params.notifications.{key} is nothing to listen to")
    return tuple(targets) or (Target("subscription", "-", "listing"),)


_LISTENED: Mapping[str, Literal["resource", "task"]] = {
    "resourceSubscriptions": "resource",
    "taskIds": "task",
}


def _listened(message: Request | Notification, key: str, name: object) -> Target:
    if not isinstance(name, str) or _CONTROL.search(name):
        raise _bad_params(message, f"params.notifications.{key} must list plain strings")
    return Target("subscription", name, _LISTENED[key])


def _elicitation(row: Method, message: Request | Notification) -> tuple[Target, ...]:
    mode = (message.params or {}).get("mode", "form")
    return (Target("elicitation", mode if isinstance(mode, str) else "-"),)


def _unnamed(row: Method, message: Request | Notification) -> tuple[Target, ...]:
    return (Target(str(row.target), "-"),)


_SUBJECTS = {
    "completion": _completion,
    "subscription": _subscription,
    "elicitation": _elicitation,
    "sampling": _unnamed,
    "roots": _unnamed,
}


def _meta(message: Request | Notification) -> JsonObject:
    return _child(message, "_meta")


def _child(message: Request | Notification, key: str) -> JsonObject:
    value = (message.params or {}).get(key)
    return value if isinstance(value, dict) else {}


def _client_info(value: object) -> ClientInfo | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    version = value.get("version")
    return ClientInfo(value["name"][:128], version[:64] if isinstance(version, str) else None)


def _refuse_lookalikes(message: Request | Notification) -> None:
    """Keys that some reader folds to one that we decide by (CVE-2026-27896): `Name`, `paramſ`."""
    for key in (*(message.params or {}), *_meta(message), *_child(message, "ref")):
        if key in _KNOWN_PARAMS.values():
            continue
        if unicodedata.normalize("NFKC", key).casefold() in _KNOWN_PARAMS:
            raise _bad_params(message, f"the key {key!r} can be read as another one")


def _bad_params(message: Request | Notification, problem: str) -> MalformedMessage:
    return MalformedMessage(
        problem,
        request_id=message.id if isinstance(message, Request) else None,
        rpc_code=INVALID_PARAMS,
    )
