"""Mode `front`: the port on the pod's address is the sidecar's, the server stays on loopback."""

from __future__ import annotations

from sidecar.injector.injection import Injection
from sidecar.injector.plan import plan
from tests.support.pods import ENABLED, annotated, container, pod


def test_the_server_is_told_to_listen_on_loopback() -> None:
    env = [{"name": "A", "value": "1"}, {"name": "MCP_HOST", "value": "0.0.0.0"}]
    planned = plan(annotated(pod({"env": env}), host_env="BIND, HOST"), ENABLED, Injection())
    said = {each["name"]: each["value"] for each in container(planned, "app")["env"]}
    loopback = dict.fromkeys(["MCP_HOST", "FASTMCP_HOST", "BIND", "HOST"], "127.0.0.1")
    assert said == {"A": "1", **loopback}


def test_the_sidecar_takes_the_server_s_port_on_the_pod_s_address() -> None:
    arguments = container(plan(pod(), ENABLED, Injection()), "mcp-sidecar")["args"]
    assert "--listen=[$(POD_IPS)]:8080" in arguments
    assert "--upstream=http://127.0.0.1:8080/mcp" in arguments
