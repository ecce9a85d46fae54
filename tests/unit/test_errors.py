"""The tree of errors: stable codes, and what each of them tells its caller."""

from __future__ import annotations

import inspect
import re
from typing import get_args

import pytest

from sidecar import errors
from sidecar.errors import ConfigError, ProtocolError, SidecarError, UpstreamError

CLASSES = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, SidecarError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_stands_in_the_drawing(kind: type[SidecarError]) -> None:
    assert re.search(rf"^[ │├└─]*{kind.__name__}\b", errors.__doc__ or "", re.MULTILINE)


def test_the_drawing_names_no_class_that_is_not_there() -> None:
    drawn = set(re.findall(r"^[ │]*[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE))
    assert drawn == {each.__name__ for each in CLASSES} - {"SidecarError"}


def test_codes_are_stable_words_and_each_means_one_thing() -> None:
    codes = [each.code for each in CLASSES]
    assert all(re.fullmatch(r"[a-z][a-z_]*", each) for each in codes)
    assert len(set(codes)) == len(codes)


def test_the_drawing_shows_who_is_whose_child() -> None:
    ancestors: list[tuple[int, str]] = []
    checked = 0
    for found in re.finditer(r"^[ │├└─]*([A-Z]\w+)  ", errors.__doc__ or "", re.MULTILINE):
        column, name = found.start(1) - found.start(), found[1]
        ancestors = [each for each in ancestors if each[0] < column]
        if ancestors:
            assert getattr(errors, name).__base__.__name__ == ancestors[-1][1]
            checked += 1
        ancestors.append((column, name))
    assert checked == len(CLASSES) - 1


def test_a_configuration_error_lists_every_problem() -> None:
    assert ConfigError(["a: no", "b: no"]).problems == ("a: no", "b: no")
    assert str(ConfigError(["a: no", "b: no"])) == "a: no; b: no"
    assert ConfigError("only one").problems == ("only one",)


@pytest.mark.parametrize(
    ("kind", "rpc_code", "status"),
    [
        pytest.param(errors.MalformedMessage, -32600, 400, id="malformed"),
        pytest.param(errors.HeaderMismatch, -32020, 400, id="headers"),
        pytest.param(errors.UnknownMethod, -32601, 200, id="method"),
    ],
)
def test_a_protocol_error_knows_its_answer(
    kind: type[ProtocolError], rpc_code: int, status: int
) -> None:
    error = kind("no")
    assert (error.rpc_code, error.status, error.request_id) == (rpc_code, status, None)
    told = kind("no", request_id="7", rpc_code=-1, status=418)
    assert (told.rpc_code, told.status, told.request_id) == (-1, 418, "7")
    assert (kind.rpc_code, kind.status) == (rpc_code, status)


def test_a_revision_that_is_not_served_is_answered_by_those_that_are() -> None:
    error = errors.UnsupportedVersion("2026-07-28", ("2025-11-25",), request_id=7)
    assert (error.rpc_code, error.status, error.request_id) == (-32022, 400, 7)
    assert error.data == {"supported": ["2025-11-25"], "requested": "2026-07-28"}


@pytest.mark.parametrize("code", get_args(errors.RefusalCode))
def test_a_refused_credential_is_a_401_that_says_why(code: errors.RefusalCode) -> None:
    error = errors.Unauthenticated(code, "no")
    assert (error.code, error.rpc_code, error.status) == (code, -31401, 401)
    again = code in ("keys_unavailable", "review_unavailable")  # nobody has looked at it
    assert error.data == {"reasons": [{"code": code}], "retryable": again}
    assert (error.retryable, error.request_id) == (again, None)
    assert code not in [each.code for each in CLASSES]


@pytest.mark.parametrize(
    ("kind", "retryable"),
    [
        pytest.param(errors.DecisionUnavailable, True, id="unavailable"),
        pytest.param(errors.DecisionInvalid, False, id="invalid"),
    ],
)
def test_only_an_unavailable_decision_may_be_asked_for_again(
    kind: type[errors.DecisionError], retryable: bool
) -> None:
    error = kind("no", detail="timeout")
    assert (error.retryable, error.detail) == (retryable, "timeout")


def test_an_upstream_error_says_whether_a_byte_had_left() -> None:
    assert UpstreamError("gone", sent=True).sent
    assert UpstreamError("gone", sent=False).rpc_code == -31502
    assert errors.UpstreamTimeout("late", sent=True).rpc_code == -31504
