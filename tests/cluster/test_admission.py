"""What the API server stores when the injector stands before it, and what it refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings

from sidecar.injector import workloads
from tests.cluster.control_plane import Cluster, Done, Json
from tests.cluster.meddler import MARK, Meddling, meddler
from tests.cluster.registered import ENABLED, IMAGE, Injector, create_namespace, pod_of
from tests.support.certificates import Authority
from tests.support.pods import PORT, annotated, breaks_restricted, container, containers, shapes
from tests.support.processes import ROOT, wait_until

pytestmark = [pytest.mark.usefixtures("webhook"), pytest.mark.timeout(180)]

PREFIX = "mcp-opa-sidecar.io/"
INJECT = {f"{PREFIX}inject": "true"}
LEFT_OUT = {f"{PREFIX}inject": "false"}
OURS = ["mcp-opa", "mcp-sidecar"]
NEWER = "example.com/mcp-opa-sidecar@sha256:" + "1" * 64
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 1001,
    "seccompProfile": {"type": "RuntimeDefault"},
}

Space = Callable[..., str]

_numbers = count(1)


@pytest.fixture
def space(cluster: Cluster) -> Space:
    """Makes a namespace with labels; its name."""

    def make(**labels: str) -> str:
        name = f"space-{next(_numbers)}"
        create_namespace(cluster, name, labels)
        return name

    return make


@pytest.fixture
def enabled(space: Space) -> str:
    """A namespace whose pods are injected."""
    return space(**ENABLED)


@pytest.fixture
def injected(cluster: Cluster, enabled: str) -> str:
    """A namespace with an injected pod of the same name."""
    cluster.create(pod_of(enabled))
    return enabled


def labelled(pod: Json, labels: dict[str, str]) -> Json:
    return {**pod, "metadata": {**pod["metadata"], "labels": labels}}


def names(pod: Json, kind: str = "initContainers") -> list[str]:
    return [each["name"] for each in pod["spec"].get(kind, [])]


def is_injected(pod: Json) -> bool:
    """Ours are there, as they should be, and the server is told to listen on loopback."""
    if names(pod)[:2] != OURS:
        return False
    ours = [container(pod, name) for name in OURS]
    assert [each["restartPolicy"] for each in ours] == ["Always", "Always"]
    assert [each["image"] for each in ours] == [IMAGE, IMAGE]
    variable = {"name": "MCP_HOST", "value": "127.0.0.1"}
    assert any(variable in each.get("env", []) for each in pod["spec"]["containers"])
    return True


def workload(kind: str, namespace: str, **spec: object) -> Json:
    """A workload with one server in its pods, which are labelled with its kind."""
    template = {"metadata": {"labels": {"of": kind.lower()}}, "spec": pod_of(namespace)["spec"]}
    if kind in ("Job", "CronJob"):
        template["spec"]["restartPolicy"] = "Never"
    found: Json = {"template": template, **spec}
    if kind == "CronJob":
        found = {"schedule": "* * * * *", "jobTemplate": {"spec": found}}
    if kind == "Deployment":
        found["selector"] = {"matchLabels": {"of": kind.lower()}}
    group = "apps/v1" if kind == "Deployment" else "batch/v1"
    metadata = {"name": "tickets", "namespace": namespace}
    return {"apiVersion": group, "kind": kind, "metadata": metadata, "spec": found}


@pytest.fixture(scope="module")
def soon(cluster: Cluster, the_injector: Injector) -> Iterator[str]:
    """An enabled namespace with a CronJob, made at the beginning: it is due within a minute."""
    name = f"space-{next(_numbers)}"
    create_namespace(cluster, name, ENABLED)
    for account in ("tickets", "support-bot"):  # that goldens have
        cluster.kubectl("create", "serviceaccount", account, "-n", name)
    cluster.create(workload("CronJob", name))
    yield name
    cluster.kubectl("delete", "cronjob", "tickets", "-n", name)


# ── Who is injected ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("soon")
def test_a_pod_of_an_enabled_namespace(cluster: Cluster, enabled: str) -> None:
    assert is_injected(cluster.create(pod_of(enabled)))
    stored = cluster.get("pod", enabled, "-n", enabled)
    assert is_injected(stored)
    assert stored["metadata"]["labels"][f"{PREFIX}injected"] == "true"


def test_a_labelled_pod_elsewhere(cluster: Cluster, space: Space) -> None:
    assert is_injected(cluster.create(labelled(pod_of(space()), INJECT)))


def test_nobody_else_is_asked_about(cluster: Cluster, space: Space, enabled: str) -> None:
    for pod in (
        pod_of(space()),
        labelled(pod_of(enabled), LEFT_OUT),
        labelled(pod_of("kube-system"), INJECT),
    ):
        assert not is_injected(cluster.create(pod, "--dry-run=server"))


def test_a_dry_run_shows_the_pod_and_leaves_nothing(cluster: Cluster, enabled: str) -> None:
    assert is_injected(cluster.create(pod_of(enabled), "--dry-run=server"))
    assert cluster.get("pods", "-n", enabled)["items"] == []


def test_applying_again_changes_nothing(cluster: Cluster, enabled: str) -> None:
    for said in ("created", "unchanged"):
        assert said in cluster.kubectl("apply", "-f", "-", given=pod_of(enabled))
    assert is_injected(cluster.get("pod", enabled, "-n", enabled))


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_pods_of_workloads(cluster: Cluster, enabled: str, kind: str) -> None:
    cluster.create(workload(kind, enabled))
    assert all(is_injected(each) for each in cluster.pods(enabled, f"of={kind.lower()}"))


def test_the_token_of_the_account_is_not_for_us(cluster: Cluster, injected: str) -> None:
    pod = cluster.get("pod", injected, "-n", injected)
    [token] = [each["name"] for each in pod["spec"]["volumes"] if "kube-api" in each["name"]]
    holders = [
        each["name"]
        for each in containers(pod)
        if token in {mount["name"] for mount in each["volumeMounts"]}
    ]
    assert holders == ["app"]


@pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])
def test_every_setting(cluster: Cluster, webhook: Injector, enabled: str, native: bool) -> None:
    webhook.start(native=native, config="sidecar", otlp="http://collector:4318", policy="other")
    pod = cluster.create(pod_of(enabled))
    assert names(pod, "initContainers" if native else "containers")[:2] == OURS
    assert "--otlp=http://collector:4318" in container(pod, "mcp-sidecar")["args"]
    maps = {each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each}
    assert maps == {"sidecar", "other"}


GOLDENS = ROOT / "tests" / "goldens" / "injector"


@pytest.mark.parametrize(
    "file", sorted(GOLDENS.glob("*.before.yaml")), ids=lambda it: it.name[:-12]
)
def test_goldens(cluster: Cluster, webhook: Injector, soon: str, file: Path) -> None:
    """The same comes of them as of `mcp-sidecar inject`."""
    told = file.with_name(file.name.replace(".before.", ".settings."))
    if told.exists():
        webhook.start(**yaml.safe_load(told.read_text(encoding="utf-8")))
    text = file.read_text(encoding="utf-8")
    refusal = file.with_name(file.name.replace(".before.yaml", ".txt"))
    after = file.with_name(file.name.replace(".before.", ".after."))
    if refusal.exists():
        [pod] = pods_in(text, soon)
        said = cluster.refused("create", "--dry-run=server", "-f", "-", given=pod)
        assert said.partition("denied the request: ")[2].strip() in refusal.read_text()
        return
    for pod, expected in zip(
        pods_in(text, soon), pods_in(after.read_text(encoding="utf-8"), soon), strict=True
    ):
        made = cluster.create(pod, "--dry-run=server")
        assert names(made) == names(expected)
        assert names(made, "containers") == names(expected, "containers")
        for each in containers(expected):
            found = container(made, each["name"])
            assert [found.get(key) for key in ("args", "env")] == [
                each.get(key) for key in ("args", "env")
            ]


def pods_in(text: str, namespace: str) -> list[Json]:
    """The pods of a stream, as if they were to be made in a namespace."""
    found = []
    for manifest in yaml.safe_load_all(text):
        for pod, holder in workloads.pods(manifest or {}):
            where = holder["metadata"].get("namespace", "")
            where = where if where.startswith("kube-") else namespace
            metadata = {**pod.get("metadata", {}), "name": "it", "namespace": where}
            found.append({**pod, "apiVersion": "v1", "kind": "Pod", "metadata": metadata})
    return found


def mend(pod: Json) -> None:
    """Take off what the API takes of nobody, so that most shapes get past it."""
    pod["spec"]["volumes"] = [{"name": "data", "emptyDir": {}}]
    ending = [
        each for each in pod["spec"].get("initContainers") or () if "restartPolicy" not in each
    ]
    for each in containers(pod):
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            asked = each.get(kind, {})
            handlers = [asked[name] for name in ("exec", "httpGet", "tcpSocket") if name in asked]
            known = [handler for handler in handlers if handler.get("port") != str(PORT)]
            if each in ending or not known:
                each.pop(kind, None)


@given(shapes(("front",)))
@settings(max_examples=30, deadline=None)
def test_what_may_be_without_us_may_be_with_us(cluster: Cluster, soon: str, pod: Json) -> None:
    mend(pod)

    def tried(namespace: str) -> Done:
        pod["metadata"] |= {"name": "it", "namespace": namespace}
        return cluster.run("create", "--dry-run=server", "-o", "json", "-f", "-", given=pod)

    assume(tried("default").returncode == 0)
    made = tried(soon)
    assert made.returncode == 0, made.stderr
    assert is_injected(json.loads(made.stdout))


# ── Who is refused ────────────────────────────────────────────────────────────────────────────────


def test_the_reason_reaches_who_creates_a_pod(cluster: Cluster, enabled: str) -> None:
    said = cluster.refused("create", "-f", "-", given=pod_of(enabled, hostNetwork=True))
    assert "hostNetwork puts the sidecar within others' reach" in said


def test_the_reason_reaches_who_looks_at_a_deployment(cluster: Cluster, enabled: str) -> None:
    made = workload("Deployment", enabled)
    made["spec"]["template"]["spec"]["containers"][0]["ports"] = []
    cluster.create(made)

    def said() -> bool:
        events = cluster.get("events", "-n", enabled)["items"]
        return any("0 ports are called 'mcp'" in each["message"] for each in events)

    wait_until(said, "an event with the reason")
    assert cluster.get("pods", "-n", enabled)["items"] == []


def test_what_was_forged_is_made_anew(cluster: Cluster, enabled: str) -> None:
    forged = cluster.create(pod_of(enabled), "--dry-run=server")
    forged["metadata"] = {
        key: forged["metadata"][key] for key in ("name", "namespace", "labels", "annotations")
    }
    container(forged, "mcp-sidecar")["image"] = "evil:1"
    assert is_injected(cluster.create(forged))


def test_when_it_is_down(cluster: Cluster, webhook: Injector, injected: str, space: Space) -> None:
    plain = space()
    finalizer = {"metadata": {"finalizers": ["example.com/hold"]}}
    cluster.create(workload("Job", injected))
    [job] = cluster.pods(injected, "of=job")
    patching = ("patch", "pod", "-n", injected, "--type=merge", "-p")
    cluster.kubectl(*patching, json.dumps(finalizer), injected)
    webhook.stop()
    again = {**pod_of(injected), "metadata": {"name": "again", "namespace": injected}}
    said = cluster.refused("create", "-f", "-", given=again)
    assert "failed calling webhook" in said
    said = cluster.refused("label", "pod", injected, "-n", injected, "a=b")
    assert "failed calling webhook" in said
    cluster.create(pod_of(plain))
    cluster.create(labelled(again, LEFT_OUT))
    # What has begun ends: neither finalizers nor the kubelet's status are asked about.
    cluster.kubectl(*patching, json.dumps({"metadata": {"finalizers": []}}), injected)
    status = {"status": {"phase": "Succeeded"}}
    name = job["metadata"]["name"]
    cluster.kubectl(*patching, json.dumps(status), name, "--subresource=status")
    cluster.kubectl("wait", "job/tickets", "-n", injected, "--for=condition=Complete")
    cluster.kubectl("delete", "pod", injected, "-n", injected, "--force")


# ── Afterwards ────────────────────────────────────────────────────────────────────────────────────


def test_our_image_stays_and_theirs_may_change(cluster: Cluster, injected: str) -> None:
    command = ("set", "image", f"pod/{injected}", "-n", injected)
    for name in OURS:
        said = cluster.refused(*command, f"{name}=evil:1")
        assert "the sidecar's own containers can not be changed" in said
    cluster.kubectl(*command, "app=tickets:2")
    assert container(cluster.get("pod", injected, "-n", injected), "app")["image"] == "tickets:2"


@pytest.mark.parametrize("subresource", [(), ("--subresource=status",)])
@pytest.mark.parametrize(("part", "name"), [("labels", "injected"), ("annotations", "status")])
def test_the_marks_stay(
    cluster: Cluster, injected: str, part: str, name: str, subresource: tuple[str, ...]
) -> None:
    patch = json.dumps({"metadata": {part: {f"{PREFIX}{name}": None}}})
    command = ("patch", "pod", injected, "-n", injected, "--type=merge", "-p", patch)
    said = cluster.refused(*command, *subresource)
    assert f"the sidecar's own {part} can not be changed" in said


def test_the_label_that_selects_stays(cluster: Cluster, space: Space) -> None:
    name = space()
    cluster.create(labelled(pod_of(name), INJECT))
    for change in ("inject-", "inject=false"):
        command = ("label", "--overwrite", "pod", name, "-n", name, f"{PREFIX}{change}")
        assert "labels can not be changed" in cluster.refused(*command)


def test_a_namespace_that_is_disabled_again_opens_nothing(cluster: Cluster, injected: str) -> None:
    cluster.kubectl("label", "namespace", injected, f"{PREFIX}injection-")
    said = cluster.refused("set", "image", f"pod/{injected}", "-n", injected, "mcp-sidecar=evil:1")
    assert "the sidecar's own containers can not be changed" in said


DEBUG = ("--image=busybox:1", "--container=debugger", "--attach=false", "--profile=general")


def test_an_ephemeral_container_would_reach_the_server(cluster: Cluster, injected: str) -> None:
    said = cluster.refused("debug", injected, "-n", injected, *DEBUG)
    assert "debugger can reach the server on loopback, past the sidecar" in said


def test_an_ephemeral_container_that_is_accepted(cluster: Cluster, enabled: str) -> None:
    cluster.create(annotated(pod_of(enabled), accept_loopback="true"))
    command = ("debug", enabled, "-n", enabled)
    said = cluster.refused(*command, *DEBUG, "--target=mcp-sidecar")
    assert "container debugger is put into mcp-sidecar" in said
    said = cluster.refused(*command, *DEBUG[:-1], "--profile=sysadmin")
    assert "container debugger is privileged" in said
    cluster.kubectl(*command, *DEBUG)


def test_a_pod_of_before_may_be_changed(cluster: Cluster, webhook: Injector, injected: str) -> None:
    webhook.start(image=NEWER)
    for change in ("label", "annotate"):
        cluster.kubectl(change, "pod", injected, "-n", injected, "example.com/a=b")
    again = {**pod_of(injected), "metadata": {"name": "again", "namespace": injected}}
    assert container(cluster.create(again), "mcp-sidecar")["image"] == NEWER
    assert is_injected(cluster.get("pod", injected, "-n", injected))


# ── Others who change pods ────────────────────────────────────────────────────────────────────────


def adds_container(pod: Json) -> None:
    if "proxy" not in names(pod, "containers"):
        pod["spec"]["containers"].append({"name": "proxy", "image": "proxy:1"})


def adds_variables(pod: Json) -> None:
    for each in containers(pod):
        each.setdefault("env", []).append({"name": "HTTP_PROXY", "value": "http://evil:1"})


def adds_volume(pod: Json) -> None:
    volume = {"name": "certificates", "emptyDir": {}}
    if volume not in pod["spec"]["volumes"]:
        pod["spec"]["volumes"].append(volume)
    for each in containers(pod):
        if "certificates" not in [mount["name"] for mount in each["volumeMounts"]]:
            each["volumeMounts"].append({"name": "certificates", "mountPath": "/etc/ssl"})


def takes_the_socket(pod: Json) -> None:
    if names(pod)[:2] == OURS:
        mount = {"name": "mcp-opa-sidecar-opa", "mountPath": "/mine"}
        container(pod, "app")["volumeMounts"].append(mount)


def changes_image(pod: Json) -> None:
    for each in containers(pod):
        each["image"] = "mirror.example.com/" + each["image"].removeprefix("mirror.example.com/")


def forges_token(pod: Json) -> None:
    for each in containers(pod):
        for mount in each.get("volumeMounts", []):
            if mount["name"] == "mcp-opa-sidecar-no-token":
                mount["name"] = "kube"
    pod["spec"].setdefault("volumes", []).append({"name": "kube", "emptyDir": {}})


@pytest.mark.parametrize(
    "meddling",
    [adds_variables, adds_volume, changes_image, forges_token],
    ids=lambda it: it.__name__,
)
def test_ours_are_made_anew_after_others(
    cluster: Cluster, enabled: str, tmp_path: Path, meddling: Meddling
) -> None:
    plain = cluster.create(pod_of(enabled), "--dry-run=server")
    with meddler(cluster, tmp_path, enabled, meddling):
        pod = cluster.create(pod_of(enabled))
    assert pod["metadata"]["annotations"][MARK] == "true"
    assert is_injected(pod)
    for name in OURS:
        assert container(pod, name) == container(plain, name)


@pytest.mark.parametrize(
    "meddling", [adds_variables, adds_volume, changes_image], ids=lambda it: it.__name__
)
def test_who_insists_is_refused(
    cluster: Cluster, enabled: str, tmp_path: Path, meddling: Meddling
) -> None:
    with meddler(cluster, tmp_path, enabled, meddling, again=True):
        said = cluster.refused("create", "-f", "-", given=pod_of(enabled))
    assert "the pod is not as the injector made it: .spec.initContainers[0]" in said


def test_another_container_is_refused(cluster: Cluster, enabled: str, tmp_path: Path) -> None:
    accepting = annotated(pod_of(enabled), accept_loopback="true")
    with meddler(cluster, tmp_path, enabled, adds_container):
        said = cluster.refused("create", "-f", "-", given=pod_of(enabled))
        assert "proxy can reach the server on loopback" in said
        pod = cluster.create(accepting)
    assert is_injected(pod)
    assert names(pod, "containers") == ["app", "proxy"]


def test_who_takes_what_is_ours_is_refused(cluster: Cluster, enabled: str, tmp_path: Path) -> None:
    with meddler(cluster, tmp_path, enabled, takes_the_socket):
        said = cluster.refused("create", "-f", "-", given=pod_of(enabled))
    assert "container app mounts volume mcp-opa-sidecar-opa of ours" in said


# ── The rules of a namespace ──────────────────────────────────────────────────────────────────────


def test_a_restricted_namespace(cluster: Cluster, space: Space) -> None:
    name = space(**ENABLED, **{"pod-security.kubernetes.io/enforce": "restricted"})
    said = cluster.refused("create", "-f", "-", given=pod_of(name))
    assert 'violates PodSecurity "restricted' in said
    assert not any(each in said for each in OURS)
    pod = cluster.create(pod_of(name, {"securityContext": RESTRICTED}))
    assert is_injected(pod)
    assert not any(breaks_restricted(each) for each in containers(pod))


def redirected(namespace: str) -> Json:
    """A pod that asks for mode `redirect`, and may have it."""
    user = {"runAsUser": 1001}
    found = pod_of(namespace, {"securityContext": RESTRICTED}, securityContext=user)
    return annotated(found, mode="redirect")


@pytest.mark.parametrize("standard", ["restricted", "baseline"])
def test_redirect_needs_a_namespace_that_lets_it(
    cluster: Cluster, space: Space, standard: str
) -> None:
    name = space(**ENABLED, **{"pod-security.kubernetes.io/enforce": standard})
    said = cluster.refused("create", "-f", "-", given=redirected(name))
    assert f'violates PodSecurity "{standard}' in said
    assert 'container "mcp-redirect" must not' in said


def test_redirect(cluster: Cluster, enabled: str) -> None:
    """Its first container is there, and nobody comes later who could lead around it."""
    pod = cluster.create(redirected(enabled))
    assert names(pod) == ["mcp-redirect", *OURS]
    command = ("debug", enabled, "-n", enabled)
    said = cluster.refused(*command, *DEBUG)
    assert "container debugger does not say allowPrivilegeEscalation: false" in said
    cluster.kubectl(*command, *DEBUG[:-1], "--profile=restricted")
    said = cluster.refused("set", "image", f"pod/{enabled}", "-n", enabled, "mcp-redirect=evil:1")
    assert "the sidecar's own containers can not be changed" in said


AMOUNTS = {"cpu": "2", "memory": "1Gi"}


@pytest.mark.parametrize(
    "limit",
    [
        {"default": AMOUNTS, "defaultRequest": {"cpu": "10m"}},
        {"max": AMOUNTS, "min": {"cpu": "1m", "memory": "1Mi"}},
    ],
    ids=["default", "max"],
)
def test_a_namespace_with_ranges(cluster: Cluster, enabled: str, limit: Json) -> None:
    metadata = {"name": "ranges", "namespace": enabled}
    ranges = {"limits": [{"type": "Container", **limit}]}
    cluster.create({"apiVersion": "v1", "kind": "LimitRange", "metadata": metadata, "spec": ranges})
    pod = cluster.create(pod_of(enabled))
    assert is_injected(pod)
    resources = container(pod, "mcp-sidecar")["resources"]
    assert resources["limits"] == {"cpu": "2", "memory": "384Mi"}
    assert resources["requests"] == {"cpu": "50m", "memory": "96Mi"}


def test_amounts_are_the_same_however_they_are_written(
    cluster: Cluster, webhook: Injector, enabled: str
) -> None:
    amounts = {"cpu": "1000m", "memory": "1024Mi"}
    webhook.start(sidecar_resources={"limits": amounts, "requests": {"cpu": "0.5"}})
    found = container(cluster.create(pod_of(enabled)), "mcp-sidecar")["resources"]
    assert found["limits"] == {"cpu": "1", "memory": "1Gi"}
    assert found["requests"] == {"cpu": "500m", "memory": "1Gi"}


# ── Certificates ──────────────────────────────────────────────────────────────────────────────────


def test_certificates_rotate_under_load(cluster: Cluster, webhook: Injector, enabled: str) -> None:
    ended, failures, done = threading.Event(), list[str](), count()
    reviewed = [0]

    def load() -> None:
        while not ended.is_set():
            made = cluster.run("create", "--dry-run=server", "-f", "-", given=pod_of(enabled))
            reviewed[0] = next(done)
            if made.returncode != 0:
                failures.append(made.stderr)

    def some_more() -> None:
        seen = reviewed[0]
        wait_until(lambda: reviewed[0] > seen + 4 or failures, "more pods")

    threads = [threading.Thread(target=load, daemon=True) for _ in range(2)]
    for each in threads:
        each.start()
    old, new = webhook.authority, Authority()
    try:
        for step, authorities in (
            (webhook.certify, (old,)),
            (webhook.register, (old, new)),
            (webhook.certify, (new,)),
            (webhook.register, (old, new, Authority())),  # others to believe: it connects anew
            (webhook.register, (new,)),
        ):
            step(*authorities)
            some_more()
    finally:
        ended.set()
        for each in threads:
            each.join()
        webhook.authority = new
    assert failures == []


def test_a_certificate_of_somebody_else_is_not_believed(
    cluster: Cluster, webhook: Injector, enabled: str
) -> None:
    webhook.certify(Authority())
    webhook.start()
    try:
        said = cluster.refused("create", "-f", "-", given=pod_of(enabled))
        assert "certificate signed by unknown authority" in said
    finally:
        webhook.certify(webhook.authority)
        webhook.start()


# ── At last, since it takes a while ───────────────────────────────────────────────────────────────


def test_pods_of_cron_jobs(cluster: Cluster, soon: str) -> None:
    def there() -> list[Json]:
        found: list[Json] = cluster.get("pods", "-n", soon, "-l", "of=cronjob")["items"]
        return found

    assert all(is_injected(each) for each in wait_until(there, "a pod of the CronJob", 90))
