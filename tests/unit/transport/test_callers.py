"""By what callers are told apart."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from sidecar.policy.identity import Principal, static
from sidecar.transport.callers import CREDENTIALS, caller_of
from tests.support.fakes import ANA

BOB = static(Principal("human", "bob", "static"))


def of(**headers: str) -> bytes | None:
    said = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return caller_of(said, CREDENTIALS, None)


def test_who_brings_no_credentials_is_like_all_others() -> None:
    assert of() is None
    assert of(accept="application/json", mcp_session_id="s") is None


@pytest.mark.parametrize("name", sorted(each.replace("-", "_") for each in CREDENTIALS))
def test_a_caller_is_known_by_what_their_server_knows_them_by(name: str) -> None:
    assert of(**{name: "a"}) == of(**{name.upper(): "a", "accept": "text/plain"})
    assert len({of(**{name: "a"}), of(**{name: "b"}), None}) == 3


def test_every_credential_counts() -> None:
    assert len({of(cookie="a"), of(authorization="a"), of(cookie="a", authorization="a")}) == 3
    twice = CIMultiDict([("Cookie", "a"), ("Cookie", "b")])
    assert caller_of(twice, CREDENTIALS, None) not in (of(cookie="a"), of(cookie="b"))


def test_of_what_does_not_go_on_nothing_counts() -> None:
    said = CIMultiDict({"Authorization": "a"})
    assert caller_of(said, CREDENTIALS - {"authorization"}, None) is None


def test_where_the_server_is_told_of_the_actor_that_counts() -> None:
    nothing: CIMultiDict[str] = CIMultiDict()
    found = {caller_of(nothing, CREDENTIALS, actor) for actor in (ANA, BOB, None)}
    assert len(found) == 3


def test_credentials_can_not_be_read_back() -> None:
    secret = "Bearer a-secret"
    found = of(authorization=secret)
    assert found is not None
    assert len(found) == 64
    assert secret.encode() not in found
