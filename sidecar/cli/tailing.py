"""`mcp-sidecar tail`: decisions as they are made, an action a line.

Names are chosen by callers and servers. What is printed of them has no control characters, no
direction marks and no line ends, whatever they hold; one that is not a plain word is in quotes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING

from sidecar.errors import ConfigError, MalformedMessage
from sidecar.protocol.jsonrpc import FROM_SERVER, JsonObject, dump_json, parse_json

if TYPE_CHECKING:
    from aiohttp import ClientResponse

ENDED = 1
BROKEN_PIPE = 141
CONNECT = 5.0
MAX_RECORD = 2**20
MAX_PENDING = 10_000
"""Decisions whose outcome has not come; older ones are shown without what they say."""
MAX_NAME, MAX_MESSAGE, MAX_PATH, MAX_TARGETS = 80, 200, 200, 3

PLAIN = re.compile(r"[^\s\"\\,=…]+")
RIGHT_TO_LEFT = frozenset({"R", "AL", "AN"})

COLOURS = {"allow": "32", "deny": "31", "error": "33"}
Paint = Callable[[str, str], str]


async def tail(options: argparse.Namespace) -> int:
    """Show decisions until the sidecar ends.

    Raises:
        ConfigError: there is no sidecar, or it can not be watched.
    """
    path = options.control or os.environ.get("MCP_SIDECAR_CONTROL")
    if not path:
        raise ConfigError("tail needs the sidecar's socket: --control PATH, or MCP_SIDECAR_CONTROL")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    painted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not options.no_color
    show = _as_it_is if options.json else Lines(_ansi if painted else _plain)
    asked = {name: vars(options)[name] for name in ("actor", "tool", "decision", "last")}
    try:
        async with _records(path, {name: str(value) for name, value in asked.items()}) as records:
            async for record in records:
                for line in show(record):
                    print(line, flush=True)
    except BrokenPipeError:  # whoever read our lines has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    print(f"mcp-sidecar: the sidecar on {quoted(path, limit=MAX_PATH)} has ended", file=sys.stderr)
    return ENDED


@asynccontextmanager
async def _records(path: str, asked: dict[str, str]) -> AsyncIterator[AsyncIterator[JsonObject]]:
    """What the sidecar tells, record by record, to its end."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
    connector = aiohttp.UnixConnector(path)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=MAX_RECORD
    ) as session:
        try:
            response = await session.get("http://control/v1/decisions", params=asked)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ConfigError(
                f"no sidecar can be watched on {quoted(path, limit=MAX_PATH)}: {_why(error)}"
            ) from None
        async with response:
            if response.status != 200:
                why = quoted((await response.text()).strip(), limit=MAX_MESSAGE)
                raise ConfigError(f"the sidecar on {quoted(path, limit=MAX_PATH)} refuses: {why}")
            _know(response, path)
            yield _read(response)


async def _read(response: ClientResponse) -> AsyncIterator[JsonObject]:
    import aiohttp

    try:
        async for line in response.content:
            try:
                record = parse_json(line, FROM_SERVER)
            except MalformedMessage:
                record = {"type": "unreadable"}
            yield record
    except (aiohttp.ClientError, ConnectionError):
        return


def _know(response: ClientResponse, path: str) -> None:
    """See to it that this is no other user's idea of a sidecar; root may look at anybody's."""
    from sidecar.transport.control import peer_uid

    transport = response.connection.transport if response.connection is not None else None
    if transport is None:
        raise ConfigError(f"who listens on {quoted(path, limit=MAX_PATH)} hangs up")
    owner = peer_uid(transport.get_extra_info("socket"))
    if os.geteuid() != 0 and owner not in (os.geteuid(), 0):
        raise ConfigError(
            f"user {owner} listens on {quoted(path, limit=MAX_PATH)}, which is not you"
        )


def _why(error: BaseException) -> str:
    cause = getattr(error, "os_error", error)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _as_it_is(record: JsonObject) -> Iterator[str]:
    yield dump_json(record).decode()


class Lines:
    """Makes one line of the records of an action."""

    def __init__(self, paint: Paint) -> None:
        self._paint = paint
        self._pending: dict[str, JsonObject] = {}

    def __call__(self, record: JsonObject) -> Iterator[str]:
        """The lines that this record completes: mostly one, or none."""
        match record["type"]:
            case "missed":
                yield self._paint(
                    "33", f"… {record['count']} records not shown: they came too fast"
                )
            case "decision" if record["decision"] == "allow" or record["mode"] == "shadow":
                self._remember(record)
            case "decision":
                self._pending.pop(record["decision_id"], None)
                yield self._line(record)
            case "outcome":
                decision = self._pending.pop(record["decision_id"], None)
                if decision is not None or record["decision"] == "allow":
                    yield self._line({**(decision or {}), **record})
            case "refused":
                yield self._line({**record, "decision": "deny"})
            case _:
                yield self._line(record)

    def _remember(self, decision: JsonObject) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._pending.pop(next(iter(self._pending)))
        self._pending[decision["decision_id"]] = decision

    def _line(self, record: JsonObject) -> str:
        word = str(record.get("decision", "-"))
        painted = self._paint(COLOURS.get(word, "0"), f"{word:<5}")
        facts = (said for said in (fact(record) for fact in FACTS) if said)
        return "  ".join((quoted(str(record.get("time", ""))[11:]), painted, *facts))


def _who(record: JsonObject) -> str | None:
    """Who acts, and for whom; of an outcome whose decision was not seen, by key."""
    actor, chain = record.get("actor"), record.get("chain") or ()
    if record["type"] == "refused":
        return f"a stranger from {quoted(str(record.get('source_address', 'a pipe')))}"
    if actor is None:
        return None
    behind = actor.get("on_behalf_of")
    who = chain[0]["id"] if chain else actor["key"]
    said = f"{actor['type']}:{quoted(who)}"
    if behind is None:
        return said
    last = f"{chain[-1]['type']}:{quoted(chain[-1]['id'])}" if chain else quoted(behind)
    return f"{said} for {last}"


def _what(record: JsonObject) -> str | None:
    method = record.get("method", record.get("path"))
    if method is None:
        return None
    targets = record.get("targets") or ()
    names = [quoted(each["name"]) for each in targets[:MAX_TARGETS]]
    names += ["…"] * (len(targets) > MAX_TARGETS)
    plain = {each["type"] for each in targets} <= {"negotiation", "listing", "stream"}
    shown = [] if method == "tools/call" and names else [quoted(method)]
    return " ".join(shown if plain else (*shown, *names))


def _resource(record: JsonObject) -> str | None:
    resource = record.get("resource")
    return None if resource is None else f"on {quoted(resource)}"


def _outcome(record: JsonObject) -> str | None:
    shadow = "shadow" if record.get("mode") == "shadow" else None
    return " ".join(each for each in (shadow, record.get("outcome")) if each) or None


def _why_not(record: JsonObject) -> str | None:
    said = []
    for each in (record.get("reasons") or ())[:MAX_TARGETS]:
        message = each.get("message")
        more = f" {quoted(message, limit=MAX_MESSAGE)}" if message else ""
        said.append(quoted(each["code"]) + more)
    return ", ".join(said) or record.get("error") or record.get("reason")


def _labelled(label: str, key: str) -> Callable[[JsonObject], str | None]:
    def fact(record: JsonObject) -> str | None:
        value = record.get(key)
        return None if value is None else f"{label}={quoted(str(value))}"

    return fact


def _took(record: JsonObject) -> str | None:
    milliseconds = record.get("milliseconds")
    return None if milliseconds is None else f"{milliseconds:.1f}ms"


FACTS = (
    *(_who, _what, _resource, _outcome, _why_not),
    *(_labelled("rule", "rule"), _labelled("rev", "policy_revision"), _took),
)
"""What a line says after time and decision."""


def quoted(text: str, *, limit: int = MAX_NAME) -> str:
    """A name as it can be printed: harmless, bounded, and in quotes unless it is a plain word."""
    shown = "".join(map(_harmless, text[:limit])) + "…" * (len(text) > limit)
    return shown if PLAIN.fullmatch(shown) else f'"{shown}"'


def _harmless(each: str) -> str:
    """The character, or its escape when it is not printed left to right in a place of its own."""
    plain = each.isprintable() and not unicodedata.combining(each)
    if plain and each not in '"\\' and unicodedata.bidirectional(each) not in RIGHT_TO_LEFT:
        return each
    return each.encode("unicode_escape").decode() if each not in '"\\' else f"\\{each}"


def _plain(code: str, text: str) -> str:
    return text


def _ansi(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"
