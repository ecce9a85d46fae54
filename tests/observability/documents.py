"""The files of k8s/observability, as what reads them would see them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tests.support.processes import ROOT

FOLDER = ROOT / "k8s" / "observability"

Object = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """A query of a panel, with what its legend names; or a rule's, with what its texts name."""

    where: str
    expr: str
    named: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.where


def dashboard() -> Object:
    found: Object = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return found


def panels() -> list[Object]:
    """Those that show something; rows do not."""
    return [each for each in dashboard()["panels"] if each["type"] != "row"]


def queries() -> list[Query]:
    """Every query of the dashboard."""
    return [
        Query(
            f"{panel['title']} {target['refId']}",
            target["expr"],
            frozenset(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])),
        )
        for panel in panels()
        for target in panel["targets"]
    ]


def groups() -> list[Object]:
    found: list[Object] = yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))["groups"]
    return found


def rules() -> list[Object]:
    return [rule for group in groups() for rule in group["rules"]]


def alerts() -> list[Object]:
    return [rule for rule in rules() if "alert" in rule]


def rule_queries() -> list[Query]:
    """Every rule's query, and the labels that the texts of an alert show."""
    return [
        Query(
            rule.get("alert") or rule["record"],
            rule["expr"],
            frozenset(re.findall(r"\$labels\.(\w+)", json.dumps(rule.get("annotations", {})))),
        )
        for rule in rules()
    ]


def scraping() -> Object:
    found: Object = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))
    return found


def target_labels() -> Iterator[str]:
    """What Prometheus puts on the series of a pod."""
    yield from ("job", "instance")
    for config in scraping()["scrape_configs"]:
        for each in config.get("relabel_configs", []):
            if not each.get("target_label", "__").startswith("__"):
                yield each["target_label"]
