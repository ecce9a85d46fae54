from __future__ import annotations

from sidecar.telemetry.metrics import METRICS
from tests.telemetry import conventions, document


def test_the_document_says_what_the_tables_say() -> None:
    told = document.DOCUMENT.read_text(encoding="utf-8")
    assert told == document.document(), "python -m tests.telemetry.document writes it anew"


def test_names_in_prometheus_are_those_that_it_is_told() -> None:
    """`test_conventions` compares them with what a real sidecar says."""
    theirs = {each.name: conventions.in_prometheus(each) for each in conventions.INSTRUMENTS}
    assert {each.name: document.in_prometheus(each) for each in METRICS} == theirs
