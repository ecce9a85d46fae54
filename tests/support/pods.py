"""Pods of every shape, and what the "restricted" Pod Security Standard asks of one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from hypothesis import strategies as st

from sidecar.injector.bundles import Bundle, Revocation
from sidecar.injector.injection import Injection, Json, Namespace

PUBLIC_KEY = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEvZ9zZsQn7d0eJ0cH2yYd9Jw0d3Ff
rQmT5u0x3sV4n5l8Jq1o2c7k9Wb6Xy0Zt1Lr2Pp3Ee4Uu5Ii6Oo7Aa8Ss9Q==
-----END PUBLIC KEY-----
"""
BUNDLE = Injection(
    bundle=Bundle(url="https://bundles.example", resource="mcp.tar.gz", key=PUBLIC_KEY),
    revocation=Revocation("revoked.tar.gz"),
)

ENABLED = Namespace("support", {"mcp-opa-sidecar.io/injection": "enabled"})

PORT = 8080

_NAMES = st.from_regex(r"[a-z]([-a-z0-9]{0,8}[a-z0-9])?", fullmatch=True)
_TEXT = st.text("abc/.-$ é", max_size=8)


def pod(container: Json | None = None, **spec: Any) -> Json:
    """A pod with one server, on the port that is called mcp."""
    ports = [{"name": "mcp", "containerPort": PORT}]
    server = {"name": "app", "image": "tickets:1", "ports": ports, **(container or {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "tickets", "namespace": "support", "labels": {"app": "tickets"}},
        "spec": {"containers": [server], **spec},
    }


def annotated(found: Json, **annotations: str) -> Json:
    """The pod with annotations of ours: `accept_loopback="true"`."""
    said = {f"mcp-opa-sidecar.io/{k.replace('_', '-')}": v for k, v in annotations.items()}
    metadata = {**found["metadata"]}
    metadata["annotations"] = {**(metadata.get("annotations") or {}), **said}
    return {**found, "metadata": metadata}


def containers(found: Json) -> Iterator[Json]:
    """Every container of a pod."""
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        yield from found["spec"].get(kind) or ()


def container(found: Json, name: str) -> Json:
    """One container of a pod."""
    return next(each for each in containers(found) if each["name"] == name)


def breaks_restricted(each: Json) -> list[str]:
    """What keeps a container out of a namespace with the "restricted" standard.

    Source: Kubernetes, "Pod Security Standards", Restricted.
    """
    context = each.get("securityContext") or {}
    drops = (context.get("capabilities") or {}).get("drop")
    held = {
        "runAsNonRoot": context.get("runAsNonRoot") is True,
        "runAsUser": context.get("runAsUser") != 0,
        "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
        "capabilities": drops == ["ALL"] and not (context["capabilities"]).get("add"),
        "seccompProfile": (context.get("seccompProfile") or {}).get("type") == "RuntimeDefault",
        "privileged": not context.get("privileged"),
        "hostPort": not any(port.get("hostPort") for port in each.get("ports") or ()),
    }
    return [name for name, holds in held.items() if not holds]


def _maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({}, optional=fields)


_PROBES = st.one_of(
    _maybe(
        httpGet=st.fixed_dictionaries(
            {"port": st.sampled_from([PORT, "mcp", 9000, "other", str(PORT)])},
            optional={"path": _TEXT, "scheme": st.sampled_from(["HTTP", "HTTPS"])},
        ),
        timeoutSeconds=st.integers(1, 9),
    ),
    _maybe(tcpSocket=st.fixed_dictionaries({"port": st.sampled_from([PORT, "mcp", 9000])})),
    _maybe(exec=st.just({"command": ["true"]}), periodSeconds=st.integers(1, 9)),
)

_ENV = st.lists(
    st.one_of(
        st.fixed_dictionaries({"name": st.sampled_from(["MCP_HOST", "HOST"]), "value": _TEXT}),
        st.fixed_dictionaries(
            {
                "name": st.sampled_from(["FASTMCP_HOST", "TOKEN"]),
                "valueFrom": st.just({"secretKeyRef": {"name": "s", "key": "k"}}),
            }
        ),
    ),
    unique_by=lambda each: str(each["name"]),
    max_size=3,
)


def _extras() -> st.SearchStrategy[Json]:
    return _maybe(
        env=st.one_of(st.none(), _ENV),
        livenessProbe=_PROBES,
        readinessProbe=_PROBES,
        startupProbe=_PROBES,
        command=st.one_of(st.none(), st.lists(_TEXT, max_size=2)),
        volumeMounts=st.sampled_from([None, [], [{"name": "data", "mountPath": "/data"}]]),
        resources=st.just({"requests": {"cpu": "1"}}),
    )


_COMMAND = st.lists(_TEXT, min_size=1, max_size=2)
_HARMLESS = st.sampled_from(
    [
        {**no_more, "allowPrivilegeEscalation": False}
        for no_more in (
            {"runAsUser": 0, "capabilities": {"drop": ["ALL"]}},
            {"runAsUser": 0, "capabilities": {"drop": ["NET_RAW", "CAP_SETUID"]}},
            {"runAsUser": 1000},
        )
    ]
)


def _front(draw: st.DrawFn, found: Json) -> Json:
    return annotated(found, accept_loopback="true")


def _redirect(draw: st.DrawFn, found: Json) -> Json:
    for each in containers(found):
        each["securityContext"] = draw(_HARMLESS)
    return annotated(found, mode="redirect")


def _client(draw: st.DrawFn, found: Json) -> Json:
    agent = container(found, "app")
    where = {"name": "TICKETS_URL", "value": "https://tickets.example.com/mcp"}
    agent["env"] = draw(st.permutations([*(agent.get("env") or ()), where]))
    return annotated(found, mode="client", container="app", servers="tickets=TICKETS_URL")


def _stdio(draw: st.DrawFn, found: Json) -> Json:
    """The command is the container's or an annotation's; nothing dials the served port."""
    server = container(found, "app")
    said = {} if server.get("command") else {"stdio_command": json.dumps(draw(_COMMAND))}
    server |= draw(_maybe(args=st.one_of(st.none(), st.lists(_TEXT, max_size=2))))
    for each in containers(found):
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            if each.get(kind, {}).keys() & {"httpGet", "tcpSocket"}:
                del each[kind]
    return annotated(found, mode="stdio", container="app", **said)


MODES = {"front": _front, "redirect": _redirect, "stdio": _stdio, "client": _client}
"""What makes a pod one that can be injected in a mode."""


@st.composite
def shapes(draw: st.DrawFn, modes: Collection[str] = tuple(MODES)) -> Json:
    """Pods that can be injected in one of the modes, in any shape that the API would take."""
    found = pod({**draw(_extras()), "ports": [{"name": "mcp", "containerPort": PORT}]})
    names = draw(st.lists(_NAMES, unique=True, max_size=4).filter(lambda each: "app" not in each))
    others = [{"name": name, "image": "x", **draw(_extras())} for name in names]
    cut = draw(st.integers(0, len(others)))
    inits = [{**each, **draw(_maybe(restartPolicy=st.just("Always")))} for each in others[cut:]]
    where: int = draw(st.integers(0, cut))
    server = found["spec"]["containers"]
    found["spec"]["containers"] = [*others[:where], *server, *others[where:cut]]
    if inits:
        found["spec"]["initContainers"] = inits
    else:
        found["spec"] |= draw(_maybe(initContainers=st.sampled_from([None, []])))
    found["spec"] |= draw(
        _maybe(volumes=st.sampled_from([None, [], [{"name": "data", "emptyDir": {}}]]))
    )
    found["metadata"] |= draw(_maybe(annotations=_maybe(note=_TEXT)))
    if draw(st.booleans()):
        found["metadata"]["labels"] = draw(st.sampled_from([None, {}, {"app": "a"}]))
    else:
        found["metadata"].pop("labels")
    return MODES[draw(st.sampled_from(sorted(modes)))](draw, found)
