"""What a pod asks for, by its labels and annotations. Labels decide whether, annotations how.

Labels, since the API server can select by them: an injector that is down then touches nobody else.
Nothing here chooses an image, a policy or an identity: who writes pods may not choose their judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import PREFIX, RESERVED_PORTS, Json, Namespace

INJECT = PREFIX + "inject"
INJECTION = PREFIX + "injection"

NEVER = frozenset({"kube-system", "kube-public", "kube-node-lease"})

_PATH = re.compile(r"/[A-Za-z0-9._~/-]{0,200}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,100}")

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for, complete."""

    mode: str
    container: str  # the server's; in mode `client`, the agent's
    port: int  # the server's; in modes `stdio` and `client`, the sidecar's
    path: str = "/mcp"  # of the server's endpoint
    host_env: tuple[str, ...] = ()  # more variables that tell the server where to listen
    accept_loopback: bool = False  # others of the pod may reach the server past the sidecar
    servers: tuple[Server, ...] = ()  # those that an agent dials
    command: tuple[str, ...] = ()  # a stdio server's, where its container does not say it


@dataclass(frozen=True, slots=True)
class Server:
    """One that an agent dials, by what a variable of its container says."""

    name: str
    variable: str
    url: str


def unwanted(pod: Json, namespace: Namespace) -> str | None:
    """Why a pod is left alone; None when it is to be injected. The pod's own label comes first."""
    label = labels_of(pod).get(INJECT)
    if namespace.name in NEVER:
        return f"nothing is injected in {namespace.name}"
    enabled = namespace.labels.get(INJECTION) == "enabled"
    if label == "false" or (label not in (None, "true") and not enabled):
        return f"the pod's label {INJECT} is {label!r}"
    if enabled or label == "true":
        return None
    return f"neither the pod is labelled {INJECT}=true nor its namespace {INJECTION}=enabled"


def path_of(said: Mapping[str, str]) -> str:
    """The path of the server's endpoint.

    Raises:
        InjectionRefused: it is none.
    """
    path = said.get("path", "/mcp")
    if not _PATH.fullmatch(path):
        raise InjectionRefused(f"{PREFIX}path {path!r} is not a path")
    return path


def names_of(said: Mapping[str, str], name: str) -> tuple[str, ...]:
    """The variables that an annotation names, with commas between them.

    Raises:
        InjectionRefused: one is not the name of a variable.
    """
    names = tuple(each.strip() for each in said.get(name, "").split(",") if each.strip())
    for each in names:
        if not VARIABLE.fullmatch(each):
            raise InjectionRefused(f"{PREFIX}{name}: {each!r} is not the name of a variable")
    return names


def candidates(spec: Json, said: Mapping[str, str]) -> list[Json]:
    """The containers that may be meant: the one that is named, or all.

    Raises:
        InjectionRefused: there is none of the name.
    """
    wanted = said.get("container")
    found = [each for each in spec["containers"] if wanted in (None, each["name"])]
    if not found:
        raise InjectionRefused(f"{PREFIX}container: there is no container {wanted!r}")
    return found


def server_of(spec: Json, said: Mapping[str, str], *, lowest: int) -> tuple[str, int]:
    """The server's container and port, which is `lowest` or above.

    Raises:
        InjectionRefused: that is not one container and one port.
    """
    containers = candidates(spec, said)
    port = said.get("port", "mcp")
    if port.isascii() and port.isdigit():
        return _numbered(containers, int(port), lowest)
    named = [(each["name"], number) for each in containers for number in declared(each, port)]
    if len(named) != 1:
        raise InjectionRefused(
            f"{len(named)} ports are called {port!r}: name the server's with {PREFIX}port"
        )
    return named[0][0], usable(named[0][1], lowest)


def declared(container: Json, name: str) -> list[int]:
    """The numbers of the ports of a container that are called so."""
    return [
        each["containerPort"]
        for each in container.get("ports") or ()
        if each.get("name") == name and each.get("protocol", "TCP") == "TCP"
    ]


def _numbered(containers: list[Json], port: int, lowest: int) -> tuple[str, int]:
    declaring = [
        each["name"]
        for each in containers
        if any(there["containerPort"] == port for there in each.get("ports") or ())
    ]
    names = declaring or [each["name"] for each in containers]
    if len(names) != 1:
        raise InjectionRefused(f"{len(names)} containers may have port {port}: {PREFIX}container")
    return names[0], usable(port, lowest)


def usable(port: int, lowest: int) -> int:
    """A port that the sidecar can have.

    Raises:
        InjectionRefused: it can not.
    """
    if not lowest <= port <= 65535 or port in RESERVED_PORTS:
        raise InjectionRefused(
            f"port {port} can not be guarded: ports below {lowest} take a privilege that there is"
            f" not, and {', '.join(map(str, sorted(RESERVED_PORTS)))} are the sidecar's own"
        )
    return port


def labels_of(pod: Json) -> Mapping[str, str]:
    """A pod's labels."""
    return _mapping(pod, "labels")


def annotations_of(pod: Json) -> Mapping[str, str]:
    """A pod's annotations."""
    return _mapping(pod, "annotations")


def _mapping(pod: Json, name: str) -> Mapping[str, Any]:
    return (pod.get("metadata") or {}).get(name) or {}
