"""What the injector hands over of the kubelet's probes, and what is not taken for it."""

from __future__ import annotations

import json

import pytest

from sidecar.errors import ConfigError
from sidecar.injector.injection import Injection
from sidecar.injector.plan import plan
from sidecar.transport.app_health import AppProbe, read_probes
from tests.support.pods import ENABLED, container, pod


def test_nothing_is_none() -> None:
    assert read_probes(None) == read_probes("") == {}


def test_what_the_injector_writes_is_read() -> None:
    header = {"name": "X-A", "value": "b c"}
    http = {"httpGet": {"port": "mcp", "path": "/h", "httpHeaders": [header], "scheme": "HTTPS"}}
    tcp = {"tcpSocket": {"port": 8080}, "timeoutSeconds": 4}
    planned = plan(pod({"livenessProbe": http, "startupProbe": tcp}), ENABLED, Injection())
    env = {each["name"]: each.get("value") for each in container(planned, "mcp-sidecar")["env"]}
    assert read_probes(env["POD_APP_PROBES"]) == {
        "/app-health/app/livez": AppProbe(8080, 1, "/h", "HTTPS", (("X-A", "b c"),)),
        "/app-health/app/startupz": AppProbe(8080, 4),
    }


@pytest.mark.parametrize(
    "said",
    [
        pytest.param("{", id="no JSON"),
        pytest.param("[]", id="a list"),
        pytest.param(json.dumps({"/x": {}}), id="no port"),
        pytest.param(json.dumps({"/x": {"port": 0}}), id="port 0"),
        pytest.param(json.dumps({"/x": {"port": 8080, "host": "10.0.0.1"}}), id="a host"),
        pytest.param(json.dumps({"/x": {"port": 8080, "scheme": "file"}}), id="a scheme"),
        pytest.param(json.dumps({"/x": {"port": 8080, "path": "/a b"}}), id="a line"),
        pytest.param(json.dumps({"/x": {"port": 8080, "headers": [["A"]]}}), id="half a header"),
        pytest.param(
            json.dumps({"/x": {"port": 8080, "headers": [["A", "b\r\nc"]]}}), id="two lines"
        ),
    ],
)
def test_what_is_something_else_is_refused(said: str) -> None:
    with pytest.raises(ConfigError, match="POD_APP_PROBES"):
        read_probes(said)
