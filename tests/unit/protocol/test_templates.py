"""Which URIs a template stands for."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.protocol.templates import MAX_TEMPLATE, MAX_URI, matches

CASES = """
    a://b                a://b                yes
    a://b                a://bc               no
    a://{x}              a://b                yes
    a://{x}              a://                 no
    a://{x}              a://b/c              no
    a://{x}              a://b?c              no
    a://{x}              a://b%2Fc            yes
    a://{x}              z://b                no
    a://{x}/c            a://b/c              yes
    a://{x}/c            a://b/d              no
    a://{x}/c            a:///c               no
    a://{x}/             a:///                no
    a://{x}/{y}          a://b/c              yes
    a://{x}/{y}          a://b/               no
    a://{x}/{y}          a://b/c/d            no
    a://{x}-{y}.txt      a://b-c.txt.txt      yes
    a://{x}-{y}.txt      a://b-.txt           no
    {x}aa                aaa                  yes
    {x}aa                aa                   no
    a://{+x}             a://b/c?d#e          yes
    a://{+x}             a://                 no
    a://{+x}/end         a://b/c/end          yes
    a://{+x}-{y}         a://b-c/d-e          no
    a://b{?q}            a://b                yes
    a://b{?q,r}          a://b?q=1&r=2        yes
    a://b{?q}            a://bc               no
    a://b{?q}            a://b#c              no
    a://{x}{?q}          a://b?q=1            yes
    a://{x}{?q}          a://b/c?q=1          no
    a://b{#f}            a://b#c              yes
    a://b{/x}            a://b                yes
    a://b{/x}            a://b/c              yes
    a://b{/x}            a://bc               no
    a://b{/x}            a://b/c/d            no
    a://b{/x*}/z         a://b/c/d/z          yes
    a://b{/x*}           a://b/c/d            yes
    a://b{;x}            a://b;x=1            yes
    a://{x}{y}           a://bc               no
    a://{x               a://{x               no
    a://x}               a://x}               no
    a://{x}}             a://b}               no
    a://{{x}}            a://{b}              no
"""


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_what_a_template_stands_for(case: str) -> None:
    template, uri, expected = case.split()
    assert matches(template, uri) is (expected == "yes")


def test_what_is_too_long_is_not_looked_at() -> None:
    assert matches("{+x}", "a" * MAX_URI)
    assert not matches("{+x}", "a" * (MAX_URI + 1))
    assert matches("a" * (MAX_TEMPLATE - 3) + "{x}", "a" * MAX_TEMPLATE)
    assert not matches("a" * (MAX_TEMPLATE - 2) + "{x}", "a" * MAX_TEMPLATE)


PIECES = st.text("abc-.", min_size=1, max_size=4)
TEXTS = st.text("/:xyz", min_size=1, max_size=4)


@given(TEXTS, st.lists(st.tuples(PIECES, TEXTS), max_size=5))
def test_a_template_stands_for_what_it_is_filled_with(
    start: str, filled: list[tuple[str, str]]
) -> None:
    template = start + "".join(f"{{v}}{text}" for _, text in filled)
    assert matches(template, start + "".join(piece + text for piece, text in filled))


@given(st.text("ab{}+?/", max_size=12), st.text("ab{}+?/", max_size=12))
def test_no_template_is_too_odd(template: str, uri: str) -> None:
    assert matches(template, uri) in (True, False)
    if "{" not in template and "}" not in template:
        assert matches(template, uri) is (template == uri)


def test_a_long_look_is_short() -> None:
    template, uri = "{x}ab" * 400 + "c", "ab" * 4000
    began = time.perf_counter()
    assert not matches(template, uri)
    assert time.perf_counter() - began < 0.5
