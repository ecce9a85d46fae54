"""Mode `front`: the server's port on the pod's address is the sidecar's, the server on loopback.

It needs no privilege, and fails closed: a server that listens everywhere finds its port taken.
What it leaves open is loopback within the pod.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import PREFIX, Injection, Json
from sidecar.injector.mode import Mode
from sidecar.injector.walls import lasting
from sidecar.injector.wishes import LOOPBACK, Wish, names_of, path_of, server_of

HOST_VARIABLES = "MCP_HOST", "FASTMCP_HOST"
"""What servers are told by where to listen."""


def _wish(spec: Json, said: Mapping[str, str]) -> Wish:
    container, port = server_of(spec, said, lowest=1024)
    accepts = said.get("accept-loopback", "false")
    if accepts not in ("true", "false"):
        raise InjectionRefused(f'{PREFIX}accept-loopback is neither "true" nor "false"')
    return Wish(
        mode="front",
        port=port,
        container=container,
        path=path_of(said),
        host_env=names_of(said, "host-env"),
        accept_loopback=accepts == "true",
    )


def _arguments(wish: Wish, injection: Injection) -> list[str]:
    return [
        f"--listen=[$(POD_IPS)]:{wish.port}",
        f"--upstream=http://{LOOPBACK}:{wish.port}{wish.path}",
    ]


def _told(wish: Wish) -> Mapping[str, str]:
    return dict.fromkeys((*HOST_VARIABLES, *wish.host_env), LOOPBACK)


def _alone(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    others = [each["name"] for each in lasting(spec) if each["name"] != wish.container]
    if others and not wish.accept_loopback:
        yield (
            f"{', '.join(others)} can reach the server on loopback, past the sidecar: mode redirect"
            f' closes that, or say {PREFIX}accept-loopback: "true" if it may be'
        )


FRONT = Mode(
    annotations=frozenset({"port", "container", "path", "host-env", "accept-loopback"}),
    wish=_wish,
    arguments=_arguments,
    told=_told,
    checks=(_alone,),
)
