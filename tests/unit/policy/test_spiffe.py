"""Whose certificate it is: certificates and headers as tables, good and bad in each way."""

from __future__ import annotations

from datetime import timedelta
from functools import cache

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import Unauthenticated
from sidecar.policy.spiffe import Workload, admit, of_certificate, of_header, workload
from tests.support.certificates import BOT, Authority, Issued

NOW = 1_795_341_600.0
OTHER = "spiffe://prod.example.com/other"
PROXY = "spiffe://prod.example.com/edge"


@cache
def authority() -> Authority:
    return Authority()


def refused(code: str, *cases: str) -> list[tuple[str, str]]:
    return [(each, code) for each in cases]


# ── Ids ───────────────────────────────────────────────────────────────────────────────────────────

LONGEST = "spiffe://" + "d" * 255 + "/" + "p" * (2048 - 9 - 255 - 1)


@pytest.mark.parametrize(
    ("uri", "domain"),
    [
        pytest.param(BOT, "prod.example.com", id="kubernetes"),
        pytest.param("spiffe://prod/bot", "prod", id="short"),
        pytest.param("spiffe://a-b_c.1/-._/A", "a-b_c.1", id="every character"),
        pytest.param("spiffe://10.0.0.7/bot", "10.0.0.7", id="address"),
        pytest.param("spiffe://prod/...", "prod", id="three dots"),
        pytest.param("spiffe://prod/.hidden/..x", "prod", id="dots and more"),
        pytest.param(LONGEST, "d" * 255, id="longest"),
    ],
)
def test_a_spiffe_id_names_a_workload_of_a_domain(uri: str, domain: str) -> None:
    found = workload(uri)
    assert found == Workload(uri, f"spiffe://{domain}")
    assert found.domain == domain


@pytest.mark.parametrize(
    "uri",
    [
        pytest.param("", id="nothing"),
        pytest.param("https://prod.example.com/bot", id="another scheme"),
        pytest.param("spiffe:prod.example.com/bot", id="no authority"),
        pytest.param(" " + BOT, id="space before"),
        pytest.param("SPIFFE://prod.example.com/bot", id="capitals"),
        pytest.param("spiffe://prod.example.com", id="no path"),
        pytest.param("spiffe://prod.example.com/", id="empty path"),
        pytest.param("spiffe:///bot", id="no domain"),
        pytest.param("spiffe://Prod.example.com/bot", id="domain in capitals"),
        pytest.param("spiffe://prod.example.com:443/bot", id="port"),
        pytest.param("spiffe://user@prod.example.com/bot", id="user"),
        pytest.param("spiffe://[::1]/bot", id="address in brackets"),
        pytest.param("spiffe://prod.example.com/bot?x=1", id="query"),
        pytest.param("spiffe://prod.example.com/bot?", id="empty query"),
        pytest.param("spiffe://prod.example.com/bot#x", id="fragment"),
        pytest.param("spiffe://prod.example.com/a/../bot", id="dots"),
        pytest.param("spiffe://prod.example.com/./bot", id="dot"),
        pytest.param("spiffe://prod.example.com/a//bot", id="empty segment"),
        pytest.param("spiffe://prod.example.com/bot/", id="trailing slash"),
        pytest.param("spiffe://prod.example.com/b%6ft", id="escape"),
        pytest.param("spiffe://prod.example.com/bot\n", id="newline"),
        pytest.param("spiffe://prod.example.com/bot\x00.evil", id="nul"),
        pytest.param("spiffe://prod.example.com/bót", id="not ascii"),
        pytest.param("spiffe://prod.example.com/a b", id="space"),
        pytest.param("spiffe://prod.example.com/*", id="star"),
        pytest.param("spiffe://prod.example.com|x/bot", id="bar"),
        pytest.param("spiffe://prod.example.com/a|b", id="bar in the path"),
        pytest.param("spiffe://" + "d" * 256 + "/bot", id="domain too long"),
        pytest.param(LONGEST + "p", id="too long"),
    ],
)
def test_what_is_no_spiffe_id_is_refused(uri: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        workload(uri)
    assert caught.value.code == "workload_malformed"


# ── Certificates ──────────────────────────────────────────────────────────────────────────────────

DNS, MAIL = x509.DNSName("bot.example.com"), x509.RFC822Name("ana@example.com")
LEAF = (x509.BasicConstraints(ca=False, path_length=None), True)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
CA = (x509.BasicConstraints(ca=True, path_length=None), True)
UNREAD = (
    x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"),
    False,
)


@pytest.mark.parametrize(
    "issued",
    [
        pytest.param(lambda: authority().client(BOT), id="one uri"),
        pytest.param(lambda: authority().client(DNS, BOT, MAIL), id="names of other kinds beside"),
        pytest.param(lambda: authority().client(BOT, extensions=[LEAF]), id="no authority"),
        pytest.param(lambda: authority().client(BOT, extensions=[UNREAD]), id="an extension more"),
        pytest.param(lambda: authority().client(BOT, key_agreement=True), id="another usage"),
        pytest.param(
            lambda: authority().client(BOT, begins=-DAY, ends=-HOUR), id="over: not for us to say"
        ),
    ],
)
def test_a_certificate_names_its_workload(issued: object) -> None:
    made = issued()  # type: ignore[operator]
    assert isinstance(made, Issued)
    found = of_certificate(made.der)
    begins = made.certificate.not_valid_before_utc.timestamp()
    ends = made.certificate.not_valid_after_utc.timestamp()
    assert found == workload(BOT, expires_at=ends, renews_at=found.renews_at)
    assert found.renews_at == pytest.approx(begins + 0.9 * (ends - begins))


@pytest.mark.parametrize(
    "issued",
    [
        pytest.param(lambda: authority().client(), id="no names"),
        pytest.param(lambda: authority().client(DNS, MAIL), id="no uri"),
        pytest.param(lambda: authority().client(BOT, OTHER), id="two ids"),
        pytest.param(lambda: authority().client(BOT, BOT), id="the same twice"),
        pytest.param(lambda: authority().client(BOT, "https://bot.example.com"), id="another uri"),
        pytest.param(lambda: authority().client("https://bot.example.com"), id="no spiffe id"),
        pytest.param(lambda: authority().client("spiffe://prod.example.com"), id="domain alone"),
        pytest.param(lambda: authority().client(BOT + "?x"), id="query"),
        pytest.param(lambda: authority().client(x509.DNSName(BOT)), id="in a name for hosts"),
        pytest.param(lambda: authority().client(BOT, extensions=[CA]), id="authority"),
        pytest.param(lambda: authority().client(BOT, key_cert_sign=True), id="signs certificates"),
        pytest.param(lambda: authority().client(BOT, crl_sign=True), id="signs revocations"),
    ],
)
def test_a_certificate_that_names_no_one_workload_is_refused(issued: object) -> None:
    made = issued()  # type: ignore[operator]
    with pytest.raises(Unauthenticated) as caught:
        of_certificate(made.der)
    assert caught.value.code == "workload_malformed"


def test_what_is_no_certificate_is_refused() -> None:
    good = authority().client(BOT).der
    broken = good.replace(b"spiffe://prod", b"spiffe\xff//prod")
    assert broken != good
    for der in (b"", b"x", good[:-1], good + b"x", broken):
        with pytest.raises(Unauthenticated) as caught:
            of_certificate(der)
        assert caught.value.code == "workload_malformed"


# ── Who is let in ─────────────────────────────────────────────────────────────────────────────────


def test_a_listed_domain_is_let_in_as_long_as_its_certificate_lasts() -> None:
    shown = workload(BOT, expires_at=NOW)
    assert admit(shown, {"prod.example.com"}, NOW - 0.1) is shown
    lasting = workload(BOT, asserted=True)
    assert admit(lasting, {"dev", "prod.example.com"}, NOW) is lasting


@pytest.mark.parametrize(
    ("domains", "now", "code"),
    [
        pytest.param((), 0, "workload_domain", id="none"),
        pytest.param(("example.com",), 0, "workload_domain", id="above"),
        pytest.param(("x.prod.example.com",), 0, "workload_domain", id="below"),
        pytest.param(("Prod.example.com",), 0, "workload_domain", id="capitals"),
        pytest.param(("spiffe://prod.example.com",), 0, "workload_domain", id="as a uri"),
        pytest.param(("prod.example.com",), NOW, "workload_expired", id="to the second"),
        pytest.param(("prod.example.com",), NOW + 1, "workload_expired", id="over"),
        pytest.param(("dev",), NOW + 1, "workload_domain", id="both"),
    ],
)
def test_nobody_else_is(domains: tuple[str, ...], now: float, code: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        admit(workload(BOT, expires_at=NOW), domains, now)
    assert caught.value.code == code


# ── X-Forwarded-Client-Cert ───────────────────────────────────────────────────────────────────────

ELEMENT = f'By={PROXY};Hash=468ed33be74eee6556d90c0149c1309e;Subject="";URI={BOT}'
SUBJECT = r'Subject="O=A\, B; URI=spiffe://x/y, \"C\"=1\\";'
FORGED = f"Hash=00;URI={OTHER}"


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(ELEMENT, id="envoy"),
        pytest.param(f"URI={BOT}", id="the id alone"),
        pytest.param(f'URI="{BOT}"', id="in quotes"),
        pytest.param(f"Uri={BOT};HASH=1;by=x", id="keys of any case"),
        pytest.param(f"{SUBJECT}URI={BOT}", id="everything in quotes"),
        pytest.param(f"URI={BOT};{SUBJECT[:-1]}", id="quotes at the end"),
        pytest.param(f"By={PROXY};By=spiffe://b/c;URI={BOT};DNS=a;DNS=b", id="several names"),
        pytest.param(f'Hash=1;Cert="-----BEGIN%20CERT%3D%0A";URI={BOT}', id="the certificate too"),
        pytest.param(f"By=https://a/?x=1;URI={BOT}", id="an equals sign"),
        pytest.param(f"Later=1;URI={BOT}", id="a key of a later version"),
        pytest.param(f"{FORGED},{ELEMENT}", id="the last counts"),
        pytest.param(f"{FORGED}, {FORGED} ,\t{ELEMENT} ", id="spaces"),
        pytest.param(f"By=;Hash=,{ELEMENT}", id="an element of nobody before"),
        pytest.param(f'Subject="a,{FORGED}";URI={BOT}', id="an element in quotes"),
    ],
)
def test_the_nearest_proxy_is_believed(said: str) -> None:
    assert of_header(said) == Workload(BOT, "spiffe://prod.example.com", asserted=True)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        *refused(
            "proxy_malformed",
            *("", " ", ",", ";", "x", "=", f"={BOT}", f"U RI={BOT}", f"URI ={BOT}", f"URI:{BOT}"),
            *(f"{ELEMENT},", f",{ELEMENT}", f"{ELEMENT};", f";{ELEMENT}", f"{FORGED},,{ELEMENT}"),
            *(f'URI="{BOT}', f'URI={BOT}"', f'URI="{BOT}"x', f'URI=x"{BOT}"', f'URI="{BOT}\\"'),
            *(
                f"nonsense,{ELEMENT}",
                f'Subject="{FORGED},{ELEMENT}',
                f"\n{ELEMENT}",
            ),
            *(f"Hash=1;Hash=2;URI={BOT}", f"Subject=a;subject=b;URI={BOT}"),
        ),
        *refused(
            "workload_malformed",
            *("Hash=1", "By=a;Hash=b", "URI=", 'URI=""', f"By={BOT}", f"DNS={BOT}", f"URIs={BOT}"),
            *(f"URI={BOT};URI={OTHER}", f"URI={BOT};URI={BOT}", f"{ELEMENT},Hash=1"),
            *(f"{ELEMENT},URI=", "URI=https://a/b", "URI=spiffe://prod.example.com"),
            *(
                f"URI={BOT}?x",
                f"URI={BOT}=x",
                "URI=spiffe%3A%2F%2Fa%2Fb",
                f"URI= {BOT}",
                f"{ELEMENT}\n",
            ),
        ),
    ],
)
def test_what_a_proxy_should_not_say_is_refused(said: str, code: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        of_header(said)
    assert caught.value.code == code


@given(st.text(alphabet='URIuriHash=;,"\\ spiffe:/.ab\t\n'))
def test_whatever_a_header_says_it_is_an_id_or_a_refusal(said: str) -> None:
    try:
        found = of_header(said)
    except Unauthenticated:
        return
    assert found == workload(found.id, asserted=True)
    assert found.id in said.rpartition(",")[2]
