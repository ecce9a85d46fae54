"""JSON Patch (RFC 6902) from what a pod was to what it shall be."""

from __future__ import annotations

from collections.abc import Iterator

from sidecar.injector.injection import Json


def patch(before: Json, after: Json) -> list[Json]:
    """The operations, of whole fields of `metadata` and `spec`: no place in a list is counted."""
    found: list[Json] = []
    for part in ("metadata", "spec"):
        if part in before and isinstance(before[part], dict):
            found += _fields(f"/{part}", before[part], after.get(part) or {})
        elif part in after:
            found.append({"op": "add", "path": f"/{part}", "value": after[part]})
    return found


def _fields(path: str, before: Json, after: Json) -> Iterator[Json]:
    for name in sorted(before.keys() | after.keys()):
        place = f"{path}/{name.replace('~', '~0').replace('/', '~1')}"
        if name not in after:
            yield {"op": "remove", "path": place}
        elif name not in before:
            yield {"op": "add", "path": place, "value": after[name]}
        elif before[name] != after[name]:
            yield {"op": "replace", "path": place, "value": after[name]}
