"""Reviews: what the API server is told of a pod, and that its patch makes the plan."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given

from sidecar.injector.admission import Unreadable, review
from sidecar.injector.injection import Injection, Json
from sidecar.injector.plan import plan
from tests.support import pods
from tests.support.pods import ENABLED, pod

NATIVE = Injection()


def body(found: Json, old: Json | None = None) -> Json:
    """A review as the API server sends it."""
    return {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "namespace": "support",
            "operation": "CREATE" if old is None else "UPDATE",
            "object": found,
            "oldObject": old,
        },
    }


def applied(found: Json, response: Json) -> Json:
    """What the API server makes of an answer (RFC 6902, the three operations that are used)."""
    result = json.loads(json.dumps(found))
    for each in json.loads(base64.b64decode(response["patch"])):
        *path, last = [
            part.replace("~1", "/").replace("~0", "~") for part in each["path"].split("/")[1:]
        ]
        holder = result
        for part in path:
            holder = holder[part]
        assert each["op"] == "add" or last in holder
        if each["op"] == "remove":
            del holder[last]
        else:
            holder[last] = each["value"]
    return dict(result)


@given(pods.shapes())
def test_the_patch_makes_the_plan(found: Json) -> None:
    answer, _ = review(body(found), "mutate", True, NATIVE)
    assert answer["response"]["allowed"]
    assert answer["response"]["patchType"] == "JSONPatch"
    assert applied(found, answer["response"]) == plan(found, ENABLED, NATIVE)


def test_what_is_injected_already_needs_no_patch() -> None:
    found = plan(pod(), ENABLED, NATIVE)
    answer, told = review(body(found), "mutate", True, NATIVE)
    assert answer["response"] == {"uid": "705ab4f5", "allowed": True}
    assert told.outcome == "unchanged"


def test_ranges_of_the_namespace_stay_when_ours_are_made_anew() -> None:
    found = plan(pod(), ENABLED, NATIVE)
    sidecar = found["spec"]["initContainers"][1]
    sidecar["resources"]["limits"] = {"cpu": "2", "memory": "1Ti"}
    answer, _ = review(body(found), "mutate", True, NATIVE)
    made = applied(found, answer["response"])["spec"]["initContainers"][1]
    assert made["resources"]["limits"] == {"cpu": "2", "memory": "384Mi"}


@pytest.mark.parametrize("half", ["mutate", "validate"])
def test_who_does_not_ask_is_let_through(half: str) -> None:
    answer, told = review(body(pod()), half, False, NATIVE)
    assert answer["response"] == {"uid": "705ab4f5", "allowed": True}
    assert (told.outcome, "neither the pod" in told.reason) == ("skipped", True)


@pytest.mark.parametrize("half", ["mutate", "validate"])
def test_a_refusal_says_why(half: str) -> None:
    answer, told = review(body(pod(hostNetwork=True)), half, True, NATIVE)
    assert answer["response"]["allowed"] is False
    assert "hostNetwork" in answer["response"]["status"]["message"]
    assert told.outcome == "refused"


def test_an_update_is_held_against_what_is_there() -> None:
    old = plan(pod(), ENABLED, NATIVE)
    new = json.loads(json.dumps(old))
    new["spec"]["initContainers"][1]["image"] = "evil"
    answer, _ = review(body(new, old), "validate", True, NATIVE)
    assert answer["response"]["allowed"] is False
    answer, _ = review(body(old, old), "validate", True, NATIVE)
    assert answer["response"]["allowed"] is True


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {},
        {"apiVersion": "admission.k8s.io/v1beta1", "request": body(pod())["request"]},
        {**body(pod()), "request": None},
        {**body(pod()), "request": {**body(pod())["request"], "uid": 1}},
        {**body(pod()), "request": {**body(pod())["request"], "object": None}},
        {**body(pod()), "request": {**body(pod())["request"], "kind": {"kind": "Node"}}},
        body({"metadata": {}}),
        body({"metadata": 1, "spec": {"containers": 1}}),
    ],
)
def test_unreadable(found: Any) -> None:
    with pytest.raises(Unreadable):
        review(found, "mutate", True, NATIVE)
