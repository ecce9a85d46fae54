"""JSON-RPC 2.0 messages: one strict reading, one canonical writing.

Two parsers that read the same bytes differently are a way around any decision: duplicate keys,
`NaN`, numbers beyond a double, lone surrogates, other encodings. So `decode` accepts only what
every JSON parser reads alike (RFC 8259, I-JSON RFC 7493), and `encode` writes the value that was
judged, not the bytes that came.

Messages from servers are read with `FROM_SERVER`: they are forwarded as they came, so what only
matters to a second reading of ours (big integers, lone surrogates) is let pass there.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from sidecar.errors import MalformedMessage

Json = Any
JsonObject = dict[str, Any]
RequestId = str | int

PARSE_ERROR = -32700
INVALID_PARAMS = -32602

MAX_SAFE_INTEGER = 2**53 - 1
MAX_ID_LENGTH = 256
MAX_INTEGER_DIGITS = 1000

_ENVELOPE = frozenset({"jsonrpc", "id", "method", "params", "result", "error"})
_METHOD = re.compile(r"[A-Za-z0-9_$./-]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Strictness:
    """How deep a message may nest, and whether integers beyond a double are refused."""

    nesting: int = 64
    big_integers: bool = False
    surrogates: bool = False


FROM_CLIENT = Strictness()
FROM_SERVER = Strictness(nesting=512, big_integers=True, surrogates=True)


@dataclass(frozen=True, slots=True)
class Request:
    """Wants an answer with the same id."""

    id: RequestId
    method: str
    params: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Notification:
    """Wants none."""

    method: str
    params: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: `error` is None when it is a result. The id is None when the request had none."""

    id: RequestId | None
    result: Json = None
    error: JsonObject | None = None


Message = Request | Notification | Response


def decode(frame: bytes, strictness: Strictness = FROM_CLIENT) -> Message:
    """Read exactly one message.

    Raises:
        MalformedMessage: -32700 for what is not (unambiguous) JSON, -32600 for JSON that is not
            a message; the id is echoed when it is a clean one.

    """
    value = parse_json(frame, strictness)
    if isinstance(value, list):
        raise MalformedMessage("batches are not accepted: send one message at a time")
    if not isinstance(value, dict):
        raise MalformedMessage("a message is a JSON object")
    return _message(value)


def encode(message: Message) -> bytes:
    """The canonical bytes of a message: ASCII, compact, no newline."""
    return dump_json(to_object(message))


def to_object(message: Message) -> JsonObject:
    """The message as the JSON object that it is on the wire."""
    if isinstance(message, Response):
        if message.error is not None:
            return {"jsonrpc": "2.0", "id": message.id, "error": message.error}
        return {"jsonrpc": "2.0", "id": message.id, "result": message.result}
    value: JsonObject = {"jsonrpc": "2.0"}
    if isinstance(message, Request):
        value["id"] = message.id
    value["method"] = message.method
    if message.params is not None:
        value["params"] = message.params
    return value


def dump_json(value: Json) -> bytes:
    """Canonical JSON: ASCII only, so that no reader's idea of line ends or encodings matters."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def parse_json(frame: bytes, strictness: Strictness = FROM_CLIENT) -> Json:
    """Read JSON that every parser reads alike.

    Raises:
        MalformedMessage: not UTF-8, a byte order mark, not JSON, duplicate keys, `NaN`, numbers
            that no double holds, lone surrogates, too deep.

    """
    try:
        text = frame.decode("utf-8")
        value = _DECODERS[strictness.big_integers].decode(text)
    except UnicodeDecodeError as error:
        raise _unparsable("the message is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _unparsable(f"the message is not JSON: {error.msg} at {error.pos}") from error
    except RecursionError as error:
        raise _unparsable(f"the message nests deeper than {strictness.nesting}") from error
    if text.count("[") + text.count("{") > strictness.nesting:
        _refuse_deep(value, strictness.nesting)
    if not strictness.surrogates and _SURROGATE_ESCAPE.search(text):
        refuse_lone_surrogates(value)
    return value


def _message(value: JsonObject) -> Message:
    request_id = value.get("id")
    echo = request_id if _clean_id(request_id) else None
    if problem := _envelope_problem(value):
        raise MalformedMessage(problem, request_id=echo)
    if "method" not in value:
        return Response(request_id, value.get("result"), value.get("error"))
    if "id" in value:
        return Request(value["id"], value["method"], value.get("params"))
    return Notification(value["method"], value.get("params"))


def _envelope_problem(value: JsonObject) -> str | None:
    """What keeps this object from being a message (JSON-RPC 2.0 §4–5), or None."""
    if extra := set(value) - _ENVELOPE:
        return f"unknown member {min(extra)!r}"
    if value.get("jsonrpc") != "2.0":
        return 'member "jsonrpc" must be "2.0"'
    if "method" in value:
        return _call_problem(value)
    if ("result" in value) == ("error" in value):
        return "a message has a method, a result or an error"
    if "params" in value:
        return "a response has no params"
    return _response_problem(value)


def _call_problem(value: JsonObject) -> str | None:
    if "result" in value or "error" in value:
        return "a message with a method has neither result nor error"
    if not isinstance(value["method"], str) or not _METHOD.fullmatch(value["method"]):
        return 'member "method" must be a method name'
    if "params" in value and not isinstance(value["params"], dict):
        return 'member "params" must be an object'
    if "id" in value and not _clean_id(value["id"]):
        return 'member "id" must be an integer or a string of at most 256 characters'
    return None


def _response_problem(value: JsonObject) -> str | None:
    if value.get("id") is not None and not _clean_id(value["id"]):
        return 'member "id" must be an integer or a string of at most 256 characters'
    if "result" in value:
        return None if "id" in value else "a result has an id"
    error = value["error"]
    if not isinstance(error, dict) or type(error.get("code")) is not int:
        return 'member "error" must be an object with an integer code'
    return None


def _clean_id(value: Json) -> bool:
    if type(value) is int:
        return abs(value) <= MAX_SAFE_INTEGER
    return isinstance(value, str) and len(value) <= MAX_ID_LENGTH and not _CONTROL.search(value)


def _unparsable(message: str) -> MalformedMessage:
    return MalformedMessage(message, rpc_code=PARSE_ERROR)


def _unique(pairs: list[tuple[str, Json]]) -> JsonObject:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise MalformedMessage("an object has a key twice")
    return value


def _safe_integer(lexeme: str) -> int:
    value = _integer(lexeme)
    if abs(value) > MAX_SAFE_INTEGER:
        raise MalformedMessage("an integer is beyond ±(2^53−1), where readers disagree about it")
    return value


def _integer(lexeme: str) -> int:
    if len(lexeme) > MAX_INTEGER_DIGITS:
        raise MalformedMessage(f"an integer has more than {MAX_INTEGER_DIGITS} digits")
    return int(lexeme)


def _finite(lexeme: str) -> float:
    value = float(lexeme)
    if math.isinf(value):
        raise MalformedMessage("a number is too large for a double")
    return value


def _constant(name: str) -> float:
    raise _unparsable(f"{name} is not JSON")


_DECODERS = {
    big: json.JSONDecoder(
        object_pairs_hook=_unique,
        parse_int=_integer if big else _safe_integer,
        parse_float=_finite,
        parse_constant=_constant,
    )
    for big in (False, True)
}


def refuse_lone_surrogates(value: Json) -> None:
    """OPA reads a lone surrogate as U+FFFD, others do not: judged would not be executed.

    Raises:
        MalformedMessage: there is one, in a key or a value.

    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedMessage("a string holds half of a surrogate pair") from error


def _refuse_deep(value: Json, nesting: int) -> None:
    level = [value]
    for _ in range(nesting):
        level = [item for each in level for item in _children(each)]
        if not level:
            return
    raise MalformedMessage(f"the message nests deeper than {nesting}")


def _children(value: Json) -> list[Json]:
    items = value.values() if isinstance(value, dict) else value
    return [each for each in items if isinstance(each, (dict, list))] if items else []
