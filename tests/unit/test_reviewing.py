"""Tokens that a cluster is asked about: how often, how many at once, and what is remembered."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from sidecar.api_server import Unreachable
from sidecar.errors import Unauthenticated
from sidecar.keys import Authenticator
from sidecar.policy.issuers import Review
from sidecar.policy.tokens import Token
from sidecar.reviewing import MAX_REFUSED
from tests.support.api_server import refused, taken
from tests.support.issuing import AUDIENCE, NOW, account_claims, cluster, issuer, signer


class Cluster:
    """Takes every token but those in `bad`; it can be held up, and be down. With a clock."""

    def __init__(self, **review: Any) -> None:
        self.now = NOW
        self.bad: set[str] = set()
        self.down = False
        self.asked: list[str] = []
        self.going = self.most = 0
        self.open = asyncio.Event()
        self.open.set()
        believed = [issuer(), cluster(review=Review(**review))]
        self.gate = Authenticator(believed, post=self._post, now=lambda: self.now)

    async def _post(self, body: bytes) -> bytes:
        token = json.loads(body)["spec"]["token"]
        self.asked.append(token)
        self.going += 1
        self.most = max(self.most, self.going)
        try:
            await self.open.wait()
        finally:
            self.going -= 1
        if self.down:
            raise Unreachable("ClientConnectorError")
        status = refused() if token in self.bad else taken(account_claims(), [AUDIENCE])
        return json.dumps({"kind": "TokenReview", "status": status}).encode()

    async def take(self, token: str) -> Token:
        return await self.gate.authenticate(token)

    async def code(self, token: str) -> str:
        with pytest.raises(Unauthenticated) as caught:
            await self.take(token)
        assert caught.value.retryable is (caught.value.code == "review_unavailable")
        return caught.value.code

    async def reached(self, count: int) -> None:
        """Until so many reviews are on their way."""
        while len(self.asked) < count:
            await asyncio.sleep(0)


def token(number: int = 0, **changes: Any) -> str:
    """Signed by somebody whose key nobody has."""
    return signer("nobody's").sign(account_claims(jti=f"k-{number}", **changes))


# ── What is remembered ────────────────────────────────────────────────────────────────────────────


async def test_a_good_token_is_good_for_a_short_while() -> None:
    there, text = Cluster(remember=10), token()
    first = await there.take(text)
    there.now += 9.9
    assert await there.take(text) is first
    assert len(there.asked) == 1
    there.now += 0.1
    assert await there.take(text) is not first
    assert len(there.asked) == 2
    there.bad.add(text)
    there.now += 10
    assert await there.code(text) == "token_rejected"


async def test_time_counts_from_the_question_on() -> None:
    there, text = Cluster(remember=10), token()
    there.open.clear()
    waiting = asyncio.gather(there.take(text))
    await there.reached(1)
    there.now += 9
    there.open.set()
    await waiting
    there.now += 1
    await there.take(text)
    assert len(there.asked) == 2


async def test_a_clock_that_is_set_back_makes_nothing_last() -> None:
    there, text = Cluster(), token(iat=0, nbf=0)
    await there.take(text)
    there.now -= 3600
    await there.take(text)
    assert len(there.asked) == 2


async def test_a_token_that_expires_is_not_good_because_it_is_remembered() -> None:
    there, text = Cluster(remember=60), token(exp=NOW + 5)
    await there.take(text)
    there.now += 5 + 30
    assert await there.code(text) == "token_expired"
    assert len(there.asked) == 1


async def test_nothing_need_be_remembered() -> None:
    there, text = Cluster(remember=0), token()
    for _ in range(3):
        await there.take(text)
    assert len(there.asked) == 3


async def test_a_refusal_is_remembered_as_long() -> None:
    there, text = Cluster(remember=10), token()
    there.bad.add(text)
    for _ in range(3):
        assert await there.code(text) == "token_rejected"
    assert len(there.asked) == 1
    there.bad.clear()
    there.now += 10
    await there.take(text)


async def test_no_token_is_kept() -> None:
    there, texts = Cluster(rate=10_000), [token(each) for each in range(5)]
    there.bad.update(texts[:2])
    await asyncio.gather(*map(there.take, texts), return_exceptions=True)
    kept = repr([vars(each) for each in (there.gate, *there.gate._reviewers.values())])
    assert not [each for each in texts if each in kept or each.split(".")[2] in kept]


async def test_refusals_are_remembered_up_to_a_bound() -> None:
    there = Cluster(rate=10_000)
    texts = [token(each) for each in range(MAX_REFUSED + 5)]
    there.bad.update(texts)
    for text in texts:
        await there.code(text)
    [reviewer] = there.gate._reviewers.values()
    assert len(reviewer._refused) == MAX_REFUSED


# ── Who is not asked about ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("code", "text"),
    [
        pytest.param("token_malformed", "opaque", id="no JWT"),
        pytest.param("token_issuer", token(iss="https://else"), id="another issuer"),
        pytest.param("token_audience", token(aud=["else"]), id="another audience"),
        pytest.param("token_expired", token(exp=NOW - 31), id="expired"),
        pytest.param(
            "token_algorithm", signer("k").sign(account_claims(), alg="none"), id="unsigned"
        ),
        pytest.param("token_algorithm", signer("k").sign(account_claims(), alg="HS256"), id="HMAC"),
    ],
)
async def test_what_can_not_be_good_is_asked_nobody(code: str, text: str) -> None:
    there = Cluster()
    assert await there.code(text) == code
    assert there.asked == []


# ── How many at once ──────────────────────────────────────────────────────────────────────────────


async def test_the_same_token_is_asked_about_once_at_a_time() -> None:
    there, text = Cluster(), token()
    there.open.clear()
    calls = [asyncio.ensure_future(there.take(text)) for _ in range(20)]
    await there.reached(1)
    calls[0].cancel()  # the one that began it: the others go on
    there.open.set()
    found = await asyncio.gather(*calls[1:])
    assert len({id(each) for each in found}) == 1
    assert there.asked == [text]


async def test_only_so_many_are_asked_at_once() -> None:
    there = Cluster(concurrent=3)
    there.open.clear()
    calls = asyncio.gather(*(there.take(token(each)) for each in range(9)))
    await there.reached(3)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(there.asked) == 3
    there.open.set()
    await calls
    assert (there.most, len(there.asked)) == (3, 9)


async def test_only_so_many_are_asked_in_a_second() -> None:
    there, texts = Cluster(rate=5), [token(each) for each in range(9)]
    found = await asyncio.gather(*map(there.take, texts), return_exceptions=True)
    over = [each for each in found if isinstance(each, Unauthenticated)]
    assert ([each.code for each in over], len(there.asked)) == (["review_unavailable"] * 4, 5)
    await there.take(texts[0])  # what is remembered costs nothing
    there.now += 1
    await there.take(texts[8])


async def test_one_who_waits_too_long_for_a_turn_is_told_to_come_back() -> None:
    there = Cluster(concurrent=1, timeout=0.1)
    there.open.clear()
    codes = await asyncio.gather(*(there.code(token(each)) for each in range(3)))
    assert codes == ["review_unavailable"] * 3
    assert there.most == 1
    there.open.set()
    await there.take(token(0))


# ── When it can not be asked ──────────────────────────────────────────────────────────────────────


async def test_nobody_is_let_in_while_the_cluster_is_down(
    caplog: pytest.LogCaptureFixture,
) -> None:
    there, known, new = Cluster(), token(1), token(2)
    await there.take(known)
    there.down = True
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert await there.code(new) == "review_unavailable"
        await there.take(known)
        there.now += 10
        assert await there.code(known) == "review_unavailable"
        there.down = False
        await there.take(new)
        await there.take(known)
    said = [each.getMessage() for each in caplog.records]
    assert [each.partition(" ")[0] for each in said] == ["reviews_failed", "reviews_work_again"]
    assert not [each for each in said if known in each or new in each]


async def test_it_ends_while_reviews_go_on() -> None:
    there = Cluster()
    there.open.clear()
    call = asyncio.ensure_future(there.take(token()))
    await there.reached(1)
    await there.gate.close()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert there.going == 0


async def test_other_issuers_are_none_of_its_business() -> None:
    there = Cluster()
    [keys] = there.gate._keys
    [reviewed] = there.gate._reviewers
    assert keys != reviewed
