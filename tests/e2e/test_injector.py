"""The injector as people use it: on files, and as the API server's webhook. Both make the same."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.certificates import Authority
from tests.support.processes import Process, get, sidecar

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "injector"
CASES = sorted(each.name.removesuffix(".before.yaml") for each in GOLDENS.glob("*.before.yaml"))
REFRESH = os.environ.get("REFRESH_GOLDENS") == "1"
IMAGE = "example.com/mcp-opa-sidecar@sha256:" + "0" * 64

Json = dict[str, Any]


def cli(command: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """A command of the injector, given `text`."""
    line = sidecar(command, "-f", "-", *arguments)
    return subprocess.run(line, input=text, capture_output=True, text=True, timeout=60, check=False)


def before(case: str) -> str:
    return (GOLDENS / f"{case}.before.yaml").read_text(encoding="utf-8")


def refused(case: str) -> bool:
    return case.startswith("refused-")


def after(case: str) -> Path:
    return GOLDENS / f"{case}.{'txt' if refused(case) else 'after.yaml'}"


def test_there_are_enough_of_them_and_none_is_forgotten() -> None:
    assert len(CASES) >= 25
    known = {f"{case}.before.yaml" for case in CASES} | {after(case).name for case in CASES}
    assert {each.name for each in GOLDENS.iterdir()} == known


@pytest.mark.parametrize("case", CASES)
def test_files(case: str) -> None:
    done = cli("inject", "--image", IMAGE, text=before(case))
    said = done.stderr if refused(case) else done.stdout
    assert done.returncode == (125 if refused(case) else 0), done.stderr
    if refused(case):
        assert done.stdout == ""
    if REFRESH:
        after(case).write_text(said, encoding="utf-8")
    assert said == after(case).read_text(encoding="utf-8")


def test_injecting_again_changes_nothing_and_uninject_gives_back() -> None:
    good = [case for case in CASES if not refused(case)]
    text = "".join(f"---\n{before(case)}" for case in good)
    once = cli("inject", text=text).stdout
    assert cli("inject", text=once).stdout == once
    back = cli("uninject", text=once).stdout
    assert list(yaml.safe_load_all(back)) == list(yaml.safe_load_all(text))


def test_why() -> None:
    text = "".join(f"---\n{before(case)}" for case in ("deployment", "opted-out"))
    done = cli("check-inject", "--enabled", text=text)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "Deployment/tickets: injected: mode front, port 8080 of container app",
        "Pod/batch: left alone: the pod's label mcp-opa-sidecar.io/inject is 'false'",
    ]
    assert "neither the pod is labelled" in cli("check-inject", text=text).stdout
    done = cli("check-inject", "--enabled", text=before("refused-host-network"))
    assert (done.returncode, "refused: hostNetwork" in done.stdout) == (1, True)


def test_nothing_is_written_when_one_is_refused() -> None:
    done = cli("inject", text=f"{before('deployment')}---\n{before('refused-our-uid')}")
    assert (done.returncode, done.stdout) == (125, "")
    assert "Pod/tickets: container app runs as a user or group that is reserved" in done.stderr


# ── The webhook ───────────────────────────────────────────────────────────────────────────────────


class Webhook:
    """A running one, asked as the API server asks."""

    def __init__(self, url: str, health: str, trust: ssl.SSLContext) -> None:
        self.url, self.health, self.trust = url, health, trust

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        request = urllib.request.Request(f"{self.url}{path}?timeout=5s", body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=10, context=self.trust) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def review(self, half: str, pod: Json, namespace: str = "support") -> Json:
        request = {
            "uid": "1", "kind": {"kind": "Pod", "version": "v1", "group": ""},
            "namespace": namespace, "operation": "CREATE", "object": pod, "dryRun": True,
        }  # fmt: skip
        body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
        status, answer = self.post(f"/{half}/namespace", json.dumps(body).encode())
        assert status == 200, answer
        response: Json = json.loads(answer)["response"]
        return response


@pytest.fixture(scope="module")
def webhook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    folder, authority = tmp_path_factory.mktemp("webhook"), Authority()
    cert, key = authority.server().saved(folder, "server")
    command = sidecar(
        "webhook", "--listen", "127.0.0.1:0", "--health", "127.0.0.1:0", "--image", IMAGE,
        "--cert", cert, "--key", key,
    )  # fmt: skip
    with Process(command) as process:
        url = process.wait_for(r"reviewing pods on (https://[0-9.:]+)")[1]
        health = process.wait_for(r"/metrics on (http://[0-9.:]+)")[1]
        yield Webhook(url, health, authority.trusting())


def pods_in(manifest: Any) -> Iterator[tuple[str, Json]]:
    """The pods that a cluster would make of a manifest, each with its namespace."""
    if not isinstance(manifest, dict):
        return
    if "items" in manifest:
        for each in manifest["items"]:
            yield from pods_in(each)
        return
    namespace = manifest["metadata"].get("namespace", "support")
    template = manifest.get("spec", {})
    while isinstance(inner := template.get("jobTemplate") or template.get("template"), dict):
        template = inner if "containers" in inner["spec"] else inner["spec"]
        if "containers" in inner["spec"]:
            yield namespace, {"metadata": inner.get("metadata", {}), "spec": inner["spec"]}
            return
    if manifest.get("kind") == "Pod":
        yield namespace, {"metadata": manifest["metadata"], "spec": manifest["spec"]}


def patched(pod: Json, response: Json) -> Json:
    found: Json = json.loads(json.dumps(pod))
    for each in json.loads(base64.b64decode(response.get("patch", b"W10="))):
        part, name = each["path"].split("/")[1:]
        assert each["op"] in ("add", "replace")
        found[part][name.replace("~1", "/")] = each["value"]
    return found


@pytest.mark.parametrize("case", [case for case in CASES if not refused(case)])
def test_the_webhook_makes_the_same(webhook: Webhook, case: str) -> None:
    text = after(case).read_text(encoding="utf-8")
    asked = [each for document in yaml.safe_load_all(before(case)) for each in pods_in(document)]
    expected = [each for document in yaml.safe_load_all(text) for each in pods_in(document)]
    assert asked
    for (namespace, pod), (_, wanted) in zip(asked, expected, strict=True):
        response = webhook.review("mutate", pod, namespace)
        assert response["allowed"], response
        assert patched(pod, response) == wanted
        assert webhook.review("validate", wanted, namespace)["allowed"]
        if wanted != pod:
            assert not webhook.review("validate", pod, namespace)["allowed"]


@pytest.mark.parametrize("case", [case for case in CASES if refused(case)])
def test_the_webhook_refuses_the_same(webhook: Webhook, case: str) -> None:
    [(namespace, pod)] = pods_in(yaml.safe_load(before(case)))
    for half in ("mutate", "validate"):
        response = webhook.review(half, pod, namespace)
        assert not response["allowed"]
        assert response["status"]["message"] in after(case).read_text(encoding="utf-8")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"request":{}}', b'{"a":1,"a":2}'])
def test_what_is_no_review_is_refused(webhook: Webhook, body: bytes) -> None:
    assert webhook.post("/mutate/pod", body)[0] == 400


def test_too_large_and_elsewhere(webhook: Webhook) -> None:
    assert webhook.post("/mutate/pod", b" " * (9 * 1024 * 1024))[0] == 413
    assert webhook.post("/mutate/node", b"{}")[0] == 404


def test_health_and_counts(webhook: Webhook) -> None:
    webhook.review("mutate", {"metadata": {}, "spec": {"containers": []}}, "kube-system")
    assert get(f"{webhook.health}/healthz")[0] == 200
    text = get(f"{webhook.health}/metrics")[1].decode()
    assert 'injector_reviews_total{webhook="mutate",outcome="skipped"}' in text
