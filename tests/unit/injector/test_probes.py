"""Which probes move to the sidecar, and what it asks for them."""

from __future__ import annotations

import json

import pytest

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import Injection, Json
from sidecar.injector.plan import plan
from tests.support.pods import ENABLED, annotated, container, pod

NATIVE = Injection()

HTTP = {"httpGet": {"port": "mcp", "path": "/h", "httpHeaders": [{"name": "A", "value": "b"}]}}
ASKED = {"port": 8080, "seconds": 1, "path": "/h", "scheme": "HTTP", "headers": [["A", "b"]]}

MOVED: dict[str, tuple[Json, Json]] = {
    "by name": (HTTP, ASKED),
    "by number": ({"httpGet": {"port": 8080}}, ASKED | {"path": "/", "headers": []}),
    "by digits": ({"httpGet": {"port": "8080"}}, ASKED | {"path": "/", "headers": []}),
    "TLS": (
        {"httpGet": {"port": 8080, "scheme": "HTTPS"}, "timeoutSeconds": 7},
        ASKED | {"path": "/", "headers": [], "scheme": "HTTPS", "seconds": 7},
    ),
    "a connection": ({"tcpSocket": {"port": 8080}}, {"port": 8080, "seconds": 1}),
}

LEFT: dict[str, Json] = {
    "another port": {"httpGet": {"port": 9000}},
    "a name of nobody": {"httpGet": {"port": "web"}},
    "a command": {"exec": {"command": ["true"]}},
    "gRPC elsewhere": {"grpc": {"port": 9000}},
}


@pytest.mark.parametrize("kind", ["livenessProbe", "readinessProbe", "startupProbe"])
@pytest.mark.parametrize(("probe", "asked"), MOVED.values(), ids=MOVED)
def test_moved(kind: str, probe: Json, asked: Json) -> None:
    planned = plan(pod({kind: {**probe, "periodSeconds": 3}}), ENABLED, NATIVE)
    path = {"l": "livez", "r": "readyz", "s": "startupz"}[kind[0]]
    now = container(planned, "app")[kind]
    assert now["httpGet"] == {"path": f"/app-health/app/{path}", "port": 15820}
    assert now["periodSeconds"] == 3
    assert "tcpSocket" not in now
    assert _questions(planned) == {f"/app-health/app/{path}": asked}


@pytest.mark.parametrize("probe", LEFT.values(), ids=LEFT)
def test_left_alone(probe: Json) -> None:
    planned = plan(pod({"livenessProbe": probe}), ENABLED, NATIVE)
    assert container(planned, "app")["livenessProbe"] == probe
    assert _questions(planned) == {}


def test_another_container_s_probe_of_the_port_moves_too() -> None:
    found = annotated(pod(), accept_loopback="true")
    other = {"name": "other", "image": "x", "livenessProbe": {"tcpSocket": {"port": 8080}}}
    found["spec"]["containers"].append(other)
    planned = plan(found, ENABLED, NATIVE)
    assert list(_questions(planned)) == ["/app-health/other/livez"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        pytest.param({"livenessProbe": {"grpc": {"port": 8080}}}, "gRPC", id="gRPC"),
        pytest.param(
            {"lifecycle": {"preStop": {"httpGet": {"port": "mcp"}}}}, "preStop of app", id="hook"
        ),
    ],
)
def test_refused(fields: Json, reason: str) -> None:
    with pytest.raises(InjectionRefused, match=reason):
        plan(pod(fields), ENABLED, NATIVE)


def _questions(planned: Json) -> Json:
    env = {each["name"]: each.get("value") for each in container(planned, "mcp-sidecar")["env"]}
    found: Json = json.loads(env.get("POD_APP_PROBES") or "{}")
    return found
