"""A stamped revision, held against what OPA serves, as time passes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sidecar.opa.expected import Expected, Stamp, stamped


@pytest.mark.parametrize(
    ("revision", "served", "seconds", "lagging"),
    [
        pytest.param("a", "a", 60.0, False, id="served"),
        pytest.param("b", "a", 4.9, False, id="not yet"),
        pytest.param("b", "a", 5.1, True, id="late"),
        pytest.param("b", None, 5.1, True, id="nothing is served"),
        pytest.param(None, None, 5.1, False, id="nothing is expected"),
    ],
)
def test_late_is_after_five_seconds(
    revision: str | None, served: str | None, seconds: float, lagging: bool
) -> None:
    assert Expected(revision, 100.0).lagging(served, 100.0 + seconds) is lagging


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stamped:
    """A file of policy data, and who looks at it."""

    def __init__(self, folder: Path) -> None:
        self.file, self.clock = folder / "data.json", Clock()
        self.stamp = Stamp(self.file, self.clock)

    def write(self, revision: object) -> None:
        """As the kubelet does it: another file takes the place."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps({"mcp": {"revision": revision}}), "utf-8")
        fresh.rename(self.file)
        self.stamp.look()

    def after(self, seconds: float, served: str | None) -> bool:
        self.clock.now += seconds
        self.stamp.look()
        return self.stamp.lagging(served)


@pytest.fixture
def found(tmp_path: Path) -> Stamped:
    return Stamped(tmp_path)


def test_a_new_stamp_has_its_time(found: Stamped) -> None:
    found.write("a")
    assert not found.after(60, "a")
    found.write("b")
    assert not found.after(4.9, "a")
    assert found.after(0.2, "a")
    assert found.stamp.expected.revision == "b"
    assert not found.after(0, "b")


def test_each_stamp_has_its_own_time(found: Stamped) -> None:
    found.write("a")
    assert found.after(6, "old")
    found.write("b")
    assert not found.after(4, "old")
    assert found.after(2, "old")


def test_an_edit_that_keeps_the_stamp_changes_nothing(found: Stamped) -> None:
    found.write("a")
    found.clock.now = 60
    found.write("a")
    assert not found.after(60, "a")
    assert found.after(0, "b")


def test_a_policy_that_tells_no_revision_is_not_held_against_one(found: Stamped) -> None:
    found.write("a")
    assert not found.after(60, None)


NO_STAMP = ["{", "[]", "{}", '{"mcp": []}', '{"mcp": {"revision": 1}}', '{"mcp": {"revision": ""}}']


@pytest.mark.parametrize("content", [None, *NO_STAMP])
def test_without_a_stamp_nothing_is_expected_and_that_is_said_once(
    found: Stamped, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    if content is not None:
        found.file.write_text(content, "utf-8")
    for _ in range(3):
        assert not found.after(60, "a")
    assert [each.split()[0] for each in caplog.messages] == ["policy_not_stamped"]
    found.write("b")
    assert found.after(6, "a")


def test_a_stamp_that_goes_is_not_expected_any_more(found: Stamped) -> None:
    found.write("b")
    assert found.after(6, "a")
    found.file.unlink()
    assert not found.after(6, "a")


def test_the_stamp_of_data() -> None:
    assert stamped(b'{"mcp": {"revision": "r1", "grants": {}}, "more": 1}') == "r1"
    assert [stamped(each.encode()) for each in NO_STAMP] == [None] * len(NO_STAMP)
    assert stamped(b"\xff") is None
