"""What a pod asks for, by its labels and annotations. Labels decide whether, annotations how.

Labels, since the API server can select by them: an injector that is down then touches nobody else.
Nothing here chooses an image, a policy or an identity: who writes pods may not choose their judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import PREFIX, RESERVED_PORTS, Json, Namespace

INJECT = PREFIX + "inject"
INJECTION = PREFIX + "injection"

Mode = Literal["front"]

ANNOTATIONS = {
    "mode": "how the sidecar stands before the server: front",
    "port": "the server's port, by number or name; else the only one that is called mcp",
    "container": "the server's container; else the one that declares the port, or the only one",
    "path": "the path of the server's endpoint; /mcp unless set",
    "host-env": "more variables that tell the server where to listen, with commas between them",
    "accept-loopback": "true: others of the pod may reach the server past the sidecar",
}
"""What may be said of a pod, each with the prefix of the project."""

SET_BY_US = frozenset({"status"})

NEVER = frozenset({"kube-system", "kube-public", "kube-node-lease"})

_PATH = re.compile(r"/[A-Za-z0-9._~/-]{0,200}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,100}")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for, complete."""

    mode: Mode
    port: int
    container: str
    path: str = "/mcp"
    host_env: tuple[str, ...] = ()
    accept_loopback: bool = False


def unwanted(pod: Json, namespace: Namespace) -> str | None:
    """Why a pod is left alone; None when it is to be injected. The pod's own label comes first."""
    label = _mapping(pod, "labels").get(INJECT)
    if namespace.name in NEVER:
        return f"nothing is injected in {namespace.name}"
    enabled = namespace.labels.get(INJECTION) == "enabled"
    if label == "false" or (label not in (None, "true") and not enabled):
        return f"the pod's label {INJECT} is {label!r}"
    if enabled or label == "true":
        return None
    return f"neither the pod is labelled {INJECT}=true nor its namespace {INJECTION}=enabled"


def wish_of(pod: Json) -> Wish:
    """What a pod asks for.

    Raises:
        InjectionRefused: it asks for what there is not, or does not say which server it means.
    """
    label = _mapping(pod, "labels").get(INJECT, "true")
    if label != "true":
        raise InjectionRefused(f'the label {INJECT} is {label!r}, neither "true" nor "false"')
    said = _said(pod)
    mode = said.get("mode", "front")
    if mode not in get_args(Mode):
        raise InjectionRefused(f"{PREFIX}mode {mode!r} is not one of: {', '.join(get_args(Mode))}")
    container, port = _server(pod["spec"], said)
    path = said.get("path", "/mcp")
    if not _PATH.fullmatch(path):
        raise InjectionRefused(f"{PREFIX}path {path!r} is not a path")
    names = tuple(each.strip() for each in said.get("host-env", "").split(",") if each.strip())
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise InjectionRefused(f"{PREFIX}host-env: {name!r} is not the name of a variable")
    accepts = said.get("accept-loopback", "false")
    if accepts not in ("true", "false"):
        raise InjectionRefused(f'{PREFIX}accept-loopback is neither "true" nor "false"')
    return Wish("front", port, container, path, names, accepts == "true")


def _said(pod: Json) -> dict[str, str]:
    found = {
        name.removeprefix(PREFIX): value
        for name, value in _mapping(pod, "annotations").items()
        if name.startswith(PREFIX)
    }
    for name in found.keys() - ANNOTATIONS.keys() - SET_BY_US:
        raise InjectionRefused(f"{PREFIX}{name} is no annotation of ours: {', '.join(ANNOTATIONS)}")
    return found


def _server(spec: Json, said: Mapping[str, str]) -> tuple[str, int]:
    """The server's container and port."""
    containers = spec["containers"]
    wanted = said.get("container")
    if wanted is not None:
        containers = [each for each in containers if each["name"] == wanted]
        if not containers:
            raise InjectionRefused(f"{PREFIX}container: there is no container {wanted!r}")
    port = said.get("port", "mcp")
    if port.isascii() and port.isdigit():
        return _numbered(containers, int(port))
    named = [
        (each["name"], declared["containerPort"])
        for each in containers
        for declared in each.get("ports") or ()
        if declared.get("name") == port and declared.get("protocol", "TCP") == "TCP"
    ]
    if len(named) != 1:
        raise InjectionRefused(
            f"{len(named)} ports are called {port!r}: name the server's with {PREFIX}port"
        )
    return named[0][0], _usable(named[0][1])


def _numbered(containers: list[Json], port: int) -> tuple[str, int]:
    declaring = [
        each["name"]
        for each in containers
        if any(declared["containerPort"] == port for declared in each.get("ports") or ())
    ]
    names = declaring or [each["name"] for each in containers]
    if len(names) != 1:
        raise InjectionRefused(f"{len(names)} containers may have port {port}: {PREFIX}container")
    return names[0], _usable(port)


def _usable(port: int) -> int:
    if not 1024 <= port <= 65535 or port in RESERVED_PORTS:
        raise InjectionRefused(
            f"port {port} can not be guarded: the sidecar has no privilege for ports below 1024,"
            f" and {', '.join(map(str, sorted(RESERVED_PORTS)))} are its own"
        )
    return port


def _mapping(pod: Json, name: str) -> Mapping[str, Any]:
    return (pod.get("metadata") or {}).get(name) or {}
