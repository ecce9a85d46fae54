"""Mode `redirect`: the kernel brings whatever dials the server's port to the sidecar.

Also other containers of the pod, other users of the server's own, and `kubectl port-forward`. Only
the sidecar's user reaches the server, so nobody else may be that user, become it, or look into what
is sent on loopback. The rules are made, and proved, by a container that ends before all others
begin; it needs NET_ADMIN, which the "baseline" Pod Security Standard does not give.

Source: Kubernetes, "Init Containers"; Linux, capabilities(7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sidecar.injector.injection import SIDECAR_PORT, Injection, Json
from sidecar.injector.mode import Mode
from sidecar.injector.parts import common, field, no_token, restricted
from sidecar.injector.walls import everybody
from sidecar.injector.wishes import LOOPBACK, Wish, path_of, server_of

HELD = frozenset({"NET_RAW", "SETUID"})
"""What a runtime gives to root, unless it is told not to, and leads around the sidecar."""

FATAL = HELD | {"BPF", "NET_ADMIN", "SYS_ADMIN", "SYS_MODULE", "SYS_PTRACE", "SYS_RAWIO"}
"""Capabilities with which a process becomes the sidecar's user, undoes the rules, or reads and
writes what others send on loopback."""


def _wish(spec: Json, said: Mapping[str, str]) -> Wish:
    container, port = server_of(spec, said, lowest=1)
    return Wish(mode="redirect", port=port, container=container, path=path_of(said))


def _arguments(wish: Wish, injection: Injection) -> list[str]:
    return [
        f"--listen=[{LOOPBACK},$(POD_IPS)]:{SIDECAR_PORT}",
        f"--upstream=http://{LOOPBACK}:{wish.port}{wish.path}",
    ]


def _first(wish: Wish, injection: Injection) -> list[Json]:
    return [
        {
            **common("mcp-redirect", injection),
            "command": ["mcp-sidecar"],
            "args": [
                "redirect",
                f"--port={wish.port}",
                f"--to={SIDECAR_PORT}",
                f"--except-uid={injection.sidecar_id}",
                "--address=$(POD_IPS)",
            ],
            "env": [{"name": "POD_IPS", "valueFrom": {"fieldRef": field("status.podIPs")}}],
            "resources": dict(injection.sidecar_resources),
            "securityContext": {
                **restricted(0, 0),
                "runAsNonRoot": False,
                "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            },
            "volumeMounts": [no_token()],
        }
    ]


def _harmless(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    """Nobody may be the sidecar's user, become it, or undo the rules."""
    pod = spec.get("securityContext") or {}
    for each in everybody(spec):
        name, context = each["name"], each.get("securityContext") or {}
        user = context.get("runAsUser", pod.get("runAsUser"))
        if user is None:
            yield f"container {name} does not say runAsUser: its image may say the sidecar's"
        # A program may be its owner's, the sidecar's user, by its mode: that takes no capability.
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"container {name} does not say allowPrivilegeEscalation: false"
        if fatal := sorted(_fatal(user, context.get("capabilities") or {})):
            yield (
                f"container {name} has {', '.join(fatal)}, which lead around the sidecar: drop ALL"
                " capabilities, or be another user than root"
            )


def _fatal(user: int | None, said: Json) -> frozenset[str]:
    added, dropped = _names(said.get("add")), _names(said.get("drop"))
    held = HELD - dropped if user == 0 and "ALL" not in dropped else frozenset()
    return FATAL if "ALL" in added else (FATAL & added) | held


def _names(capabilities: list[str] | None) -> frozenset[str]:
    return frozenset(each.upper().removeprefix("CAP_") for each in capabilities or ())


REDIRECT = Mode(
    annotations=frozenset({"port", "container", "path"}),
    wish=_wish,
    arguments=_arguments,
    checks=(_harmless,),
    first=_first,
)
