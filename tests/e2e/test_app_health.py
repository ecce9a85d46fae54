"""In a pod: the sidecar answers the kubelet's probes of a server that is on loopback only."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.processes import (
    DENY_ALL,
    Process,
    environment,
    get,
    http_sidecar,
    sidecar,
)
from tests.support.raw import free_port

STATUS = {"/well": 200, "/moved": 302, "/missing": 404, "/broken": 500}


@contextmanager
def app() -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A server on loopback: its port, and the headers of what it was asked."""
    asked: list[dict[str, str]] = []
    ended = threading.Event()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(dict(self.headers))
            if self.path == "/hangs":
                ended.wait(20)
            self.send_response(STATUS.get(self.path, 200))
            self.end_headers()

        def log_message(self, *said: object) -> None:
            """Nothing: what is asked is in `asked`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_probes_are_made_for_the_kubelet(opa_bin: Path) -> None:
    with app() as (port, asked):
        http = {"port": port, "seconds": 5, "scheme": "HTTP", "headers": [["X-Probe", "yes"]]}
        probes = {f"/app-health{path}": {**http, "path": path} for path in STATUS}
        probes["/app-health/hangs"] = {"port": port, "seconds": 0.3, "path": "/hangs"}
        probes["/app-health/tls"] = {**http, "path": "/well", "scheme": "HTTPS"}
        probes["/app-health/listens"] = {"port": port, "seconds": 5}
        probes["/app-health/gone"] = {"port": free_port(), "seconds": 5}
        probes["/app-health/nobody"] = {"port": free_port(), "seconds": 5, "path": "/"}
        env = environment(opa_bin, POD_APP_PROBES=json.dumps(probes))
        upstream = f"http://127.0.0.1:{port}/mcp"
        with http_sidecar(upstream, "--policy", DENY_ALL, env=env) as served:
            found = {path: get(f"{served.admin}{path}")[0] for path in probes}
            assert get(f"{served.admin}/app-health/other")[0] == 404
    wells = {"/app-health/well", "/app-health/moved", "/app-health/listens"}
    assert found == {path: 200 if path in wells else 503 for path in probes}
    assert {headers["X-Probe"] for headers in asked if "X-Probe" in headers} == {"yes"}


def test_what_nobody_can_mean_is_a_fault_of_the_configuration(opa_bin: Path) -> None:
    env = environment(opa_bin, POD_APP_PROBES='{"/x":{"port":"mcp"}}')
    command = sidecar(
        "http", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0",
        "--upstream", "http://127.0.0.1:9/mcp", "--policy", DENY_ALL,
    )  # fmt: skip
    with Process(command, env=env) as process:
        assert process.wait() == 125
        assert any("POD_APP_PROBES: /x.port: must be" in line for line in process.lines)


def test_the_gate_opens_when_the_other_is_there(opa_bin: Path) -> None:
    with app() as (port, _):
        assert _gate(f"http://127.0.0.1:{port}/well") == 0
        assert _gate(f"http://127.0.0.1:{port}/broken", "--seconds", "0.3") == 1
    assert _gate(f"http://127.0.0.1:{port}/well", "--seconds", "0.3") == 1


@pytest.mark.parametrize("url", ["http://10.0.0.1/", "file:///etc/passwd", "127.0.0.1:80"])
def test_the_gate_asks_this_pod_only(url: str) -> None:
    assert _gate(url) == 125


def _gate(url: str, *more: str) -> int:
    done = subprocess.run(
        sidecar("await", url, *more), capture_output=True, timeout=60, check=False
    )
    return done.returncode
