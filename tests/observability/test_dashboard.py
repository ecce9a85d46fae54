"""The dashboard can be imported; its queries and those of the rules are about what there is."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from tests.observability.documents import (
    Query,
    dashboard,
    panels,
    queries,
    rule_queries,
    target_labels,
)
from tests.observability.promql import Names, Series, exposed, names, unknown
from tests.observability.stage import Looked, looked_at
from tests.observability.test_alerts import promtool
from tests.support.otlp import Sink

VARIABLES = ("datasource", "namespace", "service", "pod")
WIDTH = 24


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory, opa_bin: Path) -> Iterator[Looked]:
    """A sidecar that exports spans too, as there are metrics about that."""
    folder = tmp_path_factory.mktemp("dashboard") / "sidecar"
    with Sink() as sink, looked_at(folder, opa_bin, "--otlp", sink.url) as found:
        found.calls()
        yield found


@pytest.fixture(scope="module")
def series(looked: Looked) -> Series:
    """What Prometheus has: what a sidecar exposes, `up`, and what the rules record of it."""
    there = {**looked.metrics(), "up": frozenset[str]()}
    found = {name: labels | set(target_labels()) for name, labels in there.items()}
    for each in rule_queries():
        if ":" in each.where:
            found[each.where] = labels_of(each.expr, found)
    return found


def labels_of(query: str, series: Series) -> frozenset[str]:
    """The labels of a query's result."""
    there = names(query)
    if " by (" in query:
        return there.grouping
    every = frozenset[str]().union(*(series[name] for name, _ in there.metrics))
    return every - there.grouping if " without (" in query else every


@pytest.mark.parametrize("query", [*queries(), *rule_queries()], ids=str)
def test_a_query_is_about_metrics_and_labels_that_there_are(query: Query, series: Series) -> None:
    assert unknown(query.expr, series) == []


@pytest.mark.parametrize("query", queries(), ids=str)
def test_a_legend_names_what_its_query_groups_by(query: Query) -> None:
    assert query.named <= names(query.expr).grouping


@pytest.mark.parametrize("query", rule_queries(), ids=str)
def test_an_alert_says_what_its_series_are_about(query: Query, series: Series) -> None:
    assert query.named <= labels_of(query.expr, series)


def test_every_metric_is_on_the_dashboard(series: Series) -> None:
    shown = {metric for each in queries() for metric, _ in names(each.expr).metrics}
    ours = {each for each in series if each.startswith(("authz_", "mcp_"))}
    left_out = {re.sub(r"_(bucket|count|sum)$", "", each) for each in ours - shown}
    assert left_out <= {re.sub(r"_(bucket|count|sum)$", "", each) for each in shown}


def test_variables_ask_for_what_there_is(series: Series) -> None:
    for variable in dashboard()["templating"]["list"][1:]:
        metric, label = re.fullmatch(
            r"label_values\((.*), (\w+)\)", variable["definition"]
        ).groups()  # type: ignore[union-attr]
        assert unknown(metric, series) == []
        assert label == variable["name"]
        assert label in set(target_labels())
        assert variable["query"]["query"] == variable["definition"]


def test_the_queries_are_promql(tmp_path: Path, prometheus_bin: Path) -> None:
    """As rules, since those are what `promtool` reads; with what Grafana puts for its variables."""
    written = [
        {"record": f"panel:{number}", "expr": filled_in(each.expr)}
        for number, each in enumerate(queries())
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": written}]}), "utf-8")
    promtool(prometheus_bin, "check", "rules", str(file))


def filled_in(query: str, every: str = "1m") -> str:
    """A query as Grafana sends it when everything is chosen."""
    return re.sub(r"\$__(rate_interval|range)", every, re.sub(r"\$\w+\"", '.*"', query))


def test_every_query_is_narrowed_to_what_is_chosen() -> None:
    for query in queries():
        for metric, labels in names(query.expr).metrics:
            assert {"namespace", "service", "pod"} <= labels, f"{query}: {metric}"


def test_it_can_be_imported() -> None:
    """By the schema that Grafana has had since version 10.4."""
    found = dashboard()
    assert (found["schemaVersion"], found["uid"], found.get("id")) == (39, "mcp-opa-sidecar", None)
    assert tuple(each["name"] for each in found["templating"]["list"]) == VARIABLES
    everything = json.dumps(found["panels"])
    assert set(re.findall(r"\$\{?(\w+)", everything)) <= {*VARIABLES, "__rate_interval", "__range"}
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"]
        assert panel["description"]


def test_panels_have_a_place_of_their_own() -> None:
    found = dashboard()["panels"]
    assert max(Counter(each["id"] for each in found).values()) == 1
    cells = {each["id"]: set(covered(each["gridPos"])) for each in found}
    assert all(x < WIDTH for each in cells.values() for x, _ in each)
    assert not any(one & other for one, other in combinations(cells.values(), 2))


def covered(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


@pytest.mark.parametrize(
    ("query", "metrics", "grouping"),
    [
        ("up", {"up": set()}, set()),
        ('sum by (a, b) (rate(x{c="by (d)", e!~"f"}[5m]))', {"x": {"c", "e"}}, {"a", "b"}),
        ("sum(x) without (a)", {"x": set()}, {"a"}),
        ("x > bool 2 and on (i) y offset 5m", {"x": set(), "y": set()}, {"i"}),
        ("x * on (j) group_left (r) y", {"x": set(), "y": set()}, {"j", "r"}),
        ("a:b:c / ignoring (d) a:b:d[1d:5m]", {"a:b:c": set(), "a:b:d": set()}, {"d"}),
    ],
)  # fmt: skip
def test_names_are_read(query: str, metrics: dict[str, set[str]], grouping: set[str]) -> None:
    assert names(query) == Names(
        tuple((name, frozenset(labels)) for name, labels in metrics.items()), frozenset(grouping)
    )


@pytest.mark.parametrize("query", ["x{", "sum by a", "x # comment", "by (a"])
def test_what_is_no_query_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match=r"no PromQL|expected"):
        names(query)


def test_what_is_not_there_is_said() -> None:
    there = exposed('# HELP x\nx{a="1",b=""} 1\ny 2\n')
    assert there == {"x": frozenset({"a"}), "y": frozenset()}
    assert unknown('sum by (a) (x{a="1"})', there) == []
    assert unknown('sum by (c) (x{b="1"}) / z', there) == ["x{b}", "z", "c"]
