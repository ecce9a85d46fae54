"""The Helm chart: the objects that kustomize makes, and a release that comes, changes and goes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar import __version__
from sidecar.injector.bundles import Bundle, Revocation
from sidecar.injector.injection import Injection, Lifetimes, read
from tests.cluster.conftest import assert_bare
from tests.cluster.control_plane import Cluster, Json
from tests.cluster.registered import DEV, KINDS, PRODUCTION, create_namespace, rendered
from tests.support.processes import ROOT

pytestmark = pytest.mark.timeout(180)

CHART = ROOT / "k8s" / "chart"
OVERLAYS = ROOT / "k8s" / "overlays"
SCHEMA = json.loads((CHART / "values.schema.json").read_text("utf-8"))
README = (ROOT / "k8s" / "README.md").read_text("utf-8")
[SECTION] = re.findall(r"^## By Helm.*?(?=^## )", README, re.DOTALL | re.MULTILINE)
[BLOCK] = re.findall(r"^```sh\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
INSTALL, UPGRADE, UNINSTALL = BLOCK.replace("\\\n", " ").splitlines()

PRODUCTIVE = ("--values", str(CHART / "values-production.yaml"))
BY_CERT_MANAGER = ("--set", "certificates.source=certManager")
NO_EVENTS = ("--set", "injector.events=false")
OWN = ("--set", "certificates.source=secret,certificates.caBundle=Q0E=")

Helm = Callable[..., str]


@pytest.fixture(scope="module")
def helm(helm_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """What it prints; it has to succeed."""
    home = tmp_path_factory.mktemp("helm")

    def run(*words: str, cluster: Cluster | None = None) -> str:
        env = {"PATH": os.environ["PATH"], "HOME": str(home)}
        if cluster is not None:
            env["KUBECONFIG"] = str(cluster.kubeconfig)
        done = subprocess.run(
            [helm_bin, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"helm {words}: {done.stdout}{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="module")
def template(helm: Helm) -> Callable[..., list[Json]]:
    """The objects that the chart makes of values."""

    def run(*values: str) -> list[Json]:
        found = yaml.safe_load_all(helm("template", "it", str(CHART), *values))
        return [each for each in found if each is not None]

    return run


# ── The same output ───────────────────────────────────────────────────────────────────────────────


HASHED = re.compile(r"\bmcp-opa-sidecar-injector-[0-9a-z]{10}\b")


def by_name(objects: list[Json]) -> dict[tuple[str, str, str], Any]:
    """Objects by what they are; each has its own hash in the name of the settings."""
    found = {}
    for each in objects:
        plain = json.loads(HASHED.sub("mcp-opa-sidecar-injector-HASH", json.dumps(each)))
        if plain["kind"] == "ConfigMap":
            plain["data"] = {name: yaml.safe_load(text) for name, text in plain["data"].items()}
        metadata = plain["metadata"]
        key = plain["kind"], metadata.get("namespace", ""), metadata["name"]
        assert key not in found
        found[key] = plain
    return found


def assert_same(ours: list[Json], theirs: list[Json]) -> None:
    charted, kustomized = by_name(ours), by_name(theirs)
    assert charted.keys() == kustomized.keys()
    for key, expected in kustomized.items():
        assert charted[key] == expected, key


@pytest.mark.parametrize(
    ("values", "overlay"),
    [
        ((), DEV),
        (PRODUCTIVE, PRODUCTION),
        (tuple(INSTALL.split()[4:]), OVERLAYS / "tutorial"),
    ],
    ids=["dev", "production", "tutorial"],
)
def test_the_same_as_an_overlay(
    template: Callable[..., list[Json]],
    cluster_parts: Path,
    values: tuple[str, ...],
    overlay: Path,
) -> None:
    assert_same(template(*values), rendered(cluster_parts, overlay))


@pytest.mark.parametrize(
    ("values", "components"),
    [
        ((*BY_CERT_MANAGER, *NO_EVENTS), ["cert-manager"]),
        (BY_CERT_MANAGER, ["cert-manager", "events"]),
    ],
    ids=["without events", "with events"],
)
def test_the_same_with_the_other_certificates(
    template: Callable[..., list[Json]],
    cluster_parts: Path,
    tmp_path: Path,
    values: tuple[str, ...],
    components: list[str],
) -> None:
    """The overlay as somebody would have it who has changed that one line, and a setting."""
    for each in ("base", "components", "overlays"):
        (tmp_path / each).symlink_to(ROOT / "k8s" / each)
    made = tmp_path / "own"
    made.mkdir()
    for file in DEV.iterdir():
        (made / file.name).write_text(file.read_text("utf-8"), "utf-8")
    said = yaml.safe_load((made / "kustomization.yaml").read_text("utf-8"))
    k8s = Path(os.path.relpath(ROOT / "k8s", made.resolve()))
    said["resources"] = [str(k8s / "base")]
    said["components"] = [str(k8s / "components" / each) for each in components]
    (made / "kustomization.yaml").write_text(yaml.safe_dump(said), "utf-8")
    if "events" not in components:
        with (made / "injector.yaml").open("a") as settings:
            settings.write("events: false\n")
    assert_same(template(*values), rendered(cluster_parts, made))


def test_a_secret_of_ones_own(template: Callable[..., list[Json]]) -> None:
    found = by_name(template(*OWN, *NO_EVENTS))
    pod = found["Deployment", "mcp-opa-sidecar-system", "mcp-opa-sidecar-injector"]["spec"][
        "template"
    ]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert [each["secret"] for each in pod["volumes"] if "secret" in each] == [
        {"secretName": "mcp-opa-sidecar-injector-tls", "defaultMode": 0o440}
    ]
    for kind in KINDS:
        for each in found[kind, "", "mcp-opa-sidecar"]["webhooks"]:
            assert each["clientConfig"]["caBundle"] == "Q0E="
    assert not [kind for kind, _, _ in found if "Role" in kind or kind in ("Issuer", "Certificate")]


def test_a_namespace_of_ones_own(template: Callable[..., list[Json]]) -> None:
    found = template("--set", "namespace.name=elsewhere,namespace.create=false", *BY_CERT_MANAGER)
    assert "mcp-opa-sidecar-system" not in json.dumps(found)
    assert not [each for each in found if each["kind"] == "Namespace"]


def test_namespaces_that_are_left_alone(template: Callable[..., list[Json]]) -> None:
    found = template("--set", "excludedNamespaces={kube-system,calico-system}")
    for each in (each for each in found if each["kind"] in KINDS):
        for webhook in each["webhooks"]:
            [never] = [
                expression["values"]
                for expression in webhook["namespaceSelector"]["matchExpressions"]
                if expression["operator"] == "NotIn"
            ]
            assert never == ["kube-system", "calico-system", "mcp-opa-sidecar-system"]


def test_other_settings_are_other_pods(template: Callable[..., list[Json]]) -> None:
    """The name of the ConfigMap changes with its content, and so does the pod's template."""

    def names(*values: str) -> set[str]:
        found = set(HASHED.findall(json.dumps(template(*values))))
        assert len(found) == 1
        return found

    assert names() == names() != names("--set", "injector.policy=other")


# ── Values ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("values", [(), PRODUCTIVE, BY_CERT_MANAGER, OWN], ids=str)
def test_it_has_nothing_to_be_complained_of(helm: Helm, values: tuple[str, ...]) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), *values)


def test_the_settings_are_those_of_the_injector(template: Callable[..., list[Json]]) -> None:
    known = SCHEMA["properties"]["injector"]["properties"]
    assert set(known) == {each.name for each in fields(Injection)} - {"image"}
    parts = {"certificates": Lifetimes, "bundle": Bundle, "revocation": Revocation}
    for name, part in parts.items():
        assert set(known[name]["properties"]) == {each.name for each in fields(part)}
    [settings] = [each for each in template() if each["kind"] == "ConfigMap"]
    assert read(yaml.safe_load(settings["data"]["injector.yaml"])) == Injection()


def test_a_bundle(template: Callable[..., list[Json]], tmp_path: Path) -> None:
    """That of the page about policies, which the injector reads as the chart writes it."""
    [shown] = re.findall(r"^```yaml\n(bundle:.*?)^```$", README, re.DOTALL | re.MULTILINE)
    values = {"injector": yaml.safe_load(shown.replace("…", "MFkwEwYH"))}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values), "utf-8")
    found = template("--values", str(tmp_path / "values.yaml"))
    [settings] = [each for each in found if each["kind"] == "ConfigMap"]
    said = read(yaml.safe_load(settings["data"]["injector.yaml"]))
    assert said == read({**values["injector"], "policy": "mcp-policy"})
    assert said.bundle is not None
    assert said.bundle.scope == "{namespace}"


def test_each_setting_is_explained_with_its_default() -> None:
    """What the comment over `injector` says is what the injector does by itself."""
    text = (CHART / "values.yaml").read_text("utf-8")
    shown = re.findall(r"^#   (\w+:.*)$", text, re.MULTILINE)
    said = yaml.safe_load("\n".join(shown))
    assert set(said) == {each.name for each in fields(Injection)} - {"image"}
    assert read({name: value for name, value in said.items() if value is not None}) == Injection()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("replicas=0", "/replicas"),
        ("injector.polcy=x", "polcy"),
        ("injector.otlp=jaeger:4318", "/injector/otlp"),
        ("injector.image=x", "image"),
        ("injector.bundle.url=https://bundles", "/injector/bundle"),
        ("injector.revocation.resource=revoked", "bundle"),
        ("injector.revocation.resource=true", "/injector/revocation/resource"),
        ("image.digest=sha256:abc", "/image/digest"),
        ("certificates.source=none", "/certificates/source"),
        ("certificates.source=secret", "certificates.caBundle"),
        ("excludedNamespaces={default}", "/excludedNamespaces"),
        ("disruptionBudgets.maxUnavailable=1", "disruptionBudgets"),
    ],
)
def test_what_can_not_be_meant_is_refused(helm_bin: Path, value: str, why: str) -> None:
    command = (helm_bin, "template", "it", CHART, "--set", value)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert why in done.stderr


def test_its_version_is_that_of_the_sidecar() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["version"] == chart["appVersion"] == __version__


# ── In a cluster ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("values", [(), PRODUCTIVE, OWN], ids=["dev", "production", "own"])
def test_the_api_server_takes_it(
    cluster: Cluster, template: Callable[..., list[Json]], values: tuple[str, ...]
) -> None:
    found = template(*values)
    if cluster.run("get", "namespace", "mcp-opa-sidecar-system").returncode != 0:
        create_namespace(cluster, "mcp-opa-sidecar-system", {})
    command = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
    said = cluster.kubectl(*command, "--force-conflicts", given=found).splitlines()
    assert len(said) == len(found)
    assert all(each.endswith("serverside-applied (server dry run)") for each in said)


def bundles(cluster: Cluster) -> set[str]:
    """What the API server believes the injector by."""
    return {
        each["clientConfig"].get("caBundle", "")
        for kind in KINDS
        for each in cluster.get(kind, "mcp-opa-sidecar")["webhooks"]
    }


def test_a_release_comes_changes_and_goes(helm: Helm, bare_cluster: Cluster) -> None:
    """By the commands of the page."""

    def types(command: str) -> str:
        program, *words = command.split()
        assert program == "helm"
        return helm(*words, cluster=bare_cluster)

    def deployed() -> Json:
        name = "mcp-opa-sidecar-injector"
        found: Json = bare_cluster.get("deployment", name, "-n", "mcp-opa-sidecar-system")["spec"]
        return found

    assert "STATUS: deployed" in types(INSTALL)
    assert deployed()["replicas"] == 1
    for kind in KINDS:  # the injector's work, whose field it stays
        number = len(bare_cluster.get(kind, "mcp-opa-sidecar")["webhooks"])
        path = "/webhooks/{}/clientConfig/caBundle"
        patch = [{"op": "add", "path": path.format(n), "value": "Q0E="} for n in range(number)]
        command = ("patch", kind, "mcp-opa-sidecar", "--type=json", "-p", json.dumps(patch))
        bare_cluster.kubectl(*command)
    types(UPGRADE)
    assert deployed()["replicas"] == 2
    assert bundles(bare_cluster) == {"Q0E="}
    budget = bare_cluster.get("poddisruptionbudgets", "-n", "mcp-opa-sidecar-system")["items"]
    assert [each["spec"]["maxUnavailable"] for each in budget] == [1]
    types(UNINSTALL)
    assert_bare(bare_cluster)
