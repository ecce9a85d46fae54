"""What labels and annotations ask for, and what can't be meant."""

from __future__ import annotations

import pytest

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import Json
from sidecar.injector.wishes import Wish, wish_of
from tests.support.pods import annotated, pod


def _ports(*ports: Json) -> Json:
    return pod({"ports": list(ports)})


def _pair(first: list[Json], second: list[Json]) -> Json:
    found = pod({"ports": first})
    found["spec"]["containers"].append({"name": "other", "image": "x", "ports": second})
    return found


MCP = {"name": "mcp", "containerPort": 8080}

GOOD: dict[str, tuple[Json, Wish]] = {
    "the port that is called mcp": (pod(), Wish("front", 8080, "app")),
    "a number": (annotated(_ports(), port="9000"), Wish("front", 9000, "app")),
    "a number that is declared": (
        annotated(_pair([], [{"containerPort": 9000}]), port="9000"),
        Wish("front", 9000, "other"),
    ),
    "another name": (
        annotated(_ports(MCP, {"name": "rpc", "containerPort": 9000}), port="rpc"),
        Wish("front", 9000, "app"),
    ),
    "a container": (
        annotated(_pair([MCP], [{**MCP, "containerPort": 9000}]), container="other"),
        Wish("front", 9000, "other"),
    ),
    "not UDP": (_ports({**MCP, "protocol": "UDP"}, MCP), Wish("front", 8080, "app")),
    "the rest": (
        annotated(pod(), path="/sse/x", host_env="A,B_1", accept_loopback="true", mode="front"),
        Wish("front", 8080, "app", "/sse/x", ("A", "B_1"), True),
    ),
    "other people's annotations": (
        {**pod(), "metadata": {"annotations": {"example.com/mode": "x"}}},
        Wish("front", 8080, "app"),
    ),
}

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
    "mode": (annotated(pod(), mode="sideways"), "is not one of: front"),
    "path": (annotated(pod(), path="mcp"), "is not a path"),
    "a path that goes on": (annotated(pod(), path="/mcp --policy=/tmp"), "is not a path"),
    "variable": (annotated(pod(), host_env="A-B"), "not the name of a variable"),
    "neither": (annotated(pod(), accept_loopback="yes"), "neither"),
    "a typo": (annotated(pod(), prot="8080"), "no annotation of ours"),
    "a policy of its own": (annotated(pod(), policy="mine"), "no annotation of ours"),
}


@pytest.mark.parametrize(("found", "wish"), GOOD.values(), ids=GOOD)
def test_wish(found: Json, wish: Wish) -> None:
    assert wish_of(found) == wish


@pytest.mark.parametrize(("found", "reason"), BAD.values(), ids=BAD)
def test_refused(found: Json, reason: str) -> None:
    with pytest.raises(InjectionRefused, match=reason):
        wish_of(found)
