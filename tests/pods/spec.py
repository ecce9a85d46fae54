"""What of a pod the runner follows. Whatever else a pod says is an error, never passed over.

`NOTED` is what it takes note of and has no means to do: limits of memory and CPU, and seccomp. Tags
and pull policies are about images, which are chosen by their names here; priorities, tolerations
and accounts are for who schedules and admits. A set has the values that are followed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
NOTED = None
Shape = Any  # None, a mapping of fields to shapes, a list of one shape, or a set of values

_FIELD = {"apiVersion": NOTED, "fieldPath": NOTED}
_ENV = {"name": NOTED, "value": NOTED, "valueFrom": {"fieldRef": _FIELD}}
_HOOK = {"exec": {"command": NOTED}}
_PROBE = {
    "httpGet": {
        "path": NOTED, "port": NOTED, "httpHeaders": [{"name": NOTED, "value": NOTED}],
        "scheme": frozenset({"HTTP"}),
    },
    "tcpSocket": {"port": NOTED},
    "exec": {"command": NOTED},
    "periodSeconds": NOTED,
    "failureThreshold": NOTED,
    "timeoutSeconds": NOTED,
    "initialDelaySeconds": NOTED,
    "successThreshold": frozenset({1}),
}  # fmt: skip
_CONTAINER = {
    "name": NOTED, "image": NOTED, "command": NOTED, "args": NOTED, "env": [_ENV],
    "ports": [{"name": NOTED, "containerPort": NOTED, "protocol": frozenset({"TCP"})}],
    "volumeMounts": [{"name": NOTED, "mountPath": NOTED, "readOnly": NOTED}],
    "startupProbe": _PROBE, "livenessProbe": _PROBE, "readinessProbe": _PROBE,
    "lifecycle": {"postStart": _HOOK, "preStop": _HOOK},
    "securityContext": {
        "runAsUser": NOTED, "runAsGroup": NOTED, "runAsNonRoot": NOTED, "privileged": NOTED,
        "allowPrivilegeEscalation": NOTED, "readOnlyRootFilesystem": NOTED,
        "capabilities": {"drop": NOTED, "add": NOTED}, "seccompProfile": NOTED,
    },
    "imagePullPolicy": NOTED, "resources": NOTED, "terminationMessagePolicy": NOTED,
    "terminationMessagePath": NOTED,
}  # fmt: skip
_TOKEN = {"audience": NOTED, "expirationSeconds": NOTED, "path": NOTED}
_FIELD_FILE = {"path": NOTED, "fieldRef": _FIELD}
POD = {
    "apiVersion": NOTED,
    "kind": NOTED,
    "metadata": NOTED,
    "status": NOTED,
    "spec": {
        "automountServiceAccountToken": NOTED,
        "dnsPolicy": NOTED,
        "enableServiceLinks": frozenset({False}),
        "preemptionPolicy": NOTED,
        "priority": NOTED,
        "schedulerName": NOTED,
        "serviceAccount": NOTED,
        "tolerations": NOTED,
        "containers": [_CONTAINER],
        "initContainers": [{**_CONTAINER, "restartPolicy": NOTED}],
        "volumes": [
            {
                "name": NOTED,
                "emptyDir": {"medium": NOTED, "sizeLimit": NOTED},
                "configMap": {"name": NOTED, "defaultMode": NOTED},
                "projected": {"sources": [{"serviceAccountToken": _TOKEN}], "defaultMode": NOTED},
                "downwardAPI": {"items": [_FIELD_FILE], "defaultMode": NOTED},
            }
        ],
        "restartPolicy": NOTED,
        "terminationGracePeriodSeconds": NOTED,
        "serviceAccountName": NOTED,
        "securityContext": {
            "runAsUser": NOTED, "runAsGroup": NOTED, "runAsNonRoot": NOTED, "seccompProfile": NOTED,
        },
    },
}  # fmt: skip


class Unsupported(ValueError):
    """The pod says what the runner does not do."""


def check(pod: Json) -> None:
    """Look at a pod.

    Raises:
        Unsupported: with the path of what is not followed.
    """
    _check(pod, POD, "pod")
    for each in [*(pod["spec"].get("initContainers") or ()), *pod["spec"]["containers"]]:
        if (each.get("securityContext") or {}).get("privileged"):
            raise Unsupported(f"{each['name']}: privileged")
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            how = (each.get(kind) or {}).keys() & {"httpGet", "tcpSocket", "exec"}
            if kind in each and len(how) != 1:
                raise Unsupported(f"{each['name']}.{kind}: not one of httpGet, tcpSocket, exec")


def _check(value: Any, shape: Shape, path: str) -> None:
    if isinstance(shape, list):
        for number, each in enumerate(value or ()):
            _check(each, shape[0], f"{path}[{number}]")
    elif isinstance(shape, dict):
        for name, each in (value or {}).items():
            if name not in shape:
                raise Unsupported(f"{path}.{name}")
            _check(each, shape[name], f"{path}.{name}")
    elif isinstance(shape, frozenset) and value not in shape:
        raise Unsupported(f"{path}: {value!r}")


def fields(pod: Json, addresses: tuple[str, ...]) -> Mapping[str, str]:
    """What the downward API knows of a pod."""
    return {
        "status.podIP": addresses[0],
        "status.podIPs": ",".join(addresses),
        "metadata.name": pod["metadata"]["name"],
        "metadata.namespace": pod["metadata"].get("namespace", "default"),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
    }


def environment(entries: list[Json] | None, known: Mapping[str, str]) -> dict[str, str]:
    """A container's variables; later ones may name earlier ones."""
    found: dict[str, str] = {}
    for each in entries or ():
        if "valueFrom" in each:
            found[each["name"]] = known[each["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            found[each["name"]] = expand(each.get("value", ""), found)
    return found


_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` by its value, where there is one, and `$$` as a dollar."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[1] is None else variables.get(found[1], found[0])

    return _REFERENCE.sub(value, text)
