"""Who acts, and for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.policy.identity import (
    MAX_CHAIN,
    PRINCIPAL_TYPES,
    UNKNOWN,
    Actor,
    Principal,
    static,
)

BOT = Principal("agent", "bot", "static")
ANA = Principal("human", "ana", "https://idp.example.com", groups=("support",))


def test_the_same_name_at_two_issuers_is_two_principals() -> None:
    assert Principal("human", "ana", "a").key != Principal("human", "ana", "b").key


@given(*(st.text(max_size=6) for _ in range(4)))
def test_two_principals_never_share_a_key(
    issuer: str, id_: str, other_issuer: str, other_id: str
) -> None:
    try:
        one = Principal("human", id_, issuer)
        other = Principal("human", other_id, other_issuer)
    except ValueError:
        return
    assert (one.key == other.key) == ((issuer, id_) == (other_issuer, other_id))


def test_an_issuer_that_could_be_taken_for_another_is_refused() -> None:
    Principal("human", "b|c", "a")
    with pytest.raises(ValueError, match="issuer"):
        Principal("human", "c", "a|b")


def test_one_that_acts_for_itself_acts_for_nobody_else() -> None:
    actor = static(ANA)
    assert (actor.principal, actor.on_behalf_of) == (ANA, None)
    assert actor.keys == ("https://idp.example.com|ana",)
    assert (actor.assurance, actor.sources) == (1, ("static",))


def test_the_first_acts_and_the_last_is_the_one_it_acts_for() -> None:
    between = Principal("service", "gateway", "static")
    actor = Actor((BOT, between, ANA), assurance=2, sources=("jwt",))
    assert (actor.principal, actor.on_behalf_of) == (BOT, ANA)
    assert actor.keys == ("static|bot", "static|gateway", "https://idp.example.com|ana")
    assert static(BOT, ANA).chain == (BOT, ANA)


def test_only_verified_evidence_has_a_token_or_a_purpose() -> None:
    for actor in (static(ANA), UNKNOWN):
        assert (actor.token, actor.purpose) == (None, None)


def test_nobody_is_unknown_and_nothing_vouches_for_it() -> None:
    assert UNKNOWN.principal.type == "unknown"
    assert (UNKNOWN.assurance, UNKNOWN.sources, UNKNOWN.on_behalf_of) == (0, (), None)
    assert set(PRINCIPAL_TYPES) == {"human", "service", "agent", "unknown"}


@pytest.mark.parametrize("length", [0, MAX_CHAIN + 1])
def test_a_chain_has_a_bound(length: int) -> None:
    with pytest.raises(ValueError, match="chain"):
        Actor((BOT,) * length, assurance=1, sources=())
    assert len(Actor((BOT,) * MAX_CHAIN, assurance=1, sources=()).chain) == MAX_CHAIN
