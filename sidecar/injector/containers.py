"""Our containers and volumes, as they stand in the pod.

The folder with OPA's socket is mounted by OPA and the sidecar only. They share a group, so that the
sidecar may use the socket; `fsGroup` would do the same to every container of the pod.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from sidecar.injector import opa
from sidecar.injector.injection import ADMIN_PORT, Injection, Json
from sidecar.injector.mode import Mode
from sidecar.injector.parts import NO_TOKEN, common, field, no_token, probe, restricted
from sidecar.injector.walls import NAMES, VOLUMES, everybody
from sidecar.injector.wishes import LOOPBACK, Wish

CONFIG = VOLUMES + "config"
PODINFO = VOLUMES + "podinfo"

AMOUNTS = "limits", "requests"
PROBES = "POD_APP_PROBES"

RESOURCE = "k8s.namespace.name=$(POD_NAMESPACE),k8s.pod.name=$(POD_NAME)"
"""By what spans and metrics say which pod they are of (OpenTelemetry, Kubernetes resources)."""

GRACE = 30
"""Seconds that a pod has for its end, where it does not say how many."""


def put(spec: Json, mode: Mode, wish: Wish, questions: Json, injection: Injection) -> None:
    """Add what is ours to a pod; `questions` are the probes to be made for the kubelet.

    Before everybody else's, so that what later webhooks append changes no place of ours.
    """
    first = mode.first(wish, injection)
    lasting = [opa.container(injection), _sidecar(mode, wish, questions, injection)]
    if injection.native:
        first += [{**each, "restartPolicy": "Always"} for each in lasting]
    else:
        pause = _pause(spec, injection)
        hooked = [{**each, "lifecycle": _hooks(each["startupProbe"], pause)} for each in lasting]
        spec["containers"] = [*hooked, *spec["containers"]]
    if first:
        spec["initContainers"] = [*first, *(spec.get("initContainers") or ())]
    volumes = [*_volumes(injection), *mode.volumes(wish, injection)]
    spec["volumes"] = [*volumes, *(spec.get("volumes") or ())]


def with_ranges(planned: Json, before: Json) -> Json:
    """The plan with the amounts that ours have by the ranges of a namespace (LimitRange).

    The API server adds them between its first round through the webhooks and the second, in which
    ours are made anew; there is no third, and without them the pod might break the ranges.
    """
    there = {each["name"]: each.get("resources") or {} for each in _ours(before)}
    for each in _ours(planned):
        said = each["resources"]
        found = there.get(each["name"], {})
        both = {kind: {**(found.get(kind) or {}), **said.get(kind, {})} for kind in AMOUNTS}
        each["resources"] = {**said, **{kind: both[kind] for kind in AMOUNTS if both[kind]}}
    return planned


def _ours(pod: Json) -> Iterator[Json]:
    return (each for each in everybody(pod["spec"]) if each["name"] in NAMES)


def _volumes(injection: Injection) -> list[Json]:
    labels = {"path": "labels", "fieldRef": field("metadata.labels")}
    found: list[Json] = [
        *opa.volumes(injection),
        {"name": PODINFO, "downwardAPI": {"items": [labels], "defaultMode": 0o444}},
        {"name": NO_TOKEN, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]
    if injection.config is not None:
        found.append(
            {"name": CONFIG, "configMap": {"name": injection.config, "defaultMode": 0o444}}
        )
    return found


def _sidecar(mode: Mode, wish: Wish, questions: Json, injection: Injection) -> Json:
    stamp, stamped_mounts = opa.stamped(injection)
    mounts = [
        {"name": opa.SOCKET, "mountPath": opa.SOCKET_FOLDER, "readOnly": True},
        {"name": PODINFO, "mountPath": "/etc/podinfo", "readOnly": True},
        *stamped_mounts,
        no_token(),
        *mode.mounts(wish, injection),
    ]
    arguments = [
        "http",
        *mode.arguments(wish, injection),
        f"--opa=unix://{opa.SOCKET_FOLDER}/opa.sock",
        f"--admin=[{LOOPBACK},$(POD_IPS)]:{ADMIN_PORT}",
    ]
    if injection.config is not None:
        mounts.append({"name": CONFIG, "mountPath": "/etc/mcp-sidecar", "readOnly": True})
        arguments.append("--config=/etc/mcp-sidecar/config.yaml")
    if injection.otlp is not None:
        arguments.append(f"--otlp={injection.otlp}")
    return {
        **common("mcp-sidecar", injection),
        "command": ["mcp-sidecar"],
        "args": arguments,
        "env": [*_environment(questions), *stamp],
        "resources": dict(injection.sidecar_resources),
        "startupProbe": probe("/livez", ADMIN_PORT, every=1, times=60),
        "livenessProbe": probe("/livez", ADMIN_PORT, every=10, times=6),
        "readinessProbe": probe("/readyz", ADMIN_PORT, every=2, times=2),
        "securityContext": restricted(injection.sidecar_id, injection.sidecar_id),
        "volumeMounts": mounts,
    }


def _environment(questions: Json) -> list[Json]:
    fields = {
        "POD_IPS": "status.podIPs",
        "POD_NAME": "metadata.name",
        "POD_NAMESPACE": "metadata.namespace",
        "POD_SERVICE_ACCOUNT": "spec.serviceAccountName",
    }
    found: list[Json] = [
        {"name": name, "valueFrom": {"fieldRef": field(path)}} for name, path in fields.items()
    ]
    found += [
        {"name": "MCP_SIDECAR_POD__LABELS_FILE", "value": "/etc/podinfo/labels"},
        {"name": "OTEL_RESOURCE_ATTRIBUTES", "value": RESOURCE},
    ]
    if questions:
        found.append({"name": PROBES, "value": json.dumps(questions, separators=(",", ":"))})
    return found


def _hooks(startup: Json, pause: int) -> Json:
    """For ordered containers: a kubelet starts the next one only after the first has returned.

    All are told to end at once, by the second after it has returned: while Services still send to
    the pod, the sidecar goes on, for as long as the server does.
    """
    asked = startup["httpGet"]
    gate = f"http://{LOOPBACK}:{asked['port']}{asked['path']}"
    patience = f"--seconds={startup['failureThreshold']}"
    hooks = {"postStart": {"exec": {"command": ["mcp-sidecar", "await", gate, patience]}}}
    if pause > 0:
        hooks["preStop"] = {"exec": {"command": ["mcp-sidecar", "pause", str(pause)]}}
    return hooks


def _pause(spec: Json, injection: Injection) -> int:
    """What of the pod's time for its end is left beside what finishing takes."""
    grace = spec.get("terminationGracePeriodSeconds")
    return min(injection.pause, (GRACE if grace is None else int(grace)) - opa.DRAIN - 1)
