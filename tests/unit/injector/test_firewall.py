"""The rules of mode `redirect`, as text. What they do is seen in tests/e2e and tests/pods."""

from __future__ import annotations

from sidecar.injector.firewall import TABLE, ruleset


def test_they_replace_themselves() -> None:
    lines = ruleset(8080, 15801, 20001).splitlines()
    assert lines[:3] == [f"table {TABLE}", f"delete table {TABLE}", f"table {TABLE} {{"]


def test_the_exception_is_one_user_on_loopback_and_stands_before_the_rule() -> None:
    rules = [line.strip() for line in ruleset(8080, 15801, 20001).splitlines() if "dport" in line]
    assert rules == [
        "tcp dport 8080 redirect to :15801",
        'oifname "lo" tcp dport 8080 meta skuid 20001 accept',
        'oifname "lo" tcp dport 8080 redirect to :15801',
    ]
