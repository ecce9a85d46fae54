"""What labels and annotations ask for, and what can't be meant."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import Json
from sidecar.injector.modes import wish_of
from sidecar.injector.wishes import Server, Wish
from tests.support.pods import annotated, pod


def _ports(*ports: Json) -> Json:
    return pod({"ports": list(ports)})


def _pair(first: list[Json], second: list[Json]) -> Json:
    found = pod({"ports": first})
    found["spec"]["containers"].append({"name": "other", "image": "x", "ports": second})
    return found


def _front(port: int, container: str = "app", **more: Any) -> Wish:
    return Wish(mode="front", port=port, container=container, **more)


def _agent(servers: str | None, *variables: Json, **annotations: str) -> Json:
    """A pod with an agent that is told where its servers are."""
    found = pod({"env": list(variables), "ports": []})
    said = {} if servers is None else {"servers": servers}
    return annotated(found, mode="client", **said, **annotations)


def _variable(name: str, value: str) -> Json:
    return {"name": name, "value": value}


MCP = {"name": "mcp", "containerPort": 8080}

GOOD: dict[str, tuple[Json, Wish]] = {
    "the port that is called mcp": (pod(), _front(8080, "app")),
    "a number": (annotated(_ports(), port="9000"), _front(9000, "app")),
    "a number that is declared": (
        annotated(_pair([], [{"containerPort": 9000}]), port="9000"),
        _front(9000, "other"),
    ),
    "another name": (
        annotated(_ports(MCP, {"name": "rpc", "containerPort": 9000}), port="rpc"),
        _front(9000, "app"),
    ),
    "a container": (
        annotated(_pair([MCP], [{**MCP, "containerPort": 9000}]), container="other"),
        _front(9000, "other"),
    ),
    "not UDP": (_ports({**MCP, "protocol": "UDP"}, MCP), _front(8080, "app")),
    "the rest": (
        annotated(pod(), path="/sse/x", host_env="A,B_1", accept_loopback="true", mode="front"),
        _front(8080, path="/sse/x", host_env=("A", "B_1"), accept_loopback=True),
    ),
    "other people's annotations": (
        {**pod(), "metadata": {"annotations": {"example.com/mode": "x"}}},
        _front(8080, "app"),
    ),
    "redirected": (
        annotated(_ports({**MCP, "containerPort": 80}), mode="redirect", path="/rpc"),
        Wish(mode="redirect", port=80, container="app", path="/rpc"),
    ),
    "a stdio server": (
        annotated(pod({"command": ["x"]}), mode="stdio"),
        Wish(mode="stdio", port=8080, container="app"),
    ),
    "a stdio server whose image says its command": (
        annotated(_ports(), mode="stdio", stdio_command='["x", "--y"]'),
        Wish(mode="stdio", port=8000, container="app", command=("x", "--y")),
    ),
    "an agent's servers": (
        _agent(
            "tickets=A, search=B",
            _variable("A", "http://tickets.support/mcp"),
            _variable("B", "https://search.example.com:8443"),
        ),
        Wish(
            mode="client",
            port=15801,
            container="app",
            servers=(
                Server("tickets", "A", "http://tickets.support/mcp"),
                Server("search", "B", "https://search.example.com:8443"),
            ),
        ),
    ),
}

A = _variable("A", "http://tickets.support/mcp")

BAD: dict[str, tuple[Json, str]] = {
    "no port": (_ports(), "0 ports are called 'mcp'"),
    "two ports": (_pair([MCP], [MCP]), "2 ports are called"),
    "no such name": (annotated(pod(), port="rpc"), "0 ports are called 'rpc'"),
    "no such container": (annotated(pod(), container="b"), "no container 'b'"),
    "nobody's number": (annotated(_pair([], []), port="9000"), "2 containers may have port 9000"),
    "too low": (annotated(pod(), port="443"), "can not be guarded"),
    "too high": (annotated(pod(), port="65536"), "can not be guarded"),
    "ours": (annotated(pod(), port="15820"), "can not be guarded"),
    "other digits": (annotated(pod(), port="٨٠٨٠"), "0 ports are called"),
    "mode": (annotated(pod(), mode="sideways"), "is not one of: front, redirect, stdio, client"),
    "another mode's": (
        annotated(pod(), mode="redirect", accept_loopback="true"),
        "accept-loopback is no annotation of mode redirect: container, path, port",
    ),
    "no servers": (_agent(None, A), "has to say which servers"),
    "servers of no name": (_agent("A", A), "'A' is not NAME=VARIABLE"),
    "a name with a path in it": (_agent("a/b=A", A), "is not NAME=VARIABLE"),
    "no such variable": (_agent("tickets=B", A), "variable B of container app has to be the URL"),
    "a variable from elsewhere": (
        _agent("tickets=A", {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}),
        "has to be the URL",
    ),
    "a URL of other variables": (
        _agent("tickets=A", _variable("A", "http://$(HOST)/mcp")),
        "has to be the URL",
    ),
    "a URL with a flag behind it": (
        _agent("tickets=A", _variable("A", "http://a/mcp --policy=/tmp")),
        "has to be the URL",
    ),
    "credentials in a URL": (
        _agent("tickets=A", _variable("A", "http://a:b@c/mcp")),
        "has to be the URL",
    ),
    "a name twice": (
        _agent("a=A,a=B", A, _variable("B", "http://b/mcp")),
        "two of the names are the same",
    ),
    "a variable twice": (_agent("a=A,b=A", A), "two of the variables are the same"),
    "an agent's port": (_agent("a=A", A, port="8080"), "no annotation of mode client"),
    "path": (annotated(pod(), path="mcp"), "is not a path"),
    "a path that goes on": (annotated(pod(), path="/mcp --policy=/tmp"), "is not a path"),
    "variable": (annotated(pod(), host_env="A-B"), "not the name of a variable"),
    "neither": (annotated(pod(), accept_loopback="yes"), "neither"),
    "a typo": (annotated(pod(), prot="8080"), "no annotation of mode front"),
    "a policy of its own": (annotated(pod(), policy="mine"), "no annotation of mode front"),
}


@pytest.mark.parametrize(("found", "wish"), GOOD.values(), ids=GOOD)
def test_wish(found: Json, wish: Wish) -> None:
    assert wish_of(found) == wish


@pytest.mark.parametrize(("found", "reason"), BAD.values(), ids=BAD)
def test_refused(found: Json, reason: str) -> None:
    with pytest.raises(InjectionRefused, match=reason):
        wish_of(found)
