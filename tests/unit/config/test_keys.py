"""The table of all that can be said, and the schema that says the same to editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config import KEYS, describe
from sidecar.errors import ConfigError
from tests.support.settings import (
    EXAMPLES,
    ODD,
    SCHEMA,
    accepted,
    alone,
    at,
    load,
    rules,
    table,
    validator,
    with_policy,
)


def test_the_table_and_the_schema_have_the_same_keys() -> None:
    assert sorted(table()) == sorted(path for path, _ in rules())


def test_every_property_of_the_schema_is_described() -> None:
    described = {path for path, rule in rules() if rule.get("description", "").endswith(".")}
    assert described == {path for path, _ in rules()}
    assert all(group["description"] for group in SCHEMA["properties"].values())


def test_the_schema_promises_the_defaults_that_are_used() -> None:
    used = describe(with_policy())
    groups = {**used, "policy": used["opa"], "log": {"level": used["log_level"]}}
    promised = {p: rule["default"] for p, rule in rules() if "default" in rule and p in KEYS}
    for path, default in promised.items():
        group, _, key = path.partition(".")
        found = groups[group][key]
        assert (list(found) if isinstance(found, tuple) else found) == default, path
    assert len(promised) > 25


@pytest.mark.parametrize("path", KEYS)
def test_the_table_and_the_schema_agree_on_each_value(path: str) -> None:
    for value in (*ODD, *EXAMPLES.values()):
        document = at(path, value)
        assert accepted(document) == validator().is_valid(document), document


@pytest.mark.parametrize(
    ("path", "rule"), [(p, r) for p, r in rules() if "minimum" in r and p in KEYS]
)
def test_bounds_belong_to_the_range(path: str, rule: Mapping[str, Any]) -> None:
    low, high = rule["minimum"], rule["maximum"]
    for value, good in ((low, True), (high, True), (low - 0.001, False), (high + 1, False)):
        assert accepted(at(path, value)) is validator().is_valid(at(path, value)) is good


@given(
    st.dictionaries(
        st.sampled_from([*{path.partition(".")[0] for path in KEYS}, "polcy"]),
        st.dictionaries(
            st.sampled_from([path.partition(".")[2] or path for path in KEYS]), st.sampled_from(ODD)
        )
        | st.sampled_from(ODD),
        max_size=3,
    )
)
def test_what_the_schema_refuses_is_refused(document: dict[str, Any]) -> None:
    if not validator().is_valid(document):
        assert not accepted(document)


def test_each_key_changes_the_settings() -> None:
    assert set(EXAMPLES) == set(KEYS)
    plain = describe(load(mode="check", opa="http://o"))
    for path, value in EXAMPLES.items():
        if path != "identity.source":  # says in a word what `static` says by being there
            found = describe(load(at(path, value), mode="check", **alone(path)))
            assert found != plain, path


@pytest.mark.parametrize(
    ("said", "transport"),
    [
        ("url: http://a/mcp", "streamable_http"),
        ("url: http://a", "streamable_http"),
        ("url: http://a/sse", "sse"),
        ("url: http://a/v1/sse/", "sse"),
        ("url: http://a/sses", "streamable_http"),
        ("url: http://a/events, transport: sse", "sse"),
        ("url: http://a/sse, transport: streamable_http", "streamable_http"),
    ],
)
def test_the_path_says_the_transport_unless_it_is_said(said: str, transport: str) -> None:
    [upstream] = with_policy(f"upstreams: [{{{said}}}]", mode="check").upstreams
    assert upstream.transport == transport


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["http://a:1/mcp"], [("a", "/mcp", "http://a:1/mcp")]),
        (["t=http://a/mcp"], [("t", "/t/mcp", "http://a/mcp")]),
        (
            ["t=http://a/mcp", "s-2=https://b"],
            [("t", "/t/mcp", "http://a/mcp"), ("s-2", "/s-2", "https://b")],
        ),
        (["http://a/x=y"], [("a", "/x=y", "http://a/x=y")]),
    ],
)
def test_servers_on_the_command_line_are_each_below_their_name(
    said: list[str], expected: list[tuple[str, str, str]]
) -> None:
    for way in (said, " ".join(said)):
        found = with_policy(mode="http", listen="127.0.0.1:0", upstream=way).upstreams
        assert [(each.name, each.path, each.url) for each in found] == expected


def test_a_server_that_is_empty_is_none() -> None:
    settings = with_policy({"upstreams": [{"url": "http://a/mcp"}]}, mode="check", upstream=[""])
    assert [each.url for each in settings.upstreams] == ["http://a/mcp"]


@pytest.mark.parametrize("said", ["T=http://a/mcp", "t=ftp://a/mcp", "t=", "t=http://a/mcp b"])
def test_what_is_no_server_is_said(said: str) -> None:
    with pytest.raises(ConfigError, match="--upstream: must be http"):
        with_policy(mode="http", listen="127.0.0.1:0", upstream=[said])
