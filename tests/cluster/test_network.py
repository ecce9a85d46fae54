"""`k8s/examples/network.yaml`: who may connect to whom, by what the API server has stored.

There is no network plugin here. `lets` reads the policies as one has to: a pod that is selected for
a direction lets through what any of its policies names, and nothing else.

Source: Kubernetes, "Network Policies".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from sidecar.injector.injection import ADMIN_PORT, OPA_PORT
from tests.cluster.control_plane import Cluster, Json
from tests.support.processes import ROOT

pytestmark = pytest.mark.timeout(180)

EXAMPLE = ROOT / "k8s" / "examples" / "network.yaml"
NAME = "kubernetes.io/metadata.name"
MCP, OTHER, DNS, OTLP = 8080, 9999, 53, 4318


@dataclass(frozen=True, slots=True)
class End:
    """A pod; one of no namespace is outside of the cluster, as a node is."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


NODE = End()
SERVER = End("support", {"app": "tickets", "mcp-opa-sidecar.io/injected": "true"})
BARE = End("support", {"app": "tickets"})
CLIENT, STRANGER = End("agents", {"app": "client"}), End("default", {"app": "x"})
NAMES = End("kube-system", {"k8s-app": "kube-dns"})
JAEGER = End("observability", {"app": "jaeger"})
NAMED = {"mcp": MCP}


@pytest.fixture(scope="module")
def policies(bare_cluster: Cluster) -> Iterator[list[Json]]:
    """Those of the example, with what the API server adds."""
    spaces = ("support", "agents")
    for each in spaces:
        bare_cluster.kubectl("create", "namespace", each)
    bare_cluster.kubectl("apply", "--validate=strict", "-f", EXAMPLE)
    yield [
        each
        for space in spaces
        for each in bare_cluster.get("networkpolicies", "-n", space)["items"]
    ]
    bare_cluster.kubectl("delete", "namespace", *spaces)


def selects(selector: Json | None, labels: Mapping[str, str]) -> bool:
    said = selector or {}
    assert set(said) <= {"matchLabels"}
    wanted: Mapping[str, str] = said.get("matchLabels", {})
    return wanted.items() <= labels.items()


def is_peer(peer: Json, end: End, own: str) -> bool:
    assert set(peer) <= {"namespaceSelector", "podSelector"}
    if "namespaceSelector" in peer:
        space = end.namespace != "" and selects(peer["namespaceSelector"], {NAME: end.namespace})
    else:
        space = end.namespace == own
    return space and selects(peer.get("podSelector"), end.labels)


def has_port(port: Json, number: int, protocol: str) -> bool:
    assert set(port) <= {"port", "protocol"}
    wanted = port.get("port", number)
    return port["protocol"] == protocol and NAMED.get(wanted, wanted) == number


def lets(policies: list[Json], direction: str, end: End, other: End, port: tuple[int, str]) -> bool:
    """Whether the policies of one end let a connection through."""
    peers = "from" if direction == "Ingress" else "to"
    mine = [
        each["spec"]
        for each in policies
        if each["metadata"]["namespace"] == end.namespace
        and direction in each["spec"]["policyTypes"]
        and selects(each["spec"]["podSelector"], end.labels)
    ]
    rules = [rule for each in mine for rule in each.get(direction.lower()) or ()]
    return not mine or any(
        (peers not in rule or any(is_peer(each, other, end.namespace) for each in rule[peers]))
        and ("ports" not in rule or any(has_port(each, *port) for each in rule["ports"]))
        for rule in rules
    )


@pytest.mark.parametrize(
    ("source", "target", "port", "connected"),
    [
        (CLIENT, SERVER, MCP, True),
        (CLIENT, SERVER, OTHER, False),
        (CLIENT, BARE, MCP, False),
        (CLIENT, STRANGER, MCP, False),
        (CLIENT, NODE, 443, False),
        (CLIENT, NAMES, DNS, True),
        (STRANGER, SERVER, MCP, False),
        (STRANGER, BARE, MCP, False),
        (STRANGER, CLIENT, OTHER, False),
        (SERVER, SERVER, MCP, False),
        (SERVER, NAMES, DNS, True),
        (SERVER, JAEGER, OTLP, True),
        (SERVER, JAEGER, 16686, False),
        (SERVER, NODE, 443, False),
        (SERVER, CLIENT, OTHER, False),
        (NODE, SERVER, ADMIN_PORT, True),
        (NODE, SERVER, OPA_PORT, True),
        (NODE, SERVER, MCP, False),
        (NODE, BARE, ADMIN_PORT, False),
    ],
)
def test_who_may_connect(
    policies: list[Json], source: End, target: End, port: int, connected: bool
) -> None:
    at = (port, "TCP")
    found = lets(policies, "Egress", source, target, at) and lets(
        policies, "Ingress", target, source, at
    )
    assert found is connected


def test_names_are_looked_up_by_either_protocol(policies: list[Json]) -> None:
    for end in (SERVER, BARE, CLIENT):
        for protocol in ("UDP", "TCP"):
            assert lets(policies, "Egress", end, NAMES, (DNS, protocol))
        assert not lets(policies, "Egress", end, STRANGER, (DNS, "UDP"))
