"""Which certificate counts: the connection's, or the one that a trusted proxy tells of."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from sidecar.config import Identity, Proxy, Spiffe
from sidecar.errors import Unauthenticated
from sidecar.policy.actors import TypeRule
from sidecar.policy.tokens import Token
from sidecar.transport.authentication import Authentication
from sidecar.transport.workloads import Workloads
from tests.support.certificates import BOT, Authority
from tests.support.issuing import claims, issuer, shown, verified

HEADER = "x-forwarded-client-cert"
EDGE = Proxy("edge", ("10.1.0.0/16",), "x-user", certificate_header=HEADER)
PROD = Spiffe(("prod.example.com",))
OTHER = "spiffe://prod.example.com/other"
PROXIED, DIRECT = "10.1.2.3", "9.9.9.9"
HOUR = timedelta(hours=1)


class Connection:
    """The end of a TLS connection on which a certificate was shown, or none."""

    def __init__(self, certificate: bytes | None) -> None:
        self._certificate = certificate

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self if name == "ssl_object" else default

    def getpeercert(self, *, binary_form: bool) -> bytes | None:
        assert binary_form
        return self._certificate


def asked(certificate: bytes | None = None, *said: tuple[str, str], remote: str = DIRECT) -> Any:
    headers = CIMultiDict(said)
    request = make_mocked_request(
        "POST", "/mcp", headers=headers, transport=Connection(certificate)
    )
    return request.clone(remote=remote)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def bot(authority: Authority) -> bytes:
    return authority.client(BOT).der


async def verify(_: str) -> Token:
    return verified(claims(sub="ana"))


SAYS = (HEADER, f"URI={OTHER}")
TOKEN = ("Authorization", "Bearer x")


@pytest.mark.parametrize(
    ("remote", "certified", "said", "chain"),
    [
        pytest.param(DIRECT, True, [], [f"service {BOT}"], id="certificate"),
        pytest.param(DIRECT, True, [SAYS], [f"service {BOT}"], id="a header of anybody"),
        pytest.param(DIRECT, True, [TOKEN], [f"service {BOT}", "human ana"], id="and a token"),
        pytest.param(PROXIED, False, [SAYS], [f"service {OTHER}"], id="a header of the proxy"),
        pytest.param(PROXIED, True, [SAYS], [f"service {OTHER}"], id="not the proxy's own"),
        pytest.param(
            PROXIED, True, [SAYS, TOKEN], [f"service {OTHER}", "human ana"], id="all of it"
        ),
        pytest.param(PROXIED, True, [TOKEN], ["human ana"], id="nothing but the proxy's own"),
        pytest.param(
            PROXIED,
            True,
            [SAYS, ("x-user", "eve")],
            [f"service {OTHER}", "unknown edge|eve"],
            id="a proxy that tells of both",
        ),
    ],
)
async def test_one_certificate_counts(
    bot: bytes, remote: str, certified: bool, said: list[tuple[str, str]], chain: list[str]
) -> None:
    identity = Identity(issuers=(issuer(),), proxy=EDGE, spiffe=PROD)
    request = asked(bot if certified else None, *said, remote=remote)
    actor = await Authentication(identity, verify).actor(request)
    assert shown(actor) == chain
    assert actor.assurance == (3 if remote == DIRECT else 2 if chain == ["human ana"] else 1)


@pytest.mark.parametrize("remote", [DIRECT, PROXIED])
async def test_who_shows_no_certificate_is_nobody(bot: bytes, remote: str) -> None:
    identity = Identity(issuers=(issuer(),), proxy=EDGE, spiffe=PROD)
    said = () if remote == PROXIED else (SAYS,)
    request = asked(bot if remote == PROXIED else None, *said, remote=remote)
    with pytest.raises(Unauthenticated) as caught:
        await Authentication(identity, verify).actor(request)
    assert caught.value.code == "credentials_missing"


async def test_without_trust_domains_no_certificate_is_read(bot: bytes) -> None:
    authentication = Authentication(Identity(proxy=EDGE))
    for request in (asked(bot), asked(bot, SAYS, remote=PROXIED)):
        assert shown(await authentication.actor(request)) == ["unknown none|anonymous"]
        assert not authentication.outworn(request)


async def test_a_rule_says_what_a_workload_is(bot: bytes) -> None:
    rule = TypeRule("agent", subject="spiffe://prod.example.com/ns/*/sa/bot")
    actor = await Authentication(Identity(types=(rule,), spiffe=PROD)).actor(asked(bot))
    assert shown(actor) == [f"agent {BOT}"]


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([SAYS, SAYS], "proxy_malformed"),
        ([(HEADER, "")], "proxy_malformed"),
        ([(HEADER, "Hash=1")], "workload_malformed"),
        ([(HEADER, "URI=spiffe://dev.example.com/bot")], "workload_domain"),
    ],
)
def test_a_proxy_tells_of_one_certificate(said: list[tuple[str, str]], code: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Workloads(PROD, HEADER).of(asked(None, *said), proxied=True)
    assert caught.value.code == code


def test_a_refused_certificate_stays_refused(authority: Authority, bot: bytes) -> None:
    elsewhere = Workloads(Spiffe(("dev.example.com",)))
    here = Workloads(PROD)
    over = authority.client(BOT, begins=-2 * HOUR, ends=-HOUR).der
    for workloads, certificate, code in (
        (elsewhere, bot, "workload_domain"),
        (here, over, "workload_expired"),
        (here, b"x", "workload_malformed"),
    ):
        for _ in range(2):
            with pytest.raises(Unauthenticated) as caught:
                workloads.of(asked(certificate), proxied=False)
            assert caught.value.code == code


def test_a_connection_gives_way_when_there_should_be_a_newer_certificate(
    authority: Authority,
) -> None:
    workloads = Workloads(PROD)
    for begins, outworn in ((-8, False), (-10, True)):
        request = asked(authority.client(BOT, begins=begins * HOUR, ends=HOUR).der)
        assert not workloads.outworn(request)  # nobody has looked at it yet
        found = workloads.of(request, proxied=False)
        assert found is not None
        assert (found.expires_at or 0) > time.time()
        assert workloads.outworn(request) is outworn


def test_a_request_whose_connection_is_gone_is_not_one_without_a_certificate(bot: bytes) -> None:
    request = asked(bot)
    request.protocol.transport = None
    with pytest.raises(ConnectionResetError):
        Workloads(PROD).of(request, proxied=False)
    assert not Workloads(PROD).outworn(request)
