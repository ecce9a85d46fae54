"""Service accounts whose cluster is asked about each token, by a sidecar that has no keys."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.support.api_server import OWN_TOKEN, ApiServer, api_server
from tests.support.issuing import AUDIENCE, CLUSTER, account_claims, signer
from tests.support.processes import (
    ALLOW_ALL,
    Served,
    done,
    get,
    http_sidecar,
    patient,
    ticket_desk,
    wait_until,
)
from tests.support.raw import Answer, beside, call, mirrors, modern, post

TICKET = call(1, "get_ticket", id=4711)


def token(namespace: str = "support", **changes: Any) -> str:
    now = int(time.time())
    times = {"iat": now, "nbf": now, "exp": now + 600}
    return signer("nobody's").sign(account_claims(namespace, **{**times, **changes}))


class Cluster:
    """A ticket desk behind a sidecar, which asks the cluster who is calling."""

    def __init__(self, folder: Path, server: ApiServer, front: Served) -> None:
        self.server, self.front = server, front
        self.log, self.audit = folder / "desk.log", folder / "audit.jsonl"

    def call(self, token: str) -> Answer:
        bearer = ("Authorization", f"Bearer {token}")
        return post(self.front.url, modern(TICKET), [*mirrors(TICKET), bearer])

    def refused(self, token: str) -> tuple[str, bool]:
        answer = self.call(token)
        error = answer.message["error"]
        assert (answer.status, error["code"]) == (401, -31401)
        return error["data"]["reasons"][0]["code"], error["data"]["retryable"]


@contextmanager
def guarded(folder: Path, opa: Path, **review: Any) -> Iterator[Cluster]:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(folder / "ca.crt"))
    (folder / "own").write_text(OWN_TOKEN, encoding="ascii")
    with beside(api_server(context)) as server, ticket_desk(folder / "desk.log") as desk:
        asked = {
            "url": server.url,
            "ca": str(folder / "ca.crt"),
            "token_file": str(folder / "own"),
            "timeout": 10,
            **review,
        }
        kubernetes = {"issuer": CLUSTER, "audiences": [AUDIENCE], "token_review": asked}
        types = [{"type": "agent", "source": "kubernetes", "subject": "agents/*"}]
        file = folder / "sidecar.yaml"
        identity = {"kubernetes": {**kubernetes, "pod_required": True}, "types": types}
        file.write_text(json.dumps({"identity": identity}), encoding="utf-8")
        options = ("--policy", ALLOW_ALL, "--config", file, "--audit", folder / "audit.jsonl")
        with http_sidecar(desk.url, *options, env=patient(opa)) as front:
            yield Cluster(folder, server, front)
            print(front.process.tail())  # shown when the test failed


def test_the_cluster_says_who_an_account_is(tmp_path: Path, opa_bin: Path) -> None:
    tokens = [token("support"), token("agents")]
    stranger = token("support", jti="k-2")
    with guarded(tmp_path, opa_bin) as cluster:
        for each in tokens:
            assert "result" in cluster.call(each).message
        assert "result" in cluster.call(tokens[0]).message
        cluster.server.rejected.add(stranger)
        assert cluster.refused(stranger) == ("token_rejected", False)
        assert cluster.refused(token(aud=["else"])) == ("token_audience", False)
        assert cluster.refused(token(iss="https://else.example")) == ("token_issuer", False)
        assert cluster.server.asked == [*tokens, stranger]
        cluster.server.changes = {"username": "system:serviceaccount:support:admin"}
        assert cluster.refused(token(jti="k-3")) == ("token_claims", False)
        metrics = get(f"{cluster.front.admin}/metrics")[1].decode()
        cluster.front.process.stop()
        left = "\n".join(cluster.front.process.lines) + metrics + cluster.audit.read_text("utf-8")
    assert done(cluster.log) == ["get_ticket"] * 3
    records = [json.loads(line) for line in cluster.audit.read_text("utf-8").splitlines()]
    calls = [r for r in records if (r["type"], r.get("method")) == ("decision", "tools/call")]
    assert [[(each["type"], each["key"]) for each in r["chain"]] for r in calls] == [
        [("service", f"{CLUSTER}|support/bot")],
        [("agent", f"{CLUSTER}|agents/bot")],
        [("service", f"{CLUSTER}|support/bot")],
    ]
    parts = {part for each in cluster.server.asked for part in each.split(".")[1:]}
    assert not [each for each in {*parts, OWN_TOKEN} if each in left]


def test_a_pod_that_is_gone_is_soon_out(tmp_path: Path, opa_bin: Path) -> None:
    """Its token would be good by its signature, and by its times."""
    text = token()
    with guarded(tmp_path, opa_bin, remember=0.5) as cluster:
        assert "result" in cluster.call(text).message
        cluster.server.rejected.add(text)
        wait_until(lambda: cluster.call(text).status == 401, "it is asked about again")
        assert cluster.refused(text) == ("token_rejected", False)


@pytest.mark.parametrize("known", [True, False])
def test_a_cluster_that_does_not_answer_lets_nobody_in_and_says_so(
    tmp_path: Path, opa_bin: Path, known: bool
) -> None:
    text = token()
    with guarded(tmp_path, opa_bin, remember=0, timeout=1) as cluster:
        if known:
            assert "result" in cluster.call(text).message
        cluster.server.mood = "silent"
        assert cluster.refused(text) == ("review_unavailable", True)
        cluster.front.process.wait_for("reviews_failed .* did not answer within 1 s")
        cluster.server.mood = "well"
        assert "result" in cluster.call(text).message
        cluster.front.process.wait_for("reviews_work_again")
    assert len(done(cluster.log)) == 1 + known
