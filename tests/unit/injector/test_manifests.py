"""Streams of YAML: what is injected, and that the rest stays byte for byte."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import ConfigError
from sidecar.injector.injection import Json
from sidecar.injector.manifests import documents, rewrite, split

SERVICE = """\
# A service, with a comment
kind: Service   # kept
spec: {ports: [ {port: 80} ]}
"""
POD = """\
kind: Pod
metadata: {name: a}
spec: {containers: [{name: app}]}
"""


def mark(pod: Json, manifest: Json) -> Json:
    return {**pod, "spec": {**pod["spec"], "marked": manifest["kind"]}}


def keep(pod: Json, manifest: Json) -> Json:
    return pod


def test_what_has_no_pod_stays_byte_for_byte() -> None:
    text = f"# head\n{SERVICE}---\n{POD}--- # tail\n{SERVICE}...\n"
    found = rewrite(text, mark)
    assert found.startswith(f"# head\n{SERVICE}---\n")
    assert found.endswith(f"--- # tail\n{SERVICE}...\n")
    assert [each.get("spec", {}).get("marked") for each in documents(found)] == [None, "Pod", None]


def test_what_is_not_changed_stays_byte_for_byte() -> None:
    text = f"{POD}---\n# nothing\n---\n{SERVICE}"
    assert rewrite(text, keep) == text


@given(st.lists(st.sampled_from([POD, SERVICE, "", "# c\n", "---\n", "--- # x\n", "a: '---'\n"])))
def test_split_loses_nothing(parts: list[str]) -> None:
    text = "".join(parts)
    assert "".join(split(text)) == text


def test_a_separator_within_text_is_none() -> None:
    text = "data:\n  a: |\n    ---\n    b\n  c: '---'\n"
    assert split(text) == [text]


TEMPLATE = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "app"}]}}
KINDS: dict[str, Json] = {
    "Pod": {"metadata": {"name": "x"}, "spec": TEMPLATE["spec"]},
    **{
        kind: {"spec": {"replicas": 1, "template": TEMPLATE}}
        for kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")
    },
    "ReplicationController": {"spec": {"template": TEMPLATE}},
    "CronJob": {"spec": {"schedule": "@daily", "jobTemplate": {"spec": {"template": TEMPLATE}}}},
    "Rollout": {"spec": {"template": TEMPLATE}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", [False, True], ids=["alone", "in a list"])
def test_kinds(kind: str, listed: bool) -> None:
    manifest: Json = {"kind": kind, **KINDS[kind]}
    if listed:
        manifest = {"kind": "List", "items": [manifest, {"kind": "Service", "spec": {}}]}
    found = rewrite(yaml.safe_dump(manifest), mark)
    assert found.count("marked: ") == 1
    assert yaml.safe_load(found) == yaml.safe_load(yaml.safe_dump(yaml.safe_load(found)))


@pytest.mark.parametrize(
    "manifest",
    [
        {"kind": "Service", "spec": {"selector": {"a": "b"}}},
        {"kind": "PodTemplate", "template": "x"},
        {"kind": "ConfigMap", "data": {"pod.yaml": POD}},
        {"kind": "Pod"},
        {"kind": "Pod", "spec": {"containers": None}},
        {"kind": "Deployment", "spec": {"template": None}},
        {"kind": "List", "items": [None, 1]},
    ],
)
def test_nothing_to_inject(manifest: Json) -> None:
    text = yaml.safe_dump(manifest)
    assert rewrite(text, mark) == text


@pytest.mark.parametrize("text", ["a: [", "a: !!python/object:os.system x", "\tx: y"])
def test_not_yaml(text: str) -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        rewrite(text, mark)


def test_a_pod_that_is_none() -> None:
    with pytest.raises(ConfigError, match="Pod a is not a manifest"):
        rewrite(POD, lambda pod, manifest: {"x": pod["metadata"]["name"]["first"]})
