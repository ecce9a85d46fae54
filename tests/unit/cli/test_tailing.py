"""One line for an action, whatever names are in it."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.audit import decision_record, outcome_record, stranger_record
from sidecar.cli.tailing import MAX_PENDING, Lines, quoted
from sidecar.conversation import Call, Stranger
from sidecar.policy.decision import Reason
from sidecar.policy.identity import Principal, static
from sidecar.protocol.session import Target
from tests.support import calls


def marked(code: str, text: str) -> str:
    return f"[{code}]{text}[/]"


def lines(*records: dict[str, Any]) -> list[str]:
    show = Lines(marked)
    return [line for record in records for line in show(record)]


def of(call: Call) -> list[str]:
    return lines(decision_record(call), outcome_record(call))


def test_an_allowed_call_is_a_line_once_it_has_ended() -> None:
    call = calls.allowed(resource="ticket:4711")
    assert lines(decision_record(call)) == []
    (line,) = of(call)
    assert line.startswith(
        "14:13:20.010Z  [32]allow[/]  agent:bot for human:alice  get_ticket  on "
    )
    assert line.endswith("  on ticket:4711  success  rule=desk  rev=r7  10.0ms")


def test_a_denial_is_a_line_at_once_and_no_other_when_it_has_ended() -> None:
    call = calls.denied()
    (line,) = of(call)
    assert line.startswith(
        "14:13:20.003Z  [31]deny [/]  agent:bot for human:alice  get_ticket  not_"
    )
    assert line.endswith('  not_granted "no grant covers it", second  rule=default  rev=r7  2.0ms')
    assert lines(decision_record(call)) == [line]


def test_no_decision_says_why() -> None:
    (line,) = of(calls.undecided())
    assert "[33]error[/]" in line
    assert "policy_unavailable" in line


def test_a_denial_that_is_not_enforced_is_a_line_when_the_call_has_ended() -> None:
    call = calls.denied(mode="shadow", outcome="success", rpc_error=None, forwarded=calls.START)
    assert lines(decision_record(call)) == []
    (line,) = of(call)
    assert "[31]deny [/]" in line
    assert "shadow success" in line


def test_an_outcome_whose_decision_was_not_seen_says_what_it_knows() -> None:
    (line,) = lines(outcome_record(calls.allowed()))
    assert "agent:static|bot for static|alice  get_ticket  success  10.0ms" in line


def test_what_is_withdrawn_is_shown_as_the_denial_that_it_is() -> None:
    before, after = calls.allowed(), calls.denied(reasons=(Reason("revoked"),))
    found = lines(decision_record(before), decision_record(after), outcome_record(after))
    assert len(found) == 1
    assert "revoked" in found[0]


@pytest.mark.parametrize(
    ("method", "targets", "said"),
    [
        ("tools/call", ("a",), "  a  "),
        ("resources/read", ("file:///x",), "  resources/read file:///x  "),
        ("subscriptions/listen", tuple("abcde"), "  subscriptions/listen a b c …  "),
    ],
)
def test_what_is_acted_on(method: str, targets: tuple[str, ...], said: str) -> None:
    kind = method.partition("s/")[0]
    operation = calls.operation(method, targets=tuple(Target(kind, each) for each in targets))
    (line,) = of(calls.allowed(operation=operation))
    assert said in line


@pytest.mark.parametrize(
    ("method", "kind"), [("tools/list", "listing"), ("initialize", "negotiation")]
)
def test_methods_that_say_it_all_stand_alone(method: str, kind: str) -> None:
    (line,) = of(calls.allowed(operation=calls.operation(method, Target(kind, "tools"))))
    assert f"  {method}  success" in line


def test_what_is_not_shown_is_said() -> None:
    assert "12 records not shown" in lines({"type": "missed", "count": 12})[0]


def test_strangers_are_a_line() -> None:
    stranger = Stranger("token_expired", "http", "10.1.2.3", "/mcp")
    assert lines(stranger_record(stranger, calls.START, 0)) == [
        "14:13:20.000Z  [31]deny [/]  a stranger from 10.1.2.3  /mcp  token_expired"
    ]


def test_records_of_other_kinds_are_shown_as_far_as_they_go() -> None:
    record = {"type": "newer", "time": "2026-11-22T10:15:00.123Z", "error": "odd"}
    assert lines(record) == ["10:15:00.123Z  [0]-    [/]  odd"]
    assert lines({"type": "unreadable"})


def test_decisions_that_wait_are_bounded() -> None:
    show = Lines(marked)
    for number in range(MAX_PENDING + 10):
        assert list(show(decision_record(calls.allowed(decision_id=str(number))))) == []
    assert len(show._pending) == MAX_PENDING


# ── Hostile names ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("get_ticket", "get_ticket"),
        ("idp.example/x|ana@desk", "idp.example/x|ana@desk"),
        ("Zoë", "Zoë"),
        ("", '""'),
        ("two words", '"two words"'),
        ("rule=all", '"rule=all"'),
        ('a"b', '"a\\"b"'),
        ("a\\x1b", '"a\\\\x1b"'),
        ("\x1b[2J", '"\\x1b[2J"'),
        ("\x9b31m", '"\\x9b31m"'),
        ("a\nb\r\tc", '"a\\nb\\r\\tc"'),
        ("\u202egnp", '"\\u202egnp"'),
        ("zero\u200bwidth", '"zero\\u200bwidth"'),
        ("עברית", '"\\u05e2\\u05d1\\u05e8\\u05d9\\u05ea"'),
        ("z\u0335\u0321", '"z\\u0335\\u0321"'),
        ("\U000e0041", '"\\U000e0041"'),
        ("x" * 100, '"' + "x" * 80 + '…"'),
    ],
)
def test_names_are_harmless(name: str, shown: str) -> None:
    assert quoted(name) == shown


@given(st.text(), st.text(), st.text())
def test_no_name_makes_a_line_anything_but_a_line(tool: str, actor: str, reason: str) -> None:
    who = static(Principal("agent", actor, "idp"), Principal("human", tool, "idp"))
    call = calls.denied(
        actor=who,
        operation=calls.operation(tool, Target("tool", tool)),
        reasons=(Reason(reason, actor),),
        resource=tool,
    )
    for line in of(call):
        assert line.isprintable()
        assert not {unicodedata.bidirectional(each) for each in line} & {"R", "AL", "AN", "RLO"}
        assert len(line) < 6000
