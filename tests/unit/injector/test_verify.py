"""What may be stored: what a plan makes, with what the API server adds, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import Injection, Json, Namespace
from sidecar.injector.plan import plan
from sidecar.injector.verify import verify_changed, verify_new
from tests.support.pods import ENABLED, container, pod

NATIVE = Injection()
Edit = Callable[[Json], object]

OTHER = {"name": "other", "image": "evil"}
MOUNT = {"name": "mcp-opa-sidecar-opa", "mountPath": "/x"}
PROBE = {"httpGet": {"path": "/h", "port": 8080}}


def planned() -> Json:
    return deepcopy(plan(pod({"livenessProbe": PROBE}), ENABLED, NATIVE))


def sidecar(found: Json) -> Json:
    return container(found, "mcp-sidecar")


def opa(found: Json) -> Json:
    return container(found, "mcp-opa")


def app(found: Json) -> Json:
    return container(found, "app")


def volume(found: Json, name: str) -> Json:
    volumes: list[Json] = found["spec"]["volumes"]
    return next(each for each in volumes if each["name"] == f"mcp-opa-sidecar-{name}")


def _default(found: Json) -> None:
    """As the API server does with what is left out."""
    for each in found["spec"]["containers"] + found["spec"]["initContainers"]:
        each.setdefault("terminationMessagePath", "/dev/termination-log")
        each.setdefault("terminationMessagePolicy", "File")
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            if kind in each:
                each[kind].setdefault("successThreshold", 1)
                each[kind].setdefault("timeoutSeconds", 1)
                each[kind]["httpGet"].setdefault("scheme", "HTTP")
        for port in each.get("ports") or ():
            port.setdefault("protocol", "TCP")


def _account(found: Json) -> None:
    """As the service-account plugin does: not where something is mounted already."""
    path = "/var/run/secrets/kubernetes.io/serviceaccount"
    found["spec"]["volumes"].append({"name": "kube-api-access-x", "projected": {"sources": []}})
    for each in found["spec"]["containers"] + found["spec"]["initContainers"]:
        mounts = each.setdefault("volumeMounts", [])
        if path not in [mount["mountPath"] for mount in mounts]:
            mounts.append({"name": "kube-api-access-x", "mountPath": path})


ALLOWED: dict[str, Edit] = {
    "as planned": lambda found: None,
    "the API server's defaults": _default,
    "the account's token, for others": _account,
    "limits of the namespace": lambda f: sidecar(f)["resources"]["limits"].update(cpu="1"),
    "requests of the namespace": lambda f: opa(f)["resources"]["requests"].update({"a/b": "1"}),
    "amounts in other words": lambda f: sidecar(f).update(
        resources={
            "requests": {"cpu": "0.05", "memory": "98304Ki"},
            "limits": {"memory": "402653184"},
        }
    ),
    "a variable of a later webhook": lambda f: app(f)["env"].append({"name": "X", "value": "1"}),
    "a volume of a later webhook": lambda f: f["spec"]["volumes"].append({"name": "x"}),
    "an annotation": lambda f: f["metadata"]["annotations"].update(x="y"),
}

REFUSED: dict[str, Edit] = {
    "the sidecar's image": lambda f: sidecar(f).update(image="evil"),
    "OPA's image": lambda f: opa(f).update(image="evil"),
    "its arguments": lambda f: sidecar(f)["args"].append("--shadow"),
    "its variables": lambda f: sidecar(f)["env"].append({"name": "MCP_SIDECAR_SHADOW"}),
    "its variables from elsewhere": lambda f: sidecar(f).update(envFrom=[{}]),
    "its working directory": lambda f: sidecar(f).update(workingDir="/tmp"),
    "its user": lambda f: sidecar(f)["securityContext"].update(runAsUser=0),
    "less memory": lambda f: sidecar(f)["resources"]["limits"].update(memory="384M"),
    "no requests": lambda f: sidecar(f)["resources"].pop("requests"),
    "a device": lambda f: sidecar(f)["resources"].update(claims=[{"name": "x"}]),
    "more capabilities": lambda f: sidecar(f)["securityContext"]["capabilities"].update(add=["A"]),
    "another mount": lambda f: sidecar(f)["volumeMounts"].append(MOUNT),
    "no probe": lambda f: sidecar(f).pop("livenessProbe"),
    "a hook": lambda f: sidecar(f).update(lifecycle={}),
    "not native": lambda f: sidecar(f).pop("restartPolicy"),
    "another order": lambda f: f["spec"]["initContainers"].reverse(),
    "somebody before it": lambda f: f["spec"]["initContainers"].insert(0, OTHER),
    "gone": lambda f: f["spec"]["initContainers"].remove(sidecar(f)),
    "a container beside the server": lambda f: f["spec"]["containers"].append(OTHER),
    "OPA's socket for the server": lambda f: app(f).update(volumeMounts=[MOUNT]),
    "another policy": lambda f: volume(f, "policy").update(configMap={"name": "lax"}),
    "another kind of socket folder": lambda f: volume(f, "opa").update(hostPath={"path": "/"}),
    "the server on all addresses": lambda f: app(f)["env"][0].update(value="0.0.0.0"),
    "the probe back": lambda f: app(f).update(livenessProbe=PROBE),
    "no status": lambda f: f["metadata"]["annotations"].pop("mcp-opa-sidecar.io/status"),
    "another status": lambda f: f["metadata"]["annotations"].update(
        {"mcp-opa-sidecar.io/status": "{}"}
    ),
    "no label": lambda f: f["metadata"]["labels"].pop("mcp-opa-sidecar.io/injected"),
    "an annotation of ours": lambda f: f["metadata"]["annotations"].update(
        {"mcp-opa-sidecar.io/port": "9000"}
    ),
    "the node's network": lambda f: f["spec"].update(hostNetwork=True),
}


@pytest.mark.parametrize("edit", ALLOWED.values(), ids=ALLOWED)
def test_may_be_created(edit: Edit) -> None:
    found = planned()
    edit(found)
    verify_new(found, ENABLED, NATIVE)


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
def test_may_not_be_created(edit: Edit) -> None:
    found = planned()
    edit(found)
    with pytest.raises(InjectionRefused):
        verify_new(found, ENABLED, NATIVE)


def test_a_namespace_may_limit_what_we_do_not() -> None:
    injection = Injection(sidecar_resources={})
    found = plan(pod(), ENABLED, injection)
    sidecar(found)["resources"] = {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}}
    verify_new(found, ENABLED, injection)


def test_a_pod_that_was_never_injected_may_not_be_created() -> None:
    with pytest.raises(InjectionRefused, match="not as the injector made it"):
        verify_new(pod(), ENABLED, NATIVE)


def test_who_does_not_ask_may_be_created() -> None:
    verify_new(pod(hostNetwork=True), Namespace("a"), NATIVE)


CHANGES: dict[str, tuple[Edit, bool]] = {
    "nothing": (lambda f: None, True),
    "the server's image": (lambda f: app(f).update(image="tickets:2"), True),
    "a label": (lambda f: f["metadata"]["labels"].update(x="y"), True),
    "a toleration": (lambda f: f["spec"].update(tolerations=[{"key": "x"}]), True),
    "the sidecar's image": (lambda f: sidecar(f).update(image="evil"), False),
    "OPA's image": (lambda f: opa(f).update(image="evil"), False),
    "the label that selects": (
        lambda f: f["metadata"]["labels"].update({"mcp-opa-sidecar.io/inject": "false"}),
        False,
    ),
    "the label that says so": (
        lambda f: f["metadata"]["labels"].pop("mcp-opa-sidecar.io/injected"),
        False,
    ),
    "the status": (
        lambda f: f["metadata"]["annotations"].pop("mcp-opa-sidecar.io/status"),
        False,
    ),
    "somebody who debugs": (lambda f: f["spec"].update(ephemeralContainers=[OTHER]), False),
    "somebody with our name": (
        lambda f: f["spec"].update(ephemeralContainers=[{**OTHER, "name": "mcp-opa"}]),
        False,
    ),
}


@pytest.mark.parametrize(("edit", "allowed"), CHANGES.values(), ids=CHANGES)
def test_changed(edit: Edit, allowed: bool) -> None:
    old = planned()
    new = deepcopy(old)
    edit(new)
    if allowed:
        verify_changed(new, old, NATIVE)
        return
    with pytest.raises(InjectionRefused):
        verify_changed(new, old, NATIVE)


def test_pods_of_an_earlier_injector_can_be_changed() -> None:
    old = plan(pod(), ENABLED, Injection(image="sidecar:1"))
    new = deepcopy(old)
    new["metadata"]["labels"]["x"] = "y"
    verify_changed(new, old, Injection(image="sidecar:2"))


def test_pods_that_are_not_injected_are_nobodys_business() -> None:
    verify_changed(pod(hostNetwork=True), pod(), NATIVE)
