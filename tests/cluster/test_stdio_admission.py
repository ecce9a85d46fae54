"""Mode `stdio` before a real API server: no privilege is needed, and nobody gets in later."""

from __future__ import annotations

import pytest

from sidecar.injector.changes import restore
from tests.cluster.control_plane import Cluster
from tests.cluster.registered import ENABLED, create_namespace, pod_of
from tests.support.pods import annotated, breaks_restricted, container, containers

pytestmark = [pytest.mark.usefixtures("webhook"), pytest.mark.timeout(180)]

RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 1001,
    "seccompProfile": {"type": "RuntimeDefault"},
}
OURS = ["mcp-shim", "mcp-opa", "mcp-sidecar"]


def test_in_a_restricted_namespace(cluster: Cluster) -> None:
    """With the token that the API server itself mounts before and after the injector."""
    name = "stdio-restricted"
    create_namespace(cluster, name, {**ENABLED, "pod-security.kubernetes.io/enforce": "restricted"})
    found = pod_of(name, {"securityContext": RESTRICTED, "command": ["python"], "args": ["s.py"]})
    pod = cluster.create(annotated(found, mode="stdio"))
    assert [each["name"] for each in pod["spec"]["initContainers"]] == OURS
    assert not any(breaks_restricted(each) for each in containers(pod))
    app, before = container(pod, "app"), container(restore(pod), "app")
    assert app["command"][-1] == "--"
    assert app["args"] == ["python", "s.py"]
    assert (before["command"], before["args"]) == (["python"], ["s.py"])
    ours = [e for e in app["volumeMounts"] if e["name"].startswith("mcp-opa-sidecar-")]
    assert len(ours) == 2
    assert before["volumeMounts"] == [e for e in app["volumeMounts"] if e not in ours]
    said = cluster.refused("set", "image", f"pod/{name}", "-n", name, "mcp-shim=evil:1")
    assert "the sidecar's own containers can not be changed" in said
    said = cluster.refused(
        "debug", name, "-n", name, "--image=busybox:1", "--target=app", "--attach=false",
        "--container=debugger", "--profile=restricted",
    )  # fmt: skip
    assert "container debugger is put into app, among its processes" in said


def test_an_image_whose_command_is_not_known(cluster: Cluster) -> None:
    name = "stdio-unknown"
    create_namespace(cluster, name, ENABLED)
    said = cluster.refused("create", "-f", "-", given=annotated(pod_of(name), mode="stdio"))
    assert "container app has no command, and what its image says is not known here" in said
