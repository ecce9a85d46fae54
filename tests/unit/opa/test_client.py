"""What an answer of OPA's means, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import DecisionError, DecisionInvalid, DecisionUnavailable
from sidecar.opa.client import UNTRACED, DecisionClient, read_answer, read_decision


@pytest.mark.parametrize(
    ("provenance", "revision"),
    [
        pytest.param(None, None, id="none"),
        pytest.param({"version": "1.19.1"}, None, id="no bundle"),
        pytest.param({"revision": "old"}, "old", id="legacy"),
        pytest.param({"bundles": {"a": {"revision": "r1"}}}, "r1", id="one"),
        pytest.param({"bundles": {"a": {}}}, None, id="one without"),
        pytest.param(
            {"bundles": {"b": {"revision": "2"}, "a": {"revision": "1"}, "c": {}}},
            "a=1,b=2,c=",
            id="several",
        ),
        pytest.param({"bundles": []}, None, id="wrong type"),
        pytest.param({"bundles": {"a": 1}}, None, id="wrong bundle"),
        pytest.param("r1", None, id="wrong provenance"),
    ],
)
def test_the_revision_of_the_bundles(provenance: Any, revision: str | None) -> None:
    assert read_decision({"result": True, "provenance": provenance}).revision == revision


def test_the_policys_own_revision_goes_first() -> None:
    answer = {"result": {"allow": True, "revision": "own"}, "provenance": {"revision": "bundle"}}
    assert read_decision(answer).revision == "own"


@pytest.mark.parametrize(
    ("given_id", "opa_id"), [("d1", "d1"), ("", None), (7, None), (None, None)]
)
def test_the_decision_id(given_id: Any, opa_id: str | None) -> None:
    assert read_decision({"result": True, "decision_id": given_id}).opa_id == opa_id


@pytest.mark.parametrize(
    ("status", "body", "kind", "detail"),
    [
        pytest.param(500, b"", DecisionUnavailable, "server_error", id="500"),
        pytest.param(500, b"[]", DecisionUnavailable, "server_error", id="500 list"),
        pytest.param(500, b'{"errors":7}', DecisionUnavailable, "server_error", id="500 errors"),
        pytest.param(500, b'{"errors":[7]}', DecisionUnavailable, "server_error", id="500 error"),
        pytest.param(
            500,
            b'{"errors":[{"code":"storage"}]}',
            DecisionUnavailable,
            "server_error",
            id="storage",
        ),
        pytest.param(
            500, b'{"errors":[{"code":"eval_x"}]}', DecisionInvalid, "evaluation_error", id="eval"
        ),
        pytest.param(
            503, b'{"errors":[{"code":"eval_x"}]}', DecisionUnavailable, "server_error", id="503"
        ),
        pytest.param(429, b"", DecisionUnavailable, "server_error", id="429"),
        pytest.param(401, b"{}", DecisionInvalid, "bad_response", id="401"),
        pytest.param(204, b"", DecisionInvalid, "bad_response", id="204"),
        pytest.param(200, b"", DecisionInvalid, "bad_response", id="empty"),
        pytest.param(200, b'{"result":NaN}', DecisionInvalid, "bad_response", id="NaN"),
        pytest.param(200, b'"\xff"', DecisionInvalid, "bad_response", id="no UTF-8"),
    ],
)
def test_an_answer_that_is_none(
    status: int, body: bytes, kind: type[DecisionError], detail: str
) -> None:
    with pytest.raises(DecisionError) as caught:
        read_answer(status, body)
    assert (type(caught.value), caught.value.detail) == (kind, detail)


def test_an_evaluation_error_says_where_but_no_values() -> None:
    error = {
        "code": "eval_builtin_error",
        "message": "regex.match: error parsing `hunter2`",
        "location": {"file": "custom.rego", "row": 7, "col": 1},
    }
    with pytest.raises(DecisionInvalid) as caught:
        read_answer(500, json.dumps({"errors": [error]}).encode())
    assert str(caught.value) == "the policy failed: eval_builtin_error at custom.rego:7"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(status=st.integers(100, 599), value=JSON | st.fixed_dictionaries({"result": JSON}))
def test_only_a_clean_allow_is_an_allow(status: int, value: Any) -> None:
    """Anything else is a `DecisionError`, and nothing else is raised."""
    try:
        decision = read_decision(read_answer(status, json.dumps(value).encode()))
    except DecisionError:
        return
    result = value["result"]
    assert status == 200
    assert decision.allow is (result if isinstance(result, bool) else result["allow"])


def test_our_own_questions_are_a_valid_context_that_is_not_sampled() -> None:
    version, trace, span, flags = UNTRACED["traceparent"].split("-")
    assert (version, len(trace), len(span), flags) == ("00", 32, 16, "00")
    assert int(trace, 16)
    assert int(span, 16)


async def test_a_client_is_made_and_closed_without_connecting() -> None:
    for url in ("unix:///run/opa.sock", "http://127.0.0.1:8181/", "https://opa:8181/prefix"):
        await DecisionClient(url).close()
