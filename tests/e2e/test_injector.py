"""The injector as people use it: on files, and as the API server's webhook. Both make the same."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.certificates import Authority
from tests.support.processes import Process, environment, get, sidecar, wait_until

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


def settings(case: str) -> list[str]:
    """The injector's, where a case is about them."""
    file = GOLDENS / f"{case}.settings.yaml"
    return ["--config", str(file)] if file.exists() else []


def after(case: str) -> Path:
    return GOLDENS / f"{case}.{'txt' if refused(case) else 'after.yaml'}"


def test_there_are_enough_of_them_and_none_is_forgotten() -> None:
    assert len(CASES) >= 25
    known = {f"{case}.before.yaml" for case in CASES} | {after(case).name for case in CASES}
    known |= {Path(settings(case)[1]).name for case in CASES if settings(case)}
    assert {each.name for each in GOLDENS.iterdir()} == known


@pytest.mark.parametrize("case", CASES)
def test_files(case: str) -> None:
    done = cli("inject", "--image", IMAGE, *settings(case), text=before(case))
    said = done.stderr if refused(case) else done.stdout
    assert done.returncode == (125 if refused(case) else 0), done.stderr
    if refused(case):
        assert done.stdout == ""
    if REFRESH:
        after(case).write_text(said, encoding="utf-8")
    assert said == after(case).read_text(encoding="utf-8")


def test_injecting_again_changes_nothing_and_uninject_gives_back() -> None:
    good = [case for case in CASES if not refused(case) and not settings(case)]
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

    def __init__(self, process: Process, authority: Authority) -> None:
        self.process, self.trust, self.ends = process, authority.trusting(), 0.0
        self.url = process.wait_for(r"reviewing pods on (https://[0-9.:]+)")[1]
        self.health = process.wait_for(r"/metrics on (http://[0-9.:]+)")[1]

    def metric(self, name: str) -> float:
        """The value of a series; 0 where there is none yet."""
        text = get(f"{self.health}/metrics")[1].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        request = urllib.request.Request(f"{self.url}{path}?timeout=5s", body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=10, context=self.trust) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(self, half: str, pod: Json, **more: Any) -> tuple[int, bytes]:
        request = {
            "uid": "1", "kind": {"kind": "Pod", "version": "v1", "group": ""},
            "namespace": "support", "operation": "CREATE", "object": pod, "dryRun": True, **more,
        }  # fmt: skip
        body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
        return self.post(f"/{half}/namespace", json.dumps(body).encode())

    def review(self, half: str, pod: Json, namespace: str = "support") -> Json:
        status, answer = self.ask(half, pod, namespace=namespace)
        assert status == 200, answer
        response: Json = json.loads(answer)["response"]
        return response


@contextmanager
def running(command: list[str], authority: Authority | None = None) -> Iterator[Webhook]:
    with Process(command) as process:
        yield Webhook(process, authority or Authority())


@contextmanager
def reviewing(folder: Path, *options: str) -> Iterator[Webhook]:
    authority = Authority()
    issued = authority.server()
    cert, key = issued.saved(folder, "server")
    command = sidecar(
        "webhook", "--listen", "127.0.0.1:0", "--health", "127.0.0.1:0", "--image", IMAGE,
        "--cert", cert, "--key", key, *options,
    )  # fmt: skip
    with running(command, authority) as made:
        made.ends = issued.certificate.not_valid_after_utc.timestamp()
        yield made


@pytest.fixture(scope="module")
def webhook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    with reviewing(tmp_path_factory.mktemp("webhook")) as found:
        yield found


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


@pytest.mark.parametrize("case", [each for each in CASES if not refused(each)])
def test_the_webhook_makes_the_same(webhook: Webhook, case: str, tmp_path: Path) -> None:
    if settings(case):
        with reviewing(tmp_path, *settings(case)) as own:
            makes_the_same(own, case)
    else:
        makes_the_same(webhook, case)


def makes_the_same(webhook: Webhook, case: str) -> None:
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


def test_a_review_that_does_not_arrive_is_given_up(webhook: Webhook) -> None:
    """Before the API server itself gives up, and by somebody who says so."""
    host, port = webhook.url.removeprefix("https://").split(":")
    began = time.monotonic()
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        webhook.trust.wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall(b"POST /mutate/pod HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in connection.recv(64)
    assert time.monotonic() - began < 5
    assert webhook.metric('injector_reviews_total{outcome="late",webhook="mutate"}') == 1


def test_health_and_counts(webhook: Webhook) -> None:
    webhook.review("mutate", {"metadata": {}, "spec": {"containers": []}}, "kube-system")
    for path in ("healthz", "readyz"):
        assert get(f"{webhook.health}/{path}") == (200, b"ok\n")
    skipped = webhook.metric('injector_reviews_total{outcome="skipped",webhook="mutate"}')
    webhook.review("mutate", {"metadata": {}, "spec": {"containers": []}}, "kube-system")
    webhook.post("/mutate/pod", b"")
    after = webhook.metric('injector_reviews_total{outcome="skipped",webhook="mutate"}')
    assert after == skipped + 1 > 1
    assert webhook.metric('injector_reviews_total{outcome="unreadable",webhook="mutate"}') >= 1
    assert webhook.metric('injector_review_seconds_count{webhook="mutate"}') >= 3
    expiry = webhook.metric("injector_certificate_expiry_timestamp_seconds")
    assert expiry == webhook.ends


@pytest.mark.parametrize("operation", ["CREATE", "UPDATE", "x" * 100, None, 7])
@pytest.mark.parametrize("metadata", [{}, {"ownerReferences": 7}, {"ownerReferences": [7]}, []])
def test_whatever_is_refused_is_counted_by_few_names(
    webhook: Webhook, operation: Any, metadata: Any
) -> None:
    pod = {"metadata": metadata, "spec": {"containers": [{"name": "app", "image": "x"}]}}
    status, _ = webhook.ask("mutate", pod, operation=operation, oldObject=pod)
    assert status in (200, 400)
    text = get(f"{webhook.health}/metrics")[1].decode()
    assert set(re.findall('operation="([^"]*)"', text)) <= {"CREATE", "UPDATE", "other"}


# ── Its certificate, and the API server ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "a certificate is needed: --cert and --key, or --self-signed"),
        (["--cert", "x"], "a certificate is needed"),
        (["--cert", "x", "--key", "y"], "tls.cert: x can not be read"),
        (["--self-signed", "--cert", "x", "--account", "{}"], "say one of the two"),
        (["--self-signed", "--account", "/nowhere"], "/nowhere has no token of a service account"),
        (["--self-signed", "--account", "{}", "--secret", "a/b"], "--secret: 'a/b' is not a name"),
        (["--self-signed", "--account", "{}", "--service", ""], "--service: '' is not a name"),
        (["--self-signed", "--account", "{}", "--host", "a b"], "--host: 'a b' is no name"),
    ],
)
def test_what_can_not_be_meant(account: Path, flags: list[str], said: str) -> None:
    line = sidecar("webhook", *(each.format(account) for each in (*flags, *NOWHERE)))
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 125
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_of_a_cluster_it_has_to_be_told_where_one_is(account: Path) -> None:
    line = sidecar("webhook", "--self-signed", "--account", account)
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=60, check=False, env=environment()
    )
    assert done.returncode == 125
    assert done.stderr.splitlines()[-1] == (
        "mcp-sidecar: --api-server has to be said outside of a cluster"
    )


NOWHERE = ("--api-server", "https://127.0.0.1:1", "--listen=127.0.0.1:0", "--health=127.0.0.1:0")
"""An API server that nobody is."""


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """A service account, as a folder."""
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "token").write_text("token")
    (folder / "namespace").write_text("system")
    (folder / "ca.crt").write_bytes(Authority().pem)
    return folder


def test_without_an_api_server_there_is_no_certificate(account: Path) -> None:
    command = sidecar("webhook", "--self-signed", "--account", account, *NOWHERE)
    with running(command) as made:
        made.process.wait_for("what there is stays in use: ClientConnectorError")
        assert get(f"{made.health}/healthz")[0] == 200
        status, why = get(f"{made.health}/readyz")
        assert status == 503
        assert why.startswith(b"there is no certificate: ")
        with pytest.raises(urllib.error.URLError):
            made.post("/mutate/pod", b"{}")
        errors = 'injector_cluster_errors_total{what="registration"}'
        wait_until(lambda: made.metric(errors) > 1, "it tries again")
        assert made.metric("injector_certificate_expiry_timestamp_seconds") == 0
        began = time.monotonic()
        assert made.process.stop() == 0
        assert time.monotonic() - began < 5


def test_no_answer_waits_for_an_event(account: Path, tmp_path: Path) -> None:
    authority = Authority()
    cert, key = authority.server().saved(tmp_path, "server")
    command = sidecar(
        "webhook", "--account", account, "--cert", cert, "--key", key, *NOWHERE
    )  # fmt: skip
    bad: Json = {"metadata": {}, "spec": {"containers": [{"name": "app", "image": "x"}]}}
    with running(command, authority) as made:
        began = time.monotonic()
        for number in range(20):
            bad["metadata"] = {"name": f"bad-{number}"}
            status, answer = made.ask("mutate", bad, dryRun=False)
            assert (status, json.loads(answer)["response"]["allowed"]) == (200, False)
        assert time.monotonic() - began < 5
        failed = 'injector_events_total{result="failed"}'
        wait_until(lambda: made.metric(failed) > 0, "the API server was tried")
        assert get(f"{made.health}/readyz")[0] == 200
