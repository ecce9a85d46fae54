"""Every span and every metric of a long mixed run is what the conventions say, and all of them are.

`conventions` is the table; what is not in it fails, and so does what is in it and was never seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.telemetry import attributes, metrics
from tests.support.otlp import Span
from tests.telemetry import conventions
from tests.telemetry.mixed_run import Run, mixed

pytestmark = pytest.mark.timeout(300)

T = TypeVar("T")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, opa_bin: Path) -> Run:
    return mixed(tmp_path_factory.mktemp("mixed"), opa_bin)


@pytest.fixture(scope="module")
def spans(run: Run) -> list[Span]:
    """The sidecars' own; OPA's are in the same traces."""
    assert {each.service for each in run.sink.spans} == {conventions.SERVICE, "opa"}
    return [each for each in run.sink.spans if each.service == conventions.SERVICE]


def wrong(
    things: Iterable[T], faults: Callable[[T], Iterator[str]], name: Callable[[T], Any]
) -> dict[str, set[Any]]:
    """What is wrong, each fault once, with the names of those that have it."""
    found: dict[str, set[Any]] = defaultdict(set)
    for each in things:
        for fault in faults(each):
            found[fault].add(name(each))
    return dict(found)


def test_every_span_is_as_the_conventions_say(spans: list[Span]) -> None:
    print(f"{len(spans)} spans")
    assert wrong(spans, conventions.faults, lambda each: (each.kind, each.name)) == {}
    assert set(conventions.faults_of_trace(spans)) == set()


def test_every_row_of_the_table_of_spans_was_seen(spans: list[Span]) -> None:
    assert conventions.unseen(spans) == set()


def test_what_is_left_out_is_not_there(spans: list[Span]) -> None:
    said = {name for each in spans for name in each.attributes}
    assert not said & set(conventions.LEFT_OUT)
    names = {each.name for each in spans}
    assert not names & set(conventions.SERVER_NOTIFICATIONS)


ENDS: dict[str, tuple[Any, Any]] = {
    "bot": (("pipe", None), ("pipe", None, False)),
    "bea": (("tcp", "http"), ("pipe", None, False)),
    "clerk": (("tcp", "http"), ("tcp", "http", True)),
    "dora": (("pipe", None), ("tcp", "http", True)),
}
"""How the client and the server of each sidecar are reached, by who acts there."""


def test_each_span_says_how_its_own_other_end_is_reached(spans: list[Span]) -> None:
    asked: dict[str, set[Any]] = defaultdict(set)
    answered: dict[str, set[Any]] = defaultdict(set)
    questions = {each.span_id: each for each in spans if conventions.where(each) == "server"}
    for each in spans:
        served = questions.get(each.parent_id or "", each).attributes
        who, said = str(served.get("actor.id")), each.attributes
        if who not in ENDS or not conventions.is_a_clients_request(said):
            continue
        end = (said["network.transport"], said.get("network.protocol.name"))
        if conventions.where(each) == "server":
            asked[who].add(end)
        else:
            answered[who].add((*end, {"server.address", "server.port"} <= set(said)))
    assert asked == {who: {client} for who, (client, _) in ENDS.items()}
    assert answered == {who: {server} for who, (_, server) in ENDS.items()}


def test_arguments_and_results_are_where_they_are_switched_on_and_nowhere_else(
    spans: list[Span],
) -> None:
    who = {
        each.resource["service.instance.id"]
        for each in spans
        if set(conventions.OPT_IN) & set(each.attributes)
    }
    assert len(who) == 1
    assert len({each.resource["service.instance.id"] for each in spans}) == 8


def test_every_metric_is_as_the_conventions_say(run: Run) -> None:
    points = run.sink.points
    print(f"{len(points)} points of {len({each.metric for each in points})} metrics")
    assert wrong(points, conventions.faults_of_point, lambda each: each.metric) == {}
    labels = {name for each in points for name in each.attributes}
    assert not labels & set(conventions.NEVER_LABELS)


def test_every_row_of_the_table_of_metrics_was_seen(run: Run) -> None:
    assert conventions.unseen_of_points(run.sink.points) == set()
    assert not {each.metric for each in run.sink.points} & set(conventions.LEFT_OUT_INSTRUMENTS)


def test_states_are_told_as_they_were(run: Run, spans: list[Span]) -> None:
    """What went on in the run: a server and an OPA that failed, streams, pins, a full disk."""

    def values(name: str) -> set[float]:
        exported = {each.value for each in run.sink.points if each.metric == name}
        return exported | set(scraped(run, name.replace(".", "_")))

    def greatest(name: str) -> float:
        return max(values(name))

    for name in ("authz.ready", "authz.opa.up", "authz.upstream.up"):
        assert values(name) == {0.0, 1.0}, name
    assert greatest("authz.catalog.complete") == 1
    assert greatest("authz.streams.active") >= 3
    assert greatest("authz.calls.active") >= 1
    assert greatest("authz.catalog.tools") == greatest("authz.catalog.pins") == 1
    assert greatest("authz.tools.unpinned") == 1
    assert greatest("authz.audit.failures") >= 1
    assert greatest("authz.spans.dropped") == 0
    assert len(values("authz.policy.age")) > 1
    told = {
        each.attributes["authz.policy_revision"]
        for each in run.sink.points
        if each.metric == "authz.policy.info"
    }
    said = {each.attributes.get("authz.policy_revision") for each in spans} - {None}
    assert told & said
    refused = {
        each.attributes["error.type"]
        for each in run.sink.points
        if each.metric == "authz.messages.malformed"
    }
    assert {"malformed_message", "credentials_missing", "token_malformed"} <= refused


def scraped(run: Run, name: str) -> Iterator[float]:
    for text in run.texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.removesuffix("_seconds") == name:
                    yield sample.value


def test_prometheus_is_told_the_same(run: Run) -> None:
    """Of one source: the same names, kinds and labels, in the way of the other format."""
    rows = {conventions.in_prometheus(each): each for each in conventions.INSTRUMENTS}
    kinds = {"counter": conventions.COUNTER, "gauge": conventions.GAUGE}
    seen = set()
    for family in (each for text in run.texts for each in text_string_to_metric_families(text)):
        if family.name in ("target", "target_info"):
            continue
        row = rows[family.name + ("_total" if family.type == "counter" else "")]
        assert kinds.get(family.type, family.type) == row.kind
        names = {name.replace(".", "_") for name in row.labels} | {"le"}
        assert {label for sample in family.samples for label in sample.labels} <= names
        seen.add(row.name)
    # Arguments are validated and audit records written where nobody scrapes.
    assert {row.name for row in rows.values()} - seen <= {
        "authz.audit.failures",
        "authz.catalog.pins",
    }


def test_the_sidecars_own_tables_say_the_same(spans: list[Span]) -> None:
    theirs = {(row.name, place) for row in attributes.ATTRIBUTES for place in row.spans}
    assert theirs == {(row.name, place) for row in conventions.ATTRIBUTES for place in row.on}
    said = {each.name: (each.unit, set(each.labels), each.buckets) for each in metrics.METRICS}
    promised = {
        each.name: (each.unit, set(each.labels), each.bounds) for each in conventions.INSTRUMENTS
    }
    assert said == promised
