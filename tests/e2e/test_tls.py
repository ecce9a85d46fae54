"""TLS where clients come in: who is let in, who they are, and files that rotate under traffic."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509

from tests.support import client as clients
from tests.support import scripted
from tests.support.certificates import BOT, Authority, Issued
from tests.support.identity import Idp, idp
from tests.support.issuing import claims
from tests.support.otlp import Sink
from tests.support.processes import (
    ALLOW_ALL,
    Process,
    Served,
    done,
    environment,
    http_sidecar,
    patient,
    sidecar,
    ticket_desk,
    wait_until,
)
from tests.support.raw import (
    JSON_HEADERS,
    Answer,
    Wire,
    call,
    initialize,
    mirrors,
    modern,
    post,
    read_event,
)
from tests.support.scripted import Asked, Scripted

ANA = claims(sub="ana")
OTHER = "spiffe://prod.example.com/ns/support/sa/other"
ECHO = call(1, "echo")
HOUR = timedelta(hours=1)
AUTHORIZATION = "Authorization"
DOMAINS = {"trust_domains": ["prod.example.com"]}
FORWARDED = "X-Forwarded-Client-Cert"


class Place:
    """Who signs, and a folder with what the sidecar reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.clients = Authority(), Authority()
        self.audit = folder / "audit.jsonl"
        self.cert, self.key = self.authority.server().saved(folder, "server")
        self.client_ca = folder / "clients.pem"
        self.client_ca.write_bytes(self.clients.pem)
        self.url = ""

    def tls(self, **more: str) -> dict[str, str]:
        """How a sidecar is told of it."""
        return {
            "cert": str(self.cert),
            "key": str(self.key),
            "client_ca": str(self.client_ca),
            **more,
        }

    def showing(self, issued: Issued | None) -> ssl.SSLContext:
        """What a client with this certificate connects with."""
        if issued is None:
            return self.authority.trusting()
        return self.authority.trusting(issued.saved(self.folder, "client"))

    def call(self, issued: Issued | None, *headers: tuple[str, str]) -> Answer:
        """A call of a client that shows this certificate, on a connection of its own."""
        said = [*mirrors(ECHO), *headers]
        return post(self.url, modern(ECHO), said, tls=self.showing(issued))

    def chains(self) -> list[list[str]]:
        """Who was behind each call that was decided about."""
        records = [json.loads(line) for line in self.audit.read_text("utf-8").splitlines()]
        wanted = ("decision", "tools/call")
        found = [each for each in records if (each["type"], each.get("method")) == wanted]
        return [[f"{each['type']} {each['id']}" for each in record["chain"]] for record in found]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextmanager
def fronted(
    place: Place,
    opa: Path,
    upstream: str,
    *options: str,
    tls: Any = None,
    policy: Path = ALLOW_ALL,
    **identity: Any,
) -> Iterator[Served]:
    """A sidecar that allows everything, with TLS; `identity` is what its file says of that."""
    said = {"spiffe": DOMAINS, **identity}
    document = {"tls": tls or place.tls(), "identity": said, "audit": {"path": str(place.audit)}}
    file = place.folder / "sidecar.yaml"
    file.write_text(json.dumps(document), encoding="utf-8")
    where: tuple[str | Path, ...] = ("--policy", policy, "--config", file, *options)
    with http_sidecar(upstream, *where, env=patient(opa)) as front:
        place.url = front.url
        yield front
        print(front.process.tail())  # shown when the test failed


@contextmanager
def serving(place: Place, opa: Path, **said: Any) -> Iterator[tuple[Served, Scripted]]:
    """The same in front of a server that remembers what it was asked."""
    with scripted.scripted(_answering) as server, fronted(place, opa, server.url, **said) as front:
        yield front, server


def code(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.message["error"]["data"]["reasons"][0]["code"]


def bearer(token: str) -> tuple[str, str]:
    return AUTHORIZATION, f"Bearer {token}"


def believing(issuer: Idp) -> dict[str, Any]:
    return {"jwt": [issuer.believed()]}


async def _answering(server: Scripted, request: Any, asked: Asked) -> web.StreamResponse | None:
    """A server whose streams stay open."""
    if asked.verb != "GET":
        return None
    response = await scripted.stream(request, scripted.event({"method": "notifications/x"}))
    await asyncio.Event().wait()
    return response


# ── Who is let in ─────────────────────────────────────────────────────────────────────────────────


def test_no_connection_without_a_certificate_of_the_clients_authority(
    place: Place, opa_bin: Path
) -> None:
    with serving(place, opa_bin, tls=place.tls(client="required")) as (front, server):
        refused = {
            "none": None,
            "another authority": place.authority.client(BOT),
            "expired": place.clients.client(BOT, begins=-2 * HOUR, ends=-HOUR),
            "for servers": place.clients.client(
                BOT,
                extensions=[(x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH]), False)],
            ),
        }
        for issued in refused.values():
            with pytest.raises((ssl.SSLError, ConnectionError)):
                place.call(issued)
        with Wire(front.url) as plain, suppress(ConnectionError):
            plain.request(json.dumps(initialize()).encode())
            assert plain.socket.recv(1024)[:4] != b"HTTP"
        assert place.call(place.clients.client(BOT)).status == 200
        old = place.showing(place.clients.client(BOT))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert post(front.url, modern(ECHO), mirrors(ECHO), tls=old).status == 200
    assert len(server.seen("tools/call")) == 2


def test_a_certificate_that_names_no_workload_we_trust_is_a_bad_credential(
    place: Place, opa_bin: Path
) -> None:
    with serving(place, opa_bin) as (_, server):
        for names, reason in (
            (["spiffe://dev.example.com/ns/support/sa/bot"], "workload_domain"),
            ([BOT, OTHER], "workload_malformed"),
            ([x509.DNSName("bot")], "workload_malformed"),
            (["spiffe://prod.example.com"], "workload_malformed"),
        ):
            answer = place.call(place.clients.client(*names))
            assert code(answer) == (401, reason)
            assert f'error_description="{reason}"' in answer.headers["www-authenticate"]
        signing = place.clients.client(BOT, key_cert_sign=True)
        assert code(place.call(signing)) == (401, "workload_malformed")
        assert place.call(None).status == 200
    assert len(server.seen("tools/call")) == 1
    assert place.chains() == [["unknown anonymous"]]


# ── Who they are ──────────────────────────────────────────────────────────────────────────────────


def test_a_certificate_is_an_actor_and_the_token_says_for_whom(place: Place, opa_bin: Path) -> None:
    with ExitStack() as stack:
        issuer, sink = stack.enter_context(idp()), stack.enter_context(Sink())
        said: dict[str, Any] = {"types": [{"type": "agent", "subject": "spiffe://*/ns/agents/**"}]}
        server = stack.enter_context(scripted.scripted(_answering))
        stack.enter_context(
            fronted(place, opa_bin, server.url, "--otlp", sink.url, **believing(issuer), **said)
        )
        token = bearer(issuer.token(ANA))
        agent = place.clients.client("spiffe://prod.example.com/ns/agents/sa/bot")
        bot = place.clients.client(BOT)
        assert place.call(bot).status == 200
        assert place.call(bot, token).status == 200
        assert place.call(agent, token).status == 200
        assert place.call(None, token).status == 200
        assert code(place.call(None)) == (401, "credentials_missing")
        assert code(place.call(bot, bearer("a.b.c"))) == (401, "token_malformed")

        def ours(span: Any) -> bool:
            return bool(span.kind == "SERVER" and span.name.startswith("tools/call"))

        sink.wait_for(4, where=ours)
        found = sorted(filter(ours, sink.spans), key=lambda span: span.start)
    names = ("actor.type", "actor.id", "actor.on_behalf_of", "actor.assurance")
    assert [tuple(each.attributes.get(name) for name in names) for each in found] == [
        ("service", BOT, None, 3),
        ("service", BOT, "ana", 3),
        ("agent", "spiffe://prod.example.com/ns/agents/sa/bot", "ana", 3),
        ("human", "ana", None, 2),
    ]
    assert place.chains() == [
        [f"service {BOT}"],
        [f"service {BOT}", "human ana"],
        ["agent spiffe://prod.example.com/ns/agents/sa/bot", "human ana"],
        ["human ana"],
    ]


@pytest.mark.parametrize("mode", clients.ERAS)
async def test_the_official_client_comes_through_tls(
    place: Place, opa_bin: Path, mode: str
) -> None:
    log = place.folder / "desk.log"
    with ExitStack() as stack:
        desk = stack.enter_context(ticket_desk(log))
        stack.enter_context(fronted(place, opa_bin, desk.url, tls=place.tls(client="required")))
        tls = place.showing(place.clients.client(BOT))
        async with clients.over_http(place.url, mode, tls=tls) as client:
            await client.call_tool("get_ticket", {"id": 4711})
    assert done(log) == ["get_ticket"]
    assert place.chains() == [[f"service {BOT}"]]


def test_a_session_is_the_workloads_that_opened_it(place: Place, opa_bin: Path) -> None:
    with ExitStack() as stack:
        desk = stack.enter_context(ticket_desk(place.folder / "log", transport="sse"))
        stack.enter_context(fronted(place, opa_bin, desk.url))
        bot, other = place.clients.client(BOT), place.clients.client(OTHER)
        wire = stack.enter_context(Wire(place.url, tls=place.showing(bot)))
        wire.request(headers=(("Accept", "text/event-stream"),), verb="GET")
        stream = wire.begin("GET")
        target = read_event(stream).decode().partition("data: ")[2].strip()
        renewed = place.clients.client(BOT)
        for issued, status in ((renewed, 202), (other, 404), (None, 404)):
            tls = place.showing(issued)
            assert post(place.url, initialize(), tls=tls, target=target).status == status
        assert any(b"protocolVersion" in line for line in stream)


def test_a_workload_is_revoked_by_its_key(place: Place, opa_bin: Path) -> None:
    policy = place.folder / "policy"
    shutil.copytree(ALLOW_ALL.parent / "starter", policy)
    with serving(place, opa_bin, policy=policy) as (front, _):
        bot, other = (place.showing(place.clients.client(each)) for each in (BOT, OTHER))
        assert "result" in post(front.url, initialize(), tls=bot).message
        revoked = {"mcp_revoked": {"principals": {f"spiffe://prod.example.com|{BOT}": True}}}
        (policy / "data.json").write_text(json.dumps(revoked), encoding="utf-8")

        def refused() -> bool:
            error = post(front.url, initialize(), tls=bot).message.get("error")
            return error is not None and error["data"]["reasons"][0]["code"] == "revoked"

        wait_until(refused, "the workload is revoked")
        assert "result" in post(front.url, initialize(), tls=other).message


def test_a_connection_that_outlives_its_certificate_ends(place: Place, opa_bin: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(scripted.scripted(_answering))
        stack.enter_context(fronted(place, opa_bin, server.url))
        tls = place.showing(
            place.clients.client(BOT, begins=timedelta(0), ends=timedelta(seconds=6))
        )
        session = post(place.url, initialize(), tls=tls).headers["mcp-session-id"]
        kept = stack.enter_context(Wire(place.url, tls=tls))
        kept.request(json.dumps(modern(ECHO)).encode(), (*JSON_HEADERS, *mirrors(ECHO)))
        first = kept.answer()
        assert (first.status, first.headers.get("connection")) == (200, None)
        wire = stack.enter_context(Wire(place.url, tls=tls))
        wire.request(headers=(*JSON_HEADERS, ("Mcp-Session-Id", session)), verb="GET")
        response = wire.begin("GET")
        assert response.status == 200
        with suppress(IncompleteRead):
            while read_event(response):
                pass
        kept.request(json.dumps(modern(ECHO)).encode(), (*JSON_HEADERS, *mirrors(ECHO)))
        late = kept.answer()
        assert code(late) == (401, "workload_expired")
        assert late.headers["connection"] == "close"
        wait_until(lambda: server.closed == ["GET"], "the server's stream is closed too")


def test_a_client_is_asked_to_connect_anew_before_its_certificate_ends(
    place: Place, opa_bin: Path
) -> None:
    with serving(place, opa_bin):
        old = place.call(place.clients.client(BOT, begins=-10 * HOUR, ends=HOUR))
        assert (old.status, old.headers.get("connection")) == (200, "close")
        newer = place.call(place.clients.client(BOT, begins=-8 * HOUR, ends=HOUR))
        assert (newer.status, newer.headers.get("connection")) == (200, None)


# ── Behind a proxy ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("peers", [["127.0.0.0/8"], ["10.0.0.0/8"]])
def test_only_a_trusted_proxy_tells_of_certificates(
    place: Place, opa_bin: Path, peers: list[str]
) -> None:
    trusted = peers == ["127.0.0.0/8"]
    proxy = {"name": "mesh", "peers": peers, "certificate_header": FORWARDED.lower()}
    says = (FORWARDED, f'Hash=0;URI={OTHER},By=spiffe://b/c;Hash=1;Subject="CN=a,b";URI={BOT}')
    own = place.clients.client("spiffe://prod.example.com/edge")
    with serving(place, opa_bin, proxy=proxy) as (_, server):
        assert place.call(None, says).status == 200
        assert place.call(own, says, ("X_Forwarded_Client_Cert", says[1])).status == 200
        assert place.call(own).status == 200
        bad = (
            ((FORWARDED, f"URI={BOT}"), (FORWARDED, f"URI={BOT}")),
            ((FORWARDED, "nonsense"),),
            ((FORWARDED, "Hash=1"),),
            ((FORWARDED, "URI=spiffe://dev.example.com/bot"),),
        )
        found = [place.call(None, *each) for each in bad]
        if trusted:
            assert [code(each)[1] for each in found] == [
                *("proxy_malformed", "proxy_malformed", "workload_malformed", "workload_domain")
            ]
        assert {each.status for each in found} == {401 if trusted else 200}
    for asked in server.seen("tools/call"):
        assert {each for each in asked.headers if "client" in each.lower()} == set()
    proxied, edge = [f"service {BOT}"], ["service spiffe://prod.example.com/edge"]
    nobody = ["unknown anonymous"]
    assert place.chains()[:3] == ([proxied, proxied, nobody] if trusted else [nobody, edge, edge])


# ── Files that rotate ─────────────────────────────────────────────────────────────────────────────


def _serial(place: Place, *authorities: Authority) -> int:
    """Of the certificate that a new connection is shown."""
    tls = ssl.create_default_context(cadata="".join(each.pem.decode() for each in authorities))
    with Wire(place.url, tls=tls) as wire:
        assert isinstance(wire.socket, ssl.SSLSocket)
        shown = wire.socket.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def _swapped(folder: Path, issued: Issued, authority: Authority, number: int) -> None:
    """A revision of the three files, put in place by a link, as mounted secrets are."""
    revision = folder / f"revision-{number}"
    revision.mkdir()
    issued.saved(revision, "tls")
    (revision / "ca.pem").write_bytes(authority.pem)
    fresh = folder / "fresh"
    fresh.symlink_to(revision.name)
    fresh.rename(folder / "current")


def test_files_that_rotate_are_used_by_new_connections(place: Place, opa_bin: Path) -> None:
    folder, second = place.folder, Authority()
    _swapped(folder, place.authority.server(), place.clients, 0)
    names = {"cert": "tls.pem", "key": "tls.key", "client_ca": "ca.pem"}
    tls = {key: str(folder / "current" / name) for key, name in names.items()}
    first_client, second_client = place.clients.client(BOT), second.client(BOT)
    failures: list[Exception] = []
    with serving(place, opa_bin, tls={**tls, "client": "required"}) as (front, _):
        ended, kept = threading.Event(), Wire(place.url, tls=place.showing(first_client))
        body, headers = json.dumps(modern(ECHO)).encode(), (*JSON_HEADERS, *mirrors(ECHO))
        answered = 0

        def traffic() -> None:
            nonlocal answered
            try:
                while not ended.is_set():
                    kept.request(body, headers)
                    assert kept.answer().status == 200
                    answered += 1
            except Exception as error:
                failures.append(error)

        with kept:
            thread = threading.Thread(target=traffic)
            thread.start()
            try:
                old = _serial(place, place.authority)
                issued = place.authority.server()
                _swapped(folder, issued, second, 1)
                assert _serial(place, place.authority) == issued.certificate.serial_number != old
                assert place.call(second_client).status == 200
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    place.call(first_client)
                (folder / "current" / "tls.pem").write_bytes(b"half a cert")
                for _ in range(3):
                    assert _serial(place, place.authority) == issued.certificate.serial_number
                before = answered
                wait_until(lambda: answered > before or failures, "the old connection goes on")
                _swapped(folder, place.authority.server(), place.clients, 2)
                assert place.call(first_client).status == 200
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    place.call(second_client)
            finally:
                ended.set()
                thread.join()
        logged = "\n".join(front.process.lines)
    assert failures == []
    assert logged.count("the old ones stay in use") == 1
    assert logged.count("the files have changed, and are in use") == 2


def test_files_that_are_renamed_one_by_one_are_used_when_they_fit(
    place: Place, opa_bin: Path
) -> None:
    with serving(place, opa_bin):
        old = _serial(place, place.authority)
        issued = place.authority.server()
        cert, key = issued.saved(place.folder, "next")
        cert.rename(place.cert)
        assert _serial(place, place.authority) == old
        key.rename(place.key)
        assert _serial(place, place.authority) == issued.certificate.serial_number


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_of_before_is_not_resumed(
    place: Place, opa_bin: Path, version: ssl.TLSVersion
) -> None:
    """Whose certificate was good under the old authority is not let in by a shorter handshake."""
    with serving(place, opa_bin):
        tls = place.showing(place.clients.client(BOT))
        tls.maximum_version = version
        session = _served(place, tls, None)
        assert session is None or not session.has_ticket
        place.client_ca.write_bytes(Authority().pem)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            _served(place, tls, session)


def _served(
    place: Place, tls: ssl.SSLContext, session: ssl.SSLSession | None
) -> ssl.SSLSession | None:
    """The session of a connection on which a call is answered, begun with another session."""
    with Wire(place.url) as wire:
        wire.socket = tls.wrap_socket(wire.socket, server_hostname="127.0.0.1", session=session)
        wire.request(json.dumps(modern(ECHO)).encode(), (*JSON_HEADERS, *mirrors(ECHO)))
        assert wire.answer().status == 200
        return wire.socket.session


# ── What can not be served ────────────────────────────────────────────────────────────────────────


SPIFFE_ALONE = (
    "identity.spiffe: tls.client_ca or identity.proxy.certificate_header has to bring certificates"
)


def _unusable(place: Place) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """What a configuration says instead, and what it is told."""
    folder, server = place.folder, {"cert": str(place.cert), "key": str(place.key)}
    missing, garbage, locked = (str(folder / each) for each in ("missing", "garbage", "locked"))
    other = str(place.authority.server().saved(folder, "other")[1])
    Path(garbage).write_text("-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n")
    Path(locked).write_bytes(_locked())
    names, no_file = ("cert", "key", "client_ca"), "can not be read: No such file or directory"
    certificates, key = "holds no certificates in PEM", "holds no private key without a password"
    proxy = {"name": "a", "peers": ["::1"], "certificate_header": "x-cert"}
    yield (
        {"tls": place.tls(**dict.fromkeys(names, missing))},
        [f"tls.{each}: {missing} {no_file}" for each in names],
    )
    yield (
        {"tls": place.tls(**dict.fromkeys(names, garbage))},
        [
            f"tls.cert: {garbage} {certificates}",
            f"tls.key: {garbage} {key} in PEM",
            f"tls.client_ca: {garbage} {certificates}",
        ],
    )
    yield {"tls": place.tls(key=other)}, [f"tls.key: {other} is not the key of {place.cert}"]
    yield {"tls": place.tls(key=locked)}, [f"tls.key: {locked} {key} in PEM"]
    yield {"identity": {}}, ["tls.client_ca: identity.spiffe has to say who clients then are"]
    yield {"tls": server}, [SPIFFE_ALONE]
    yield (
        {"identity": {"proxy": proxy}, "tls": {**server, "key": missing}},
        [
            "identity.proxy.certificate_header: needs identity.spiffe",
            f"tls.key: {missing} {no_file}",
        ],
    )


def test_what_can_not_be_served_is_told_before_anything_is(place: Place, opa_bin: Path) -> None:
    file = place.folder / "sidecar.yaml"
    where = ("--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:9/mcp", "--admin", "off")
    for said, problems in _unusable(place):
        document = {"tls": place.tls(), "identity": {"spiffe": DOMAINS}, **said}
        file.write_text(json.dumps(document), encoding="utf-8")
        for command in (("check",), ("http", *where)):
            options = (*command, "--policy", ALLOW_ALL, "--config", file)
            with Process(sidecar(*options), env=environment(opa_bin)) as process:
                assert process.wait() == 125
                told = [each for each in process.lines if each.startswith("mcp-sidecar: ")]
            assert told == [f"mcp-sidecar: {each}" for each in problems], command


def _locked() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
    )

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))


def test_a_client_that_never_shakes_hands_keeps_nobody_waiting(place: Place, opa_bin: Path) -> None:
    with serving(place, opa_bin) as (front, _):
        port = int(place.url.rpartition(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)):
            assert place.call(place.clients.client(BOT)).status == 200
            began = time.monotonic()
            assert front.process.stop() == 0
            assert time.monotonic() - began < 12
