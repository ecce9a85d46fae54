"""What a pod may not bring along: each of it would lead around the sidecar, or pose as it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import RESERVED_PORTS, Injection, Json
from sidecar.injector.wishes import Wish

NAMES = "mcp-redirect", "mcp-shim", "mcp-opa", "mcp-sidecar"
"""Containers of ours, in the order in which they are started."""

VOLUMES = "mcp-opa-sidecar-"
"""How the names of our volumes begin."""

KINDS = "initContainers", "containers", "ephemeralContainers"

Check = Callable[[Json, Wish, Injection], Iterator[str]]


def refuse(spec: Json, wish: Wish, injection: Injection, checks: tuple[Check, ...]) -> None:
    """Look at a pod that has nothing of ours in it; `checks` are those of the wished mode.

    Raises:
        InjectionRefused: with every reason there is.
    """
    found = [reason for check in (*CHECKS, *checks) for reason in check(spec, wish, injection)]
    if found:
        raise InjectionRefused("; ".join(found))


def everybody(spec: Json) -> Iterator[Json]:
    """Each container of a pod, of every kind."""
    for kind in KINDS:
        yield from spec.get(kind) or ()


def _names(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    for each in everybody(spec):
        if each["name"] in NAMES:
            yield f"the name of container {each['name']} is reserved"


def _volumes(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    for each in spec.get("volumes") or ():
        if each["name"].startswith(VOLUMES):
            yield f"the name of volume {each['name']} is reserved"
    for container in everybody(spec):
        for kind in ("volumeMounts", "volumeDevices"):
            for mount in container.get(kind) or ():
                if mount["name"].startswith(VOLUMES):
                    yield f"container {container['name']} mounts volume {mount['name']} of ours"


def _ports(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    for container in everybody(spec):
        for port in container.get("ports") or ():
            if RESERVED_PORTS & {port.get("containerPort"), port.get("hostPort")}:
                yield f"container {container['name']} declares a port that is reserved"


def _uids(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    ours = {injection.sidecar_id, injection.opa_id}
    pod = spec.get("securityContext") or {}
    if ours & {pod.get("runAsUser"), pod.get("runAsGroup"), pod.get("fsGroup")}:
        yield "the pod runs as a user or group that is reserved"
    if ours & set(pod.get("supplementalGroups") or ()):
        yield "the pod has a group that is reserved"
    for container in everybody(spec):
        context = container.get("securityContext") or {}
        if ours & {context.get("runAsUser"), context.get("runAsGroup")}:
            yield f"container {container['name']} runs as a user or group that is reserved"


def _shared(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "shareProcessNamespace"):
        if spec.get(name):
            yield f"{name} puts the sidecar within others' reach"
    for container in everybody(spec):
        if (container.get("securityContext") or {}).get("privileged"):
            yield f"container {container['name']} is privileged: nothing holds it"
        if container.get("targetContainerName") in NAMES:
            target = container["targetContainerName"]
            yield f"container {container['name']} is put into {target}, among its processes"


def _ending(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    """A kubelet waits for ordered containers, and ours do not end by themselves."""
    policy = spec.get("restartPolicy", "Always")
    if policy != "Always" and not injection.native:
        yield f"with restartPolicy {policy} the pod is to end, which takes native sidecars"


def lasting(spec: Json) -> Iterator[Json]:
    """Those that run beside the server."""
    yield from spec["containers"]
    yield from spec.get("ephemeralContainers") or ()
    for each in spec.get("initContainers") or ():
        if each.get("restartPolicy") == "Always":
            yield each


CHECKS: tuple[Check, ...] = (_names, _volumes, _ports, _uids, _shared, _ending)
