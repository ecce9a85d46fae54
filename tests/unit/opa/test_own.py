"""The own OPA before it is started, and what it tells OPA; the rest needs a real one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import pytest

from sidecar.config import Opa
from sidecar.opa.expected import IN_FORCE_PATIENCE, Expected
from sidecar.opa.own import OpaTracing, OwnOpa, opa_configuration


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("tls", [True, False])
def test_opas_spans_go_to_the_collector(protocol: str, tls: bool) -> None:
    tracing = OpaTracing("collector:4317", "grpc" if protocol == "grpc" else "http", tls)
    configuration = opa_configuration(tracing)
    assert configuration["distributed_tracing"] == {
        "type": protocol,
        "address": "collector:4317",
        "service_name": "opa",
        "sample_percentage": 0,
        "encryption": "tls" if tls else "off",
        "batch_span_processor_options": {"batch_timeout_ms": 100},
    }
    assert configuration["decision_logs"]["drop_decision"] == "/mcp/sidecar/silent"


@pytest.mark.parametrize(
    ("url", "protocol", "address", "tls"),
    [
        ("http://127.0.0.1:4318", "http", "127.0.0.1:4318", False),
        ("http://collector/", "http", "collector:80", False),
        ("https://collector", "http", "collector:443", True),
        ("https://[::1]:4317", "grpc", "[::1]:4317", True),
        ("http://collector", "grpc", "collector:443", False),
        ("collector:4317", "grpc", "collector:4317", False),
    ],
)
def test_opas_spans_go_where_the_sidecars_go(
    url: str, protocol: Literal["http", "grpc"], address: str, tls: bool
) -> None:
    assert OpaTracing.to(url, protocol) == OpaTracing(address, protocol, tls)


def test_opa_trusts_and_shows_the_certificates_that_it_is_given() -> None:
    tracing = OpaTracing("c:1", tls=True, authorities="/ca.pem", certificate="me.pem", key="me.key")
    told = opa_configuration(tracing)["distributed_tracing"]
    assert told["encryption"] == "mtls"
    assert told["tls_ca_cert_file"] == "/ca.pem"
    assert told["tls_cert_file"] == str(Path("me.pem").absolute())
    assert told["tls_private_key_file"] == str(Path("me.key").absolute())


@pytest.mark.parametrize("tracing", [None, OpaTracing("c:1")])
def test_its_decision_log_drops_the_canary_alone(tracing: OpaTracing | None) -> None:
    told = opa_configuration(tracing, log=True)
    assert told["decision_logs"] == {"console": True, "drop_decision": "/system/log/drop"}
    assert ("distributed_tracing" in told) is (tracing is not None)


def test_it_is_told_nothing_when_there_is_nothing_to_tell() -> None:
    assert opa_configuration(None) == {}


async def test_it_stops_though_it_never_started() -> None:
    own = OwnOpa(Opa(policy=Path("policy")))
    assert own.pid is None
    await own.stop()


def test_it_lags_when_a_revision_is_not_served_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnOpa(Opa(policy=Path("policy")))
    assert own.status() == {"revision": None, "expected": None}
    now = time.monotonic()
    own._expected, own.served = Expected("r2", now), "r1"
    own.rejected = {"at": "t", "error": "e"}
    seen = [own.lagging]
    monkeypatch.setattr(time, "monotonic", lambda: now + IN_FORCE_PATIENCE + 0.1)
    seen.append(own.lagging)
    own.served = "r2"
    seen.append(own.lagging)
    assert seen == [False, True, False]
    assert own.status() == {"revision": "r2", "expected": "r2", "rejected": own.rejected}
