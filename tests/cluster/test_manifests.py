"""What `k8s/` holds is what the API takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.control_plane import Cluster, Json
from tests.cluster.registered import DEV, PRODUCTION, create_namespace, rendered
from tests.support.processes import ROOT, sidecar

EXAMPLES = ROOT / "k8s" / "examples"
SYSTEM = "mcp-opa-sidecar-system"

pytestmark = pytest.mark.timeout(180)


def one(manifests: list[Json], kind: str) -> Json:
    [found] = [each for each in manifests if each["kind"] == kind]
    return found


@pytest.fixture(scope="module", params=[DEV, PRODUCTION], ids=lambda it: it.name)
def manifests(request: pytest.FixtureRequest, cluster: Cluster) -> list[Json]:
    """Those of an overlay; its namespace is there."""
    found = rendered(cluster.parts, request.param)
    cluster.kubectl("apply", "-f", "-", given=one(found, "Namespace"))
    return found


def test_the_api_server_takes_them(cluster: Cluster, manifests: list[Json]) -> None:
    command = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
    said = cluster.kubectl(*command, given=manifests).splitlines()
    assert len(said) == len(manifests)
    assert all(each.endswith("serverside-applied (server dry run)") for each in said)


def test_the_injector_may_live_where_it_is_put(cluster: Cluster, manifests: list[Json]) -> None:
    template = one(manifests, "Deployment")["spec"]["template"]
    account = {"apiVersion": "v1", **one(manifests, "ServiceAccount")}
    cluster.kubectl("apply", "-f", "-", given=account)
    metadata = {**template["metadata"], "name": "one", "namespace": SYSTEM}
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}
    made = cluster.create(pod, "--dry-run=server")
    assert not any("kube-api" in each["name"] for each in made["spec"]["volumes"])


def test_what_is_injected_is_what_the_injector_runs(manifests: list[Json]) -> None:
    [container] = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    [said] = [each["value"] for each in container["env"] if each["name"] == "INJECTED_IMAGE"]
    assert said == container["image"] != "mcp-opa-sidecar"


def test_whoever_is_asked_about_fails_closed(manifests: list[Json]) -> None:
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        for each in one(manifests, kind)["webhooks"]:
            assert each["failurePolicy"] == "Fail"
            assert each["objectSelector"], each["name"]
            [never] = [
                expression["values"]
                for expression in each["namespaceSelector"]["matchExpressions"]
                if expression["operator"] == "NotIn"
            ]
            assert never == ["kube-system", "kube-public", "kube-node-lease", SYSTEM]


def test_production_is_there_twice(cluster: Cluster) -> None:
    found = rendered(cluster.parts, PRODUCTION)
    assert one(found, "Deployment")["spec"]["replicas"] == 2
    assert one(found, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_the_example(cluster: Cluster) -> None:
    image = "registry.example.com/mcp-opa-sidecar:dev"
    command = sidecar("inject", "-f", EXAMPLES / "before.yaml", "--image", image)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == (EXAMPLES / "after.yaml").read_text(encoding="utf-8")
    create_namespace(cluster, "support", {"pod-security.kubernetes.io/enforce": "restricted"})
    for file in ("before.yaml", "after.yaml"):
        applied = ("apply", "--server-side", "--dry-run=server", "-f", EXAMPLES / file)
        assert cluster.kubectl(*applied).count("serverside-applied") == 2
    [deployment, _] = yaml.safe_load_all(done.stdout)
    template = deployment["spec"]["template"]
    metadata = {**template["metadata"], "name": "one", "namespace": "support"}
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}
    cluster.create(pod, "--dry-run=server")


def test_goldens_are_pods_as_the_api_knows_them(cluster: Cluster) -> None:
    """What `inject` writes, the API server takes, field by field."""
    create_namespace(cluster, "goldens", {})
    for file in sorted((ROOT / "tests" / "goldens" / "injector").glob("*.after.yaml")):
        taken(cluster, file)


def taken(cluster: Cluster, file: Path) -> None:
    for manifest in yaml.safe_load_all(file.read_text(encoding="utf-8")):
        if not isinstance(manifest, dict) or "items" in manifest:
            continue
        manifest["metadata"].setdefault("name", "it")
        manifest["metadata"]["namespace"] = "goldens"
        command = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
        done = cluster.run(*command, given=manifest)
        assert done.returncode == 0, f"{file.name}: {done.stderr}"
