"""The runner itself: what it does not follow is an error, and volumes change as kubelets do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pods.conftest import server_pod
from tests.pods.spec import Unsupported, check, environment, expand
from tests.pods.volumes import Payload, labels_file

Json = dict[str, Any]


def probed(**probe: Any) -> Json:
    return {"containers": [{"name": "a", "readinessProbe": probe}]}


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"hostNetwork": True}, "pod.spec.hostNetwork"),
        ({"securityContext": {"fsGroup": 1}}, "pod.spec.securityContext.fsGroup"),
        ({"volumes": [{"name": "s", "secret": {}}]}, r"pod.spec.volumes\[0\].secret"),
        ({"initContainers": [{"name": "a", "envFrom": []}]}, "envFrom"),
        ({"containers": [{"name": "a", "securityContext": {"privileged": True}}]}, "privileged"),
        ({"containers": [{"name": "a", "livenessProbe": {"grpc": {}}}]}, "grpc"),
        ({"containers": [{"name": "a", "livenessProbe": {"periodSeconds": 1}}]}, "not one of"),
        (probed(httpGet={"port": 80, "scheme": "HTTPS"}), "scheme: 'HTTPS'"),
        (probed(tcpSocket={"port": 80}, successThreshold=2), "successThreshold: 2"),
        ({"containers": [{"name": "a", "ports": [{"protocol": "UDP"}]}]}, "protocol: 'UDP'"),
        ({"enableServiceLinks": True}, "enableServiceLinks: True"),
        ({"containers": [{"name": "a", "volumeMounts": [{"subPath": "x"}]}]}, "subPath"),
        ({"containers": [{"name": "a", "lifecycle": {"preStop": {"sleep": {}}}}]}, "sleep"),
    ],
)
def test_what_is_not_followed_is_an_error(spec: Json, path: str) -> None:
    check(server_pod())
    with pytest.raises(Unsupported, match=path):
        check(server_pod(**spec))


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("--listen=$(POD_IP):80", "--listen=192.0.2.2:80"),
        ("$(POD_IP)$(POD_IP)", "192.0.2.2192.0.2.2"),
        ("$(NOBODY)", "$(NOBODY)"),
        ("$$(POD_IP)", "$(POD_IP)"),
        ("$POD_IP", "$POD_IP"),
        ("$$$(POD_IP)", "$192.0.2.2"),
    ],
)
def test_variables_in_arguments(text: str, expanded: str) -> None:
    assert expand(text, {"POD_IP": "192.0.2.2"}) == expanded


def test_variables_of_variables() -> None:
    field = {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    entries: list[Json] = [
        {"name": "B", "value": "$(A)"},
        {"name": "A", **field},
        {"name": "C", "value": "$(A)/$(B)"},
    ]
    found = environment(entries, {"status.podIP": "192.0.2.2"})
    assert found == {"B": "$(A)", "A": "192.0.2.2", "C": "192.0.2.2/$(A)"}


def test_a_config_map_changes_by_one_link(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "volume", {"a": "1", "b": "1"}, 0o444)
    assert (payload.folder / "a").readlink() == Path("..data/a")
    data = (payload.folder / "..data").readlink()
    payload.write({"b": "2", "c": "2"})
    visible = {each.name: each.read_text("utf-8") for each in payload.folder.glob("[!.]*")}
    assert visible == {"b": "2", "c": "2"}
    assert (payload.folder / "..data").readlink() != data
    assert not (payload.folder / data).exists()
    assert (payload.folder / "c").stat().st_mode & 0o777 == 0o444


def test_labels() -> None:
    assert labels_file({"b": "2", "a": "1"}) == 'a="1"\nb="2"'
