"""The names in a PromQL query, and the names that there are.

It reads names, not the grammar: `promtool` does that. What it does not know stops it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""\s+ | (?P<string>"(?:[^"\\]|\\.)*") | (?P<range>\[[\w$:]+\])
    | (?P<number>\d[\w.]*) | (?P<word>[A-Za-z_:][\w:]*) | (?P<sign>[{}(),=~!<>+*/%^-])""",
    re.VERBOSE,
)
_GROUPING = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_WORDS = frozenset({"and", "or", "unless", "bool", "offset"})


@dataclass(frozen=True)
class Names:
    """What a query names: each metric with the labels that select it, and what it groups by."""

    metrics: tuple[tuple[str, frozenset[str]], ...]
    grouping: frozenset[str]


def names(query: str) -> Names:
    """The names in a query.

    Raises:
        ValueError: it has something that is no token of PromQL.

    """
    tokens = list(_tokens(query))
    metrics: list[tuple[str, frozenset[str]]] = []
    grouping: set[str] = set()
    at = 0
    while at < len(tokens):
        word, after = tokens[at], tokens[at + 1 : at + 2]
        at += 1
        if not re.match(r"[A-Za-z_:]", word) or word in _WORDS:
            continue
        if word in _GROUPING:
            labels, at = _until(tokens, at, "(", ")")
            grouping |= labels
        elif after == ["{"]:
            labels, at = _until(tokens, at, "{", "}")
            metrics.append((word, labels))
        elif after not in (["("], ["by"], ["without"]):  # else a function or an aggregation
            metrics.append((word, frozenset()))
    return Names(tuple(metrics), frozenset(grouping))


def _tokens(query: str) -> Iterator[str]:
    at = 0
    while at < len(query):
        found = _TOKEN.match(query, at)
        if found is None:
            raise ValueError(f"no PromQL: {query[at:]!r}")
        at = found.end()
        if found.lastgroup is not None:
            yield found[0]


def _until(tokens: list[str], at: int, opening: str, closing: str) -> tuple[frozenset[str], int]:
    """The words between two brackets, and where it goes on."""
    if tokens[at : at + 1] != [opening] or closing not in tokens[at:]:
        raise ValueError(f"{opening} … {closing} expected: {' '.join(tokens[at:])!r}")
    end = tokens.index(closing, at)
    words = (each for each in tokens[at + 1 : end] if re.match(r"[A-Za-z_]", each))
    return frozenset(words), end + 1


Series = dict[str, frozenset[str]]
"""The metrics that there are, and all labels that are on any series of each."""

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? \S+$", re.MULTILINE)


def exposed(text: str) -> Series:
    """What a text for Prometheus holds. A label without a value is none."""
    found: dict[str, set[str]] = {}
    for name, labels in _SAMPLE.findall(text):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="[^"]', labels))
    return {name: frozenset(labels) for name, labels in found.items()}


def unknown(query: str, series: Series) -> list[str]:
    """What a query names that is not there."""
    there, wrong = names(query), []
    known = frozenset[str]().union(
        *(series.get(metric, frozenset()) for metric, _ in there.metrics)
    )
    for metric, labels in there.metrics:
        if metric in series:
            wrong += [f"{metric}{{{each}}}" for each in sorted(labels - series[metric])]
        else:
            wrong.append(metric)
    return wrong + sorted(there.grouping - known)
