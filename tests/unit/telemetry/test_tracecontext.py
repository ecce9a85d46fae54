from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.telemetry.tracecontext import Remote, headers, read_baggage, read_remote

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_parent_is_read() -> None:
    assert read_remote({"traceparent": GOOD}) == Remote(GOOD, TRACE, SPAN, True)


@pytest.mark.parametrize(
    ("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("03", True), ("fe", False)]
)
def test_the_lowest_flag_says_sampled(flags: str, sampled: bool) -> None:
    remote = read_remote({"traceparent": f"00-{TRACE}-{SPAN}-{flags}"})
    assert remote is not None
    assert remote.sampled is sampled


def test_a_later_version_may_say_more() -> None:
    assert read_remote({"traceparent": f"01-{TRACE}-{SPAN}-01-more"}) is not None


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(5, id="number"),
        pytest.param(None, id="null"),
        pytest.param([GOOD], id="list"),
        pytest.param({"a": GOOD}, id="object"),
        pytest.param(True, id="boolean"),
        pytest.param("", id="empty"),
        pytest.param("x" * 1_000_000, id="long"),
        pytest.param(GOOD.upper(), id="upper case"),
        pytest.param(f" {GOOD}", id="space"),
        pytest.param(f"{GOOD}\n", id="newline"),
        pytest.param(f"{GOOD}-more", id="more in version 00"),
        pytest.param(f"01-{TRACE}-{SPAN}-01-a\r\nEvil: 1", id="a header in a later version"),
        pytest.param(f"01-{TRACE}-{SPAN}-01-{'x' * 100}", id="long in a later version"),
        pytest.param(f"ff-{TRACE}-{SPAN}-01", id="version ff"),
        pytest.param(f"00-{'0' * 32}-{SPAN}-01", id="no trace id"),
        pytest.param(f"00-{TRACE}-{'0' * 16}-01", id="no span id"),
        pytest.param(f"00-{TRACE[:-1]}\uff11-{SPAN}-01", id="other digits"),
    ],
)
def test_anything_else_is_no_parent(value: Any) -> None:
    assert read_remote({"traceparent": value}) is None


@pytest.mark.parametrize("name", ["Traceparent", "TRACEPARENT", "trace-parent"])
def test_keys_are_exact(name: str) -> None:
    assert read_remote({name: GOOD}) is None


@pytest.mark.parametrize(
    "state",
    [
        "a=1",
        "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
        "fw529a3039@dt=FfffffA;B:1 2",
        "a=1 , b=2",
        "a=1,,b=2",
        "0a=1",
        ",".join(f"k{n}=v" for n in range(32)),
    ],
)
def test_a_tracestate_goes_on_as_it_came(state: str) -> None:
    remote = read_remote({"traceparent": GOOD, "tracestate": state})
    assert remote is not None
    assert remote.tracestate == state


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(7, id="number"),
        pytest.param({}, id="object"),
        pytest.param("", id="empty"),
        pytest.param(",,", id="no members"),
        pytest.param("a", id="no value"),
        pytest.param("a=", id="empty value"),
        pytest.param("A=1", id="upper case"),
        pytest.param("a=1,a=2", id="twice"),
        pytest.param("a=b=c", id="equals in a value"),
        pytest.param("a=1\r\nEvil: 1", id="a header"),
        pytest.param("a=\u00e9", id="not ASCII"),
        pytest.param("a=" + "x" * 257, id="long value"),
        pytest.param(",".join(f"k{n}=v" for n in range(33)), id="many members"),
        pytest.param(",".join(f"k{n}={'v' * 100}" for n in range(12)), id="long"),
    ],
)
def test_a_bad_tracestate_is_dropped_and_its_parent_kept(state: Any) -> None:
    assert read_remote({"traceparent": GOOD, "tracestate": state}) == Remote(
        GOOD, TRACE, SPAN, True
    )


@pytest.mark.parametrize(
    "baggage",
    [
        "a=1",
        "a=1,b=2",
        "a = 1 ; p ; q=2 , b=%20",
        "a=",
        "userId=alice,serverNode=DF%2028,isProduction=false",
        ",".join(f"k{n}=v" for n in range(64)),
    ],
)
def test_baggage_goes_on_as_it_came(baggage: str) -> None:
    assert read_baggage({"baggage": baggage}) == baggage


@pytest.mark.parametrize(
    "baggage",
    [
        pytest.param(7, id="number"),
        pytest.param(["a=1"], id="list"),
        pytest.param("", id="empty"),
        pytest.param("a", id="no value"),
        pytest.param("a=1,", id="an empty member"),
        pytest.param("a b=1", id="space in a key"),
        pytest.param("a=1 2", id="space in a value"),
        pytest.param('a="1"', id="quotes"),
        pytest.param("a=\u00e9", id="not ASCII"),
        pytest.param("a=1\r\nEvil: 1", id="a header"),
        pytest.param("a=1\n", id="newline"),
        pytest.param(",".join(f"k{n}=v" for n in range(65)), id="many members"),
        pytest.param("a=" + "x" * 8192, id="long"),
    ],
)
def test_bad_baggage_is_dropped(baggage: Any) -> None:
    assert read_baggage({"baggage": baggage}) is None


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(["traceparent", "tracestate", "baggage"]) | st.text()
NEARLY = st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.?", fullmatch=True)


@given(st.dictionaries(KEYS, ANY_JSON | NEARLY))
def test_nothing_raises_and_what_gets_through_fits_in_a_header(meta: dict[str, Any]) -> None:
    remote, baggage = read_remote(meta), read_baggage(meta)
    said = headers(remote.traceparent, remote.tracestate, baggage) if remote else {}
    assert all(value.isascii() and value.isprintable() for value in said.values())


@pytest.mark.parametrize(
    "meta",
    [
        {"baggage": "a=" + " \t" * 4000 + "b"},
        {"baggage": "a" * 8192},
        {"baggage": "a=1" + ";p" * 4000 + " x"},
        {"baggage": "a=1" + " ;" * 4000},
        {"traceparent": GOOD, "tracestate": "a=" + " " * 1021 + ","},
        {"traceparent": GOOD, "tracestate": "a" * 1000 + "@"},
    ],
)
def test_no_input_takes_long(meta: dict[str, str]) -> None:
    start = time.process_time()
    read_remote(meta)
    read_baggage(meta)
    assert time.process_time() - start < 0.05
