"""Reading one value: what fits is taken as it is, what does not is a problem with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any


class Bad(Exception):
    """A value that can not be used."""


class Problems(list[tuple[str, Bad]]):
    """Where, as the operator wrote it, and what."""

    def read(self, key: Key, value: Any, where: str) -> Any:
        """Read `value`; what is bad in it is kept here, and read as None."""
        try:
            if isinstance(key, list):
                items = enumerate(items_of(value))
                return tuple([self.read(key[0], item, f"{where}[{i}]") for i, item in items])
            return key.read(value, where, self) if isinstance(key, Record) else key(value)
        except Bad as bad:
            return self.append((where, bad))

    def unknown(self, where: str, name: str, known: Collection[str]) -> None:
        """Keep a name that is in no table."""
        from difflib import get_close_matches

        elsewhere = [each for each in known if each.endswith(f".{name}")]
        near = elsewhere or get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        self.append((where, Bad(f"is not known{hint}")))


@dataclass(frozen=True, slots=True)
class Record:
    """A mapping with keys of its own, of which `make` makes one value."""

    keys: Mapping[str, Key]
    required: tuple[str, ...]
    make: Callable[..., Any]

    def read(self, value: Any, where: str, problems: Problems) -> Any:
        """Read key by key, so that each problem has its place."""
        before, seen = len(problems), {}
        for name, item in mapping(value).items():
            if name in self.keys:
                seen[name] = problems.read(self.keys[name], item, f"{where}.{name}")
            else:
                problems.unknown(f"{where}.{name}", name, self.keys)
        problems += [(where, Bad(f"needs the key {n!r}")) for n in self.required if n not in value]
        if len(problems) > before:
            return None
        try:
            return self.make(**seen)
        except ValueError as error:
            raise Bad(str(error)) from None


Key = Callable[[Any], Any] | Record | list[Any]  # a list of one: each item is read so


def a_value(what: str, fits: Callable[[Any], object]) -> Callable[[Any], Any]:
    """The reader of what is stored as it is written."""

    def read(value: Any) -> Any:
        if fits(value):
            return value
        shown = re.sub("//[^/]*@", "//…@", json.dumps(value, ensure_ascii=False))
        raise Bad(f"must be {what}, not {shown if len(shown) <= 60 else shown[:57] + '…'}")

    return read


def text(what: str, pattern: str) -> Callable[[Any], Any]:
    """The reader of a text that is, as a whole, what the pattern says."""
    return a_value(what, lambda value: isinstance(value, str) and re.fullmatch(pattern, value))


def one_of(*words: str) -> Callable[[Any], Any]:
    """The reader of one of these words."""
    return text(f"one of {', '.join(words)}", "|".join(words))


def number(low: float, high: float, *kinds: type) -> Key:
    """The reader of a number of these kinds, from `low` to `high`; of null where None is one."""

    def fits(value: Any) -> bool:
        typed = isinstance(value, kinds) and not isinstance(value, bool)
        return typed and (value is None or bool(low <= value <= high))

    whole, null = "whole " * (float not in kinds), " or null" * (type(None) in kinds)
    return a_value(f"a {whole}number from {low} to {high}{null}", fits)


items_of = a_value(
    "a list that says nothing twice",
    lambda value: isinstance(value, list) and len({*map(repr, value)}) == len(value),
)
mapping = a_value("a mapping", lambda value: isinstance(value, dict))
