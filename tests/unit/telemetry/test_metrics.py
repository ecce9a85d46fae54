from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.resources import Resource

from sidecar.conversation import Call
from sidecar.policy.decision import Reason
from sidecar.protocol.session import Target
from sidecar.telemetry.metrics import MAX_CODES, METRICS, POLICY_BUCKETS, Metrics
from tests.support import calls

SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics(Resource({"service.name": "x"}), "1", pushed=None, scraped=True)
    yield made
    made.shutdown()


def samples(metrics: Metrics, name: str) -> list[tuple[dict[str, str], float]]:
    """The series of one name: labels that are not empty, and the value."""
    return [
        (dict(re.findall(r'(\w+)="([^"]+)"', labels or "")), float(value))
        for found, labels, value in SAMPLE.findall(metrics.render().decode())
        if found == name
    ]


def test_decisions_are_counted_by_who_what_and_why(metrics: Metrics) -> None:
    for call in (calls.allowed(), calls.allowed(), calls.denied()):
        metrics.record(call)
    allowed = {
        "actor_type": "agent",
        "authz_decision": "allow",
        "authz_mode": "enforce",
        "gen_ai_tool_name": "get_ticket",
    }
    denied = {**allowed, "authz_decision": "deny", "authz_reason": "not_granted"}
    assert samples(metrics, "authz_decisions_total") == [(allowed, 2.0), (denied, 1.0)]


def test_what_nobody_judged_is_an_operation_and_no_decision(metrics: Metrics) -> None:
    metrics.record(calls.passed())
    assert samples(metrics, "authz_decisions_total") == []
    assert samples(metrics, "authz_decision_duration_seconds_count") == []
    ((labels, count),) = samples(metrics, "mcp_server_operation_duration_seconds_count")
    assert (labels["mcp_method_name"], count) == ("ping", 1.0)


def test_the_policys_time_is_measured_from_100_microseconds_on(metrics: Metrics) -> None:
    metrics.record(calls.undecided())
    labels = {"actor_type": "agent", "authz_decision": "error", "error_type": "timeout"}
    assert samples(metrics, "authz_decision_duration_seconds_sum") == [(labels, 0.002)]
    buckets = samples(metrics, "authz_decision_duration_seconds_bucket")
    assert [each["le"] for each, _ in buckets[:-1]] == [str(each) for each in POLICY_BUCKETS]


def test_an_operation_has_the_attributes_of_the_convention(metrics: Metrics) -> None:
    metrics.record(calls.allowed(outcome="upstream_error", rpc_error=(-32603, "")))
    assert samples(metrics, "mcp_server_operation_duration_seconds_sum") == [
        (
            {
                "mcp_method_name": "tools/call",
                "mcp_protocol_version": "2025-11-25",
                "gen_ai_operation_name": "execute_tool",
                "gen_ai_tool_name": "get_ticket",
                "error_type": "-32603",
                "rpc_response_status_code": "-32603",
                "network_transport": "tcp",
                "network_protocol_name": "http",
            },
            0.01,
        )
    ]


def flood(n: int) -> Iterator[Call]:
    """What an attacker, a server and a policy can make up."""
    name = f"name-{n}"
    yield calls.denied(operation=calls.operation(target=Target("tool", name)), tool_known=False)
    yield calls.denied(operation=calls.operation("prompts/get", Target("prompt", name)))
    yield calls.allowed(operation=calls.operation(target=Target("tool", name)), tool_known=None)
    yield calls.unknown(f"method/{n}")
    yield calls.allowed(operation=calls.operation(protocol_version=name))
    yield calls.allowed(outcome="upstream_error", rpc_error=(-n, ""))
    yield calls.denied(reasons=(Reason("reason_" + "abcdefghij"[n % 10] * (n // 10 + 1)),))
    yield calls.denied(reasons=(Reason(f"Not a code {n}"),))


def test_the_number_of_series_is_bounded(metrics: Metrics) -> None:
    for n in range(400):
        for call in flood(n):
            metrics.record(call)
    assert len(samples(metrics, "authz_decisions_total")) < 600
    series = samples(metrics, "mcp_server_operation_duration_seconds_count")
    values = {name: {labels.get(name) for labels, _ in series} for name in series[0][0]}
    assert len(series) < 400
    assert len(values["gen_ai_tool_name"]) <= 202
    assert values["mcp_protocol_version"] == {"2025-11-25", "_OTHER"}
    assert "_OTHER" in values["mcp_method_name"]
    codes = {labels.get("error_type") for labels, _ in series}
    assert len(codes) <= MAX_CODES + 2


def test_malformed_messages_are_counted_by_code(metrics: Metrics) -> None:
    metrics.malformed("malformed_message")
    metrics.malformed("header_mismatch")
    metrics.malformed("malformed_message")
    assert samples(metrics, "authz_messages_malformed_total") == [
        ({"error_type": "malformed_message"}, 2.0),
        ({"error_type": "header_mismatch"}, 1.0),
    ]


def test_what_is_observed_is_read_at_each_scrape(metrics: Metrics) -> None:
    values = iter((3, 5))
    metrics.observe("authz.calls.active", lambda: next(values))
    metrics.observe("authz.spans.dropped", lambda: 7)
    assert samples(metrics, "authz_calls_active") == [({}, 3.0)]
    assert samples(metrics, "authz_calls_active") == [({}, 5.0)]


def test_dropped_spans_are_a_counter(metrics: Metrics) -> None:
    metrics.observe("authz.spans.dropped", lambda: 7)
    assert samples(metrics, "authz_spans_dropped_total") == [({}, 7.0)]


def test_only_what_is_in_the_table_can_be_observed(metrics: Metrics) -> None:
    with pytest.raises(KeyError):
        metrics.observe("authz.surprise", lambda: 1)


def test_everything_that_is_emitted_is_in_the_table(metrics: Metrics) -> None:
    for each in METRICS:
        if each.kind.startswith("observed"):
            metrics.observe(each.name, lambda: 1)
    metrics.malformed("x")
    for call in flood(1):
        metrics.record(call)
    for each in METRICS:
        base = each.name.replace(".", "_")
        suffix = {"counter": "_total", "observed counter": "_total", "histogram": "_seconds_sum"}
        found = samples(metrics, base + suffix.get(each.kind, ""))
        assert found, each.name
        allowed = {label.replace(".", "_") for label in each.labels}
        assert {label for labels, _ in found for label in labels} <= allowed, each.name


def test_the_resource_is_in_the_text_once(metrics: Metrics) -> None:
    metrics.malformed("x")
    assert samples(metrics, "target_info") == [({"service_name": "x"}, 1.0)]


def test_two_registries_do_not_meet(metrics: Metrics) -> None:
    other = Metrics(Resource({}), "1", pushed=None, scraped=True)
    other.record(calls.allowed())
    assert samples(metrics, "authz_decisions_total") == []
    other.shutdown()


def test_nothing_is_rendered_when_nobody_scrapes() -> None:
    made = Metrics(Resource({}), "1", pushed=None, scraped=False)
    assert made.render() == b""
    made.shutdown()
