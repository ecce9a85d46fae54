"""The official suite comes to the same result with and without the sidecar, check by check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.conftest import ROWS
from tests.conformance.runner import (
    SETS,
    Arena,
    Comparison,
    Key,
    Result,
    Run,
    ScenarioSet,
    Suite,
    arena,
    row,
    through_bridge,
)

pytestmark = pytest.mark.timeout(240)


# A pipe has no streams to poll, and where nothing comes before an answer the bridge answers JSON.
STREAMS = {"server-sse-polling", "server-sse-multiple-streams"}


@pytest.fixture(scope="module", autouse=True)
def _opa(opa_bin: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCP_SIDECAR_OPA_BIN", str(opa_bin))
        yield


@pytest.fixture(scope="module")
def both(suite: Suite) -> Iterator[Arena]:
    with arena(suite) as running:
        yield running


@pytest.fixture(scope="module", params=SETS, ids=lambda each: each.name.replace(" ", "-"))
def compared(both: Arena, request: pytest.FixtureRequest) -> Comparison:
    result = both.compare(request.param)
    ROWS.append(row(result))
    return result


def test_the_fixture_scores_what_it_should(compared: Comparison) -> None:
    expected, run = compared.of, compared.direct
    assert (run.passed, run.failed, run.code) == (expected.passed, expected.failed, 0), run.output


def test_no_check_is_different_through_the_sidecar(compared: Comparison) -> None:
    assert not compared.differences, "\n".join(compared.differences)


@pytest.mark.parametrize("of", SETS, ids=lambda each: each.name.replace(" ", "-"))
def test_a_stdio_server_is_as_good_through_the_bridge(suite: Suite, of: ScenarioSet) -> None:
    with arena(suite, through_bridge) as running:
        compared = running.compare(of)
    ROWS.append(row(compared, "by bridge"))
    assert (compared.sidecar.failed, compared.sidecar.code) == (of.failed, 0)
    other = {key.scenario for key in compared.different} - STREAMS
    assert not other, "\n".join(compared.differences)


def test_no_revision_of_the_suite_is_left_out(suite: Suite) -> None:
    required, versions = suite.revisions()
    assert {each.options[-1] for each in SETS if "--requirements" in each.options} == required
    assert {each.options[-1] for each in SETS if "--spec-version" in each.options} == versions


PASSED = Result("SUCCESS", "it does", None)
FAILED = Result("FAILURE", "it does", "it does not")
FAILED_OTHERWISE = Result("FAILURE", "it does", "it hangs")
NOTE = Result("INFO", "an event came", None)
OTHER_NOTE = Result("INFO", "another event came", None)


@pytest.mark.parametrize(
    ("without", "through", "different"),
    [
        pytest.param(PASSED, PASSED, False, id="same"),
        pytest.param(PASSED, FAILED, True, id="fails"),
        pytest.param(FAILED, PASSED, True, id="is mended"),
        pytest.param(FAILED, FAILED_OTHERWISE, True, id="fails otherwise"),
        pytest.param(PASSED, None, True, id="is not there"),
        pytest.param(None, FAILED, True, id="is new"),
        pytest.param(PASSED, NOTE, True, id="is a note"),
        pytest.param(NOTE, OTHER_NOTE, False, id="notes differ"),
        pytest.param(None, NOTE, False, id="a note more"),
    ],
)
def test_what_counts_as_a_difference(
    without: Result | None, through: Result | None, different: bool
) -> None:
    compared = Comparison(SETS[0], _run(without), _run(through))
    assert bool(compared.differences) is different


def test_another_exit_code_is_a_difference() -> None:
    assert Comparison(SETS[0], _run(PASSED), _run(PASSED, code=1)).differences


def _run(result: Result | None, code: int = 0) -> Run:
    key = Key("ping", "ping", "Ping", 1)
    return Run(code, {} if result is None else {key: result}, "")
