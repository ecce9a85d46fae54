"""Which certificates are due, given what there is and the time. Pure, but for the keys it draws.

An authority goes through four states, and whatever signs is believed throughout::

    coming    in the Secret, and so put into `caBundle`; it signs nothing
    believed  both registrations were seen to name it: from then on the overlap counts
    signing   the overlap is over: API servers and replicas know it. A leaf of it is made at once
    gone      another one signs; it stays in `caBundle` until it ends, and no leaf outlives it

Replicas look at moments of their own, and do not speak with each other. So a replica may serve the
leaf before the last one, but never one whose authority is not believed yet, or no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from cryptography.x509 import Certificate

from sidecar.injector.certificates import Kept, authority, leaf, names_of
from sidecar.injector.injection import Lifetimes


@dataclass(frozen=True, slots=True)
class Moment:
    """What a step goes by: the time, what is wanted, and what both registrations hold."""

    now: datetime
    names: Sequence[str]
    lifetimes: Lifetimes
    held: Collection[Certificate] = ()

    def after(self, since: datetime, seconds: float) -> bool:
        """Whether so much time has passed."""
        return since + timedelta(seconds=seconds) <= self.now


def renewed(kept: Kept | None, moment: Moment) -> Kept:
    """What there has to be; `kept` itself when nothing is due."""
    if kept is None or _ended(kept, moment):
        return _first(moment)
    for step in STEPS:
        kept = step(kept, moment)
    return kept


def _ended(kept: Kept, moment: Moment) -> bool:
    return (kept.coming or kept.authority).ends <= moment.now


def _first(moment: Moment) -> Kept:
    """Nobody believes anything: there is no gap to be kept from."""
    made = authority(moment.now, moment.lifetimes.authority)
    return Kept(leaf(made, moment.now, moment.lifetimes.leaf, moment.names), made)


def _announced(kept: Kept, moment: Moment) -> Kept:
    """The next authority, when this one would not outlive a leaf by the time that one may sign."""
    needed = moment.lifetimes.leaf + moment.lifetimes.overlap
    if kept.coming is not None or not moment.after(kept.authority.ends, -needed):
        return kept
    return replace(kept, coming=authority(moment.now, moment.lifetimes.authority))


def _believed(kept: Kept, moment: Moment) -> Kept:
    if kept.coming is None or kept.believed is not None:
        return kept
    known = kept.coming.certificate in moment.held
    return replace(kept, believed=moment.now) if known else kept


def _handed_over(kept: Kept, moment: Moment) -> Kept:
    if kept.coming is None:
        return kept
    held = kept.coming.certificate in moment.held and kept.believed is not None
    known = held and moment.after(kept.believed or moment.now, moment.lifetimes.overlap)
    if not known and kept.authority.ends > moment.now:
        return kept
    made = leaf(kept.coming, moment.now, moment.lifetimes.leaf, moment.names)
    return Kept(made, kept.coming, gone=(*kept.gone, kept.authority.certificate))


def _fresh(kept: Kept, moment: Moment) -> Kept:
    """Another leaf after two thirds of its life, or for other names."""
    two_thirds = kept.leaf.begins + (kept.leaf.ends - kept.leaf.begins) * 2 / 3
    if moment.now < two_thirds and names_of(kept.leaf.certificate) == [*moment.names]:
        return kept
    made = leaf(kept.authority, moment.now, moment.lifetimes.leaf, moment.names)
    return replace(kept, leaf=made)


def _forgotten(kept: Kept, moment: Moment) -> Kept:
    counting = tuple(each for each in kept.gone if each.not_valid_after_utc > moment.now)
    return kept if counting == kept.gone else replace(kept, gone=counting)


STEPS: Sequence[Callable[[Kept, Moment], Kept]] = (
    _announced,
    _believed,
    _handed_over,
    _fresh,
    _forgotten,
)
