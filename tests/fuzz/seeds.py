"""What a search begins with: small inputs that reach far, and the words of each language."""

from __future__ import annotations

from sidecar.protocol.jsonrpc import JsonObject, Notification, Request, Response, encode
from sidecar.protocol.methods import Era
from tests.fuzz.targets import TABLE
from tests.support.fakes import modern

SUBJECTS: JsonObject = {
    "name": "t",
    "uri": "file:///a%20b",
    "taskId": "1",
    "ref": {"type": "ref/prompt", "name": "p"},
    "arguments": {"id": 4711, "é": [1.5, None, True]},
    "notifications": {"toolsListChanged": True, "taskIds": ["1"]},
    "requestId": 1,
}


def _messages() -> list[bytes]:
    """One message of each row of the table, for each era that has it."""
    found = []
    for row in TABLE.rows.values():
        if row.kind == "notification":
            found.append(encode(Notification(row.name, SUBJECTS)))
        elif row.exists_in(Era.LEGACY):
            found.append(encode(Request(1, row.name, SUBJECTS)))
        if row.kind == "request" and row.exists_in(Era.MODERN):
            found.append(encode(modern(row.name, "x", **SUBJECTS)))
    answers = [Response(1, {"tools": []}), Response(None, error={"code": -1, "message": "no"})]
    return [*found, *map(encode, answers)]


AMBIGUOUS = [
    b'{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}',
    b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a","n\\u0061me":"b"}}',
    b'{"jsonrpc":"2.0","id":1.0,"method":"ping","params":{"a":-0,"b":1e5,"c":1E-400}}',
    b'{"jsonrpc":"2.0","id":"\\ud83d\\ude00","result":"\\ud800"}',
    b'[{"jsonrpc":"2.0","method":"ping"}]',
    '{"jsonrpc":"2.0","method":"x","params":{"é":"😀\u2028"}}'.encode(),
]
STREAMS = [
    b"event: message\nid: 7\nretry: 100\ndata: {}\n\n",
    b"\xef\xbb\xbfdata: a\r\n\r\ndata: b\r\rdata: c\n\r\n",
    b": ping\n\ndata: a\ndata\ndata:  b\n: inside\n\nid\n\n",
    "data: é€😀\n\ndata: \udcc3\n\n".encode("utf-8", "surrogateescape"),
]
SCHEMAS = [
    b'[{"properties":{"a":{"type":"string","x-mcp-header":"Region"}}},{"a":"eu"}]',
    b'[{"properties":{"a":{"properties":{"b":{"type":"integer","x-mcp-header":"B"}}}}},3]',
    b'[{"$defs":{"a":{"items":{"anyOf":[{"x-mcp-header":"A"}]}}}},{}]',
    b'[{"properties":{"a":{"type":"boolean","x-mcp-header":"A"}}},{"a":1.5}]',
]
VALUES = [b"plain", b" padded ", b"=?base64?dA==?=", b"=?base64?dB==?=", "é😀".encode(), b"a\r\nb"]
CUTS = [b"\x00\x01\x02\x03", b"\x05\x09\x0d\x20"]

SEEDS: dict[str, list[bytes]] = {
    "jsonrpc": _messages() + AMBIGUOUS,
    "events": [cut + each for cut in CUTS for each in STREAMS],
    "lines": [CUTS[0] + b"a\r\nb\n\n c\n\r\n{}\rd", CUTS[1] + b"\n".join(AMBIGUOUS)],
    "headers": VALUES,
    "mirrors": SCHEMAS,
    "session": _messages() + AMBIGUOUS,
    "planted": [b"a"],
}

_JSON = [
    *('"jsonrpc":"2.0"', '"id":1', '"method":', '"params":{', '"result":', '"error":{"code":1}'),
    *('"_meta":{', '"name":', '"arguments":{', "NaN", "1e999", "-0", "\\u", "\\ud800", "\\udc00"),
    *("null", "true", "false", '":', '",', "},", "],", "\u212a", "\u017f"),
]
_SESSION = [
    *(f'"{name}"' for name in TABLE.rows),
    *('"uri":', '"taskId":', '"ref":{"type":"ref/resource","uri":""}', '"notifications":{'),
    *('"io.modelcontextprotocol/protocolVersion":"2026-07-28"', '"inputResponses":{'),
    *('"taskIds":[', '"resourceSubscriptions":[', '"Name":', "\\u0000", "%2e%2e/", "file:///"),
]
_EVENTS = ["data:", "id:", "event:", "retry:", "\r\n", "\n\n", "\r\r", ":", "\ufeff", " "]
_MIRRORS = [
    *('"x-mcp-header":', '"properties":{', '"type":"string"', '"type":"integer"', '"items":{'),
    *('"anyOf":[', '"$defs":{', '"type":"boolean"'),
]

WORDS: dict[str, list[str]] = {
    "jsonrpc": _JSON,
    "events": _EVENTS,
    "lines": ["\r\n", "\n", "\r"],
    "headers": ["=?base64?", "?=", "=", "\t", " "],
    "mirrors": _JSON + _MIRRORS,
    "session": _JSON + _SESSION,
    "planted": ["\r\n"],
}


def dictionary(target: str) -> str:
    """The words in the notation of libFuzzer."""
    quoted = ("".join(f"\\x{byte:02x}" for byte in word.encode("utf-8")) for word in WORDS[target])
    return "".join(f'"{each}"\n' for each in quoted)
