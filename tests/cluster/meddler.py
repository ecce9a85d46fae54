"""Somebody else's mutating webhook, which comes after the injector's."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.cluster.control_plane import LOOPBACK, Cluster, Json
from tests.cluster.registered import pod_of
from tests.support.certificates import Authority
from tests.support.processes import wait_until

Meddling = Callable[[Json], None]
"""Changes the pod that it is given."""

NAME = "zz-meddler"
"""The API server calls configurations in the order of their names."""

MARK = "meddled"


@contextmanager
def meddler(
    cluster: Cluster, folder: Path, namespace: str, meddling: Meddling, *, again: bool = False
) -> Iterator[None]:
    """One that changes the pods of a namespace; `again` when others have changed them since."""
    authority = Authority()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.server().saved(folder, "meddler"))
    server = ThreadingHTTPServer((LOOPBACK, 0), _handler(meddling))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        found = _registration(int(server.server_address[1]), authority, namespace, again)
        cluster.kubectl("apply", "-f", "-", given=found)
        wait_until(lambda: _is_asked(cluster, namespace), "the API server asks the meddler")
        yield
    finally:
        cluster.run("delete", "mutatingwebhookconfiguration", NAME)
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(meddling: Meddling) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            body = json.dumps(_answer(json.loads(self.rfile.read(size)), meddling)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's)
            """Nobody reads it."""

    return Handler


def _answer(review: Json, meddling: Meddling) -> Json:
    request = review["request"]
    pod = deepcopy(request["object"])
    meddling(pod)
    annotations = {**(pod["metadata"].get("annotations") or {}), MARK: "true"}
    operations = [
        {"op": "replace", "path": "/spec", "value": pod["spec"]},
        {"op": "add", "path": "/metadata/annotations", "value": annotations},
    ]
    patch = base64.b64encode(json.dumps(operations).encode()).decode()
    response = {"uid": request["uid"], "allowed": True, "patchType": "JSONPatch", "patch": patch}
    return {"apiVersion": review["apiVersion"], "kind": review["kind"], "response": response}


def _registration(port: int, authority: Authority, namespace: str, again: bool) -> Json:
    webhook = {
        "name": "meddler.example.com",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "reinvocationPolicy": "IfNeeded" if again else "Never",
        "clientConfig": {
            "url": f"https://{LOOPBACK}:{port}/",
            "caBundle": base64.b64encode(authority.pem).decode(),
        },
        "rules": [
            {
                "operations": ["CREATE"],
                "apiGroups": [""],
                "apiVersions": ["v1"],
                "resources": ["pods"],
            }
        ],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": NAME},
        "webhooks": [webhook],
    }


def _is_asked(cluster: Cluster, namespace: str) -> bool:
    """By a pod that the injector leaves alone, so that nothing else decides."""
    probe = pod_of(namespace)
    probe["metadata"]["labels"] = {"mcp-opa-sidecar.io/inject": "false"}
    command = ("create", "--dry-run=server", "-o", "json", "-f", "-")
    done = cluster.run(*command, given=probe)
    found = json.loads(done.stdout)["metadata"] if done.returncode == 0 else {}
    return MARK in found.get("annotations", {})
