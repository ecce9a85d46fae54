"""What an issuer's settings refuse: what could never work, or would weaken every check."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.policy.issuers import Issuer, KeySource, Review, fetchable, same_origin
from sidecar.policy.jwks import ALGORITHMS
from tests.support.issuing import issuer


def test_the_defaults_are_strict() -> None:
    plain = Issuer("https://idp.example.com", ("me",))
    assert (plain.agents, plain.interactive, plain.claims) == ((), (), ())
    assert set(plain.algorithms) == set(ALGORITHMS)
    assert not {"none", "HS256"} & set(ALGORITHMS)
    assert plain.keys == KeySource()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"name": ""}, "name", id="no-name"),
        pytest.param({"name": "https://a|b"}, "name", id="bar-in-name"),
        pytest.param({"actor_issuers": ("a|b",)}, "name", id="bar-in-another"),
        pytest.param({"audiences": ()}, "audience", id="no-audience"),
        pytest.param({"audiences": ("",)}, "audience", id="empty-audience"),
        pytest.param({"algorithms": ()}, "algorithms", id="no-algorithm"),
        pytest.param({"algorithms": ("HS256",)}, "algorithms", id="hmac"),
        pytest.param({"algorithms": ("none",)}, "algorithms", id="none"),
        pytest.param({"leeway": -1}, "leeway", id="negative-leeway"),
        pytest.param({"leeway": 3600}, "leeway", id="an-hour-of-leeway"),
        pytest.param({"name": "idp", "keys": KeySource()}, "https", id="nowhere-to-discover"),
        pytest.param({"name": "http://a.example", "keys": KeySource()}, "https", id="plain-http"),
    ],
)
def test_an_issuer_that_can_not_be_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        issuer(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"url": "https://a.example/k", "file": "/keys.json"}, id="two-places"),
        pytest.param({"url": "http://a.example/k"}, id="plain-http"),
        pytest.param({"url": "file:///keys"}, id="file-url"),
        pytest.param({"timeout": 0}, id="no-time"),
        pytest.param({"stale": 0}, id="stale-at-once"),
        pytest.param({"interval": 0}, id="no-limit"),
        pytest.param({"retry": 0.1}, id="hasty"),
    ],
)
def test_keys_that_can_not_be_had_safely_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"keys|more than 0|at least"):
        KeySource(**changes)


@pytest.mark.parametrize(
    ("url", "plain", "insecure"),
    [
        pytest.param("https://a.example/k", True, True, id="https"),
        pytest.param("http://127.0.0.1:8080/k", True, True, id="loopback"),
        pytest.param("http://[::1]/k", True, True, id="loopback-6"),
        pytest.param("http://localhost/k", True, True, id="localhost"),
        pytest.param("http://a.example/k", False, True, id="http"),
        pytest.param("http://localhost.a.example/k", False, True, id="not-localhost"),
        pytest.param("http://127.0.0.1.a.example/k", False, True, id="not-loopback"),
        pytest.param("https://u:p@a.example/k", False, False, id="credentials"),
        pytest.param("https:///k", False, False, id="no-host"),
        pytest.param("https://a.example:x/k", False, False, id="no-port"),
        pytest.param("https://[::1/k", False, False, id="no-url"),
        pytest.param("ftp://a.example/k", False, False, id="ftp"),
        pytest.param("keys", False, False, id="word"),
    ],
)
def test_what_may_be_fetched(url: str, plain: bool, insecure: bool) -> None:
    assert (fetchable(url, insecure=False), fetchable(url, insecure=True)) == (plain, insecure)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param("https://a.example/x", "https://A.example:443/y", True, id="default-port"),
        pytest.param("https://a.example", "https://a.example:8443/", False, id="port"),
        pytest.param("https://a.example", "http://a.example/", False, id="scheme"),
        pytest.param("https://a.example", "https://b.a.example/", False, id="host"),
    ],
)
def test_the_same_server(one: str, other: str, same: bool) -> None:
    assert same_origin(one, other) is same


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"url": "http://10.0.0.1"}, "https", id="plain-http"),
        pytest.param({"url": "https://u:p@10.0.0.1"}, "https", id="credentials"),
        pytest.param({"remember": 3600}, "remember", id="an-hour"),
        pytest.param({"remember": -1}, "remember", id="negative"),
        pytest.param({"timeout": 0}, "timeout", id="no-time"),
        pytest.param({"concurrent": 0}, "concurrent", id="no-room"),
        pytest.param({"rate": 0}, "rate", id="no-rate"),
    ],
)
def test_a_review_that_can_not_be_had_safely_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Review(**changes)


def test_only_a_cluster_without_keys_is_asked() -> None:
    assert Issuer("in no URL", ("me",), kind="kubernetes", review=Review()).review == Review()
    with pytest.raises(ValueError, match="not both"):
        Issuer("k", ("me",), review=Review())
    with pytest.raises(ValueError, match="not both"):
        Issuer("k", ("me",), KeySource(file="/keys"), kind="kubernetes", review=Review())
