"""What `k8s/` holds is what the API takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sidecar.injector.modes import MODES
from tests.cluster.control_plane import Cluster, Json
from tests.cluster.registered import DEV, KINDS, PRODUCTION, create_namespace, rendered
from tests.support.processes import ROOT, sidecar

EXAMPLES = ROOT / "k8s" / "examples"
SYSTEM = "mcp-opa-sidecar-system"

pytestmark = pytest.mark.timeout(180)


def one(manifests: list[Json], kind: str) -> Json:
    [found] = [each for each in manifests if each["kind"] == kind]
    return found


def of_kind(manifests: list[Json], kind: str) -> list[Json]:
    return [each for each in manifests if each["kind"] == kind]


@pytest.fixture(scope="module")
def by_cert_manager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The production overlay after the change of one line that README.md names."""
    folder = tmp_path_factory.mktemp("switched") / "k8s"
    shutil.copytree(ROOT / "k8s", folder)
    file = folder / "overlays" / "production" / "kustomization.yaml"
    text = file.read_text(encoding="utf-8")
    assert text.count("../../components/self-signed") == 1
    file.write_text(text.replace("components/self-signed", "components/cert-manager"))
    return file.parent


@pytest.fixture(scope="module", params=["dev", "production", "cert-manager"])
def manifests(
    request: pytest.FixtureRequest, cluster: Cluster, by_cert_manager: Path
) -> list[Json]:
    """Those of an overlay; its namespace is there. Those of cert-manager have no API here."""
    folders = {"dev": DEV, "production": PRODUCTION, "cert-manager": by_cert_manager}
    found = rendered(cluster.parts, folders[request.param])
    cluster.kubectl("apply", "-f", "-", given=one(found, "Namespace"))
    return [each for each in found if not each["apiVersion"].startswith("cert-manager.io/")]


def test_the_api_server_takes_them(cluster: Cluster, manifests: list[Json]) -> None:
    command = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
    said = cluster.kubectl(*command, given=manifests).splitlines()
    assert len(said) == len(manifests)
    assert all(each.endswith("serverside-applied (server dry run)") for each in said)


def test_keys_are_where_one_component_puts_them(manifests: list[Json]) -> None:
    """Read over the API, with rights and a way to it; or mounted, with neither."""
    pod = one(manifests, "Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    volumes = {each["name"] for each in pod["volumes"]}
    mounts = {each["name"] for each in container["volumeMounts"]}
    own = "--self-signed" in container["args"]
    assert pod["automountServiceAccountToken"] is own
    assert volumes == mounts == ({"settings"} if own else {"settings", "tls"})
    files = [each for each in container["args"] if each.startswith(("--cert=", "--key="))]
    assert files == ([] if own else ["--cert=/tls/tls.crt", "--key=/tls/tls.key"])
    assert bool(of_kind(manifests, "ClusterRole")) is own
    assert bool(one(manifests, "NetworkPolicy")["spec"]["egress"]) is own
    assert one(manifests, "ServiceAccount")["automountServiceAccountToken"] is False


def test_certificates_of_cert_manager_are_those_that_are_used(
    cluster: Cluster, by_cert_manager: Path
) -> None:
    found = rendered(cluster.parts, by_cert_manager)
    certificates = {each["metadata"]["name"]: each for each in of_kind(found, "Certificate")}
    issuers = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "Issuer")}
    service, pod = one(found, "Service")["metadata"], one(found, "Deployment")["spec"]["template"]
    [mounted] = [each["secret"] for each in pod["spec"]["volumes"] if "secret" in each]
    [name] = [
        name
        for name, each in certificates.items()
        if each["spec"]["secretName"] == mounted["secretName"]
    ]
    leaf = certificates.pop(name)["spec"]
    host = f"{service['name']}.{service['namespace']}.svc"
    assert leaf["dnsNames"] == [host, f"{host}.cluster.local"]
    [authority] = [each["spec"] for each in certificates.values()]
    assert issuers[leaf["issuerRef"]["name"]] == {"ca": {"secretName": authority["secretName"]}}
    assert issuers[authority["issuerRef"]["name"]] == {"selfSigned": {}}
    assert (authority["isCA"], authority["privateKey"]["rotationPolicy"]) == (True, "Never")
    for kind in KINDS:
        annotations = one(found, kind)["metadata"]["annotations"]
        assert annotations["cert-manager.io/inject-ca-from"] == f"{SYSTEM}/{name}"


def test_events_may_be_had_beside_cert_manager(cluster: Cluster, by_cert_manager: Path) -> None:
    file = by_cert_manager / "kustomization.yaml"
    before = file.read_text(encoding="utf-8")
    line = "  - ../../components/cert-manager # or cert-manager\n"
    assert line in before
    file.write_text(before.replace(line, f"{line}  - ../../components/events\n"))
    try:
        found = rendered(cluster.parts, by_cert_manager)
    finally:
        file.write_text(before)
    [role] = of_kind(found, "ClusterRole")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]
    assert one(found, "Deployment")["spec"]["template"]["spec"]["automountServiceAccountToken"]
    assert of_kind(found, "Role") == []


def test_the_injector_may_live_where_it_is_put(cluster: Cluster, manifests: list[Json]) -> None:
    template = one(manifests, "Deployment")["spec"]["template"]
    account = {"apiVersion": "v1", **one(manifests, "ServiceAccount")}
    cluster.kubectl("apply", "-f", "-", given=account)
    metadata = {**template["metadata"], "name": "one", "namespace": SYSTEM}
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}
    made = cluster.create(pod, "--dry-run=server")
    tokens = [each for each in made["spec"]["volumes"] if "kube-api" in each["name"]]
    assert bool(tokens) is template["spec"]["automountServiceAccountToken"]


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


def test_each_mode_has_an_example() -> None:
    assert {each.parent.name for each in EXAMPLES.glob("*/before.yaml")} == set(MODES)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_an_example(cluster: Cluster, mode: str) -> None:
    """It is what `inject` makes of it, and its pods may live where it says that they do."""
    before, after = (EXAMPLES / mode / f"{when}.yaml" for when in ("before", "after"))
    image = "registry.example.com/mcp-opa-sidecar:dev"
    command = sidecar("inject", "-f", before, "--image", image)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == after.read_text(encoding="utf-8")
    objects = list(yaml.safe_load_all(done.stdout))
    [template] = [each["spec"]["template"] for each in objects if each["kind"] == "Deployment"]
    [space] = {each["metadata"].get("namespace") for each in objects if "spec" in each}
    standard = {"pod-security.kubernetes.io/enforce": "restricted"}
    said = [each["metadata"]["labels"] for each in objects if each["kind"] == "Namespace"]
    create_namespace(cluster, space, *(said or [standard]))
    for file in (before, after):
        applied = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", file)
        assert cluster.kubectl(*applied).count("serverside-applied") == len(objects)
    for each in (each for each in objects if each["kind"] == "ServiceAccount"):
        cluster.create(each)
    metadata = {**template["metadata"], "name": "one", "namespace": space}
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
