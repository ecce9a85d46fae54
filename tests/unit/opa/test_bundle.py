"""A ConfigMap as YAML: whatever is in it comes out again."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import PolicyUnusable
from sidecar.opa.bundle import Built, config_map, render

BUILT = Built("abc", {".library/authz/decision.rego": "package a\n", "b/c.rego": "x"}, {"mcp": {}})


def test_keys_are_flat_and_the_revision_is_told() -> None:
    found = config_map(BUILT, "mcp-policy", "support")
    assert sorted(found["data"]) == ["b_c.rego", "data.json", "library_authz_decision.rego"]
    assert found["metadata"]["annotations"] == {"mcp-opa-sidecar.io/revision": "abc"}
    assert (found["metadata"]["name"], found["metadata"]["namespace"]) == ("mcp-policy", "support")
    assert "namespace" not in config_map(BUILT, "mcp-policy", None)["metadata"]


def test_two_files_of_one_name_are_refused() -> None:
    with pytest.raises(PolicyUnusable, match="rename one"):
        config_map(Built("abc", {"a/b.rego": "", "a_b.rego": ""}, {}), "x", None)


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(PolicyUnusable, match="too large"):
        config_map(Built("abc", {"a.rego": "é" * 500_001}, {}), "x", None)


LINES = st.lists(
    st.sampled_from(["", "a", "  a", "\ta: b", "# é", "---", "a\r", "\x00", "\x85", "|"])
)


@given(LINES.map("\n".join), st.booleans())
def test_every_text_comes_out_again(text: str, ends: bool) -> None:
    text += "\n" * ends
    found = config_map(Built("abc", {"a.rego": text, "b.rego": "b\n"}, {"mcp": {}}), "x", None)
    assert yaml.safe_load(render(found)) == found


def test_a_policy_can_be_read_in_it() -> None:
    found = config_map(Built("abc", {"a.rego": "package a\n\n\tb if c\n"}, {}), "x", None)
    assert "  a.rego: |2+\n    package a\n\n    \tb if c\n" in render(found)
