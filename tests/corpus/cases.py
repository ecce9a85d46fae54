"""The cases, as they stand in the YAML files, and how their bytes are put together.

A text may name what depends on the road that a case takes: `$ID` is the request's id, `$META` the
envelope of the stateless revision (nothing elsewhere), `$CALL` a whole call of the tool that is not
allowed, `$ECHO` one of the tool that may be, `$HEAD` the header lines of a proper request. What is
no text is put together by one of `MAKERS`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
ITEMS = FOLDER / "items.yaml"

# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────

WORDS = {
    "$CALL": '{"jsonrpc":"2.0","id":$ID,"method":"tools/call",'
    '"params":{"name":"danger","arguments":{}$META}}',
    "$ECHO": '{"jsonrpc":"2.0","id":$ID,"method":"tools/call",'
    '"params":{"name":"echo","arguments":{}$META}}',
    "$ESCAPED": '{\\"jsonrpc\\":\\"2.0\\",\\"id\\":1,\\"method\\":\\"tools/call\\",'
    '\\"params\\":{\\"name\\":\\"danger\\"}}',
    "$LIST": '{"jsonrpc":"2.0","id":$ID,"method":"tools/list","params":{$ONLYMETA}}',
    "$PING": '{"jsonrpc":"2.0","id":$ID,"method":"ping"}',
    "$SAMPLING": '{"jsonrpc":"2.0","id":"q-$ID","method":"sampling/createMessage",'
    '"params":{"messages":[],"maxTokens":1}}',
    "$ANSWER": '{"jsonrpc":"2.0","id":$ID,"result":{"content":[],"resultType":"complete"}}',
    "$STOLEN": '{"jsonrpc":"2.0","id":987654,"result":{"stolen":true}}',
}

WRAPPED = {"gzip": 31, "deflate": 15, "raw-deflate": -15}
"""What zlib calls the kinds of compression."""

Words = Mapping[str, str]
Part = Any


def text_of(text: str, words: Words) -> str:
    """The text with every `$WORD` in it replaced, also those that come with a replacement."""
    if "$" in text:
        for name, value in (*WORDS.items(), *words.items()):
            text = text.replace(name, value)
    return text


def make(part: Part, words: Words) -> bytes:
    """The bytes of a part: a text, several parts, or something made by the one key it has."""
    if isinstance(part, str):
        return text_of(part, words).encode()
    if isinstance(part, list):
        return b"".join(make(each, words) for each in part)
    [(maker, argument)] = part.items()
    return MAKERS[maker](argument, words)


def _swap(argument: Part, words: Words) -> bytes:
    """`$CALL` (or what stands third) with a piece of its text replaced."""
    old, new, *of = argument
    whole, before = make(of[0] if of else "$CALL", words), make(old, words)
    assert before in whole, f"{old!r} is not in {whole!r}"
    return whole.replace(before, make(new, words), 1)


def _encode(argument: Part, words: Words) -> bytes:
    codec, of = argument
    return make(of, words).decode().encode(codec)


def _compress(argument: Part, words: Words) -> bytes:
    how, of = argument
    compressor = zlib.compressobj(wbits=WRAPPED[how])
    return compressor.compress(make(of, words)) + compressor.flush()


def _chunk(argument: Part, words: Words) -> bytes:
    data = make(argument, words)
    return b"%x\r\n%b\r\n" % (len(data), data)


def _many(argument: Part, words: Words) -> bytes:
    """`[times, text]`: the text over and over, `%` in it a number that grows."""
    times, of = argument
    whole = make(of, words)
    return b",".join(whole.replace(b"%", b"%d" % number) for number in range(times))


MAKERS: Mapping[str, Callable[[Part, Words], bytes]] = {
    "hex": lambda argument, words: bytes.fromhex(argument),
    "repeat": lambda argument, words: make(argument[1], words) * argument[0],
    "many": _many,
    "swap": _swap,
    "encode": _encode,
    "compress": _compress,
    "length": lambda argument, words: b"%d" % len(make(argument, words)),
    "length_hex": lambda argument, words: b"%x" % len(make(argument, words)),
    "chunk": _chunk,
    "bytewise": lambda argument, words: b"".join(
        b"1\r\n%c\r\n" % each for each in make(argument, words)
    ),
}

# ── Cases ─────────────────────────────────────────────────────────────────────────────────────────

ROADS = {
    "modern": "http",
    "session": "http",
    "stateless": "http",
    "bridge-http": "http",
    "stdio": "pipe",
    "stdio-modern": "pipe",
    "bridge-stdio": "pipe",
    "bridge-stdio-modern": "pipe",
    "sse": "sse",
}
"""Every way to a server, and what carries it."""

CARRIERS = {
    "body": ("http", "pipe", "sse"),
    "request": ("http",),
    "raw": ("http",),
    "pipe": ("pipe",),
    "says": ("http", "pipe"),
}
"""What a step may be, and what can carry it: a message, an HTTP request that is not as usual, the
bytes of a connection or of a pipe, and what a server says when it is asked to."""

MODERN = ("modern", "stdio-modern", "bridge-stdio-modern")


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is sent: its kind, its part, and all that is unusual about it."""

    kind: str
    part: Part
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """What is sent, where, what comes back, and how many harmless calls it lets through.

    `live` says of which servers, reached directly, it is known that they execute it.
    """

    name: str
    file: str
    covers: tuple[str, ...]
    steps: tuple[Step, ...]
    roads: tuple[str, ...]
    reply: Mapping[str, tuple[str, ...]]
    lets: tuple[int, ...]
    live: tuple[str, ...]
    servers: tuple[str, ...]

    def expected(self, road: str) -> tuple[str, ...]:
        """What may come back on a road."""
        found = self.reply.get(road) or self.reply.get(ROADS[road]) or self.reply["any"]
        return found if ROADS[road] == "http" else tuple(map(_without_status, found))


def load() -> list[Case]:
    """Every case of every file, families spelled out."""
    files = sorted(each for each in FOLDER.glob("*.yaml") if each != ITEMS)
    return [case for file in files for case in _read(file)]


def items() -> dict[str, str]:
    """What has to be covered: a name for each, and what it is, in a few words."""
    found: dict[str, dict[str, str]] = yaml.safe_load(ITEMS.read_text(encoding="utf-8"))
    return {f"{group}/{name}": text for group, each in found.items() for name, text in each.items()}


def _read(file: Path) -> Iterator[Case]:
    whole = yaml.safe_load(file.read_text(encoding="utf-8"))
    for each in whole["cases"]:
        row = {**whole.get("all", {}), **each}
        family = row.pop("each", None)
        if family is None:
            yield _case(row, file.stem)
            continue
        for name, value in family.items():
            assert value is not None, f"{row['name']}: {name} is nothing"
            single = _substitute(row, value)
            yield _case({**single, "name": f"{row['name']}: {name}"}, file.stem)


def _substitute(tree: Any, value: Any) -> Any:
    """The tree with `$EACH` in it replaced by one member of the family."""
    if isinstance(tree, str):
        if tree == "$EACH":
            return value
        return tree.replace("$EACH", str(value)) if "$EACH" in tree else tree
    if isinstance(tree, list):
        return [_substitute(each, value) for each in tree]
    if isinstance(tree, dict):
        return {key: _substitute(each, value) for key, each in tree.items()}
    return tree


def _case(row: dict[str, Any], file: str) -> Case:
    steps = tuple(map(_step, row.pop("steps", None) or [_take_step(row)]))
    reply = row.pop("reply")
    case = Case(
        name=row.pop("name"),
        file=file,
        covers=tuple(row.pop("covers", ())),
        steps=steps,
        roads=_roads(steps, row.pop("roads", None), row.pop("not", ())),
        reply={key: _several(each) for key, each in _by_road(reply).items()},
        lets=tuple(_list(row.pop("lets", 0))),
        live=tuple(row.pop("live", ())),
        servers=tuple(row.pop("servers", ())),
    )
    assert not row, f"{case.name}: {sorted(row)} means nothing"
    return case


def _take_step(row: dict[str, Any]) -> dict[str, Any]:
    keys = {*CARRIERS, "method", "mirror", "wait", "end", "pieces", "media"}
    return {key: row.pop(key) for key in keys & set(row)}


def _step(row: dict[str, Any]) -> Step:
    kind = next(each for each in CARRIERS if each in row)
    return Step(kind, row[kind], {key: each for key, each in row.items() if key != kind})


def _roads(steps: tuple[Step, ...], only: list[str] | None, without: list[str]) -> tuple[str, ...]:
    """Where all steps can be carried, less what the case leaves out."""
    unknown = {*(only or ()), *without} - {*ROADS, *ROADS.values()}
    assert not unknown, f"there are no roads {unknown}"
    return tuple(
        road
        for road, carrier in ROADS.items()
        if all(carrier in CARRIERS[each.kind] for each in steps)
        and (only is None or {road, carrier} & {*only})
        and not {road, carrier} & {*without}
    )


def _by_road(reply: Any) -> dict[str, Any]:
    return dict(reply) if isinstance(reply, dict) else {"any": reply}


def _without_status(word: str) -> str:
    """What is left of a status and a code where there are codes alone."""
    status, _, code = word.partition(" ")
    return code or {"202": "none"}.get(status, status)


def _several(value: Any) -> tuple[str, ...]:
    return tuple(str(each) for each in _list(value))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
