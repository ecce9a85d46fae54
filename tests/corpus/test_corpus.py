"""Nothing in the corpus is executed: at no server, over no transport, under neither policy."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.corpus.cases import ROADS, Case, items, load
from tests.corpus.conftest import REPORTS
from tests.corpus.places import DENY_ALL, DIRECT, PLACES, RULES, Place, World
from tests.corpus.runner import Report, run
from tests.support.opa import real_opa, write
from tests.support.processes import ROOT, patient
from tests.support.raw import beside

pytestmark = pytest.mark.timeout(600)

AT_ONCE = 3
CASES = load()
LIVE = [each for each in CASES if each.live]
REACHED = [each for each in PLACES if each.front in ("http", "stdio")]

Futures = dict[tuple[Place, str], Future[Report]]


@pytest.fixture(scope="module")
def world(
    opa_bin: Path, node_parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("corpus")
    folders = {DENY_ALL: ROOT / "policies" / DENY_ALL}
    for name, rules in RULES.items():
        folders[name] = write(folder / name, {"custom.rego": rules})
    library = str(ROOT / "policies" / "mcp")
    with ExitStack() as stack:
        opa = {
            name: stack.enter_context(beside(real_opa(opa_bin, policy, library))).url
            for name, policy in folders.items()
        }
        yield World(folder, node_parts, opa, patient(opa_bin))


@pytest.fixture(scope="module")
def reports(world: World) -> Iterator[Futures]:
    """Several places at a time, in the order of the tests that wait for them."""
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as pool:
        futures = {
            (place, DIRECT): pool.submit(run, world, place, DIRECT, LIVE) for place in REACHED
        }
        futures |= {
            (place, policy): pool.submit(run, world, place, policy, CASES)
            for place in PLACES
            for policy in place.policies
        }
        yield futures
        pool.shutdown(cancel_futures=True)


# ── The corpus is whole ───────────────────────────────────────────────────────────────────────────


def test_everything_that_is_known_has_a_case() -> None:
    covered = {each for case in CASES for each in case.covers}
    assert covered == set(items())


def test_no_two_cases_have_one_name() -> None:
    names = [(each.file, each.name) for each in CASES]
    assert len(names) == len(set(names))


def test_every_case_has_a_road_and_every_road_has_cases() -> None:
    assert all(each.roads for each in CASES)
    assert {road for each in CASES for road in each.roads} == set(ROADS)


# ── The attacks are live, and die at the sidecar ──────────────────────────────────────────────────


@pytest.mark.parametrize("place", REACHED, ids=str)
def test_a_server_that_is_reached_directly_executes_what_it_is_said_to(
    reports: Futures, place: Place
) -> None:
    report = reports[place, DIRECT].result()
    expected = {(each.name, road) for each in LIVE for road in _live_at(each, place)}
    assert not expected - report.live


def _live_at(case: Case, place: Place) -> list[str]:
    return [
        road
        for server, road in (each.split("/") for each in case.live)
        if server == place.server and road in place.roads
    ]


@pytest.mark.parametrize(
    ("place", "policy"),
    [
        pytest.param(place, policy, id=f"{place} {policy}")
        for place in PLACES
        for policy in place.policies
    ],
)
def test_nothing_is_executed_and_the_sidecar_lives_on(
    reports: Futures, place: Place, policy: str
) -> None:
    report = reports[place, policy].result()
    REPORTS.append(report)
    assert set(report.runs) == set(place.roads)
    assert not sum(report.executed.values()), "\n".join(report.problems)
    assert not report.problems, "\n".join(report.problems)
