"""Mode `stdio`: the server's command is given to a shim, and the sidecar is all that has a port."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from sidecar import shim
from sidecar.errors import InjectionRefused
from sidecar.injector.changes import STATUS, restore
from sidecar.injector.injection import Injection, Json
from sidecar.injector.plan import plan
from sidecar.injector.verify import verify_changed, verify_new
from tests.support.pods import ENABLED, annotated, breaks_restricted, container, pod

COMMAND = ["python", "server.py"]
WRAPPED = [*shim.words("/mcp-shim"), "--socket=/run/mcp-stdio/app.sock", "--peer=20001", "--"]


def server(said: Json | None = None, /, **annotations: str) -> Json:
    """A pod with a stdio server that declares no port."""
    found = pod({"command": COMMAND, "ports": [], **(said or {})})
    return annotated(found, mode="stdio", **annotations)


def more(found: Json, **spec: Any) -> Json:
    """The pod, with more in its specification."""
    return {**found, "spec": {**found["spec"], **spec}}


def planned(found: Json, **settings: Any) -> Json:
    return plan(found, ENABLED, Injection(**settings))


def test_the_command_goes_to_the_shim_and_the_rest_stays() -> None:
    found = server({"args": ["--all"], "env": [{"name": "A", "value": "1"}], "tty": True})
    app = container(planned(found), "app")
    assert app["command"] == WRAPPED
    assert app["args"] == [*COMMAND, "--all"]
    assert {k: v for k, v in app.items() if k not in ("command", "args", "volumeMounts")} == {
        k: v for k, v in container(found, "app").items() if k not in ("command", "args")
    }


def test_tools_can_not_be_written_to_and_the_sockets_folder_is_the_servers() -> None:
    found = planned(server())
    mounts = {
        name: {each["name"]: each for each in container(found, name)["volumeMounts"]}
        for name in ("mcp-shim", "mcp-opa", "mcp-sidecar", "app")
    }
    assert mounts["app"] == {
        "mcp-opa-sidecar-shim": {
            "name": "mcp-opa-sidecar-shim", "mountPath": "/mcp-shim", "readOnly": True
        },
        "mcp-opa-sidecar-stdio": {
            "name": "mcp-opa-sidecar-stdio", "mountPath": "/run/mcp-stdio"
        },
    }  # fmt: skip
    assert mounts["mcp-sidecar"]["mcp-opa-sidecar-stdio"]["readOnly"] is True
    assert "mcp-opa-sidecar-shim" not in mounts["mcp-sidecar"]
    assert "mcp-opa-sidecar-stdio" not in mounts["mcp-shim"] | mounts["mcp-opa"]
    volumes = {each["name"]: each["emptyDir"] for each in found["spec"]["volumes"][-2:]}
    assert volumes == {
        "mcp-opa-sidecar-shim": {"sizeLimit": "128Mi"},
        "mcp-opa-sidecar-stdio": {"medium": "Memory", "sizeLimit": "1Mi"},
    }


@pytest.mark.parametrize("native", [True, False])
def test_the_shim_is_there_before_anybody_needs_it(native: bool) -> None:
    other = {"name": "first", "image": "x"}
    found = planned(more(server(), initContainers=[other]), native=native)
    first, *_ = found["spec"]["initContainers"]
    assert (first["name"], first["args"]) == ("mcp-shim", ["shim", "--install=/mcp-shim"])
    assert "restartPolicy" not in first
    assert breaks_restricted(first) == []


def test_the_sidecar_serves_it_on_the_pods_address_alone() -> None:
    arguments = container(planned(server(), sidecar_id=700), "mcp-sidecar")["args"]
    assert arguments[1:3] == [
        "--listen=[$(POD_IPS)]:8000",
        "--upstream=unix-stdio:///run/mcp-stdio/app.sock",
    ]
    assert "--peer=700" in container(planned(server(), sidecar_id=700), "app")["command"]


MCP = {"name": "mcp", "containerPort": 9000}
OTHER = {"name": "other", "image": "x", "command": ["x"]}


@pytest.mark.parametrize(
    ("found", "port"),
    [
        (server(), 8000),
        (server({"ports": [MCP]}), 9000),
        (server({"ports": [{**MCP, "protocol": "UDP"}]}), 8000),
        (server({"ports": [{**MCP, "name": "rpc"}]}), 8000),
        (server({"ports": [{**MCP, "name": "rpc"}]}, port="rpc"), 9000),
        (server({"ports": [MCP]}, port="8443"), 8443),
    ],
)
def test_the_port(found: Json, port: int) -> None:
    assert f"--listen=[$(POD_IPS)]:{port}" in container(planned(found), "mcp-sidecar")["args"]


def beside(other: Json, **annotations: str) -> Json:
    """The server, and another container behind it."""
    found = server({"ports": [MCP]} if annotations.pop("mcp", "") else None, **annotations)
    found["spec"]["containers"].append(other)
    return found


def test_of_several_containers_the_server_is_named_or_has_the_port() -> None:
    for found in (beside(OTHER, container="app"), beside(OTHER, mcp="yes")):
        made = planned(found)
        assert container(made, "app")["command"] == WRAPPED
        assert container(made, "other") == OTHER


def test_a_command_that_the_image_says_is_said_once_more() -> None:
    found = server({"command": [], "args": ["--all"]}, stdio_command='["node", "index.js"]')
    made = planned(found)
    assert container(made, "app")["args"] == ["node", "index.js", "--all"]
    assert container(restore(made), "app")["command"] == []
    assert restore(made) == found


GRPC = {"readinessProbe": {"grpc": {"port": 8000}}}
HTTP = {"httpGet": {"path": "/", "port": 8000}}

REFUSED: dict[str, tuple[Json, str]] = {
    "no command": (server({"command": None}), "has no command, and what its image says"),
    "an empty one": (server({"command": []}), "has no command"),
    "two commands": (server(stdio_command='["a"]'), "container app has a command"),
    "not JSON": (
        server({"command": None}, stdio_command="python server.py"),
        "not a list of words",
    ),
    "no words": (server({"command": None}, stdio_command="[]"), "not a list of words"),
    "not words": (server({"command": None}, stdio_command='["a", 1]'), "not a list of words"),
    "no list": (server({"command": None}, stdio_command='{"a": 1}'), "not a list of words"),
    "several containers": (beside(OTHER), "2 containers may be the server"),
    "two with the port": (beside({**OTHER, "ports": [MCP]}, mcp="yes"), "2 containers may be"),
    "no such container": (server(container="b"), "there is no container 'b'"),
    "no such port": (server(port="rpc"), "0 ports are called 'rpc'"),
    "a low port": (server(port="443"), "can not be guarded"),
    "our port": (server(port="15820"), "can not be guarded"),
    "a path": (server(path="/x"), "no annotation of mode stdio: container, port, stdio-command"),
    "loopback": (server(accept_loopback="true"), "no annotation of mode stdio"),
    "a probe by HTTP": (server({"livenessProbe": HTTP}), "livenessProbe of app dials port 8000"),
    "a probe by TCP": (
        server({"startupProbe": {"tcpSocket": {"port": 8000}}}),
        "startupProbe of app dials port 8000, and a stdio server has none: ask by exec",
    ),
    "a probe by gRPC": (server(GRPC), "readinessProbe of app dials"),
    "another's probe": (beside({**OTHER, **GRPC}, container="app"), "readinessProbe of other"),
    "a hook": (server({"lifecycle": {"preStop": HTTP}}), "preStop of app dials port 8000"),
    "our container": (beside({**OTHER, "name": "mcp-shim"}, container="app"), "is reserved"),
    "our mount": (
        beside(
            {**OTHER, "volumeMounts": [{"name": "mcp-opa-sidecar-stdio", "mountPath": "/x"}]},
            container="app",
        ),
        "container other mounts volume mcp-opa-sidecar-stdio of ours",
    ),
    "shared processes": (more(server(), shareProcessNamespace=True), "shareProcessNamespace"),
}


@pytest.mark.parametrize(("found", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(found: Json, reason: str) -> None:
    with pytest.raises(InjectionRefused, match=reason):
        planned(found)


ACCEPTED: dict[str, Json] = {
    "a probe by exec": {"livenessProbe": {"exec": {"command": ["true"]}}},
    "a probe of another port": {"livenessProbe": {"httpGet": {"port": 9090}}},
    "a hook by exec": {"lifecycle": {"preStop": {"exec": {"command": ["true"]}}}},
}


@pytest.mark.parametrize("said", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(said: Json) -> None:
    app = container(planned(server(said)), "app")
    assert {name: app[name] for name in said} == said


def test_nobody_comes_later_among_the_servers_processes() -> None:
    old = planned(server())
    for target, allowed in (("app", False), ("mcp-sidecar", False), (None, True)):
        debugged = deepcopy(old)
        debugged["spec"]["ephemeralContainers"] = [
            {
                "name": "debugger",
                "image": "x",
                **({"targetContainerName": target} if target else {}),
            }
        ]
        if allowed:
            verify_changed(debugged, old, Injection())
            continue
        with pytest.raises(InjectionRefused, match=f"debugger is put into {target}"):
            verify_changed(debugged, old, Injection())


# ── What others do to it, and what its note may say ───────────────────────────────────────────────


def test_what_others_add_stays_when_it_is_taken_off() -> None:
    """The API server mounts the account's token, and later webhooks may add what they like."""
    token = {"name": "token", "mountPath": "/var/run/secrets", "readOnly": True}
    made = planned(server())
    app = container(made, "app")
    app["volumeMounts"] = [token, *app["volumeMounts"]]
    app["args"].append("--more")
    assert container(restore(made), "app")["volumeMounts"] == [token]
    assert container(restore(made), "app")["args"] == ["--more"]
    again = container(planned(made), "app")
    assert again["args"] == [*COMMAND, "--more"]
    assert again["volumeMounts"][-1] == token


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("command", ["sh", "-c"]),
        ("command", [*WRAPPED[:-2], "--peer=1001", "--"]),
        ("command", None),
        ("volumeMounts", []),
    ],
)
def test_a_server_that_goes_past_its_shim_is_not_accepted(field: str, value: Any) -> None:
    made = planned(server())
    verify_new(made, ENABLED, Injection())
    container(made, "app")[field] = value
    with pytest.raises(InjectionRefused, match="not as the injector made it"):
        verify_new(made, ENABLED, Injection())


@pytest.mark.parametrize("words", [0, 1, 2, 9, -1, True, "two", None])
def test_a_note_about_the_command_is_no_evidence(words: Any) -> None:
    made = planned(server())
    annotations = made["metadata"]["annotations"]
    note = json.loads(annotations[STATUS])
    note["containers"]["app"]["wrapped"]["words"] = words
    forged = {**made, "metadata": {**made["metadata"]}}
    forged["metadata"]["annotations"] = {**annotations, STATUS: json.dumps(note)}
    if type(words) is not int or words < 0:
        with pytest.raises(InjectionRefused, match="not what the injector wrote"):
            planned(forged)
    elif words == 0:
        with pytest.raises(InjectionRefused, match="has no command"):
            planned(forged)
    else:
        again = planned(forged)
        assert container(again, "app") == container(made, "app")
