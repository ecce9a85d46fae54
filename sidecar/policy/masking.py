"""Arguments and results as they may be written down: their shape, and such values as were named.

A string is shown as `<string 12>`, a number as `<number>`; only what is at a path that the
configuration names is shown as it is. Two rules no path lifts by covering what is around them:

* below a name that looks like a secret's (`password`, `api_key`, `Authorization`, …) there is
  `<masked>` and nothing more, unless a path names that very place;
* a text that looks like it holds a token or key (a JWT, `Bearer …`, a PEM block, credentials in a
  URL, `password=…`, a long random word) is `<string 12>`, whatever is named.

What comes out is bounded, and so is the work: as soon as there is no room, `...` stands for the
rest. Names of keys are shown when they are plain words; a key can be a secret too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sidecar.protocol.jsonrpc import Json, JsonObject, dump_json

Root = Literal["arguments", "result"]

MAX_BYTES = 4096
MAX_STRING = 256
MAX_DEPTH = 16
MASKED = "<masked>"
CUT = "..."

SECRETS = (
    *("password", "passwd", "passphrase", "passcode", "secret", "token", "jwt", "bearer", "oauth"),
    *("authorization", "authentication", "credential", "cookie", "session", "signature"),
    *("apikey", "accesskey", "privatekey", "signingkey", "encryptionkey", "cardnumber"),
)
"""A name is a secret's when, written without separators and in lower case, it has one of these."""
SHORT_SECRETS = frozenset(
    {"pwd", "pass", "auth", "pin", "otp", "totp", "cvv", "cvc", "ssn", "iban"}
)
"""The same for whole words of a name: `card_pin` and `cardPin`, not `shipping`."""

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_PLAIN = re.compile(r"[A-Za-z0-9_.$@:/ -]{1,64}")
_LONG = "|".join((*SECRETS, "(?:api|access|private)[ _-]key"))
_SHORT = "|".join(sorted(SHORT_SECRETS))
_TOKENS = re.compile(
    r"eyJ[\w-]{4,}\.[\w-]+"  # a JWT
    r"|(?i:\b(?:bearer|basic|digest|negotiate)\s+[\w+/=.~-]{6,})"
    r"|-----BEGIN "
    r"|://[^/\s@]+@"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{12,}|\bAIza[\w-]{20,}|\bxox[a-z]-|\bsk[-_][\w-]{12,}"
    r"|\b(?:gh[a-z]|github_pat|glpat)[-_]\w{10,}"
    r"|[\w+=-]{40,}"
    rf"|(?i:(?:(?:{_LONG})\w*|\b(?:{_SHORT})\b)[\"'\\]*\s*[:=])"
)

_RESERVE = MAX_DEPTH * len('"...":"...",') + 32
_OVERHEAD = len('"":"...",{}')

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Masking:
    """What is shown of content (`masking` in the configuration)."""

    shown: tuple[str, ...] = ()  # paths: result.structuredContent.*.status; lists take no step
    secrets: tuple[str, ...] = ()  # names of secrets besides SECRETS, as those are written

    def mask(self, root: Root, value: Json, limit: int = MAX_BYTES) -> Json:
        """The value as it may be written down; as JSON it has at most `limit` bytes."""
        paths = tuple(tuple(each.split(".")) for each in self.shown)
        below = tuple(_below(paths, root))
        walk = _Walk((*SECRETS, *self.secrets), limit - _RESERVE)
        return walk.value(value, below, covered=() in below, depth=0)


def text(value: Json) -> str:
    """What is masked as JSON."""
    return dump_json(value).decode()


def looks_secret(name: str, secrets: tuple[str, ...] = SECRETS) -> bool:
    """Whether a key's name is one that secrets have."""
    words = [each.lower() for each in _WORDS.findall(name)]
    whole = "".join(words)
    return not SHORT_SECRETS.isdisjoint(words) or any(each in whole for each in secrets)


def holds_token(value: str) -> bool:
    """Whether a text looks like it holds a token, a key or a password."""
    return _TOKENS.search(value) is not None


class _Walk:
    """One value, from the outside in, for as long as there is room."""

    def __init__(self, secrets: tuple[str, ...], room: int) -> None:
        self._secrets, self._room = secrets, room

    def value(self, value: Json, paths: tuple[Path, ...], *, covered: bool, depth: int) -> Json:
        """`paths` lead on from here to what is shown; `covered`: this is."""
        if isinstance(value, dict):
            return self._object(value, paths, covered, depth) if depth < MAX_DEPTH else "<object>"
        if isinstance(value, list):
            return self._list(value, paths, covered, depth) if depth < MAX_DEPTH else "<list>"
        leaf = _leaf(value, covered=covered)
        return leaf if self._takes(len(dump_json(leaf))) else CUT

    def _object(
        self, value: JsonObject, paths: tuple[Path, ...], covered: bool, depth: int
    ) -> JsonObject:
        found: JsonObject = {}
        for key, each in value.items():
            name = _name(key)
            if not self._takes(len(name) + _OVERHEAD):
                found[CUT] = CUT
                break
            below = tuple(_below(paths, key))
            if looks_secret(key, self._secrets) and not _names(paths, key):
                found[name] = MASKED if self._takes(len(MASKED)) else CUT
            else:
                shown = covered or () in below
                found[name] = self.value(each, below, covered=shown, depth=depth + 1)
        return found

    def _list(
        self, value: list[Json], paths: tuple[Path, ...], covered: bool, depth: int
    ) -> list[Json]:
        found: list[Json] = []
        for each in value:
            if not self._takes(_OVERHEAD):
                found.append(CUT)
                break
            found.append(self.value(each, paths, covered=covered, depth=depth + 1))
        return found

    def _takes(self, size: int) -> bool:
        fits = size <= self._room
        self._room -= size if fits else 0
        return fits


def _below(paths: tuple[Path, ...], key: str) -> Iterator[Path]:
    return (path[1:] for path in paths if path and path[0] in (key, "*"))


def _names(paths: tuple[Path, ...], key: str) -> bool:
    """Whether one of the paths ends in exactly this key."""
    return (key,) in paths


def _name(key: str) -> str:
    return key if _PLAIN.fullmatch(key) and not holds_token(key) else f"<key {len(key)}>"


def _leaf(value: Json, *, covered: bool) -> Json:
    match value:
        case None | bool():
            return value
        case str() if not covered or len(value) > MAX_BYTES or holds_token(value):
            return f"<string {len(value)}>"
        case str():
            return value if len(value) <= MAX_STRING else value[:MAX_STRING] + CUT
        case _:
            return value if covered else "<number>"
