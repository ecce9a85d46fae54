"""What must hold for any bytes: each target is a function that fails on bytes that break it.

A target is plain Python, so that bytes which once broke it can be a unit test, without a fuzzer.
"""

from __future__ import annotations

import json
import json.decoder
import json.scanner
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sidecar.errors import HeaderMismatch, MalformedMessage, ProtocolError
from sidecar.policy import document, identity
from sidecar.policy.document import Environment
from sidecar.policy.identity import Principal
from sidecar.protocol.framing import Event, EventDecoder, FrameTooLarge, LineDecoder, encode_event
from sidecar.protocol.jsonrpc import (
    FROM_CLIENT,
    FROM_SERVER,
    Message,
    Notification,
    Request,
    Response,
    decode,
    dump_json,
    encode,
    parse_json,
    to_object,
)
from sidecar.protocol.methods import Direction, MethodTable
from sidecar.protocol.mirror import (
    Mirror,
    contradicted,
    parameter_headers,
    read_mirrors,
    request_headers,
)
from sidecar.protocol.session import (
    Operation,
    Session,
    check_headers,
    decode_sentinel,
    encode_sentinel,
)

PLENTY = 1 << 20
SMALL = 64
TABLE = MethodTable.of(["acme/reindex"])
ACTOR = identity.static(Principal("agent", "bot", "static"), Principal("human", "ana", "static"))
ENVIRONMENT = Environment("0.0.0", "tickets", "stdio", "2026-11-22T10:15:00Z")
CODES = (-32700, -32600, -32601, -32602, -32020)
DIRECTIONS = ((FROM_CLIENT, Direction.FROM_CLIENT), (FROM_SERVER, Direction.FROM_SERVER))


class _Reader(json.JSONDecoder):
    """Another reading of JSON, in Python, so that the search sees its branches.

    `first` takes the first of several members of the same name, else the last.
    """

    def __init__(self, first: bool) -> None:
        super().__init__(object_pairs_hook=lambda pairs: dict(pairs[::-1] if first else pairs))
        self.parse_string: Any = json.decoder.py_scanstring  # type: ignore[attr-defined]
        self.parse_object: Any = json.decoder.JSONObject  # type: ignore[attr-defined]
        self.parse_array: Any = json.decoder.JSONArray  # type: ignore[attr-defined]
        self.scan_once: Any = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


READERS = (_Reader(first=True), _Reader(first=False))


def canonical(value: Any) -> str:
    """A text that only the same JSON value has: 1, 1.0 and true are three."""
    return json.dumps(value, sort_keys=True)


def same(one: Message, other: Message) -> bool:
    """Whether two messages say the same."""
    return type(one) is type(other) and encode(one) == encode(other)


def jsonrpc(data: bytes) -> None:
    """Bytes are one message to every reader, or an error that can be answered."""
    readings = _readings(data)
    for strictness, _ in DIRECTIONS:
        try:
            message = decode(data, strictness)
        except MalformedMessage as error:
            _is_answerable(error)
            continue
        frame = encode(message)
        assert frame.isascii()
        assert b"\n" not in frame
        assert b"\r" not in frame
        assert same(decode(frame, strictness), message)
        assert canonical(json.loads(frame)) == canonical(to_object(message))
        wire = {canonical(to_object(message)), canonical(_bare(message))}
        assert readings
        assert {canonical(each) for each in readings} <= wire


def _readings(data: bytes) -> list[Any]:
    """What other readers make of the bytes; none when it is no JSON to them."""
    try:
        return [each.decode(data.decode()) for each in READERS]
    except (ValueError, RecursionError):
        return []


def _bare(message: Message) -> dict[str, Any]:
    """The object of an error without id, which some leave out and we write as null."""
    value = to_object(message)
    if isinstance(message, Response) and message.id is None:
        del value["id"]
    return value


def events(data: bytes) -> None:
    """A stream of events means the same in any pieces, and what is given is what came."""
    cuts, stream = data[:4], data[4:]
    whole, one_by_one = _events([stream]), _events(_singly(stream))
    assert _meaning(whole) == _meaning(one_by_one) == _meaning(_events(_pieces(stream, cuts)))
    assert _meaning(whole) == _by_the_standard(stream)
    for found in (whole, one_by_one):
        given = b"".join(each.raw for each in found)
        assert stream.startswith(given)
        assert b"".join(each.raw for each in _events([stream, b"\n\n"])) == stream + b"\n\n"
    for event in whole:
        _is_written_as_read(event)
    _stays_within_bounds(EventDecoder(SMALL).feed, stream, cuts)


def _is_written_as_read(event: Event) -> None:
    if event.data is None or "\n" in event.data:
        return
    (again,) = _events([encode_event(event.data.encode(), event)])
    assert (again.data, *_named(again)) == (event.data, *_named(event))


def _named(event: Event) -> tuple[str, str | None, str | None]:
    return event.name, event.id, event.retry


def _events(pieces: Iterable[bytes]) -> list[Event]:
    decoder = EventDecoder(PLENTY)
    return [event for piece in pieces for event in decoder.feed(piece)]


Meaning = tuple[str | None, str, str | None, str | None]


def _meaning(found: Iterable[Event]) -> list[Meaning]:
    """The events without what is nothing but comments and line ends."""
    told: list[Meaning] = []
    for number, each in enumerate(found):
        raw = each.raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else each.raw
        if any(line and not line.startswith(b":") for line in re.split(rb"[\r\n]", raw)):
            told.append((each.data, *_named(each)))
    return told


def _by_the_standard(stream: bytes) -> list[Meaning]:
    """A second reading, line by line after WHATWG HTML 9.2.6."""
    found: list[Meaning] = []
    values: dict[str, list[str]] = {}
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        if line and not line.startswith(":"):
            name, _, value = line.partition(":")
            values.setdefault(name, []).append(value.removeprefix(" "))
        elif not line and values:
            data = "\n".join(values["data"]) if "data" in values else None
            given, id_, retry = (values.get(key, [None])[-1] for key in ("event", "id", "retry"))
            found.append((data, given or "message", id_, retry))
            values = {}
    return found


def lines(data: bytes) -> None:
    """Lines are the same in any pieces, and none is lost, joined or split."""
    cuts, stream = data[:4], data[4:]
    expected = [each.removesuffix(b"\r") for each in stream.split(b"\n")]
    whole = _lines([stream])
    assert whole == [each for each in expected if each.strip()]
    assert whole == _lines(_singly(stream)) == _lines(_pieces(stream, cuts))
    _stays_within_bounds(LineDecoder(SMALL).feed, stream, cuts)


def _lines(pieces: Iterable[bytes]) -> list[bytes]:
    decoder = LineDecoder(PLENTY)
    found = [line for piece in pieces for line in decoder.feed(piece)]
    rest = decoder.finish()
    return found if rest is None else [*found, rest]


def _singly(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


def _pieces(stream: bytes, cuts: bytes) -> list[bytes]:
    """The stream cut in at most five, where the bytes of `cuts` say."""
    places = sorted(cut % (len(stream) + 1) for cut in cuts)
    return [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


def _stays_within_bounds(
    feed: Callable[[bytes], Iterable[bytes | Event]], stream: bytes, cuts: bytes
) -> None:
    try:
        for piece in _pieces(stream, cuts):
            for each in feed(piece):
                assert len(each if isinstance(each, bytes) else each.raw) <= SMALL + 1
    except FrameTooLarge:
        assert len(stream) > SMALL


def headers(data: bytes) -> None:
    """A header value is one text or none, and the headers that we write say what the body says."""
    text = data.decode("utf-8", "replace")
    value = encode_sentinel(text)
    assert value.isascii()
    assert value.isprintable()
    assert decode_sentinel(value) == text
    claimed = decode_sentinel(data.decode("latin-1"))
    if claimed is not None and data.isascii():
        assert decode_sentinel(encode_sentinel(claimed)) == claimed
    request = Request(1, "tools/call", {"name": text, "_meta": _envelope()})
    written = {key.lower(): item for key, item in request_headers(request, TABLE).items()}
    check_headers(request, written, TABLE)
    other = {**written, "mcp-name": data.decode("latin-1")}
    if _is_refused(request, other):
        assert claimed != text
    else:
        assert claimed == text


def _envelope() -> dict[str, Any]:
    return {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
    }


def _is_refused(request: Request, written: dict[str, str]) -> bool:
    try:
        check_headers(request, written, TABLE)
    except HeaderMismatch:
        return True
    return False


def mirrors(data: bytes) -> None:
    """Any schema is readable or refused, and what is written by it contradicts no arguments."""
    try:
        value = parse_json(data)
        schema, arguments = (value, {}) if not isinstance(value, list) else (*value, {}, {})[:2]
        found = read_mirrors(schema)
    except MalformedMessage as error:
        _is_answerable(error)
        return
    written = parameter_headers(found, arguments)
    assert all(text.isascii() and text.isprintable() for text in written.values())
    sent = {name: [text] for name, text in written.items()}
    assert _contradicted(found, arguments, sent) is None
    for name, text in written.items():
        for other in ([], [text, text], [text + "x"]):
            assert _contradicted(found, arguments, {**sent, name: other}) == name


def _contradicted(
    found: tuple[Mirror, ...], arguments: Any, sent: Mapping[str, list[str]]
) -> str | None:
    return contradicted(found, arguments, lambda name: sent.get(name, []))


def session(data: bytes) -> None:
    """A message is something that can be judged, as it is, or an error that can be answered."""
    for strictness, direction in DIRECTIONS:
        for version in (None, "2025-11-25"):
            try:
                message = decode(data, strictness)
                if isinstance(message, Response):
                    return
                operation = Session(TABLE, "s3cret", version).receive(message, direction)
                _can_be_judged(operation)
                if direction is Direction.FROM_CLIENT:
                    _agrees_with_its_headers(message)
                    check_headers(message, {}, TABLE)
            except ProtocolError as error:
                _is_answerable(error)


def _can_be_judged(operation: Operation) -> None:
    assert TABLE.rows.get(operation.message.method) is not None
    for target in operation.targets:
        question = document.build(operation, target, ACTOR, ENVIRONMENT)
        assert question["target"] == {"type": target.type, "name": target.name}
        assert canonical(json.loads(dump_json(question))) == canonical(question)
        if target.type == "tool":
            arguments = operation.params.get("arguments") or {}
            assert canonical(question["tool"]["arguments"]) == canonical(arguments)


def _agrees_with_its_headers(message: Request | Notification) -> None:
    written = request_headers(message, TABLE)
    assert all(value.isascii() and value.isprintable() for value in written.values())
    check_headers(message, {key.lower(): value for key, value in written.items()}, TABLE)


def _is_answerable(error: ProtocolError) -> None:
    assert error.rpc_code in CODES
    assert error.status in (200, 400, 404)
    assert type(error.request_id) in (type(None), str, int)
    encode(Response(error.request_id, error={"code": error.rpc_code, "message": str(error)}))


def planted(data: bytes) -> None:
    """A fault that is there on purpose: what finds it, finds."""
    assert b"\r\n" not in data


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (jsonrpc, events, lines, headers, mirrors, session)
}
