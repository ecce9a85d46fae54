"""What the tests ask of a pod that runs: from outside, as other pods do, and from within."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

from sidecar.injector.injection import ADMIN_PORT
from tests.pods.network import POD_IP
from tests.pods.runner import Pod
from tests.support import reaching
from tests.support.processes import done
from tests.support.reaching import PORT

URL = f"http://{POD_IP}:{PORT}/mcp"


def log(pod: Pod) -> Path:
    return pod.volumes["data"] / "log"


def call(pod: Pod, name: str, *, host: str = POD_IP, **more: Any) -> int:
    """0, or the code of the error, by the official client from outside."""
    return pod.network.from_outside(lambda: reaching.call(host, name, **more))


def asked(pod: Pod, method: str, port: int, path: str, body: str = "") -> int:
    """What a port of the pod answers to somebody outside: the status."""
    return pod.network.from_outside(lambda: reaching.asked(POD_IP, method, port, path, body))


def follow_the_starter(pod: Pod) -> None:
    """Somebody outside gets what the starter policy grants, and the server sees nothing else."""
    before = len(done(log(pod)))
    pod.network.from_outside(lambda: reaching.follow_the_starter(POD_IP))
    assert done(log(pod))[before:] == ["get_ticket"]


def readyz(pod: Pod) -> Any:
    return json.loads(admin(pod, "/readyz"))


def admin(pod: Pod, path: str) -> str:
    """What the sidecar says of itself."""

    def ask() -> str:
        connection = http.client.HTTPConnection(POD_IP, ADMIN_PORT, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    return pod.network.from_outside(ask)


def python(pod: Pod, container: str, program: str) -> str:
    """What a program prints that runs in a container, as that container's user."""
    found = pod[container].container
    assert found is not None
    ran = found.exec(["/usr/bin/env", "python3", "-c", program], 30)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout.decode().strip()


WRITES = [
    ("PUT", "/v1/policies/evil", "package evil"),
    ("DELETE", "/v1/policies/policy/custom.rego", ""),
    ("PUT", "/v1/data/mcp/grants", "{}"),
    ("PATCH", "/v1/data", '[{"op":"add","path":"x","value":1}]'),
    ("POST", "/v1/data/mcp/authz/decision", '{"input":{}}'),
    ("POST", "/v1/query", '{"query":"data"}'),
    ("GET", "/v1/data", ""),
    ("GET", "/v1/config", ""),
    ("POST", "/", "{}"),
]
"""What of OPA's API is not the sidecar's question, but for the fifth, which is."""


def by_socket(pod: Pod) -> list[tuple[str, str]]:
    """What OPA answers to each of `WRITES` on its socket, from within the sidecar: path, status."""
    program = f"""
import http.client, socket
for method, path, body in {WRITES!r}:
    connection = http.client.HTTPConnection("opa")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect("/run/mcp-opa/opa.sock")
    connection.request(method, path, body)
    print(path, connection.getresponse().status)
"""
    answers = [line.split() for line in python(pod, "mcp-sidecar", program).splitlines()]
    return [(path, status) for path, status in answers]
