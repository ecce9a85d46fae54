"""A minute of search in every run of the tests; the seeds also where there is no fuzzer."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from tests.conftest import MISSING
from tests.fuzz.__main__ import again, report, run
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS

SECONDS = 60


@pytest.fixture(scope="session")
def fuzzer() -> None:
    """Atheris, which has builds for Linux on x86-64 alone."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip(f"{MISSING} atheris (it has no build for this machine or this Python)")


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_hold(target: str) -> None:
    assert SEEDS[target]
    for each in SEEDS[target]:
        TARGETS[target](each)


@pytest.mark.usefixtures("fuzzer")
def test_a_fault_that_was_planted_is_found_and_can_be_looked_at_again(tmp_path: Path) -> None:
    (ran,) = run(30, ["planted"], tmp_path / "findings", tmp_path / "corpus")
    assert not ran.fine
    (finding,) = ran.findings
    assert b"\r\n" in finding.read_bytes()
    assert "AssertionError" in report([ran])
    replayed = subprocess.run(again(ran, finding), capture_output=True, timeout=30, check=False)
    assert replayed.returncode == ran.code != 0


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.usefixtures("fuzzer")
def test_a_minute_of_search_finds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(SECONDS, list(TARGETS), tmp_path / "findings", tmp_path / "corpus")
    with capsys.disabled():
        print(f"\n{report(ran)}")
    assert [each.target for each in ran if not each.fine] == []
