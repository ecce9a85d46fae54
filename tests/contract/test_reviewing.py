"""Reviews over real HTTP: whom the sidecar trusts, and servers that do not answer."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trustme

from sidecar.errors import Unauthenticated
from sidecar.keys import Authenticator
from sidecar.policy.issuers import Review
from tests.support.api_server import OWN_TOKEN, ApiServer, Mood, api_server
from tests.support.issuing import account_claims, cluster, signer


@cache
def token(number: int = 0) -> str:
    now = int(time.time())
    return signer("nobody's").sign(
        account_claims(iat=now, nbf=now, exp=now + 3600, jti=f"k-{number}")
    )


@asynccontextmanager
async def gate(server: ApiServer, folder: Path, **review: Any) -> AsyncIterator[Authenticator]:
    own = folder / "own"
    if not own.exists():
        own.write_text(OWN_TOKEN + "\n", encoding="ascii")
    said = {"url": server.url, "ca": None, "token_file": str(own), **review}
    authenticator = Authenticator([cluster(review=Review(**said))])
    try:
        yield authenticator
    finally:
        await authenticator.close()


async def code(authenticator: Authenticator, text: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await authenticator.authenticate(text)
    return caught.value.code


async def test_a_token_is_reviewed(tmp_path: Path) -> None:
    async with api_server() as server, gate(server, tmp_path) as authenticator:
        assert (await authenticator.authenticate(token(0))).id == "k-0"
        server.rejected.add(token(1))
        assert await code(authenticator, token(1)) == "token_rejected"
        server.audiences = []
        assert await code(authenticator, token(2)) == "token_audience"
        server.changes = {"username": "system:serviceaccount:support:admin"}
        server.audiences = None
        assert await code(authenticator, token(3)) == "token_claims"
        assert server.asked == [token(each) for each in range(4)]


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        ("silent", "did not answer within 0.3 s"),
        ("redirecting", "it says 307"),
        ("failing", "may not create tokenreviews"),
        ("huge", "more than 262144 bytes"),
        ("babbling", "no review"),
    ],
)
async def test_a_server_that_does_not_answer_lets_nobody_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mood: Mood, words: str
) -> None:
    async with api_server() as server, gate(server, tmp_path, timeout=0.3) as authenticator:
        server.mood = mood
        assert await code(authenticator, token()) == "review_unavailable"
        [said] = [each.getMessage() for each in caplog.records]
        assert words in said
        assert not [each for each in (token(), OWN_TOKEN) if each in said]
        server.mood = "well"
        await authenticator.authenticate(token())


async def test_one_that_is_down_is_asked_again_when_it_is_back(tmp_path: Path) -> None:
    async with (
        api_server() as server,
        gate(server, tmp_path, remember=0) as authenticator,
    ):
        await authenticator.authenticate(token())
        await server.stop()
        assert await code(authenticator, token()) == "review_unavailable"
        await server.start()
        await authenticator.authenticate(token())


async def test_the_sidecars_own_token_is_read_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own"
    own.write_text("expired", encoding="ascii")
    async with api_server() as server, gate(server, tmp_path) as authenticator:
        assert await code(authenticator, token()) == "review_unavailable"
        assert "own token is not taken" in caplog.text
        own.write_text(OWN_TOKEN, encoding="ascii")
        await authenticator.authenticate(token())
        own.unlink()
        assert await code(authenticator, token(2)) == "review_unavailable"
        assert f"FileNotFoundError: {own}" in caplog.text


async def test_the_servers_certificate_is_checked(tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.issue_cert("127.0.0.1").configure_cert(context)
    file = tmp_path / "ca"
    theirs.cert_pem.write_to_path(str(file))
    async with (
        api_server(context) as server,
        gate(server, tmp_path, ca=str(file), remember=0) as authenticator,
        gate(server, tmp_path) as by_the_systems,
    ):
        assert await code(authenticator, token()) == "review_unavailable"
        assert await code(by_the_systems, token()) == "review_unavailable"
        assert server.asked == []
        ours.cert_pem.write_to_path(str(file))
        await authenticator.authenticate(token())
        theirs.cert_pem.write_to_path(str(file))
        assert await code(authenticator, token()) == "review_unavailable"
        file.unlink()
        assert await code(authenticator, token()) == "review_unavailable"
