from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource
from prometheus_client.parser import text_string_to_metric_families

from sidecar.conversation import Call
from sidecar.policy.decision import Reason
from sidecar.protocol.session import Target
from sidecar.telemetry.attributes import MAX_NAME, MAX_NAMES
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
    allowed["authz_owner"] = "support"
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
    yield calls.allowed(decision=replace(calls.ALLOWED, owner=f"team-{n}"))


def test_the_number_of_series_is_bounded(metrics: Metrics) -> None:
    for n in range(400):
        for call in flood(n):
            metrics.record(call)
    decisions = samples(metrics, "authz_decisions_total")
    assert len(decisions) < 800
    assert len({labels.get("authz_owner") for labels, _ in decisions}) <= MAX_NAMES + 2
    series = samples(metrics, "mcp_server_operation_duration_seconds_count")
    values = {name: {labels.get(name) for labels, _ in series} for name in series[0][0]}
    assert len(series) < 400
    assert len(values["gen_ai_tool_name"]) <= 202
    assert values["mcp_protocol_version"] == {"2025-11-25", "_OTHER"}
    assert "_OTHER" in values["mcp_method_name"]
    codes = {labels.get("error_type") for labels, _ in series}
    assert len(codes) <= MAX_CODES + 2


HOSTILE = st.text(max_size=300) | st.sampled_from(["\ud800", '"}\n# EOF\nx{a="', "a" * 10**5, ""])


@given(st.lists(HOSTILE, min_size=1, max_size=6), st.integers(-(2**63), 2**63))
@example(["\ud800"], 2**70)
def test_hostile_names_break_no_text_and_no_bound(names: list[str], code: int) -> None:
    metrics = Metrics(Resource({}), "1", pushed=None, scraped=True)
    for name in names:
        for known in (True, None, False):
            asked = calls.operation(target=Target("tool", name), protocol_version=name)
            metrics.record(calls.allowed(operation=asked, tool_known=known))
            metrics.record(calls.denied(operation=asked, tool_known=known))
        metrics.record(calls.unknown(name))
        metrics.record(
            calls.allowed(operation=calls.operation("prompts/get", Target("prompt", name)))
        )
        metrics.record(calls.allowed(outcome="upstream_error", rpc_error=(code, name)))
        metrics.record(calls.denied(reasons=(Reason(name),)))
    rows = {each.name.replace(".", "_"): each for each in METRICS}
    for family in text_string_to_metric_families(metrics.render().decode()):
        row = rows.get(family.name.removesuffix("_seconds"))
        for sample in family.samples if row else ():
            assert row is not None
            allowed = {label.replace(".", "_") for label in row.labels} | {"le"}
            assert set(sample.labels) <= allowed
            assert max(map(len, sample.labels.values()), default=0) <= MAX_NAME
    metrics.shutdown()


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


def test_what_is_observed_by_labels_has_those_of_the_table_in_a_bounded_size(
    metrics: Metrics,
) -> None:
    revision = {"authz.policy_revision": "\ud800" + "r" * 500, "actor.id": "ana"}
    metrics.observe("authz.policy.info", lambda: [(revision, 1)])
    assert samples(metrics, "authz_policy_info") == [
        ({"authz_policy_revision": "?" + "r" * 127}, 1.0)
    ]


def test_what_is_not_known_is_not_there(metrics: Metrics) -> None:
    metrics.observe("authz.policy.age", list)
    assert samples(metrics, "authz_policy_age_seconds") == []


def test_what_was_let_through_is_timed_until_its_answer_was_there(metrics: Metrics) -> None:
    metrics.record(calls.denied())
    assert samples(metrics, "mcp_client_operation_duration_seconds_sum") == []
    metrics.record(calls.allowed(outcome="upstream_error", rpc_error=(-32602, "")))
    ((labels, taken),) = samples(metrics, "mcp_client_operation_duration_seconds_sum")
    assert taken == 0.006
    assert labels["error_type"] == labels["rpc_response_status_code"] == "-32602"
    assert (labels["server_address"], labels["server_port"]) == ("tickets", "9000")


def test_a_server_is_up_that_answered_the_last_request(metrics: Metrics) -> None:
    def up() -> dict[str, float]:
        return {labels["authz_server"]: n for labels, n in samples(metrics, "authz_upstream_up")}

    metrics.record(calls.denied())
    assert up() == {}
    metrics.record(calls.allowed())
    metrics.record(calls.allowed(server="desk", outcome="upstream_error", rpc_error=(-31502, "")))
    metrics.record(calls.allowed(outcome="cancelled"))
    assert up() == {"tickets": 1.0, "desk": 0.0}
    metrics.record(calls.allowed(server="desk"))
    assert up() == {"tickets": 1.0, "desk": 1.0}


def test_dropped_spans_are_a_counter(metrics: Metrics) -> None:
    metrics.observe("authz.spans.dropped", lambda: 7)
    assert samples(metrics, "authz_spans_dropped_total") == [({}, 7.0)]


def test_only_what_is_in_the_table_can_be_observed(metrics: Metrics) -> None:
    with pytest.raises(KeyError):
        metrics.observe("authz.surprise", lambda: 1)


def test_everything_that_is_emitted_is_in_the_table(metrics: Metrics) -> None:
    for each in METRICS:
        if each.kind.startswith("observed") and each.name != "authz.upstream.up":
            metrics.observe(each.name, lambda: 1)
    metrics.malformed("x")
    for call in flood(1):
        metrics.record(call)
    for each in METRICS:
        suffix = {"counter": "_total", "observed counter": "_total", "histogram": "_sum"}
        unit = "_seconds" if each.unit == "s" else ""
        found = samples(metrics, each.name.replace(".", "_") + unit + suffix.get(each.kind, ""))
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
