"""What a caller may say of its trace, read strictly (W3C Trace Context, W3C Baggage, SEP-414).

`_meta` and headers are the caller's to choose, and go on to OPA and to the server: only what the
grammars allow gets through, in a bounded size. Anything else is as if nothing had been said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

MAX_TRACEPARENT = 128
MAX_TRACESTATE = 1024
MAX_TRACESTATE_MEMBERS = 32
MAX_BAGGAGE = 8192
MAX_BAGGAGE_MEMBERS = 64

_VERSION_0_LENGTH = 55
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-[!-~]*)?"
)
_STATE_KEY = r"[a-z0-9][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}"
_STATE = re.compile(rf"({_STATE_KEY})=[ -+\--<>-~]{{0,255}}[!-+\--<>-~]")
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 (a token of RFC 9110, no secret)
_PAIR = rf"{_TOKEN}[ \t]*=[ \t]*[!#-+\--:<-\[\]-~]*"
_BAGGAGE = re.compile(rf"[ \t]*{_PAIR}(?:[ \t]*;[ \t]*(?:{_PAIR}|{_TOKEN}))*[ \t]*")


class Remote(NamedTuple):
    """A span of the caller's; `traceparent` as it came."""

    traceparent: str
    trace_id: str
    span_id: str
    sampled: bool
    tracestate: str | None = None


def read_remote(carrier: Mapping[str, object]) -> Remote | None:
    """The caller's span in `_meta` or in headers. A bad tracestate is dropped, its parent kept."""
    text = carrier.get("traceparent")
    if not isinstance(text, str) or len(text) > MAX_TRACEPARENT:
        return None
    match = _TRACEPARENT.fullmatch(text)
    if match is None or (text.startswith("00") and len(text) != _VERSION_0_LENGTH):
        return None
    return Remote(text, match[1], match[2], bool(int(match[3], 16) & 1), _read_state(carrier))


def read_baggage(carrier: Mapping[str, object]) -> str | None:
    """The caller's baggage in `_meta` or in headers: all of it, or none."""
    text = carrier.get("baggage")
    if not isinstance(text, str) or len(text) > MAX_BAGGAGE:
        return None
    members = text.split(",", MAX_BAGGAGE_MEMBERS)
    good = len(members) <= MAX_BAGGAGE_MEMBERS and all(map(_BAGGAGE.fullmatch, members))
    return text if good else None


def headers(traceparent: str, tracestate: str | None, baggage: str | None = None) -> dict[str, str]:
    """A context as headers, or as keys of `_meta`."""
    fields = {"traceparent": traceparent, "tracestate": tracestate, "baggage": baggage}
    return {name: value for name, value in fields.items() if value is not None}


def _read_state(carrier: Mapping[str, object]) -> str | None:
    text = carrier.get("tracestate")
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TRACESTATE:
        return None
    members = [member for each in text.split(",") if (member := each.strip(" \t"))]
    keys = {match[1] for each in members if (match := _STATE.fullmatch(each))}
    return text if 0 < len(keys) == len(members) <= MAX_TRACESTATE_MEMBERS else None
