"""What a pod may not bring along, each in the pod that brings it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import Injection, Json
from sidecar.injector.plan import plan
from tests.support.pods import ENABLED, annotated, pod

NATIVE = Injection()
OTHER = {"name": "other", "image": "x"}


def _with(**fields: Any) -> Json:
    """The usual pod with fields of its server set."""
    return pod(fields)


def _beside(kind: str, **fields: Any) -> Json:
    """The usual pod, with another container that may be."""
    found = annotated(pod(), accept_loopback="true")
    found["spec"].setdefault(kind, []).append({**OTHER, **fields})
    return found


def _two(kind: str, container: Json) -> Json:
    """The usual pod and another container, which nobody has accepted."""
    found = pod()
    found["spec"].setdefault(kind, []).append(container)
    return found


MOUNT = [{"name": "mcp-opa-sidecar-opa", "mountPath": "/x"}]

REFUSED: dict[str, tuple[Json, str]] = {
    "our name": (_beside("containers", name="mcp-sidecar"), "name of container mcp-sidecar"),
    "our name, first": (_beside("initContainers", name="mcp-opa"), "name of container mcp-opa"),
    "our volume": (
        pod(volumes=[{"name": "mcp-opa-sidecar-opa", "emptyDir": {}}]),
        "volume mcp-opa-sidecar-opa",
    ),
    "a mount of ours": (_with(volumeMounts=MOUNT), "mounts volume"),
    "a device of ours": (_with(volumeDevices=[{"name": "mcp-opa-sidecar-x"}]), "mounts volume"),
    "a mount of ours, first": (_beside("initContainers", volumeMounts=MOUNT), "mounts volume"),
    "a mount of ours, later": (_beside("ephemeralContainers", volumeMounts=MOUNT), "mounts"),
    "our admin port": (_beside("containers", ports=[{"containerPort": 15820}]), "reserved"),
    "OPA's port": (_beside("containers", ports=[{"containerPort": 15821}]), "reserved"),
    "a host port of ours": (
        _beside("containers", ports=[{"containerPort": 1, "hostPort": 15801}]),
        "reserved",
    ),
    "the sidecar's uid": (_with(securityContext={"runAsUser": 20001}), "reserved"),
    "OPA's uid": (_with(securityContext={"runAsUser": 20002}), "reserved"),
    "our group": (_with(securityContext={"runAsGroup": 20001}), "reserved"),
    "the pod's uid": (pod(securityContext={"runAsUser": 20001}), "reserved"),
    "the pod's group": (pod(securityContext={"fsGroup": 20001}), "reserved"),
    "one of its groups": (pod(securityContext={"supplementalGroups": [1, 20001]}), "reserved"),
    "the node's network": (pod(hostNetwork=True), "hostNetwork"),
    "the node's processes": (pod(hostPID=True), "hostPID"),
    "each other's processes": (pod(shareProcessNamespace=True), "shareProcessNamespace"),
    "among our processes": (
        _beside("ephemeralContainers", targetContainerName="mcp-sidecar"),
        "put into mcp-sidecar",
    ),
    "all privileges": (_with(securityContext={"privileged": True}), "privileged"),
    "another container": (_two("containers", OTHER), "other can reach the server"),
    "a native sidecar": (
        _two("initContainers", {**OTHER, "restartPolicy": "Always"}),
        "other can reach the server",
    ),
    "somebody who debugs": (_two("ephemeralContainers", OTHER), "other can reach the server"),
}

ACCEPTED: dict[str, Json] = {
    "the usual": pod(),
    "one before the server": _two("initContainers", OTHER),
    "several, accepted": _beside("containers"),
    "a user of its own": _with(securityContext={"runAsUser": 1000, "runAsGroup": 20002 + 1}),
    "volumes of its own": pod(volumes=[{"name": "data", "emptyDir": {}}]),
    "false is not true": pod(hostNetwork=False, shareProcessNamespace=False),
}


@pytest.mark.parametrize(("found", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])
def test_refused(found: Json, reason: str, native: bool) -> None:
    with pytest.raises(InjectionRefused, match=reason):
        plan(found, ENABLED, Injection(native=native))


@pytest.mark.parametrize("found", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(found: Json) -> None:
    assert plan(found, ENABLED, NATIVE) != found


@pytest.mark.parametrize("policy", ["Never", "OnFailure"])
def test_a_pod_that_is_to_end_needs_native_sidecars(policy: str) -> None:
    found = pod(restartPolicy=policy)
    assert plan(found, ENABLED, Injection()) != found
    with pytest.raises(InjectionRefused, match="takes native sidecars"):
        plan(found, ENABLED, Injection(native=False))
    again = pod(restartPolicy="Always")
    assert plan(again, ENABLED, Injection(native=False)) != again


def test_every_reason_is_told_at_once() -> None:
    with pytest.raises(InjectionRefused) as refused:
        plan(pod({"volumeMounts": MOUNT}, hostNetwork=True, hostPID=True), ENABLED, NATIVE)
    assert all(each in str(refused.value) for each in ("mounts", "hostNetwork", "hostPID"))


@pytest.mark.parametrize("found", [each for each, _ in REFUSED.values()], ids=REFUSED)
def test_who_does_not_ask_is_left_alone(found: Json) -> None:
    unwanted = deepcopy(found)
    unwanted["metadata"]["labels"]["mcp-opa-sidecar.io/inject"] = "false"
    assert plan(unwanted, ENABLED, NATIVE) == unwanted
