"""Keys over real HTTP: rotation, and issuers that are down, slow, elsewhere or endless."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from sidecar.errors import KeysUnusable, Unauthenticated
from sidecar.keys import Authenticator, fetch_url
from sidecar.policy.issuers import Issuer, KeySource
from tests.support.issuer_server import IssuerServer, Mood, issuer_server
from tests.support.issuing import AUDIENCE, Signer, claims, key_set, signer

OLD, NEW = signer("old"), signer("new")


class Clock:
    """The real one, which can be moved ahead."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@asynccontextmanager
async def gate(
    server: IssuerServer, clock: Clock | None = None, **source: Any
) -> AsyncIterator[Authenticator]:
    settings = {"url": f"{server.url}/keys", **source}
    issuer = Issuer(server.url, (AUDIENCE,), KeySource(**settings))
    authenticator = Authenticator([issuer], now=clock or time.time)
    try:
        yield authenticator
    finally:
        await authenticator.close()


def token(server: IssuerServer, by: Signer = OLD, **changes: Any) -> str:
    now = int(time.time())
    times = {"iat": now, "exp": now + 10**6}
    return by.sign(claims(**{"iss": server.url, **times, **changes}))


async def code(authenticator: Authenticator, text: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await authenticator.authenticate(text)
    return caught.value.code


async def test_keys_are_fetched_once_and_a_rotation_is_seen() -> None:
    clock = Clock()
    async with issuer_server(OLD) as server, gate(server, clock) as authenticator:
        for jti in ("1", "2"):
            assert (await authenticator.authenticate(token(server, jti=jti))).id == jti
        assert [path for path, _ in server.asked] == ["/keys"]
        server.keys = key_set(OLD, NEW)
        clock.ahead += 30
        assert (await authenticator.authenticate(token(server, NEW, jti="3"))).id == "3"
        assert len(server.asked) == 2


async def test_keys_are_discovered() -> None:
    async with issuer_server(OLD) as server, gate(server, url=None) as authenticator:
        await authenticator.authenticate(token(server))
        paths = [path for path, _ in server.asked]
    assert paths == ["/.well-known/openid-configuration", "/keys"]


async def test_keys_stay_good_while_the_issuer_is_down_and_it_is_asked_again_when_it_is_back() -> (
    None
):
    clock = Clock()
    async with issuer_server(OLD) as server, gate(server, clock) as authenticator:
        await authenticator.authenticate(token(server))
        await server.stop()
        clock.ahead += 3600
        await authenticator.authenticate(token(server, jti="2"))
        assert await code(authenticator, token(server, NEW)) == "token_key_unknown"
        clock.ahead += 24 * 3600
        assert await code(authenticator, token(server)) == "keys_unavailable"
        await server.start()
        clock.ahead += 5
        await authenticator.authenticate(token(server))


@pytest.mark.parametrize("mood", ["silent", "redirecting", "huge", "failing"])
async def test_an_issuer_that_serves_no_keys_is_given_up_on(mood: Mood) -> None:
    async with issuer_server(OLD) as server, gate(server, timeout=0.5) as authenticator:
        server.mood = mood
        assert await code(authenticator, token(server)) == "keys_unavailable"
        assert [path for path, _ in server.asked] == ["/keys"]


@pytest.mark.parametrize(
    ("mood", "why"),
    [
        pytest.param("silent", "did not answer within 0.2 s", id="slow"),
        pytest.param("redirecting", "answered 302", id="redirect"),
        pytest.param("failing", "answered 503", id="failing"),
        pytest.param("huge", "more than 1000 bytes", id="huge"),
    ],
)
async def test_a_fetch_that_fails_says_why(mood: Mood, why: str) -> None:
    async with issuer_server(OLD) as server:
        server.mood = mood
        with pytest.raises(KeysUnusable, match=why):
            await fetch_url(KeySource(timeout=0.2, max_size=1000), f"{server.url}/keys")


async def test_nobody_there_says_so() -> None:
    async with issuer_server(OLD) as server:
        url = server.url
    with pytest.raises(KeysUnusable, match="not reached"):
        await fetch_url(KeySource(), url)


async def test_a_token_to_fetch_with_is_read_each_time(tmp_path: Path) -> None:
    bearer = tmp_path / "token"
    source = KeySource(bearer=str(bearer))
    async with issuer_server(OLD) as server:
        for text in ("one\n", "two"):
            bearer.write_text(text)
            assert await fetch_url(source, f"{server.url}/keys") == server.keys
        assert [sent for _, sent in server.asked] == ["Bearer one", "Bearer two"]
        bearer.unlink()
        with pytest.raises(KeysUnusable):
            await fetch_url(source, f"{server.url}/keys")


async def test_the_servers_certificate_is_checked(tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.issue_cert("127.0.0.1").configure_cert(context)
    application = web.Application()

    async def keys(_request: web.Request) -> web.Response:
        return web.Response(body=b"keys")

    application.router.add_get("/keys", keys)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        url = f"https://127.0.0.1:{runner.addresses[0][1]}/keys"
        for name, authority in (("ours", ours), ("theirs", theirs)):
            authority.cert_pem.write_to_path(str(tmp_path / name))
        assert await fetch_url(KeySource(ca=str(tmp_path / "ours")), url) == b"keys"
        for source in (KeySource(ca=str(tmp_path / "theirs")), KeySource()):
            with pytest.raises(KeysUnusable, match="not reached"):
                await fetch_url(source, url)
    finally:
        await runner.cleanup()
