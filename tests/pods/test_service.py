"""A Service's address leads to the sidecar, in each mode that guards a server.

What kube-proxy does on a node is done in the namespace of everybody else: the address of a Service
is nobody's, and the kernel puts the pod's in its place.

Source: Kubernetes, "Virtual IPs and Service Proxies", nftables proxy mode.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.pods.asking import log
from tests.pods.conftest import Json, Rig, server_pod
from tests.pods.network import POD_IP, Network
from tests.pods.test_redirect import redirected
from tests.pods.test_stdio import stdio_pod
from tests.support.processes import done
from tests.support.reaching import PORT, asked, follow_the_starter

pytestmark = pytest.mark.timeout(180)

SERVICE_IP = "198.51.100.10"
RULES = f"""
table ip services {{
    chain dialled {{
        type nat hook output priority -100;
        ip daddr {SERVICE_IP} tcp dport {PORT} dnat to {POD_IP}:{PORT}
    }}
}}
"""

PODS: dict[str, Callable[[], Json]] = {
    "front": server_pod,
    "redirect": redirected,
    "stdio": stdio_pod,
}


def serve(network: Network, nft_usr: Path) -> None:
    """Make a Service of the pod, for everybody else; it goes with their namespace."""
    libraries = ":".join(map(str, nft_usr.glob("lib/*-linux-gnu")))
    env = {"PATH": f"{nft_usr}/sbin:/usr/sbin:/usr/bin:/bin", "LD_LIBRARY_PATH": libraries}
    into = ["nsenter", f"--net={network.outside}"]
    for command, given in (
        (["ip", "route", "add", f"{SERVICE_IP}/32", "via", POD_IP], ""),
        (["nft", "-f", "-"], RULES),
    ):
        subprocess.run([*into, *command], env=env, input=given, text=True, check=True, timeout=30)


@pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])
@pytest.mark.parametrize("pod_of", PODS.values(), ids=PODS)
def test_by_a_service_clients_get_what_the_policy_allows(
    rig: Rig, starter: Mapping[str, str], nft_usr: Path, pod_of: Callable[[], Json], native: bool
) -> None:
    with rig.running(pod_of(), starter, native=native) as pod:
        serve(pod.network, nft_usr)
        pod.wait_ready()
        pod.network.from_outside(lambda: follow_the_starter(SERVICE_IP))
        assert done(log(pod)) == ["get_ticket"]
        found = pod.network.from_outside(lambda: asked(SERVICE_IP, "GET", PORT, "/healthz"))
        assert found == 404
