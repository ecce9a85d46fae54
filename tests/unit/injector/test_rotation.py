"""What is due at which time; and that whatever is served is believed, through years of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from cryptography.x509 import Certificate
from hypothesis import given
from hypothesis import strategies as st

from sidecar.injector.certificates import Kept, data_of, names_of, read
from sidecar.injector.injection import Lifetimes
from sidecar.injector.rotation import Moment, renewed

START = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = ("injector.system.svc",)
LIFETIMES = Lifetimes()


def moment(days: float, held: Collection[Certificate] = (), *names: str) -> Moment:
    return Moment(START + timedelta(days=days), names or NAMES, LIFETIMES, held)


FIRST = renewed(None, moment(0))
ALL = FIRST.authorities


def reached(*days: float) -> Kept:
    """After looks on these days, at each of which both registrations hold what there was."""
    found = FIRST
    for day in days:
        found = renewed(found, moment(day, found.authorities))
    return found


@pytest.mark.parametrize(
    ("day", "leaf_is_new"),
    [(0, False), (19.9, False), (20, True), (29, True), (31, True), (300, True)],
)
def test_a_leaf_is_renewed_after_two_thirds_of_its_life(day: float, leaf_is_new: bool) -> None:
    found = renewed(FIRST, moment(day, ALL))
    assert (found is not FIRST) is leaf_is_new
    assert found.authority is FIRST.authority
    found.leaf.certificate.verify_directly_issued_by(FIRST.authority.certificate)


def test_nothing_is_due_again_at_once() -> None:
    for day in (0.0, 20.0, 334.0):
        found = reached(day)
        assert renewed(found, moment(day)) is found
        again = read(data_of(found))
        assert renewed(again, moment(day)) is again


def test_other_names_need_another_leaf() -> None:
    found = renewed(FIRST, moment(1, ALL, "other.system.svc"))
    assert names_of(found.leaf.certificate) == ["other.system.svc"]
    assert found.authority is FIRST.authority


@pytest.mark.parametrize(
    ("days", "state"),
    [
        pytest.param([333.9], (1, False, False), id="an authority that outlives the next leaf"),
        pytest.param([334], (2, False, False), id="one that would not, by the end of the overlap"),
        pytest.param([334, 334.1], (2, True, False), id="the next is seen in both registrations"),
        pytest.param([334, 334.1, 335], (2, True, False), id="for less than the overlap"),
        pytest.param([334, 334.1, 335.1], (2, False, True), id="for as long: it signs"),
        pytest.param([334, 334.1, 335.1, 364.9], (2, False, True), id="the old one stays"),
        pytest.param([334, 334.1, 335.1, 365], (1, False, True), id="until it ends"),
        pytest.param([400], (1, False, True), id="nobody looked for too long: all over again"),
    ],
)
def test_an_authority_is_handed_over(days: list[float], state: tuple[int, bool, bool]) -> None:
    found = reached(*days)
    another = found.authority.certificate != FIRST.authority.certificate
    assert (len(found.authorities), found.believed is not None, another) == state
    found.leaf.certificate.verify_directly_issued_by(found.authority.certificate)


def test_what_nobody_believes_does_not_sign() -> None:
    """Registrations that can not be written hold it up, and its time begins when they can be."""
    coming = reached(334)
    found = coming
    for day in (336, 350, 360):
        found = renewed(found, moment(day, ALL))
        assert (found.coming, found.believed) == (coming.coming, None)
        assert found.authority is FIRST.authority
    seen = renewed(found, moment(361, coming.authorities))
    assert seen.believed == START + timedelta(days=361)
    assert renewed(seen, moment(362, ALL)).authority is FIRST.authority
    handed = renewed(seen, moment(362, coming.authorities))
    assert handed.authority is coming.coming


def test_when_nothing_else_is_left_what_comes_signs() -> None:
    found = renewed(reached(334), moment(365))
    assert found.coming is None
    assert len(found.authorities) == 1
    assert found.leaf.ends == START + timedelta(days=395)


# ── Years of it ───────────────────────────────────────────────────────────────────────────────────

LAG = 0.4
"""Days until all API servers go by what was written: less than the overlap of one."""

LONGEST = 7.5
"""Days for which a replica may fail to look: less than a third of a leaf's life."""

LUCK = "well", "well", "well", "no secret", "no registration", "nothing"
"""What of it can be written or read at a look."""


@dataclass
class World:
    """The Secret, what `caBundle` was when, and what each replica serves."""

    secret: Kept | None = None
    bundles: list[tuple[datetime, tuple[Certificate, ...]]] = field(default_factory=list)
    serving: dict[int, Kept] = field(default_factory=dict)

    def held(self, at: datetime) -> tuple[Certificate, ...]:
        return next((held for since, held in reversed(self.bundles) if since <= at), ())

    def look(self, replica: int, now: datetime, can: str) -> None:
        """As a replica looks, where some of what it needs may not be had."""
        if can == "nothing":
            return
        held = self.held(now) if can != "no registration" else ()
        due = renewed(self.secret, Moment(now, NAMES, LIFETIMES, held))
        if can != "no secret":
            self.secret = due
        if self.secret is not None:
            self.serving[replica] = self.secret
            if can != "no registration":
                self.bundles.append((now, self.secret.authorities))

    def gaps(self, now: datetime) -> list[int]:
        """Which replicas serve what some API server would not believe, now."""
        return [
            replica
            for replica, kept in self.serving.items()
            for signer in (kept.authority.certificate,)
            if kept.leaf.ends <= now
            or signer not in self.held(now)
            or signer not in self.held(now - timedelta(days=LAG))
        ]


@given(st.randoms(use_true_random=True), st.floats(0.3, 2.4))
def test_whatever_is_served_is_believed(chance: Random, pause: float) -> None:
    """At any moment of years, by API servers that are up to date and by those that are behind."""
    world, now, authorities = World(), START, set[Certificate]()
    looked = dict.fromkeys(range(3), START)
    for replica in looked:
        world.look(replica, now, "well")
    now += timedelta(days=LAG)
    while now < START + timedelta(days=2.5 * 365):
        assert world.gaps(now) == []
        replica, luck = chance.randrange(3), chance.choice(LUCK)
        late = [each for each, last in looked.items() if now - last > timedelta(days=LONGEST)]
        for each, can in ((replica, luck), *((each, "well") for each in late)):
            world.look(each, now, can)
            looked[each] = now if can == "well" else looked[each]
            assert world.gaps(now) == []
        authorities |= {*world.held(now)}
        now += timedelta(days=chance.uniform(0.01, pause))
    assert len(authorities) >= 3


def test_a_clock_that_is_behind_does_no_harm() -> None:
    found = reached(334, 334.1, 335.1)
    back = renewed(found, moment(330, found.authorities))
    assert replace(back) == found
