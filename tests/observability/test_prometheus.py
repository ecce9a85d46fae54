"""prometheus.yaml on a real Prometheus: the dashboard's queries have answers, by both ways."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.documents import FOLDER, queries, rules
from tests.observability.running import collector, discovered, prometheus
from tests.observability.stage import looked_at
from tests.observability.test_dashboard import filled_in
from tests.support.otlp import Sink
from tests.support.processes import wait_until


@pytest.mark.timeout(180)
def test_every_panel_shows_something(
    tmp_path: Path, prometheus_bin: Path, collector_bin: Path, opa_bin: Path
) -> None:
    """Of one sidecar that Prometheus scrapes, and of one in shadow mode that pushes."""
    pushing = {"OTEL_METRIC_EXPORT_INTERVAL": "500"}
    with (
        Sink() as sink,
        collector(collector_bin, sink.url) as running,
        looked_at(tmp_path / "pod", opa_bin, "--otlp", sink.url) as pod,
        looked_at(
            tmp_path / "shadow", opa_bin, "--shadow", "--otlp", running.url, **pushing
        ) as shadow,
        prometheus(tmp_path, prometheus_bin, pod.served.admin, running.scraped) as seen,
    ):

        def empty() -> list[str]:
            pod.calls()
            shadow.calls()
            return [
                str(each) for each in queries() if not any(shown(seen.ask(filled_in(each.expr))))
            ]

        wait_until(lambda: not empty(), "every panel shows something", timeout=120)
        (up,) = seen.ask('up{job="mcp-sidecar"}')
        assert {key: up["metric"][key] for key in ("namespace", "pod", "service")} == {
            "namespace": "support",
            "pod": "tickets-1",
            "service": "tickets",
        }
        (modes, *others) = seen.ask('count by (job) (authz_decisions_total{authz_mode="shadow"})')
        assert (modes["metric"], others) == ({"job": "mcp-opa-sidecar"}, [])
        owners = seen.ask('sum by (authz_owner) (authz_decisions_total{authz_decision="deny"})')
        assert "finance-team" in {each["metric"].get("authz_owner") for each in owners}


def shown(result: list[dict[str, Any]]) -> list[str]:
    """The values that can be drawn."""
    return [each["value"][1] for each in result if each["value"][1] != "NaN"]


def test_the_configuration_is_as_prometheus_wants_it(tmp_path: Path, prometheus_bin: Path) -> None:
    """But for the part that asks the Kubernetes API, which not every build has."""
    file = tmp_path / "prometheus.yaml"
    file.write_text(yaml.safe_dump(discovered("http://10.1.0.7:15820", "otel-collector:8889")))
    (tmp_path / "alerts.yaml").write_bytes((FOLDER / "alerts.yaml").read_bytes())
    done = subprocess.run(
        [prometheus_bin / "promtool", "check", "config", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout
