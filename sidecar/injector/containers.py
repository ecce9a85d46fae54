"""Our containers and volumes. Each satisfies the "restricted" Pod Security Standard.

The folder with OPA's socket is mounted by the two of them only. They share a group, so that the
sidecar may use the socket; `fsGroup` would do the same to every container of the pod.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from sidecar.injector.injection import ADMIN_PORT, OPA_PORT, Injection, Json
from sidecar.injector.walls import NAMES, VOLUMES, everybody
from sidecar.injector.wishes import Wish

SOCKET = VOLUMES + "opa"
POLICY = VOLUMES + "policy"
CONFIG = VOLUMES + "config"
PODINFO = VOLUMES + "podinfo"
NO_TOKEN = VOLUMES + "no-token"

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
AMOUNTS = "limits", "requests"
PROBES = "POD_APP_PROBES"
DRAIN = 12
"""Seconds that an ordered OPA goes on deciding, since all end at once; a native one ends last."""

BOOT = "/opt/mcp-opa-sidecar/boot"
"""In the image: what of OPA's policy no bundle and no ConfigMap may replace."""


def ours(wish: Wish, questions: Json, injection: Injection) -> list[Json]:
    """OPA, and the sidecar that asks it; `questions` are the probes to be made for the kubelet."""
    found = [_opa(injection), _sidecar(wish, questions, injection)]
    if injection.native:
        return [{**each, "restartPolicy": "Always"} for each in found]
    return [{**each, **_gate(each["name"])} for each in found]


def volumes(injection: Injection) -> list[Json]:
    """What they mount."""
    labels = {"path": "labels", "fieldRef": _field("metadata.labels")}
    found: list[Json] = [
        {"name": SOCKET, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": POLICY, "configMap": {"name": injection.policy, "defaultMode": 0o444}},
        {"name": PODINFO, "downwardAPI": {"items": [labels], "defaultMode": 0o444}},
        {"name": NO_TOKEN, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]
    if injection.config is not None:
        found.append(
            {"name": CONFIG, "configMap": {"name": injection.config, "defaultMode": 0o444}}
        )
    return found


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


def _opa(injection: Injection) -> Json:
    return {
        **_common("mcp-opa", injection),
        "command": ["opa"],
        "args": [
            "run",
            "--server",
            "--addr=unix:///run/mcp-opa/opa.sock",
            "--unix-socket-perm=0660",
            f"--diagnostic-addr=0.0.0.0:{OPA_PORT}",
            "--skip-version-check",
            "--log-level=error",
            "--log-format=json",
            *([] if injection.native else [f"--shutdown-wait-period={DRAIN}"]),
            *(["--authorization=basic"] if injection.opa_authorization else []),
            "--ignore=.*",
            "--watch",
            BOOT,
            "/policy",
        ],
        "env": [{"name": "GOGC", "value": "400"}],
        "resources": dict(injection.opa_resources),
        "startupProbe": _probe("/health", OPA_PORT, every=1, times=60),
        "livenessProbe": _probe("/health", OPA_PORT, every=10, times=6),
        "securityContext": _restricted(injection.opa_id, injection.sidecar_id),
        "volumeMounts": [
            {"name": SOCKET, "mountPath": "/run/mcp-opa"},
            {"name": POLICY, "mountPath": "/policy", "readOnly": True},
            _no_token(),
        ],
    }


def _sidecar(wish: Wish, questions: Json, injection: Injection) -> Json:
    mounts = [
        {"name": SOCKET, "mountPath": "/run/mcp-opa", "readOnly": True},
        {"name": PODINFO, "mountPath": "/etc/podinfo", "readOnly": True},
        _no_token(),
    ]
    arguments = [
        "http",
        f"--listen=$(POD_IP):{wish.port}",
        f"--upstream=http://127.0.0.1:{wish.port}{wish.path}",
        "--opa=unix:///run/mcp-opa/opa.sock",
        f"--admin=0.0.0.0:{ADMIN_PORT}",
    ]
    if injection.config is not None:
        mounts.append({"name": CONFIG, "mountPath": "/etc/mcp-sidecar", "readOnly": True})
        arguments.append("--config=/etc/mcp-sidecar/config.yaml")
    if injection.otlp is not None:
        arguments.append(f"--otlp={injection.otlp}")
    return {
        **_common("mcp-sidecar", injection),
        "command": ["mcp-sidecar"],
        "args": arguments,
        "env": _environment(questions),
        "resources": dict(injection.sidecar_resources),
        "startupProbe": _probe("/livez", ADMIN_PORT, every=1, times=60),
        "livenessProbe": _probe("/livez", ADMIN_PORT, every=10, times=6),
        "readinessProbe": _probe("/readyz", ADMIN_PORT, every=2, times=2),
        "securityContext": _restricted(injection.sidecar_id, injection.sidecar_id),
        "volumeMounts": mounts,
    }


def _environment(questions: Json) -> list[Json]:
    fields = {
        "POD_IP": "status.podIP",
        "POD_NAME": "metadata.name",
        "POD_NAMESPACE": "metadata.namespace",
        "POD_SERVICE_ACCOUNT": "spec.serviceAccountName",
    }
    found: list[Json] = [
        {"name": name, "valueFrom": {"fieldRef": _field(path)}} for name, path in fields.items()
    ]
    found.append({"name": "MCP_SIDECAR_POD__LABELS_FILE", "value": "/etc/podinfo/labels"})
    if questions:
        found.append({"name": PROBES, "value": json.dumps(questions, separators=(",", ":"))})
    return found


def _common(name: str, injection: Injection) -> Json:
    return {
        "name": name,
        "image": injection.image,
        "imagePullPolicy": injection.pull_policy,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _field(path: str) -> Json:
    return {"apiVersion": "v1", "fieldPath": path}


def _probe(path: str, port: int, *, every: int, times: int) -> Json:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": every,
        "failureThreshold": times,
        "timeoutSeconds": 2,
    }


def _gate(name: str) -> Json:
    """For ordered containers: the kubelet starts the next one only after this has returned."""
    what = f"http://127.0.0.1:{OPA_PORT}/health" if name == "mcp-opa" else _OWN_LIFE
    return {"lifecycle": {"postStart": {"exec": {"command": ["mcp-sidecar", "await", what]}}}}


_OWN_LIFE = f"http://127.0.0.1:{ADMIN_PORT}/livez"


def _no_token() -> Json:
    """An empty folder where the API server would else put the account's token for us as well."""
    return {"name": NO_TOKEN, "mountPath": ACCOUNT, "readOnly": True}


def _restricted(user: int, group: int) -> Json:
    return {
        "runAsUser": user,
        "runAsGroup": group,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
