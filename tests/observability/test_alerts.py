"""Every alert is raised when it should be, and only then: by `promtool`, over made-up series."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.observability.documents import FOLDER, alerts, groups

POD = ", ".join(
    f'{name}="{value}"'
    for name, value in {
        "job": "mcp-sidecar",
        "instance": "10.1.0.7:15820",
        "namespace": "support",
        "service": "tickets",
        "pod": "tickets-1",
    }.items()
)
BEFORE, AFTER = 1500, 60
"""Minutes of a past in which calls were allowed, and of what comes then."""

Series = dict[str, str]


def one(name: str, values: str, **labels: str) -> Series:
    more = "".join(f', {label}="{value}"' for label, value in labels.items())
    return {f"{name}{{{POD}{more}}}": values}


def decisions(mode: str = "enforce", **counted: str) -> Series:
    """Of agents at one tool: counters by what was decided."""
    caller = {"actor_type": "agent", "gen_ai_tool_name": "get_ticket", "authz_mode": mode}
    found: Series = {}
    for decision, values in counted.items():
        found |= one("authz_decisions_total", values, authz_decision=decision, **caller)
    return found


def then(before: int, after: int) -> str:
    """A counter that grew so much each minute, and grows so much now."""
    return f"0+{before}x{BEFORE} {before * BEFORE}+{after}x{AFTER}"


def policy(age: str) -> Series:
    info = one("authz_policy_info", "1x120", authz_policy_revision="3f9a")
    return one("authz_policy_age_seconds", age) | info


@dataclass(frozen=True)
class Case:
    """What is measured each minute, and whether the alert is raised after so many minutes."""

    alert: str
    what: str
    series: Series
    minutes: int
    raised: bool

    def __str__(self) -> str:
        return f"{self.alert}: {self.what}"


GOOD, DENIED, NOW = then(10, 10), then(0, 10), BEFORE + 15
RARE, FEW = f"0x{BEFORE + 7} 1 2 3 3x{AFTER}", f"0x{BEFORE - 100} 0+1x50 50x{AFTER + 100}"
KNOWN, OPA, FAIL = "McpKnownGoodCallersDenied", "McpOpaUnreachable", "McpDecisionsFail"
READY, UNPINNED, OLD = "McpSidecarNotReady", "McpToolsUnpinned", "McpPolicyOld"
AUDIT, SPANS = "McpAuditFailing", "McpSpansDropped"

CASES = [
    Case(KNOWN, "denied", decisions(allow=GOOD, deny=DENIED), NOW, True),
    Case(KNOWN, "nothing is left", decisions(allow=then(10, 0), deny=DENIED), NOW, True),
    Case(KNOWN, "all as ever", decisions(allow=GOOD), NOW, False),
    Case(KNOWN, "a denial now and then", decisions(allow=GOOD, deny=then(0, 1)), NOW, False),
    Case(KNOWN, "as often as ever", decisions(allow=GOOD, deny=then(10, 10)), NOW, False),
    Case(KNOWN, "never seen before", decisions(deny=DENIED), NOW, False),
    Case(KNOWN, "shadow", decisions(allow=GOOD) | decisions("shadow", deny=DENIED), NOW, False),
    Case(KNOWN, "three calls", decisions(allow=then(10, 0), deny=RARE), BEFORE + 12, False),
    Case(KNOWN, "hardly known", decisions(allow=FEW, deny=DENIED), NOW, False),
    Case(OPA, "for two minutes", one("authz_opa_up", "1 0 0 0"), 3, True),
    Case(OPA, "for a moment", one("authz_opa_up", "1 0 1 1"), 3, False),
    Case(FAIL, "one in twenty", decisions(allow="0+95x30", error="0+5x30"), 20, True),
    Case(FAIL, "one in a thousand", decisions(allow="0+999x30", error="0+1x30"), 20, False),
    Case(READY, "says so itself", one("authz_ready", "1 0x20"), 10, True),
    Case(READY, "does not answer", one("up", "1 0x20"), 10, True),
    Case(READY, "while it starts", one("authz_ready", "0 0 1x20"), 10, False),
    Case(UNPINNED, "one", one("authz_tools_unpinned", "0 1x20"), 10, True),
    Case(UNPINNED, "none", one("authz_tools_unpinned", "0x20"), 10, False),
    Case(OLD, "a week and a day", policy("691200+60x120"), 20, True),
    Case(OLD, "a day", policy("86400+60x120"), 20, False),
    Case(AUDIT, "grows", one("authz_audit_failures_total", "0 0 0 2 2 2"), 5, True),
    Case(AUDIT, "long ago", one("authz_audit_failures_total", "7x30"), 20, False),
    Case(SPANS, "goes on", one("authz_spans_dropped_total", "0+5x40"), 30, True),
    Case(SPANS, "once", one("authz_spans_dropped_total", "0 0 9x40"), 30, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_alert_is_raised_when_it_should_be(
    case: Case, tmp_path: Path, prometheus_bin: Path
) -> None:
    raised = f'count(ALERTS{{alertname="{case.alert}", alertstate="firing"}})'
    samples = [{"labels": "{}", "value": 1}] if case.raised else []
    test = {
        "rule_files": [str(FOLDER / "alerts.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in case.series.items()],
                "promql_expr_test": [
                    {"expr": raised, "eval_time": f"{case.minutes}m", "exp_samples": samples}
                ],
            }
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps(test), encoding="utf-8")
    promtool(prometheus_bin, "test", "rules", str(file))


def test_every_alert_is_seen_raised_and_not_raised() -> None:
    seen = {(case.alert, case.raised) for case in CASES}
    assert seen == {(each["alert"], raised) for each in alerts() for raised in (True, False)}


def test_the_rules_are_as_prometheus_wants_them(prometheus_bin: Path) -> None:
    promtool(
        prometheus_bin, "check", "rules", "--lint=all", "--lint-fatal", str(FOLDER / "alerts.yaml")
    )


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    chapters = headings((FOLDER / "README.md").read_text(encoding="utf-8"))
    for alert in alerts():
        said = alert["annotations"]
        assert {"summary", "description", "runbook"} == set(said), alert["alert"]
        assert said["runbook"].rpartition("#")[2] in chapters, alert["alert"]
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
    runbooks = {each for each in chapters if each.startswith("mcp")}
    assert runbooks == {each["alert"].lower() for each in alerts()}


def headings(text: str) -> set[str]:
    return {found.lower() for found in re.findall(r"^#+ (\w+)$", text, re.MULTILINE)}


def test_the_operators_manifest_is_made_of_the_same_rules() -> None:
    """By the commands that README.md gives, but for the one that talks to a cluster."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(\(.*?\)) \| kubectl apply -f -\n```", text, re.DOTALL)
    done = subprocess.run(
        ["sh", "-euc", commands],
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    manifest = yaml.safe_load(done.stdout)
    assert manifest["kind"] == "PrometheusRule"
    assert manifest["spec"] == {"groups": groups()}


def promtool(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [folder / "promtool", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
