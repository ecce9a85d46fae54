"""The own OPA before it is started, and what it tells OPA; the rest needs a real one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sidecar.config import Opa
from sidecar.opa.own import IN_FORCE_PATIENCE, OpaTracing, OwnOpa, opa_configuration


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("tls", [True, False])
def test_opas_spans_go_to_the_collector(protocol: str, tls: bool) -> None:
    tracing = OpaTracing("collector:4317", "grpc" if protocol == "grpc" else "http", tls)
    configuration = opa_configuration(tracing)
    assert configuration["distributed_tracing"] == {
        "type": protocol,
        "address": "collector:4317",
        "service_name": "opa",
        "sample_percentage": 100,
        "encryption": "tls" if tls else "off",
        "batch_span_processor_options": {"batch_timeout_ms": 100},
    }
    assert configuration["decision_logs"]["drop_decision"] == "/mcp/sidecar/silent"


async def test_it_stops_though_it_never_started() -> None:
    own = OwnOpa(Opa(policy=Path("policy")))
    assert own.pid is None
    await own.stop()


def test_it_lags_when_a_revision_is_not_served_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnOpa(Opa(policy=Path("policy")))
    assert own.status() == {"revision": None, "expected": None}
    own.expected, own.served = "r2", "r1"
    own.rejected = {"at": "t", "error": "e"}
    own._since = now = time.monotonic()
    seen = [own.lagging]
    monkeypatch.setattr(time, "monotonic", lambda: now + IN_FORCE_PATIENCE + 0.1)
    seen.append(own.lagging)
    own.served = "r2"
    seen.append(own.lagging)
    assert seen == [False, True, False]
    assert own.status() == {"revision": "r2", "expected": "r2", "rejected": own.rejected}
