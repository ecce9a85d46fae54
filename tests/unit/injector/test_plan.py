"""What a pod becomes, whatever its shape: others lose nothing, and planning again does nothing."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import InjectionRefused
from sidecar.injector.changes import restore
from sidecar.injector.injection import Injection, Json, Namespace
from sidecar.injector.plan import plan
from sidecar.injector.verify import verify_new
from sidecar.injector.walls import NAMES
from tests.support import pods
from tests.support.pods import ENABLED, annotated, container, containers, pod

LASTING = ["mcp-opa", "mcp-sidecar"]
NATIVE, ORDERED = Injection(), Injection(native=False)
INJECTIONS = st.sampled_from(
    [NATIVE, ORDERED, Injection(config="mcp-config", otlp="http://c:4318"), pods.BUNDLE]
)


@given(pods.shapes(), INJECTIONS)
def test_planning_again_changes_nothing(found: Json, injection: Injection) -> None:
    before = deepcopy(found)
    once = plan(found, ENABLED, injection)
    assert found == before
    assert plan(once, ENABLED, injection) == once


@given(pods.shapes(), INJECTIONS)
def test_taking_off_gives_the_pod_back(found: Json, injection: Injection) -> None:
    assert restore(plan(found, ENABLED, injection)) == found


@given(pods.shapes(), INJECTIONS, INJECTIONS)
def test_another_injector_s_pod_comes_out_as_this_one_s(
    found: Json, other: Injection, injection: Injection
) -> None:
    elsewhere = plan(found, ENABLED, other)
    assert plan(elsewhere, ENABLED, injection) == plan(found, ENABLED, injection)


@given(pods.shapes(), INJECTIONS)
def test_the_validator_accepts_a_plan(found: Json, injection: Injection) -> None:
    verify_new(plan(found, ENABLED, injection), ENABLED, injection)


@given(pods.shapes(), INJECTIONS)
def test_ours_are_first_and_in_order(found: Json, injection: Injection) -> None:
    spec = plan(found, ENABLED, injection)["spec"]
    names = {
        kind: [each["name"] for each in spec.get(kind) or () if each["name"] in NAMES]
        for kind in ("initContainers", "containers")
    }
    ours = [*names["initContainers"], *names["containers"]]
    assert ours == sorted(ours, key=NAMES.index)
    assert ours[-2:] == LASTING
    assert names["containers"] == ([] if injection.native else LASTING)
    for kind, there in names.items():
        assert [each["name"] for each in (spec.get(kind) or ())[: len(there)]] == there


@given(pods.shapes(), INJECTIONS)
def test_ours_are_restricted_but_for_what_makes_rules(found: Json, injection: Injection) -> None:
    planned = plan(found, ENABLED, injection)
    broken = {
        each["name"]: pods.breaks_restricted(each)
        for each in containers(planned)
        if each["name"] in NAMES
    }
    rules = broken.pop("mcp-redirect", None)
    assert set(map(tuple, broken.values())) == {()}
    is_redirect = found["metadata"]["annotations"].get("mcp-opa-sidecar.io/mode") == "redirect"
    assert rules == (["runAsNonRoot", "runAsUser", "capabilities"] if is_redirect else None)


OF_THE_SERVER = {"env", "command", "args", "volumeMounts"}


@given(pods.shapes(), INJECTIONS)
def test_others_keep_all_but_variables_and_probes(found: Json, injection: Injection) -> None:
    planned = plan(found, ENABLED, injection)
    is_stdio = found["metadata"]["annotations"].get("mcp-opa-sidecar.io/mode") == "stdio"
    touched = {"livenessProbe", "readinessProbe", "startupProbe"}
    for each in containers(found):
        now = container(planned, each["name"])
        if each["name"] == "app":
            touched |= OF_THE_SERVER if is_stdio else {"env"}
        assert _without(now, touched) == _without(each, touched)
        touched -= OF_THE_SERVER


@given(pods.shapes())
def test_only_we_mount_what_is_ours(found: Json) -> None:
    planned = plan(found, ENABLED, NATIVE)
    mounts = {
        each["name"]: {mount["name"] for mount in each.get("volumeMounts") or ()}
        for each in containers(planned)
    }
    is_stdio = found["metadata"]["annotations"].get("mcp-opa-sidecar.io/mode") == "stdio"
    for name, names in mounts.items():
        theirs = {each for each in names if each.startswith("mcp-opa-sidecar-")}
        if name not in NAMES:
            pipes = {"mcp-opa-sidecar-shim", "mcp-opa-sidecar-stdio"}
            assert theirs == (pipes if name == "app" and is_stdio else set())
    assert "mcp-opa-sidecar-opa" in mounts["mcp-opa"] & mounts["mcp-sidecar"]


@pytest.mark.parametrize(
    ("grace", "pause", "seconds"),
    [
        pytest.param(None, 5, "5", id="as long as is said"),
        pytest.param(120, 60, "60", id="long, where there is time"),
        pytest.param(20, 10, "7", id="what is left of the pod's time"),
        pytest.param(13, 5, None, id="no time"),
        pytest.param(0, 5, None, id="none at all"),
        pytest.param(30, 0, None, id="none wanted"),
    ],
)
def test_ordered_containers_go_on_for_a_while_at_the_end(
    grace: int | None, pause: int, seconds: str | None
) -> None:
    found = pod(terminationGracePeriodSeconds=grace)
    planned = plan(found, ENABLED, Injection(native=False, pause=pause))
    hooks = [container(planned, name)["lifecycle"] for name in LASTING]
    told = [hook.get("preStop", {"exec": {"command": [None]}})["exec"]["command"] for hook in hooks]
    assert [command[-1] for command in told] == [seconds, seconds]
    native = plan(found, ENABLED, Injection(pause=pause))
    assert all("lifecycle" not in container(native, name) for name in LASTING)


@pytest.mark.parametrize("injection", [NATIVE, ORDERED])
def test_ordered_containers_have_a_gate_and_native_ones_are_native(injection: Injection) -> None:
    planned = plan(pod(), ENABLED, injection)
    ours = [container(planned, name) for name in LASTING]
    assert all((each.get("restartPolicy") == "Always") is injection.native for each in ours)
    assert all(("lifecycle" in each) is not injection.native for each in ours)


def test_what_it_exports_is_known_for_the_pod_s() -> None:
    env = container(plan(pod(), ENABLED, NATIVE), "mcp-sidecar")["env"]
    names = [each["name"] for each in env]
    [said] = [each["value"] for each in env if each["name"] == "OTEL_RESOURCE_ATTRIBUTES"]
    assert said == "k8s.namespace.name=$(POD_NAMESPACE),k8s.pod.name=$(POD_NAME)"
    # Only what stands before it is put in.
    for name in ("POD_NAMESPACE", "POD_NAME"):
        assert names.index(name) < names.index("OTEL_RESOURCE_ATTRIBUTES")


LABEL = "mcp-opa-sidecar.io/inject"


@pytest.mark.parametrize(
    ("label", "namespace", "injected"),
    [
        pytest.param(None, ENABLED, True, id="namespace"),
        pytest.param("true", Namespace("a"), True, id="pod"),
        pytest.param("false", ENABLED, False, id="the pod says no"),
        pytest.param("yes", Namespace("a"), False, id="not a label of ours"),
        pytest.param(None, Namespace("a"), False, id="nobody asks"),
        pytest.param(None, Namespace("a", {"mcp-opa-sidecar.io/injection": "on"}), False, id="on"),
        pytest.param("true", Namespace("kube-system"), False, id="kube-system"),
    ],
)
def test_labels_decide(label: str | None, namespace: Namespace, injected: bool) -> None:
    found = pod()
    if label is not None:
        found["metadata"]["labels"][LABEL] = label
    planned = plan(found, namespace, NATIVE)
    assert (planned != found) is injected


def test_a_label_that_nobody_can_mean_is_refused_where_pods_are_injected() -> None:
    found = pod()
    found["metadata"]["labels"][LABEL] = "flase"
    with pytest.raises(InjectionRefused, match="neither"):
        plan(found, ENABLED, NATIVE)


def test_the_default_container_stays_the_one_that_was_named() -> None:
    name = "kubectl.kubernetes.io/default-container"
    assert plan(pod(), ENABLED, NATIVE)["metadata"]["annotations"][name] == "app"
    found = pod()
    found["metadata"]["annotations"] = {name: "other"}
    assert plan(found, ENABLED, NATIVE)["metadata"]["annotations"][name] == "other"


NOTE: Json = {"version": 1, "containers": {}, "empty": {}, "default_container": True}
VARIABLE_OF_TEXT = {"app": {"env": {"empty": {}, "variables": {"A": "x"}}}}


@pytest.mark.parametrize(
    "status",
    [
        pytest.param("", id="empty"),
        pytest.param("{}", id="nothing in it"),
        pytest.param("[]", id="a list"),
        pytest.param("\ud800", id="no text"),
        pytest.param(json.dumps({**NOTE, "version": 2}), id="a later version"),
        pytest.param(json.dumps({**NOTE, "default_container": 1}), id="a number"),
        pytest.param(json.dumps({**NOTE, "containers": []}), id="a list of containers"),
        pytest.param(json.dumps({**NOTE, "containers": VARIABLE_OF_TEXT}), id="variable of text"),
        pytest.param(
            json.dumps({**NOTE, "containers": {"app": {"probes": {"livenessProbe": "x"}}}}),
            id="a probe of text",
        ),
        pytest.param(json.dumps({**NOTE, "empty": {"volumes": [{}]}}), id="full where empty"),
        pytest.param('{"version":1,' + json.dumps(NOTE)[1:], id="a key twice"),
    ],
)
def test_a_status_that_is_not_ours_is_refused(status: str) -> None:
    with pytest.raises(InjectionRefused, match="status"):
        plan(annotated(pod(), status=status), ENABLED, NATIVE)


def test_a_forged_note_gets_nothing_past_the_plan() -> None:
    probe = {"httpGet": {"port": 8080}}
    forged = {**NOTE, "containers": {"app": {"probes": {"livenessProbe": probe, "image": {}}}}}
    planned = plan(annotated(pod(), status=json.dumps(forged)), ENABLED, NATIVE)
    assert container(planned, "app")["image"] == "tickets:1"
    assert container(planned, "app")["livenessProbe"]["httpGet"]["port"] == 15820


def _without(found: Json, names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in names}
