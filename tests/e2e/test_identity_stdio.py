"""A token for the client on a pipe: from a file that is replaced, or an inherited descriptor."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support import scripted
from tests.support.identity import Idp, idp, policy
from tests.support.issuing import claims, own_claims
from tests.support.processes import (
    ALLOW_ALL,
    descendants,
    desk,
    done,
    environment,
    patient,
    sidecar,
    wait_until,
)
from tests.support.raw import Object, Pipe, call, initialize, request, stdio_sidecar
from tests.support.scripted import Asked, Scripted

ANA, REPORTING = claims(sub="ana"), own_claims("reporting")
TICKET = call(0, "get_ticket", id=4711)


@pytest.fixture
def issuer() -> Iterator[Idp]:
    with idp() as issuer:
        yield issuer


@contextmanager
def wrapped(
    folder: Path, opa: Path, issuer: Idp, command: Sequence[str] | None = None, **identity: Any
) -> Iterator[Pipe]:
    """A ticket desk behind a sidecar, and a raw client."""
    file = folder / "sidecar.yaml"
    said = {"jwt": [issuer.believed()], **identity}
    file.write_text(json.dumps({"identity": said}), encoding="utf-8")
    options = ("--policy", policy(folder, issuer.url), "--config", file)
    server = desk(folder / "desk.log")
    with stdio_sidecar(server, *options, env=patient(opa), command=command) as pipe:
        yield pipe


def refused(answer: Object) -> str:
    error = answer["error"]
    assert (error["code"], error["data"]["retryable"]) == (-31401, False)
    return str(error["data"]["reasons"][0]["code"])


def test_a_token_file_is_read_when_it_changes(tmp_path: Path, opa_bin: Path, issuer: Idp) -> None:
    secret = tmp_path / "token"
    with wrapped(tmp_path, opa_bin, issuer, token_file=str(secret)) as pipe:
        assert refused(pipe.ask(initialize())) == "credentials_missing"
        pipe.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        secret.write_text("opaque", encoding="ascii")
        assert refused(pipe.ask(request(1, "ping"))) == "token_malformed"
        secret.write_text(issuer.token(ANA) + "\n", encoding="ascii")
        pipe.greet()
        assert "result" in pipe.ask({**TICKET, "id": 2})
        secret.write_text(issuer.token(ANA, iat=1, exp=2), encoding="ascii")
        assert refused(pipe.ask({**TICKET, "id": 3})) == "token_expired"
        other = tmp_path / "other"
        other.write_text(issuer.token(REPORTING), encoding="ascii")
        other.rename(secret)
        assert "result" in pipe.ask({**TICKET, "id": 4})
        denied = pipe.ask(call(5, "create_ticket", title="x"))["error"]
        assert denied["data"]["reasons"][0]["code"] == "not_granted"
        secret.unlink()
        assert refused(pipe.ask({**TICKET, "id": 6})) == "credentials_missing"
    assert done(tmp_path / "desk.log") == ["get_ticket", "get_ticket"]


def tick(number: int) -> Object:
    return {"method": "notifications/resources/updated", "params": {"uri": f"tick:{number}"}}


def test_nobody_hears_the_server_while_no_token_is_good(
    tmp_path: Path, opa_bin: Path, issuer: Idp
) -> None:
    """What it says by itself is kept back from when the token expires until it is renewed."""
    secret, file, says = tmp_path / "token", tmp_path / "sidecar.yaml", list[Object]()
    identity = {"jwt": [issuer.believed(leeway=0)], "token_file": str(secret)}
    file.write_text(json.dumps({"identity": identity}), encoding="utf-8")

    async def speaking(_: Scripted, asking: web.Request, asked: Asked) -> web.StreamResponse | None:
        if asked.verb != "GET":
            return None
        response = await scripted.stream(asking)
        while True:
            while says:
                await response.write(scripted.event(says.pop(0)).encode() + b"\n\n")
            await asyncio.sleep(0.01)

    with scripted.scripted(speaking) as server:
        options = ("--policy", ALLOW_ALL, "--config", file, "--upstream", server.url)
        with stdio_sidecar((), *options, env=patient(opa_bin)) as pipe:

            def heard(**said: Any) -> Object:
                return pipe.first(lambda each: each.items() >= said.items())

            until = time.time() + 3
            secret.write_text(issuer.token(ANA, exp=until), encoding="ascii")
            pipe.greet()
            says.append(tick(1))
            heard(**tick(1))
            wait_until(lambda: time.time() > until, "the token has expired")
            says += [tick(2), {"id": "q", "method": "roots/list"}]
            heard(id="q")  # which the policy has let through, although nobody is there
            secret.write_text(issuer.token(ANA), encoding="ascii")
            says.append(tick(3))
            heard(**tick(3))
            uris = [each["params"]["uri"] for each in pipe.messages() if "params" in each]
            assert uris == ["tick:1", "tick:3"]


def test_a_token_may_come_from_a_descriptor_that_no_child_gets(
    tmp_path: Path, opa_bin: Path, issuer: Idp
) -> None:
    secret = tmp_path / "token"
    secret.write_text(f"{issuer.token(REPORTING)}\n{issuer.token(ANA)}", encoding="ascii")
    command = ("sh", "-c", f'exec "$@" 37< {secret}', "sh", *sidecar("stdio"))
    with wrapped(tmp_path, opa_bin, issuer, ("bash", *command[1:]), token_fd=37) as pipe:
        pipe.greet()
        assert "result" in pipe.ask(call(1, "create_ticket", title="ana may"))
        for pid in descendants(pipe.process.pid):
            folder = Path(f"/proc/{pid}/fd")
            if folder.exists():
                held = [str(each.readlink()) for each in folder.iterdir()]
                assert str(secret) not in held, pid


def test_a_descriptor_that_is_not_open_is_told_at_start(
    tmp_path: Path, opa_bin: Path, issuer: Idp
) -> None:
    with wrapped(tmp_path, opa_bin, issuer, token_fd=999) as pipe:
        assert pipe.process.wait() == 125
    assert "identity.token_fd: 999 can not be read" in "\n".join(pipe.process.lines)


def test_a_token_is_no_variable(tmp_path: Path, issuer: Idp) -> None:
    token = issuer.token(ANA)
    with ExitStack() as stack:
        env = environment(MCP_SIDECAR_IDENTITY__TOKEN=token)
        server, options = desk(tmp_path / "log"), ("--opa", "http://127.0.0.1:1")
        pipe = stack.enter_context(stdio_sidecar(server, *options, env=env))
        assert pipe.process.wait() == 125
    said = "\n".join(pipe.process.lines)
    assert "MCP_SIDECAR_IDENTITY__TOKEN: is not known" in said
    assert token not in said
