"""The kubelet's probes of a server that answers on loopback only: the sidecar asks in its stead."""

from __future__ import annotations

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import ADMIN_PORT, Json

KINDS = {"livenessProbe": "livez", "readinessProbe": "readyz", "startupProbe": "startupz"}
HOOKS = "postStart", "preStop"
ASKING = "httpGet", "tcpSocket", "grpc"


def path_of(container: str, kind: str) -> str:
    """Where the sidecar answers for a probe."""
    return f"/app-health/{container}/{KINDS[kind]}"


def asks_server(container: Json, probe: Json, port: int) -> bool:
    """Whether a probe or hook of a container dials the port that the sidecar takes over."""
    for kind in ASKING:
        if kind in probe:
            return _number(container, (probe[kind] or {}).get("port")) == port
    return False


def moved(container: Json, kind: str, port: int) -> Json | None:
    """The probe that the kubelet shall make instead; None where it can stay.

    Raises:
        InjectionRefused: it is one that the sidecar can not make.
    """
    probe = container.get(kind)
    if not isinstance(probe, dict) or not asks_server(container, probe, port):
        return None
    if "grpc" in probe:
        raise InjectionRefused(f"{kind} of {container['name']} asks the guarded port by gRPC")
    kept = {name: value for name, value in probe.items() if name not in ASKING}
    return {**kept, "httpGet": {"path": path_of(container["name"], kind), "port": ADMIN_PORT}}


def question(container: Json, kind: str, port: int) -> Json:
    """What the sidecar asks on loopback: `{"port", "seconds"}`, and of HTTP the rest of it."""
    probe = container[kind]
    seconds = probe.get("timeoutSeconds", 1)
    if "tcpSocket" in probe:
        return {"port": port, "seconds": seconds}
    http = probe["httpGet"]
    return {
        "port": port,
        "seconds": seconds,
        "path": http.get("path", "/"),
        "scheme": http.get("scheme", "HTTP"),
        "headers": [[each["name"], each["value"]] for each in http.get("httpHeaders") or ()],
    }


def refuse_hooks(container: Json, port: int) -> None:
    """Hooks that dial the guarded port would meet the sidecar.

    Raises:
        InjectionRefused: there is one.
    """
    for name in HOOKS:
        hook = (container.get("lifecycle") or {}).get(name) or {}
        if asks_server(container, hook, port):
            raise InjectionRefused(f"{name} of {container['name']} dials the guarded port")


def _number(container: Json, port: object) -> object:
    """A port by its number; kubelets look names up in the container itself."""
    if not isinstance(port, str):
        return port
    if port.isascii() and port.isdigit():
        return int(port)
    ports = container.get("ports") or ()
    return next((each["containerPort"] for each in ports if each.get("name") == port), None)
