"""What OPA answers is understood to the last key, or it is no answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import DecisionInvalid
from sidecar.policy.decision import MAX_ATTRIBUTES, Decision, Reason, combine, parse

SCHEMAS = Path(__file__).resolve().parents[3] / "policies" / "schemas"
SCHEMA = json.loads((SCHEMAS / "decision.schema.json").read_text(encoding="utf-8"))
VALID = jsonschema.Draft7Validator(SCHEMA)

WHOLE = {
    "allow": False,
    "reasons": [
        {"code": "missing_scope", "message": "ask for it", "scope": "tickets:write"},
        {"code": "second", "message": ""},
    ],
    "rule": "r",
    "owner": "support",
    "revision": "7",
    "watermark": "w",
    "mode": "shadow",
    "visible": ["a", "b", "a"],
    "obligations": [{"type": "mask_result", "paths": ["x"]}],
    "attributes": {"cost": 3, "who": "me", "sure": True, "share": 0.5},
}


def test_every_key_is_read() -> None:
    assert parse(WHOLE, opa_id="o1", bundle_revision="b") == Decision(
        allow=False,
        reasons=(
            Reason("missing_scope", "ask for it", "tickets:write"),
            Reason("second"),
        ),
        rule="r",
        owner="support",
        revision="7",
        watermark="w",
        mode="shadow",
        visible=frozenset({"a", "b"}),
        obligations=({"type": "mask_result", "paths": ["x"]},),
        attributes={"cost": 3, "sure": True, "who": "me", "share": 0.5},
        opa_id="o1",
    )
    assert VALID.is_valid(WHOLE)


@pytest.mark.parametrize("allow", [True, False])
def test_a_boolean_is_a_decision(allow: bool) -> None:
    short = parse(allow, opa_id="o", bundle_revision="b")
    assert short == Decision(allow=allow, revision="b", opa_id="o")
    assert parse({"allow": allow}, opa_id="o", bundle_revision="b") == short
    assert short.visible is None


def test_to_enforce_is_what_is_meant_when_nothing_is_said() -> None:
    assert parse({"allow": True, "mode": "enforce"}) == parse({"allow": True})


def test_the_policys_own_revision_comes_before_the_bundles() -> None:
    assert parse({"allow": True, "revision": "own"}, bundle_revision="b").revision == "own"
    assert parse({"allow": True}).revision is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        pytest.param(None, "null", id="null"),
        pytest.param(1, "int", id="1 is not true"),
        pytest.param("true", "str", id="text"),
        pytest.param([], "list", id="a list"),
        pytest.param([True], "list", id="a list of true"),
        pytest.param({}, "allow", id="an empty object"),
        pytest.param({"reasons": []}, "allow", id="no allow"),
        pytest.param({"alow": True}, "alow", id="misspelt"),
        pytest.param({"allow": True, "deny": True}, "deny", id="an unknown key"),
        pytest.param({"allow": True, "Allow": True}, "Allow", id="case"),
        pytest.param({"allow": None}, "null", id="allow null"),
        pytest.param({"allow": 1}, "int", id="allow 1"),
        pytest.param({"allow": "true"}, "str", id="allow text"),
        pytest.param({"allow": []}, "list", id="allow list"),
        pytest.param({"allow": True, "reasons": None}, "reasons", id="reasons null"),
        pytest.param({"allow": True, "reasons": {}}, "reasons", id="reasons object"),
        pytest.param({"allow": True, "reasons": ["x"]}, "reasons", id="reason text"),
        pytest.param({"allow": False, "reasons": [{}]}, "reasons", id="reason empty"),
        pytest.param({"allow": False, "reasons": [{"code": "x"}]}, "reasons", id="no message"),
        pytest.param({"allow": False, "reasons": [{"message": "x"}]}, "reasons", id="no code"),
        pytest.param(
            {"allow": False, "reasons": [{"code": 1, "message": "x"}]}, "reasons", id="code number"
        ),
        pytest.param(
            {"allow": False, "reasons": [{"code": "x", "message": None}]}, "reasons", id="no text"
        ),
        pytest.param(
            {"allow": False, "reasons": [{"code": "x", "message": "", "scope": None}]},
            "reasons",
            id="scope null",
        ),
        pytest.param(
            {"allow": False, "reasons": [{"code": "x", "message": "", "help": "y"}]},
            "unknown key",
            id="a reason's unknown key",
        ),
        *(
            pytest.param(
                {"allow": False, "reasons": [{"code": code, "message": ""}]}, "snake_case", id=code
            )
            for code in ("", "Not", "not-granted", "not granted", "1st", "_x", "é")
        ),
        pytest.param({"allow": True, "rule": None}, "rule", id="rule null"),
        pytest.param({"allow": True, "rule": 1}, "rule", id="rule number"),
        pytest.param({"allow": True, "owner": ["x"]}, "owner", id="owner list"),
        pytest.param({"allow": True, "revision": 7}, "revision", id="revision number"),
        pytest.param({"allow": True, "watermark": False}, "watermark", id="watermark"),
        pytest.param({"allow": True, "mode": "dry-run"}, "mode", id="mode"),
        pytest.param({"allow": True, "mode": None}, "mode", id="mode null"),
        pytest.param({"allow": True, "mode": ["shadow"]}, "mode", id="mode list"),
        pytest.param({"allow": True, "visible": None}, "visible", id="visible null"),
        pytest.param({"allow": True, "visible": {"a": True}}, "visible", id="visible object"),
        pytest.param({"allow": True, "visible": "all"}, "visible", id="visible text"),
        pytest.param({"allow": True, "visible": ["a", 1]}, "visible", id="visible number"),
        pytest.param({"allow": True, "obligations": None}, "obligations", id="obligations null"),
        pytest.param({"allow": True, "obligations": ["mask"]}, "obligations", id="obligation text"),
        pytest.param({"allow": True, "obligations": [{}]}, "obligations", id="obligation empty"),
        pytest.param(
            {"allow": True, "obligations": [{"type": 1}]}, "obligations", id="obligation number"
        ),
    ],
)
def test_what_is_not_understood_is_no_decision(value: Any, told: str) -> None:
    with pytest.raises(DecisionInvalid, match=told) as refused:
        parse(value)
    assert refused.value.detail == "bad_response"
    assert not refused.value.retryable
    assert not VALID.is_valid(value)


@pytest.mark.parametrize(
    ("attributes", "kept"),
    [
        pytest.param({"a": None, "b": [1], "c": {}, "d": 1}, {"d": 1}, id="no scalars"),
        pytest.param(None, {}, id="null"),
        pytest.param(["a"], {}, id="a list"),
        pytest.param(
            {f"k{n:02}": n for n in range(30)},
            {f"k{n:02}": n for n in range(MAX_ATTRIBUTES)},
            id="too many",
        ),
    ],
)
def test_bad_attributes_are_dropped_and_deny_nothing(attributes: Any, kept: Any) -> None:
    assert parse({"allow": True, "attributes": attributes}).attributes == kept


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
REASONS = st.fixed_dictionaries(
    {"code": st.sampled_from(["denied", "x_1", "No", ""]), "message": st.text(max_size=3)},
    optional={"scope": st.text(max_size=3), "extra": st.just(1)},
)
DOCUMENTS = st.fixed_dictionaries(
    {"allow": st.booleans() | JSON},
    optional={
        "reasons": st.lists(REASONS | JSON, max_size=2),
        "rule": st.text(max_size=3) | JSON,
        "owner": st.text(max_size=3) | JSON,
        "mode": st.sampled_from(["enforce", "shadow", "off"]),
        "visible": st.lists(st.text(max_size=3), max_size=2) | JSON,
        "obligations": st.lists(st.fixed_dictionaries({"type": st.text(max_size=3)})) | JSON,
        "attributes": st.dictionaries(st.text(max_size=3), JSON, max_size=3),
        "extra": JSON,
    },
)


@given(DOCUMENTS | JSON)
def test_the_schema_and_the_reader_accept_the_same(value: Any) -> None:
    try:
        decision = parse(value)
    except DecisionInvalid:
        assert not VALID.is_valid(value)
        return
    assert VALID.is_valid(value)
    assert decision.allow is (value if isinstance(value, bool) else value["allow"])


def test_the_first_reason_is_the_one_to_go_by() -> None:
    assert parse(WHOLE).reason == "missing_scope"
    assert Decision(allow=True).reason is None


@pytest.mark.parametrize(
    ("allow", "codes", "revoked"),
    [
        pytest.param(False, ["revoked"], True, id="revoked"),
        pytest.param(False, ["revoked", "other"], True, id="revoked first"),
        pytest.param(False, ["other", "revoked"], False, id="revoked second"),
        pytest.param(True, ["revoked"], False, id="an allow"),
        pytest.param(False, [], False, id="no reason"),
    ],
)
def test_only_a_refusal_whose_first_reason_says_so_is_a_revocation(
    allow: bool, codes: list[str], revoked: bool
) -> None:
    assert Decision(allow, tuple(Reason(code) for code in codes)).revoked is revoked


# ── Several targets ───────────────────────────────────────────────────────────────────────────────

YES = Decision(allow=True, rule="yes")
OBLIGED = Decision(allow=True, rule="obliged", obligations=({"type": "mask_result"},))
NO = Decision(allow=False, reasons=(Reason("no"),))
NO_SHADOWED = Decision(allow=False, reasons=(Reason("later"),), mode="shadow")
REVOKED = Decision(allow=False, reasons=(Reason("revoked"),), mode="shadow")


@pytest.mark.parametrize(
    ("decisions", "strictest"),
    [
        pytest.param([YES], YES, id="one"),
        pytest.param([YES, YES], YES, id="all allow"),
        pytest.param([YES, NO, YES], NO, id="one refuses"),
        pytest.param([NO, Decision(allow=False)], NO, id="the first refusal"),
        pytest.param([NO, REVOKED], REVOKED, id="a revocation before any refusal"),
        pytest.param([NO_SHADOWED, NO], NO, id="an enforced refusal before a shadowed one"),
        pytest.param([NO_SHADOWED, REVOKED], REVOKED, id="a revocation before a shadowed refusal"),
        pytest.param([YES, NO_SHADOWED], NO_SHADOWED, id="a shadowed refusal before an allow"),
        pytest.param([YES, OBLIGED], OBLIGED, id="an obligation"),
    ],
)
def test_the_strictest_of_several_decisions_counts(
    decisions: list[Decision], strictest: Decision
) -> None:
    combined = combine(decisions)
    assert (combined.allow, combined.reasons) == (strictest.allow, strictest.reasons)
    assert combined.obligations == strictest.obligations
    assert combined.rule == strictest.rule


def test_obligations_of_all_targets_are_met_together() -> None:
    limited = Decision(allow=True, obligations=({"type": "limit_result"},))
    assert [each["type"] for each in combine([OBLIGED, YES, limited]).obligations] == [
        "mask_result",
        "limit_result",
    ]


def test_lifting_a_refusal_lifts_no_obligation_of_another_target() -> None:
    assert combine([NO_SHADOWED, OBLIGED]) == replace(NO_SHADOWED, mode="enforce")
    assert combine([NO_SHADOWED, replace(OBLIGED, mode="shadow")]) == NO_SHADOWED
    mixed = combine([replace(OBLIGED, mode="shadow"), OBLIGED])
    assert (mixed.allow, mixed.mode, len(mixed.obligations)) == (True, "enforce", 2)


ALL_KINDS = [YES, OBLIGED, replace(OBLIGED, mode="shadow"), NO, NO_SHADOWED, REVOKED]


@given(st.lists(st.sampled_from(ALL_KINDS), min_size=1, max_size=4))
def test_all_must_allow(decisions: list[Decision]) -> None:
    combined = combine(decisions)
    assert combined.allow == all(each.allow for each in decisions)
    assert combined.revoked == any(each.revoked for each in decisions)
    enforced = [each for each in decisions if each.mode == "enforce"]
    if any(not each.allow or each.obligations for each in enforced):
        assert combined.revoked or combined.mode == "enforce"


def test_a_code_ends_where_it_ends() -> None:
    with pytest.raises(DecisionInvalid):
        parse({"allow": False, "reasons": [{"code": "x\n", "message": ""}]})
