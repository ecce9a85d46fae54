"""The injector's own settings: what they are unless said, and what can't be meant."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.errors import ConfigError
from sidecar.injector.injection import Injection, read


def test_nothing_said_is_the_defaults() -> None:
    assert read(None) == read({}) == Injection()


def test_what_is_said_is_taken() -> None:
    said = {"image": "x@sha256:1", "native": False, "opa_id": 3, "otlp": "http://c:4318"}
    found = read({**said, "sidecar_resources": {"limits": {"cpu": "1"}}})
    assert (found.image, found.native, found.opa_id, found.otlp) == tuple(said.values())
    assert found.sidecar_resources == {"limits": {"cpu": "1"}}
    assert found.opa_resources == Injection().opa_resources
    assert read({"certificates": {"look": 5}}).certificates.look == 5
    assert read({"events": False}).events is False


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        pytest.param([], "must be a mapping", id="a list"),
        pytest.param({"imag": "x"}, "did you mean 'image'", id="a typo"),
        pytest.param({"image": "x y"}, "image: must be", id="two words"),
        pytest.param({"image": ""}, "image: must be", id="empty"),
        pytest.param({"pull_policy": "never"}, "pull_policy: must be", id="pull policy"),
        pytest.param({"native": "yes"}, "native: must be", id="a word"),
        pytest.param({"opa_authorization": 1}, "opa_authorization: must be", id="a number"),
        pytest.param({"sidecar_id": 0}, "sidecar_id: must be", id="root"),
        pytest.param({"sidecar_id": True}, "sidecar_id: must be", id="true"),
        pytest.param({"sidecar_id": 20002}, "have to differ", id="one user"),
        pytest.param({"policy": "My_Policy"}, "policy: must be", id="no name"),
        pytest.param({"otlp": "c:4318"}, "otlp: must be", id="no URL"),
        pytest.param(
            {"opa_resources": {"requests": {"cpu": "lots"}}},
            "opa_resources.requests.cpu: must be",
            id="no quantity",
        ),
        pytest.param({"events": "no"}, "events: must be", id="a word for no"),
        pytest.param({"certificates": {"leaf": 0}}, "certificates.leaf: must be", id="no life"),
        pytest.param({"certificates": {"leafs": 9}}, "did you mean 'leaf'", id="a typo, deep"),
        pytest.param({"certificates": {"authority": 3600}}, "three times", id="too short"),
        pytest.param({"certificates": {"look": 90000}}, "half of overlap", id="too seldom"),
        pytest.param({"opa_resources": {"request": {}}}, "did you mean 'requests'", id="deep"),
    ],
)
def test_refused(document: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(document)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        read({"image": "", "native": 1, "x": 1})
    assert len(refused.value.problems) == 3
