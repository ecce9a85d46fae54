"""Where the pods are in the kinds that make them: whatever has a template, and lists of such."""

from __future__ import annotations

from collections.abc import Callable

from sidecar.injector.injection import Json

Change = Callable[[Json, Json], Json]
"""From a pod, or the template of one, and its manifest, to what shall be in the pod's place."""

TEMPLATES = "template", "jobTemplate"


def with_pods(manifest: Json, change: Change) -> Json:
    """The manifest with `change` done to every pod in it. What has no pod comes out as it is."""
    items = manifest.get("items")
    if isinstance(items, list):
        return {**manifest, "items": [_item(each, change) for each in items]}
    if manifest.get("kind") == "Pod" and _has_containers(manifest):
        return change(manifest, manifest)
    return _with_template(manifest, lambda pod: change(pod, manifest))


def pods(manifest: Json) -> list[tuple[Json, Json]]:
    """Every pod, or template of one, of a manifest, and what it is in."""
    found: list[tuple[Json, Json]] = []

    def look(pod: Json, holder: Json) -> Json:
        found.append((pod, holder))
        return pod

    with_pods(manifest, look)
    return found


def _item(item: object, change: Change) -> object:
    return with_pods(item, change) if isinstance(item, dict) else item


def _with_template(holder: Json, change: Callable[[Json], Json]) -> Json:
    spec = holder.get("spec")
    if not isinstance(spec, dict):
        return holder
    for name in TEMPLATES:
        inner = spec.get(name)
        if isinstance(inner, dict):
            has_pod = _has_containers(inner)
            found = change(inner) if has_pod else _with_template(inner, change)
            return {**holder, "spec": {**spec, name: found}}
    return holder


def _has_containers(pod: Json) -> bool:
    spec = pod.get("spec")
    return isinstance(spec, dict) and isinstance(spec.get("containers"), list)
