"""What OPA answered, read strictly.

`parse` turns the value of `data.mcp.authz.decision` into a `Decision` or raises `DecisionInvalid`:
an answer that is not understood to the last key is no answer (a deny), since a misspelt `alow` or a
newer key may be what the policy's author relied on. The normative form is
`policies/schemas/decision.schema.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

from sidecar.errors import DecisionInvalid

Mode = Literal["enforce", "shadow"]
Scalar = str | int | float | bool

MAX_ATTRIBUTES = 16
REVOKED = "revoked"

_CODE = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why: a stable snake_case code, a sentence for people, and the scope that would help."""

    code: str
    message: str = ""
    scope: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """One answer of the policy, understood.

    `visible` is None when the policy said nothing of it (everything is visible), else the names of
    a listing that may be shown. `opa_id` is OPA's own decision id, there when its log is on.
    """

    allow: bool
    reasons: tuple[Reason, ...] = ()
    rule: str | None = None
    owner: str | None = None
    revision: str | None = None
    watermark: str | None = None
    mode: Mode = "enforce"
    visible: frozenset[str] | None = None
    obligations: tuple[Mapping[str, Any], ...] = ()
    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    opa_id: str | None = None

    @property
    def reason(self) -> str | None:
        """The first reason's code: the one that spans, metrics and people go by."""
        return self.reasons[0].code if self.reasons else None

    @property
    def revoked(self) -> bool:
        """True for a refusal that nothing lifts: neither shadow mode nor negotiation."""
        return not self.allow and self.reason == REVOKED


def parse(value: Any, *, opa_id: str | None = None, bundle_revision: str | None = None) -> Decision:
    """Read `value`, the `result` of the query.

    Raises:
        DecisionInvalid: for anything that is not a decision document, version 1.

    """
    if isinstance(value, bool):
        return Decision(allow=value, revision=bundle_revision, opa_id=opa_id)
    if not isinstance(value, dict):
        raise _invalid(f"is {_kind(value)}, not a boolean or an object")
    if unknown := sorted(set(value) - set(_READERS)):
        raise _invalid(f"has the unknown key {unknown[0]!r}")
    if "allow" not in value:
        raise _invalid("has no key 'allow'")
    fields = {key: _READERS[key](key, item) for key, item in value.items()}
    fields.setdefault("revision", bundle_revision)
    return Decision(**fields, opa_id=opa_id)


def combine(decisions: Iterable[Decision]) -> Decision:
    """One decision for an action with several targets: the strictest of them.

    A refusal that nothing lifts comes before one that shadow mode may lift, and what all allow has
    the obligations of all. Lifting one target's refusal must not lift another's obligations, so a
    refusal beside obligations is enforced.
    """
    strictest, *others = sorted(decisions, key=_leniency)
    if not others:
        return strictest
    binding = [each for each in (strictest, *others) if each.obligations]
    if not strictest.allow:
        enforced = any(each.mode == "enforce" for each in binding)
        return replace(strictest, mode="enforce") if enforced else strictest
    counting = binding or [strictest, *others]
    together = tuple(chain.from_iterable(each.obligations for each in counting))
    return replace(counting[0], obligations=together, mode=min(each.mode for each in counting))


def _leniency(decision: Decision) -> int:
    if decision.allow:
        return 3
    return 0 if decision.revoked else (1 if decision.mode == "enforce" else 2)


def _bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _invalid(f"{key} is {_kind(value)}, not a boolean")
    return value


def _string(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _invalid(f"{key} is {_kind(value)}, not a string")
    return value


def _mode(key: str, value: Any) -> Mode:
    if value == "enforce":
        return "enforce"
    if value == "shadow":
        return "shadow"
    raise _invalid(f"{key} is neither 'enforce' nor 'shadow'")


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _invalid(f"{key} is {_kind(value)}, not a list")
    return value


def _reasons(key: str, value: Any) -> tuple[Reason, ...]:
    return tuple(_reason(item) for item in _list(key, value))


def _reason(item: Any) -> Reason:
    if not isinstance(item, dict) or not {"code", "message"} <= set(item):
        raise _invalid("reasons holds something that is not {code, message, scope?}")
    if set(item) - {"code", "message", "scope"}:
        raise _invalid("reasons holds an object with an unknown key")
    if not all(isinstance(each, str) for each in item.values()):
        raise _invalid("reasons holds an object whose values are not strings")
    if not _CODE.fullmatch(item["code"]):
        raise _invalid("reasons holds a code that is not snake_case")
    return Reason(**item)


def _visible(key: str, value: Any) -> frozenset[str]:
    return frozenset(_string(key, item) for item in _list(key, value))


def _obligations(key: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    items = _list(key, value)
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            raise _invalid("obligations holds something that is not {type, …}")
    return tuple(items)


def _attributes(key: str, value: Any) -> Mapping[str, Scalar]:
    """Bad attributes are dropped, never a deny: they are remarks, not part of the verdict."""
    if not isinstance(value, dict):
        return {}
    good = {name: item for name, item in value.items() if isinstance(item, (str, int, float, bool))}
    return dict(sorted(good.items())[:MAX_ATTRIBUTES])


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "allow": _bool,
    "reasons": _reasons,
    "rule": _string,
    "owner": _string,
    "revision": _string,
    "watermark": _string,
    "mode": _mode,
    "visible": _visible,
    "obligations": _obligations,
    "attributes": _attributes,
}


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _invalid(what: str) -> DecisionInvalid:
    return DecisionInvalid(f"the decision {what}", detail="bad_response")
