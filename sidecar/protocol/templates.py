"""Whether a URI is one of those that a template stands for (RFC 6570, in time linear in the URI).

A plain expression, `{name}`, stands for one piece of a path. Those with an operator stand for what
they could be expanded to: `{+path}` for anything, `{?q}`, `{/id}` and so on for nothing, or for
what begins with their sign. Each takes as little as it can, so that there is one look along the URI
and never a second: a template in which only a longer choice would do (`{+path}-{id}`), or in which
two expressions stand side by side, misses URIs that are its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MAX_URI = 8192
"""Characters; no template matches a longer one."""

MAX_TEMPLATE = 2048
REMEMBERED = 4096

_EXPRESSION = re.compile(r"\{([^{}]*)\}")
_TAIL = re.compile(r"\{([?&#])[^{}]*\}\Z")
_BETWEEN_PIECES = re.compile(r"[/?#]")


@dataclass(frozen=True, slots=True)
class _Gap:
    """What an expression is filled with, up to the text that follows.

    `sign` is how it begins, where it may also be empty. `wide`: it may hold several pieces.
    """

    sign: str
    wide: bool
    following: str

    def fits(self, text: str) -> bool:
        if not text or not text.startswith(self.sign):
            return not text and bool(self.sign)
        return self.wide or not _BETWEEN_PIECES.search(text, len(self.sign))


@dataclass(frozen=True, slots=True)
class _Template:
    """The text before the first gap, the gaps, and the sign of what may follow at the very end."""

    start: str
    gaps: tuple[_Gap, ...]
    tail: str


def matches(template: str, uri: str) -> bool:
    """Whether `uri` can be had from `template` by filling it in."""
    read = _read(template)
    if read is None or len(uri) > MAX_URI or not uri.startswith(read.start):
        return False
    if read.tail:
        uri = uri.partition(read.tail)[0]
    at = len(read.start)
    for gap in read.gaps[:-1]:
        end = uri.find(gap.following, at if gap.sign else at + 1)
        if end < 0 or not gap.fits(uri[at:end]):
            return False
        at = end + len(gap.following)
    return _ends(uri, at, read.gaps[-1]) if read.gaps else at == len(uri)


def _ends(uri: str, at: int, last: _Gap) -> bool:
    end = len(uri) - len(last.following)
    return at <= end and uri.endswith(last.following) and last.fits(uri[at:end])


@lru_cache(REMEMBERED)
def _read(template: str) -> _Template | None:
    """What is understood of a template; None for what is none."""
    if len(template) > MAX_TEMPLATE:
        return None
    tail = _TAIL.search(template)
    start, *rest = _EXPRESSION.split(template if tail is None else template[: tail.start()])
    texts = rest[1::2]
    if not all(texts[:-1]) or any("{" in each or "}" in each for each in (start, *texts)):
        return None
    gaps = tuple(_gap(each, text) for each, text in zip(rest[::2], texts, strict=True))
    return _Template(start, gaps, tail[1] if tail else "")


def _gap(expression: str, following: str) -> _Gap:
    operator = expression[:1]
    several = "*" in expression or "," in expression
    wide = operator in tuple("+#?&") or (operator == "/" and several)
    return _Gap(operator if operator in tuple("#./;?&") else "", wide, following)
