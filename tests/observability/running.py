"""The real Collector and the real Prometheus, with the files of k8s/observability."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import yaml

from tests.observability.documents import FOLDER, scraping
from tests.observability.promql import Series, exposed
from tests.support.processes import Process, environment, get, wait_until
from tests.support.raw import free_port

READY = r"Everything is ready"
EVERY = "500ms"


@dataclass(frozen=True)
class Collector:
    """A Collector that runs: `url` takes OTLP over HTTP, `scraped` is where Prometheus looks."""

    url: str
    scraped: str

    def metrics(self) -> Series:
        return exposed(get(f"http://{self.scraped}/metrics")[1].decode())


@contextmanager
def collector(
    binary: Path, backend: str, config: Path = FOLDER / "collector.yaml", **variables: str
) -> Iterator[Collector]:
    """collector.yaml on loopback, on free ports, with `backend` in Jaeger's place."""
    names = ("OTLP_HTTP_PORT", "OTLP_GRPC_PORT", "PROMETHEUS_PORT", "HEALTH_PORT")
    ports = {name: str(free_port()) for name in names}
    where = {"COLLECTOR_HOST": "127.0.0.1", "JAEGER_OTLP": backend, **ports, **variables}
    command: list[str | Path] = [binary, "--config", config]
    with Process(command, env={**environment(), **where}) as process:
        process.wait_for(READY)
        yield Collector(
            f"http://127.0.0.1:{ports['OTLP_HTTP_PORT']}", f"127.0.0.1:{ports['PROMETHEUS_PORT']}"
        )


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs."""

    url: str

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that a query gives now."""
        status, body = get(f"{self.url}/api/v1/query?query={quote(query)}")
        answer: dict[str, Any] = json.loads(body)
        assert status == 200, f"{query}: {answer}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result


@contextmanager
def prometheus(folder: Path, bin_folder: Path, pod: str, pushed: str) -> Iterator[Prometheus]:
    """prometheus.yaml, with a pod that somebody discovered, and with the Collector's address."""
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(discovered(pod, pushed)), encoding="utf-8")
    (folder / "alerts.yaml").write_bytes((FOLDER / "alerts.yaml").read_bytes())
    port = free_port()
    command: list[str | Path] = [
        bin_folder / "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    found = Prometheus(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        with suppress(OSError):
            return get(f"{found.url}/-/ready")[0] == 200
        return False

    with Process(command) as process:
        wait_until(ready, f"Prometheus is ready: {process}")
        yield found


def discovered(pod: str, pushed: str) -> dict[str, Any]:
    """The configuration, with what the Kubernetes API would have said."""
    where = urlsplit(pod)
    said = {
        "__meta_kubernetes_namespace": "support",
        "__meta_kubernetes_pod_container_name": "mcp-sidecar",
        "__meta_kubernetes_pod_ip": str(where.hostname),
        "__meta_kubernetes_pod_label_app_kubernetes_io_name": "tickets",
        "__meta_kubernetes_pod_name": "tickets-1",
        "__meta_kubernetes_pod_phase": "Running",
    }
    other = {**said, "__meta_kubernetes_pod_container_name": "tickets"}
    text = json.dumps(scraping()).replace("15820", str(where.port))
    config: dict[str, Any] = json.loads(text.replace("otel-collector:8889", pushed))
    config["global"] = {"scrape_interval": EVERY, "evaluation_interval": EVERY}
    pods = config["scrape_configs"][0]
    assert pods.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    pods["static_configs"] = [
        {"targets": [f"{where.hostname}:1"], "labels": labels} for labels in (said, other)
    ]
    return config
