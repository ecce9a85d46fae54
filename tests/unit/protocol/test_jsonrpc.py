"""One strict reading, one writing: what two parsers could read differently is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import MalformedMessage
from sidecar.protocol.jsonrpc import (
    FROM_CLIENT,
    FROM_SERVER,
    MAX_SAFE_INTEGER,
    Message,
    Notification,
    Request,
    Response,
    Strictness,
    decode,
    dump_json,
    encode,
    parse_json,
)

CALL = Request(1, "tools/call", {"name": "t", "arguments": {"x": 1}})

PARSE, INVALID = -32700, -32600


def call(params: str = "{}", request_id: str = "1", more: str = "") -> bytes:
    return f'{{"jsonrpc":"2.0","id":{request_id},"method":"m","params":{params}{more}}}'.encode()


def nested(depth: int) -> bytes:
    """A message whose containers stand `depth` deep."""
    return call('{"x":' + "[" * (depth - 2) + "]" * (depth - 2) + "}")


# ── What is refused: each way in which two parsers were seen to differ ────────────────────────────


@pytest.mark.parametrize(
    ("frame", "code", "echo"),
    [
        # Two readings of the same bytes.
        pytest.param(call('{"a":1,"a":2}'), INVALID, None, id="duplicate key in params"),
        pytest.param(call('{"a":{"b":[{"c":1,"c":1}]}}'), INVALID, None, id="duplicate key inside"),
        pytest.param(call(more=',"id":2'), INVALID, None, id="duplicate id"),
        pytest.param(call(more=',"method":"n"'), INVALID, None, id="duplicate method"),
        pytest.param(call(more=',"params":{}'), INVALID, None, id="duplicate params"),
        pytest.param(call('{"a":1,"\\u0061":2}'), INVALID, None, id="duplicate key by escape"),
        pytest.param(call('{"x":NaN}'), PARSE, None, id="NaN"),
        pytest.param(call('{"x":Infinity}'), PARSE, None, id="Infinity"),
        pytest.param(call('{"x":-Infinity}'), PARSE, None, id="-Infinity"),
        pytest.param(call('{"x":1e400}'), INVALID, None, id="1e400"),
        pytest.param(call('{"x":-1e400}'), INVALID, None, id="-1e400"),
        pytest.param(call('{"x":' + "9" * 5000 + "}"), INVALID, None, id="5000 digits"),
        pytest.param(call('{"x":9007199254740992}'), INVALID, None, id="2^53"),
        pytest.param(call('{"x":-9007199254740992}'), INVALID, None, id="-2^53"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"\xff"}', PARSE, None, id="not UTF-8"),
        pytest.param(b"\xc0\xaf", PARSE, None, id="overlong UTF-8"),
        pytest.param(b"\xef\xbb\xbf" + call(), PARSE, None, id="byte order mark"),
        pytest.param(call().decode().encode("utf-16"), PARSE, None, id="UTF-16"),
        pytest.param(call().decode().encode("utf-16-le"), PARSE, None, id="UTF-16 without mark"),
        pytest.param(call().decode().encode("utf-32-be"), PARSE, None, id="UTF-32"),
        pytest.param(call('{"x":"\\ud800"}'), INVALID, None, id="lone high surrogate"),
        pytest.param(call('{"x":"\\uDC00a"}'), INVALID, None, id="lone low surrogate"),
        pytest.param(call('{"x":"\\ude00\\ud83d"}'), INVALID, None, id="surrogates in wrong order"),
        pytest.param(call('{"\\udead":1}'), INVALID, None, id="lone surrogate in a key"),
        pytest.param(call('{"x":[[["\\ud800"]]]}'), INVALID, None, id="lone surrogate inside"),
        pytest.param(call('{"x":"a\x00b"}'), PARSE, None, id="raw NUL in a string"),
        pytest.param(call() + b"\x00", PARSE, None, id="raw NUL behind"),
        pytest.param(call('{"x":"a\nb"}'), PARSE, None, id="raw control character"),
        pytest.param(call() + b" {}", PARSE, None, id="two objects"),
        pytest.param(call() + b"garbage", PARSE, None, id="trailing garbage"),
        pytest.param(call('{"x":1,}'), PARSE, None, id="trailing comma"),
        pytest.param(call('{"x":1/*c*/}'), PARSE, None, id="comment"),
        pytest.param(call("{'x':1}"), PARSE, None, id="single quotes"),
        pytest.param(call('{"x":01}'), PARSE, None, id="leading zero"),
        pytest.param(call('{"x":+1}'), PARSE, None, id="plus sign"),
        pytest.param(call('{"x":.5}'), PARSE, None, id="no digit before the point"),
        pytest.param(call('{"x":0x10}'), PARSE, None, id="hexadecimal"),
        pytest.param(call('{"x":"\\x41"}'), PARSE, None, id="unknown escape"),
        pytest.param(call('{"x":"\\u12"}'), PARSE, None, id="short escape"),
        pytest.param(call('{"x":\u00a01}'), PARSE, None, id="a space that is none"),
        pytest.param(b"", PARSE, None, id="nothing"),
        pytest.param(b"  \n", PARSE, None, id="white space"),
        pytest.param(call()[:-1], PARSE, None, id="cut off"),
        pytest.param(b"Content-Length: 5\r\n\r\n{}", PARSE, None, id="preamble"),
        # JSON that is no message.
        pytest.param(b"[]", INVALID, None, id="empty batch"),
        pytest.param(b"[" + call() + b"]", INVALID, None, id="batch"),
        pytest.param(b'"text"', INVALID, None, id="a string"),
        pytest.param(b"1", INVALID, None, id="a number"),
        pytest.param(b"null", INVALID, None, id="null"),
        pytest.param(b"{}", INVALID, None, id="empty object"),
        pytest.param(call(request_id="null"), INVALID, None, id="id null"),
        pytest.param(call(request_id="1.5"), INVALID, None, id="id 1.5"),
        pytest.param(call(request_id="1.0"), INVALID, None, id="id 1.0"),
        pytest.param(call(request_id="1e2"), INVALID, None, id="id 1e2"),
        pytest.param(call(request_id="true"), INVALID, None, id="id true"),
        pytest.param(call(request_id="{}"), INVALID, None, id="id object"),
        pytest.param(call(request_id="[1]"), INVALID, None, id="id list"),
        pytest.param(call(request_id="1" * 23), INVALID, None, id="id of 23 digits"),
        pytest.param(call(request_id='"\\u0000"'), INVALID, None, id="id with NUL"),
        pytest.param(call(request_id='"a\\nb"'), INVALID, None, id="id with newline"),
        pytest.param(call(request_id=json.dumps("x" * 257)), INVALID, None, id="id too long"),
        pytest.param(call(more=',"result":{}'), INVALID, 1, id="method and result"),
        pytest.param(
            call(more=',"error":{"code":1,"message":""}'), INVALID, 1, id="method and error"
        ),
        pytest.param(call("[1]"), INVALID, 1, id="params list"),
        pytest.param(call("null"), INVALID, 1, id="params null"),
        pytest.param(call('"x"'), INVALID, 1, id="params string"),
        pytest.param(call(more=',"extra":1'), INVALID, 1, id="unknown member"),
        pytest.param(b'{"jsonrpc":"2.0","id":"a","method":7}', INVALID, "a", id="method number"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":null}', INVALID, 1, id="method null"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":""}', INVALID, 1, id="method empty"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"a b"}', INVALID, 1, id="method with space"
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"a\\n"}', INVALID, 1, id="method, newline"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"t\xc3\xb6\xc3\xb6ls"}', INVALID, 1, id="method, ö"
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"' + b"m" * 129 + b'"}', INVALID, 1, id="method long"
        ),
        pytest.param(b'{"id":1,"method":"m"}', INVALID, 1, id="no jsonrpc"),
        pytest.param(b'{"jsonrpc":2.0,"id":1,"method":"m"}', INVALID, 1, id="jsonrpc a number"),
        pytest.param(b'{"jsonrpc":"1.0","id":1,"method":"m"}', INVALID, 1, id="jsonrpc 1.0"),
        pytest.param(b'{"jsonrpc":"2.0","id":1}', INVALID, 1, id="id alone"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"params":{}}', INVALID, 1, id="params alone"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"result":1,"error":{"code":1}}', INVALID, 1, id="two outcomes"
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"result":1,"params":{}}', INVALID, 1, id="params too"
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":true,"result":1}', INVALID, None, id="answer to true"),
        pytest.param(b'{"jsonrpc":"2.0","id":1.0,"result":1}', INVALID, None, id="answer to 1.0"),
        pytest.param(b'{"jsonrpc":"2.0","result":1}', INVALID, None, id="answer to nobody"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"error":null}', INVALID, 1, id="error null"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"error":"no"}', INVALID, 1, id="error string"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"error":{"code":"1"}}', INVALID, 1, id="code string"
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"error":{"code":true}}', INVALID, 1, id="code true"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"error":{}}', INVALID, 1, id="no code"),
    ],
)
def test_what_is_ambiguous_is_refused(frame: bytes, code: int, echo: int | str | None) -> None:
    with pytest.raises(MalformedMessage) as refused:
        decode(frame)
    error = refused.value
    assert (error.rpc_code, error.status, error.request_id) == (code, 400, echo)


LOOKALIKES = sorted(
    (member, other)
    for member in ("jsonrpc", "id", "method", "params", "result", "error")
    for other in {member.upper(), member.title(), member.replace("s", "ſ"), member + " "} - {member}
)


@pytest.mark.parametrize(("member", "lookalike"), LOOKALIKES)
def test_a_member_that_only_looks_like_one_is_refused(member: str, lookalike: str) -> None:
    whole = {"jsonrpc": "2.0", "id": 1, "method": "m", "params": {}}
    instead = {(lookalike if key == member else key): value for key, value in whole.items()}
    for value in ({**whole, lookalike: 1}, {**instead, lookalike: 1}):
        with pytest.raises(MalformedMessage):
            decode(dump_json(value))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        pytest.param(call(), Request(1, "m", {}), id="a request"),
        pytest.param(b" \t\r\n" + call() + b"\n ", Request(1, "m", {}), id="white space around"),
        pytest.param(call(request_id='""'), Request("", "m", {}), id="an empty id"),
        pytest.param(call(request_id="0"), Request(0, "m", {}), id="id 0"),
        pytest.param(call(request_id="-7"), Request(-7, "m", {}), id="a negative id"),
        pytest.param(
            call(request_id=str(MAX_SAFE_INTEGER)), Request(MAX_SAFE_INTEGER, "m", {}), id="2^53-1"
        ),
        pytest.param(
            call(request_id=json.dumps("é" * 256)), Request("é" * 256, "m", {}), id="a long id"
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","\\u006dethod":"a"}', Notification("a"), id="an escaped key"
        ),
        pytest.param(
            call('{"x":"\\ud83d\\ude00"}'), Request(1, "m", {"x": "😀"}), id="a surrogate pair"
        ),
        pytest.param(call('{"x":"\\u0000"}'), Request(1, "m", {"x": "\x00"}), id="an escaped NUL"),
        pytest.param(
            call('{"x":"\\\\ud800"}'), Request(1, "m", {"x": "\\ud800"}), id="an escaped backslash"
        ),
        pytest.param(
            call('{"x":9007199254740991}'), Request(1, "m", {"x": 2**53 - 1}), id="a safe integer"
        ),
        pytest.param(call('{"x":1e22}'), Request(1, "m", {"x": 1e22}), id="a large double"),
        pytest.param(call('{"x":1e-400}'), Request(1, "m", {"x": 0.0}), id="a small double"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"' + b"m" * 128 + b'"}',
            Request(1, "m" * 128),
            id="a long method",
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","method":"$/a.b_C-1/d"}',
            Notification("$/a.b_C-1/d"),
            id="its letters",
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":"a","result":null}', Response("a"), id="null result"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"result":[1]}', Response(1, [1]), id="a list"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":null,"error":{"code":-1,"message":"x"}}',
            Response(None, error={"code": -1, "message": "x"}),
            id="an error for nobody",
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","error":{"code":-1}}', Response(None, error={"code": -1}), id="no id"
        ),
    ],
)
def test_what_every_reader_reads_alike_is_read(frame: bytes, message: Message) -> None:
    found = decode(frame)
    assert found == message
    assert type(getattr(found, "id", None)) is type(getattr(message, "id", None))


# ── Bounds ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strictness", [FROM_CLIENT, FROM_SERVER, Strictness(nesting=3)])
def test_nesting_has_an_exact_bound(strictness: Strictness) -> None:
    decode(nested(strictness.nesting), strictness)
    with pytest.raises(MalformedMessage):
        decode(nested(strictness.nesting + 1), strictness)


def test_width_is_not_depth() -> None:
    decode(call('{"x":[' + ",".join(["[]", "{}"] * 500) + "]}"))
    decode(call(json.dumps({"x": "[{" * 500})))


@pytest.mark.parametrize("strictness", [FROM_CLIENT, FROM_SERVER], ids=["client", "server"])
@pytest.mark.parametrize("depth", [200, 600, 900, 5000, 100_000])
def test_deep_nesting_is_refused_and_no_stack_overflows(depth: int, strictness: Strictness) -> None:
    pair = '"\\ud83d\\ude00"'
    frame = call('{"x":' + "[" * depth + pair + "]" * depth + "}")
    if depth < strictness.nesting - 2:
        assert encode(decode(frame, strictness)) == frame
        return
    with pytest.raises(MalformedMessage) as refused:
        decode(frame, strictness)
    assert refused.value.rpc_code in (PARSE, INVALID)
    with pytest.raises(MalformedMessage):
        decode(call('{"x":' + '{"a":' * depth + "1" + "}" * depth + "}"), strictness)
    with pytest.raises(MalformedMessage):
        decode(b"[" * depth, strictness)


@pytest.mark.parametrize("value", [2**53, -(2**53), 10**23, 10**999], ids=repr)
def test_big_integers_pass_when_asked_to(value: int) -> None:
    frame = call(dump_json({"x": value}).decode())
    with pytest.raises(MalformedMessage):
        decode(frame)
    relaxed = decode(frame, Strictness(big_integers=True))
    assert relaxed == Request(1, "m", {"x": value})
    assert encode(relaxed) == frame
    assert decode(frame, FROM_SERVER) == relaxed


def test_even_then_an_integer_has_a_bound_and_an_id_is_safe() -> None:
    relaxed = Strictness(big_integers=True)
    with pytest.raises(MalformedMessage):
        decode(call('{"x":' + "9" * 1001 + "}"), relaxed)
    with pytest.raises(MalformedMessage):
        decode(call(request_id=str(2**53)), relaxed)


def test_a_server_may_send_a_lone_surrogate_and_it_is_written_as_it_came() -> None:
    frame = b'{"jsonrpc":"2.0","id":1,"result":"\\ud800"}'
    assert encode(decode(frame, FROM_SERVER)) == frame


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(call('{"a":1,"a":1}'), id="duplicate key"),
        pytest.param(call('{"x":NaN}'), id="NaN"),
        pytest.param(call('{"x":1e999}'), id="infinite"),
        pytest.param(b"\xef\xbb\xbf" + call(), id="byte order mark"),
        pytest.param(b"[" + call() + b"]", id="batch"),
        pytest.param(call(more=',"result":1'), id="hybrid"),
    ],
)
def test_a_server_is_not_let_off_the_rest(frame: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(frame, FROM_SERVER)


def test_the_refusal_does_not_repeat_what_was_sent() -> None:
    with pytest.raises(MalformedMessage) as refused:
        decode(b'{"jsonrpc":"2.0","id":1,"method":"m","password":"s3cret"}')
    assert "s3cret" not in str(refused.value)


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
IDS = st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER) | st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
PARAMS = st.none() | st.dictionaries(TEXT, VALUES, max_size=4)
METHODS = st.from_regex(r"[A-Za-z0-9_$./-]{1,128}", fullmatch=True)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Request, IDS, METHODS, PARAMS),
    st.builds(Notification, METHODS, PARAMS),
    st.builds(Response, IDS, VALUES),
    st.builds(
        Response,
        st.none() | IDS,
        st.none(),
        st.fixed_dictionaries(
            {"code": st.integers(-40000, 40000), "message": TEXT, "data": VALUES}
        ),
    ),
)


@given(MESSAGES)
def test_what_is_written_is_read_as_the_same_message(message: Message) -> None:
    frame = encode(message)
    assert decode(frame) == message
    assert encode(decode(frame)) == frame


@given(MESSAGES)
def test_what_is_written_is_one_line_of_ascii(message: Message) -> None:
    frame = encode(message)
    assert frame.isascii()
    assert min(frame) >= 0x20


@given(VALUES)
def test_another_parser_reads_the_same_value(value: Any) -> None:
    assert json.loads(dump_json(value)) == value
    assert parse_json(dump_json(value)) == value


@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=3), st.integers(0, 5))
def test_a_key_twice_is_refused_at_every_level(value: dict[str, Any], depth: int) -> None:
    key, first = next(iter(value.items()))
    pair = f"{json.dumps(key)}:{json.dumps(first)}"
    text = "{" + pair + "," + pair + "}"
    for _ in range(depth):
        text = '{"a":[' + text + "]}"
    with pytest.raises(MalformedMessage) as refused:
        decode(call(text))
    assert refused.value.rpc_code == INVALID
    with pytest.raises(MalformedMessage):
        decode(call(text), FROM_SERVER)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_no_json_is_never_written(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dump_json(value)


def test_params_that_are_not_there_are_not_invented() -> None:
    assert encode(Notification("ping")) == b'{"jsonrpc":"2.0","method":"ping"}'
    assert encode(Notification("ping", {})) == b'{"jsonrpc":"2.0","method":"ping","params":{}}'
    assert decode(encode(CALL)) == CALL
