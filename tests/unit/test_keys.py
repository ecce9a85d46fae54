"""Keys fetched and kept: rotation, issuers that are down, and tokens verified once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import keys
from sidecar.errors import KeysUnusable, Unauthenticated
from sidecar.keys import Authenticator, Refreshes
from sidecar.policy import jwks, tokens
from sidecar.policy.issuers import Issuer, KeySource
from sidecar.policy.jwks import PublicKey
from sidecar.policy.tokens import Token
from tests.support.issuing import (
    CLUSTER,
    DROP,
    IDP,
    KEYS_URL,
    NOW,
    PARTNER,
    Signer,
    account_claims,
    claims,
    cluster,
    issuer,
    key_set,
    signer,
)

OLD, NEW, STRANGER = signer("old"), signer("new"), signer("stranger")
INTERVAL, RETRY, MAX_AGE, STALE = 30, 5, 300, 24 * 3600


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Web:
    """What the issuers serve, by URL; an exception is raised. It can be held up."""

    def __init__(self, pages: dict[str, bytes | Exception]) -> None:
        self.pages = pages
        self.asked: list[str] = []
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, source: KeySource, url: str) -> bytes:
        self.asked.append(url)
        await self.open.wait()
        page = self.pages.get(url, KeysUnusable("404"))
        if isinstance(page, Exception):
            raise page
        return page

    def serve(self, *signers: Signer) -> None:
        self.pages[KEYS_URL] = key_set(*signers)

    def break_down(self) -> None:
        self.pages[KEYS_URL] = KeysUnusable("down")


class Desk:
    """An authenticator with its clock and its web."""

    def __init__(self, *issuers: Issuer, **pages: bytes | Exception) -> None:
        self.clock = Clock()
        self.web = Web({KEYS_URL: key_set(OLD), **pages})
        self.gate = Authenticator(issuers or (issuer(),), fetch=self.web, now=self.clock)

    async def take(self, token: str) -> Token:
        return await self.gate.authenticate(token)

    async def code(self, token: str) -> str:
        with pytest.raises(Unauthenticated) as caught:
            await self.take(token)
        return caught.value.code

    async def settled(self) -> None:
        """What goes on behind the calls has ended."""
        for _ in range(5):
            await asyncio.sleep(0)


def lasting(by: Signer, **changes: Any) -> str:
    return by.sign(claims(exp=NOW + 10**6, **changes))


# ── Having keys ───────────────────────────────────────────────────────────────────────────────────


async def test_keys_are_fetched_with_the_first_token_and_kept() -> None:
    desk = Desk()
    assert (await desk.take(lasting(OLD, sub="a"))).claims["sub"] == "a"
    assert (await desk.take(lasting(OLD, sub="b"))).claims["sub"] == "b"
    assert desk.web.asked == [KEYS_URL]


async def test_keys_can_be_fetched_before_the_first_token() -> None:
    desk = Desk()
    await desk.gate.warm()
    assert desk.web.asked == [KEYS_URL]
    await desk.take(lasting(OLD))
    assert desk.web.asked == [KEYS_URL]


async def test_an_issuer_that_nobody_configured_is_not_asked() -> None:
    desk = Desk()
    assert await desk.code(lasting(OLD, iss=PARTNER)) == "token_issuer"
    assert await desk.code(OLD.sign(account_claims())) == "token_issuer"
    assert desk.web.asked == []


async def test_an_algorithm_that_the_issuer_does_not_use_asks_for_no_keys() -> None:
    desk = Desk(issuer(algorithms=("RS256",)))
    assert await desk.code(lasting(OLD)) == "token_algorithm"
    assert desk.web.asked == []


async def test_each_issuer_has_its_own_keys() -> None:
    partner_url = PARTNER + "/keys"
    desk = Desk(
        issuer(),
        issuer(PARTNER, keys=KeySource(url=partner_url)),
        **{partner_url: key_set(signer("partner"))},
    )
    assert (await desk.take(signer("partner").sign(claims(iss=PARTNER)))).issuer.name == PARTNER
    assert await desk.code(signer("partner").sign(claims())) == "token_key_unknown"
    assert await desk.code(OLD.sign(claims(iss=PARTNER))) == "token_key_unknown"
    taken = signer("partner").sign(claims(), kid="old")
    assert await desk.code(taken) == "token_signature"


async def test_a_token_of_another_cluster_is_refused() -> None:
    """Every cluster calls its issuer the same; its keys are its own."""
    url = CLUSTER + "/openid/v1/jwks"
    desk = Desk(cluster(keys=KeySource(url=url)), **{url: key_set(signer("ours"))})
    assert (await desk.take(signer("ours").sign(account_claims()))).issuer.kind == "kubernetes"
    assert await desk.code(signer("theirs").sign(account_claims())) == "token_key_unknown"
    assert await desk.code(signer("theirs").sign(account_claims(), kid="ours")) == "token_signature"


async def test_a_token_without_a_key_id_gets_the_only_key() -> None:
    desk = Desk()
    await desk.take(OLD.sign(claims(), kid=DROP))
    desk.web.serve(OLD, NEW)
    desk.clock.now += MAX_AGE
    await desk.gate.warm()
    assert await desk.code(OLD.sign(claims(jti="2"), kid=DROP)) == "token_key_unknown"


async def test_an_issuer_stands_in_the_settings_once() -> None:
    with pytest.raises(ValueError, match="once"):
        Authenticator([issuer(), issuer()])


# ── Rotation ──────────────────────────────────────────────────────────────────────────────────────


async def test_an_unknown_key_id_asks_again_so_a_rotation_is_seen_at_once() -> None:
    desk = Desk()
    await desk.take(lasting(OLD))
    desk.clock.now += INTERVAL
    desk.web.serve(OLD, NEW)
    await desk.take(lasting(NEW))
    await desk.take(lasting(OLD))
    assert len(desk.web.asked) == 2


async def test_made_up_key_ids_drive_nothing() -> None:
    desk = Desk()
    await desk.take(lasting(OLD))
    for second in range(3 * INTERVAL):
        desk.clock.now = NOW + second
        assert await desk.code(STRANGER.sign(claims(), kid=f"k{second}")) == "token_key_unknown"
    assert len(desk.web.asked) == 3


async def test_many_who_wait_for_a_key_ask_once() -> None:
    desk = Desk()
    desk.web.open.clear()
    waiting = [asyncio.ensure_future(desk.take(lasting(OLD, jti=str(n)))) for n in range(20)]
    await desk.settled()
    waiting.pop().cancel()
    await desk.settled()
    desk.web.open.set()
    assert {each.issuer.name for each in await asyncio.gather(*waiting)} == {IDP}
    assert len(desk.web.asked) == 1


async def test_a_call_whose_key_is_known_never_waits() -> None:
    desk = Desk()
    await desk.take(lasting(OLD, jti="1"))
    desk.web.open.clear()
    desk.clock.now += MAX_AGE
    for jti in ("1", "2"):
        assert (await asyncio.wait_for(desk.take(lasting(OLD, jti=jti)), 1)).id == jti
    assert len(desk.web.asked) == 2
    await desk.gate.close()


async def test_a_key_that_the_issuer_withdraws_is_gone_for_remembered_tokens_too() -> None:
    desk = Desk()
    token = lasting(OLD)
    await desk.take(token)
    desk.web.serve(NEW)
    desk.clock.now += MAX_AGE
    await desk.take(token)  # the refresh begins behind this one
    await desk.settled()
    assert await desk.code(token) == "token_key_unknown"


async def test_other_numbers_under_the_same_key_id_are_another_key() -> None:
    desk = Desk()
    token = lasting(OLD)
    await desk.take(token)
    desk.web.pages[KEYS_URL] = key_set(STRANGER.jwk(kid="old"))
    desk.clock.now += MAX_AGE
    await desk.take(token)
    await desk.settled()
    assert await desk.code(token) == "token_signature"


# ── Issuers that are down ─────────────────────────────────────────────────────────────────────────


async def test_keys_stay_good_while_the_issuer_is_down_and_not_forever() -> None:
    desk = Desk()
    token = lasting(OLD)
    await desk.take(token)
    desk.web.break_down()
    for hours in range(24):
        desk.clock.now = NOW + hours * 3600
        await desk.take(token)
        await desk.take(lasting(OLD, jti=f"t{hours}"))
        await desk.settled()
    desk.clock.now = NOW + STALE
    assert await desk.code(token) == "keys_unavailable"
    desk.web.serve(OLD)
    desk.clock.now += RETRY
    await desk.take(token)


async def test_an_unknown_key_id_while_the_issuer_is_down_is_just_that() -> None:
    desk = Desk()
    await desk.take(lasting(OLD))
    desk.web.break_down()
    desk.clock.now += INTERVAL
    assert await desk.code(lasting(NEW)) == "token_key_unknown"
    await desk.take(lasting(OLD))


BROKEN = {
    "down": KeysUnusable("down"),
    "html": b"<html>",
    "no-keys": b'{"keys": []}',
    "only-symmetric-keys": b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}',
    "a-bug": RuntimeError("bug"),
}


@pytest.mark.parametrize("page", BROKEN.values(), ids=BROKEN)
async def test_without_keys_a_token_is_refused_and_the_next_try_comes_soon(
    page: bytes | Exception,
) -> None:
    desk = Desk(**{KEYS_URL: page})
    assert await desk.code(lasting(OLD)) == "keys_unavailable"
    desk.web.serve(OLD)
    assert await desk.code(lasting(OLD)) == "keys_unavailable"
    assert len(desk.web.asked) == 1
    desk.clock.now += RETRY
    await desk.take(lasting(OLD))


@pytest.mark.parametrize("page", BROKEN.values(), ids=BROKEN)
async def test_a_bad_refresh_takes_no_key_away(page: bytes | Exception) -> None:
    desk = Desk()
    await desk.take(lasting(OLD))
    desk.web.pages[KEYS_URL] = page
    desk.clock.now += MAX_AGE
    await desk.take(lasting(OLD))
    await desk.settled()
    await desk.take(lasting(OLD, jti="2"))


async def test_a_clock_that_is_set_back_stops_nothing() -> None:
    desk = Desk()
    desk.clock.now += 10**5
    token = OLD.sign(claims(exp=NOW + 10**6))
    await desk.take(token)
    desk.clock.now = NOW
    await desk.take(token)
    assert len(desk.web.asked) == 2


async def test_closing_ends_a_fetch() -> None:
    desk = Desk()
    desk.web.open.clear()
    waiting = asyncio.ensure_future(desk.take(lasting(OLD)))
    await desk.settled()
    await desk.gate.close()
    with pytest.raises(Unauthenticated, match="can not be had"):
        await waiting


# ── Discovery ─────────────────────────────────────────────────────────────────────────────────────

WELL_KNOWN = IDP + "/.well-known/openid-configuration"
DISCOVERED = issuer(keys=KeySource())


def document(**changes: Any) -> bytes:
    return json.dumps({"issuer": IDP, "jwks_uri": KEYS_URL, **changes}).encode()


async def test_keys_are_discovered_where_none_are_configured() -> None:
    desk = Desk(DISCOVERED, **{WELL_KNOWN: document()})
    await desk.take(lasting(OLD))
    assert desk.web.asked == [WELL_KNOWN, KEYS_URL]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(document(issuer=PARTNER), id="another-issuers"),
        pytest.param(document(issuer=IDP + "/"), id="with-a-slash"),
        pytest.param(document(jwks_uri="https://evil.example/keys"), id="another-server"),
        pytest.param(document(jwks_uri="http://idp.example.com/keys"), id="without-tls"),
        pytest.param(document(jwks_uri="https://idp.example.com:8443/keys"), id="another-port"),
        pytest.param(document(jwks_uri="https://idp.example.com@evil.example/k"), id="credentials"),
        pytest.param(document(jwks_uri=7), id="number"),
        pytest.param(document(jwks_uri=None), id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"<html>", id="html"),
        pytest.param(b'{"issuer":"' + IDP.encode() + b'","issuer":"x"}', id="key-twice"),
        pytest.param(KeysUnusable("404"), id="none"),
    ],
)
async def test_a_discovery_document_that_leads_elsewhere_is_not_followed(
    page: bytes | Exception,
) -> None:
    desk = Desk(DISCOVERED, **{WELL_KNOWN: page})
    assert await desk.code(lasting(OLD)) == "keys_unavailable"
    assert desk.web.asked == [WELL_KNOWN]


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


def on_disk(path: Path) -> Desk:
    return Desk(issuer(keys=KeySource(file=str(path), max_size=4096)))


def rotate(path: Path, content: bytes) -> None:
    """As whoever rotates files should: another file by the same name."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


async def test_a_key_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    rotate(path, key_set(OLD))
    desk = on_disk(path)
    token = lasting(OLD)
    await desk.take(token)
    rotate(path, key_set(NEW))
    await desk.take(lasting(NEW))
    assert await desk.code(token) == "token_key_unknown"
    assert desk.web.asked == []


async def test_a_key_file_that_stays_is_good_however_old(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    rotate(path, key_set(OLD))
    desk = on_disk(path)
    await desk.take(lasting(OLD))
    desk.clock.now += 2 * STALE
    await desk.take(lasting(OLD, jti="2"))


@pytest.mark.parametrize("content", [key_set(OLD), b"{"], ids=["good", "broken"])
async def test_a_key_file_that_stays_is_read_once(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[bytes] = []
    real = jwks.read_keys

    def counted(read: bytes) -> tuple[PublicKey, ...]:
        reads.append(read)
        return real(read)

    monkeypatch.setattr(jwks, "read_keys", counted)
    path = tmp_path / "keys.json"
    rotate(path, content)
    desk = on_disk(path)
    for second in range(5):
        desk.clock.now = NOW + second
        with suppress(Unauthenticated):
            await desk.take(STRANGER.sign(claims()))
    assert reads == [content]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="gone"),
        pytest.param(b"", id="empty"),
        pytest.param(key_set(NEW)[:-9], id="torn"),
        pytest.param(key_set(NEW) + b" " * 4096, id="huge"),
    ],
)
async def test_a_bad_key_file_takes_no_key_away(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys.json"
    rotate(path, key_set(OLD))
    desk = on_disk(path)
    await desk.take(lasting(OLD))
    path.unlink()
    if content is not None:
        rotate(path, content)
    for second in (1, 2, 3):
        desk.clock.now = NOW + second
        await desk.take(lasting(OLD, jti=str(second)))
        assert await desk.code(lasting(NEW)) == "token_key_unknown"
    rotate(path, key_set(NEW))
    await desk.take(lasting(NEW))


@pytest.mark.parametrize("content", [None, b"{"], ids=["absent", "broken"])
async def test_without_a_key_file_a_token_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        rotate(path, content)
    desk = on_disk(path)
    for second in (0, 1, 2):
        desk.clock.now = NOW + second
        assert await desk.code(lasting(OLD)) == "keys_unavailable"
    rotate(path, key_set(OLD))
    await desk.take(lasting(OLD))


# ── Verified once ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The `jti` of every token whose signature was checked."""
    seen: list[str] = []
    real = tokens.verify

    def counted(unverified: tokens.Unverified, *rest: Any) -> Token:
        seen.append(unverified.claims["jti"])
        return real(unverified, *rest)

    monkeypatch.setattr(tokens, "verify", counted)
    return seen


async def test_a_token_is_verified_once(verifications: list[str]) -> None:
    desk = Desk()
    one, two = lasting(OLD, jti="1"), lasting(OLD, jti="2")
    first = await desk.take(one)
    for token in (one, two, one, two):
        await desk.take(token)
    assert await desk.take(one) is first
    assert verifications == ["1", "2"]


async def test_a_remembered_tokens_time_is_asked_each_time(verifications: list[str]) -> None:
    desk = Desk()
    token = OLD.sign(claims(exp=NOW + 100))
    await desk.take(token)
    desk.clock.now = NOW + 129
    await desk.take(token)
    desk.clock.now = NOW + 130
    assert await desk.code(token) == "token_expired"
    desk.clock.now = NOW - 91
    assert await desk.code(token) == "token_not_yet_valid"
    assert verifications == ["t-1", "t-1"]


async def test_a_refused_token_is_not_remembered_as_good() -> None:
    desk = Desk()
    good = lasting(OLD)
    bad = good[:-2] + ("AA" if not good.endswith("AA") else "BA")
    await desk.take(good)
    for _ in range(2):
        assert await desk.code(bad) in ("token_signature", "token_malformed")


async def test_the_longest_unused_tokens_are_forgotten(
    verifications: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_VERIFIED", 2)
    desk = Desk()
    by_id = {jti: lasting(OLD, jti=jti) for jti in "abc"}
    for jti in ("a", "b", "a", "c", "a", "b"):
        await desk.take(by_id[jti])
    assert verifications == ["a", "b", "c", "b"]


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_any_text_is_refused_and_nothing_else_happens(text: str) -> None:
    async def judge() -> None:
        assert (await Desk().code(text)).startswith("token_")

    _run(judge)


def _run(coroutine: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner() as runner:
        runner.run(_awaited(coroutine))


async def _awaited(coroutine: Callable[[], Awaitable[None]]) -> None:
    await coroutine()


async def test_half_a_surrogate_in_a_token_is_a_refusal_too() -> None:
    assert await Desk().code("\ud800.\udfff.") == "token_malformed"


# ── What is told of it ────────────────────────────────────────────────────────────────────────────


async def test_refreshes_are_counted_and_the_age_of_the_keys_is_known() -> None:
    desk = Desk()
    keys = desk.gate.keys[IDP]
    assert (keys.age, keys.refreshes) == (None, Refreshes())
    await desk.gate.warm()
    assert (keys.age, keys.refreshes) == (0, Refreshes(1, 0))
    desk.web.break_down()
    desk.clock.now += MAX_AGE + 1
    await desk.take(lasting(OLD))
    await desk.settled()
    assert (keys.age, keys.refreshes) == (MAX_AGE + 1, Refreshes(1, 1, "down"))
    desk.web.serve(OLD)
    desk.clock.now += INTERVAL
    await desk.take(lasting(OLD, sub="b"))
    await desk.settled()
    assert (keys.age, keys.refreshes) == (0, Refreshes(2, 1))


async def test_keys_that_can_not_be_read_are_a_failure_too() -> None:
    desk = Desk(**{KEYS_URL: b"no JSON"})
    await desk.gate.warm()
    told = desk.gate.keys[IDP].refreshes
    assert (told.successes, told.failures, told.problem is None) == (0, 1, False)
