"""The own OPA: a real process over a real folder, from start to end and in between."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
import uvloop

from sidecar.config import Opa
from sidecar.errors import DecisionError, PolicyUnusable
from sidecar.opa import OpaTracing, OwnOpa, question
from sidecar.opa import process as process_module
from tests.support.opa import CALLERS, eventually, open_files, write
from tests.support.own_opa import BROKEN_REGO, Running, data, running, script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write(tmp_path / "policy", {"callers.rego": CALLERS, "data.json": data("echo")})


@pytest.fixture
def settings(opa_bin: Path, policy: Path) -> Opa:
    return Opa(policy=policy, binary=str(opa_bin))


# ── Start and end ─────────────────────────────────────────────────────────────────────────────────


async def test_it_serves_the_folder_and_leaves_nothing_behind(settings: Opa) -> None:
    files, tasks = open_files(), len(asyncio.all_tasks())
    async with running(settings) as it:
        pid, private = it.own.pid, Path(it.own.url.removeprefix("unix://")).parent
        assert private.stat().st_mode & 0o777 == 0o700
        assert await it.allows("echo")
        assert not await it.allows("delete")
        decision = await it.client.decide({}, deadline=1, headers={})
        assert decision.revision == it.own.expected == it.own.served == it.readiness.revision
        assert it.readiness.status() == {
            "ready": True,
            "opa": {"answers": True, "since": it.readiness.since},
            "policy": {"revision": it.own.expected, "expected": it.own.expected},
        }
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert not private.exists()
    await eventually(lambda: open_files() <= files + 1, within=2)  # + 1: the look at the files
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks, within=2)


def test_it_runs_on_uvloop(settings: Opa) -> None:
    async def run() -> None:
        async with running(settings) as it:
            assert it.own.pid is not None
            os.kill(it.own.pid, signal.SIGKILL)
            await eventually(lambda: it.own.pid is None, within=2)
            await eventually(lambda: it.allows("echo"), within=2)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_it_runs_where_the_kernel_gives_no_signal(
    settings: Opa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "_ON_LINUX", False)
    async with running(settings) as it:
        pid = it.own.pid
        assert pid is not None
        assert "opa" in psutil.Process(pid).name()
        assert await it.allows("echo")
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: it.own.pid not in (None, pid), within=2)
        await eventually(lambda: it.allows("echo"), within=2)
    assert not psutil.pid_exists(pid)


PARENT = """
import asyncio, sys
from pathlib import Path
import sidecar.opa.process as process
from sidecar.config import Opa
from sidecar.opa import OwnOpa

async def main():
    process._ON_LINUX = sys.argv[3] == "kernel"
    own = OwnOpa(Opa(policy=Path(sys.argv[1]), binary=sys.argv[2]))
    await own.start()
    print(own.pid, own.url, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["kernel", "pipe"])
async def test_it_never_outlives_the_sidecar(settings: Opa, how: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(settings.policy), str(settings.binary), how],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().decode().split()
    parent.stdout.close()
    assert psutil.pid_exists(int(pid))
    parent.kill()
    parent.wait()
    try:
        await eventually(lambda: not running_process(int(pid)), within=2)
    finally:
        shutil.rmtree(Path(url.removeprefix("unix://")).parent)


def runs_another(own: OwnOpa, pid: int) -> bool:
    return own.pid not in (None, pid)


def running_process(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


# ── What can not be started ───────────────────────────────────────────────────────────────────────

UNDEFINED_NAME = "package mcp.custom\n\nallow if nobody_defines_this(input)\n"


async def unusable(settings: Opa) -> str:
    files = open_files()
    with pytest.raises(PolicyUnusable) as caught:
        await OwnOpa(settings).start()
    assert len(str(caught.value).splitlines()) <= 20
    await eventually(lambda: open_files() <= files + 1, within=2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        pytest.param("broken.rego", BROKEN_REGO, "rego_parse_error", id="syntax"),
        pytest.param("broken.rego", UNDEFINED_NAME, "rego_type_error", id="type"),
        pytest.param("data.json", '{"callers": ', "data.json", id="json"),
        pytest.param("more.yaml", "a: [", "more.yaml", id="yaml"),
        pytest.param("more.yaml", "callers: 1", "merge error", id="data against data"),
        pytest.param("more.json", '{"mcp": {"revision": "x"}}', "merge error", id="revision"),
    ],
)
async def test_a_policy_that_does_not_pass_the_check(
    settings: Opa, policy: Path, name: str, text: str, says: str
) -> None:
    write(policy, {name: text})
    message = await unusable(settings)
    assert says in message
    assert "/tmp" not in message


async def test_no_policy(settings: Opa, policy: Path) -> None:
    shutil.rmtree(policy)
    assert str(policy) in await unusable(settings)
    policy.mkdir()
    write(policy, {".hidden.rego": "package x", "x_test.rego": "package x", "README.md": "#"})
    assert "holds no .rego" in await unusable(settings)


async def test_no_opa(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "none was found" in await unusable(Opa(policy=policy, tools=tmp_path))
    script(tmp_path / "opa", "echo 'Version: 0.70.0'")
    message = await unusable(Opa(policy=policy, binary=str(tmp_path / "opa")))
    assert "0.70.0" in message
    assert "none was found" in await unusable(Opa(policy=policy, binary="no-such-opa"))
    script(tmp_path / "opa", "exit 1")
    assert "no OPA that answers" in await unusable(Opa(policy=policy))


async def test_an_old_opa_on_the_path_is_passed_over(
    settings: Opa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "tools").mkdir()
    script(tmp_path / "path" / "opa", "echo 'Version: 0.70.0'")
    (tmp_path / "tools" / "opa").symlink_to(str(settings.binary))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    async with running(Opa(policy=settings.policy, tools=tmp_path / "tools")) as it:
        assert await it.allows("echo")


async def test_an_opa_that_never_ends_its_check(
    settings: Opa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "opa", f'[ "$1" = check ] && exec sleep 60; exec {settings.binary} "$@"')
    monkeypatch.setattr(process_module, "COMMAND_PATIENCE", 0.3)
    message = await unusable(Opa(policy=settings.policy, binary=str(tmp_path / "opa")))
    assert "`opa check` did not end" in message


async def test_an_opa_that_never_serves(
    settings: Opa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes every check, and ends when it should serve: the message has its last words."""
    script(
        tmp_path / "opa", f'[ "$1" = run ] && echo "no way" >&2 && exit 3; {settings.binary} "$@"'
    )
    monkeypatch.setattr("sidecar.opa.own.START_PATIENCE", 0.5)
    message = await unusable(Opa(policy=settings.policy, binary=str(tmp_path / "opa")))
    assert "0.5 s" in message
    assert "no way" in message


# ── The process ───────────────────────────────────────────────────────────────────────────────────


async def test_killed_under_traffic_it_is_back_within_two_seconds(settings: Opa) -> None:
    outcomes: list[str] = []

    def allowed_since(number: int) -> bool:
        return "allow" in outcomes[number:]

    async def traffic(it: Running) -> None:
        while True:
            began = time.monotonic()
            try:
                document = {"actor": {"id": "ann"}, "target": {"name": "echo"}}
                decision = await it.client.decide(document, deadline=0.5, headers={})
                outcomes.append("allow" if decision.allow else "deny")
            except DecisionError as error:
                outcomes.append(error.detail)
            assert time.monotonic() - began < 0.6
            await asyncio.sleep(0.001)

    async with running(settings) as it, asyncio.TaskGroup() as group:
        tasks = [group.create_task(traffic(it)) for _ in range(5)]
        for _ in range(3):
            pid, seen = it.own.pid, len(outcomes)
            assert pid is not None
            await eventually(partial(allowed_since, seen), within=2)
            os.kill(pid, signal.SIGKILL)
            await eventually(partial(runs_another, it.own, pid), within=2)
            await eventually(partial(allowed_since, len(outcomes)), within=2)
            await eventually(lambda: it.readiness.ready, within=2)
        for task in tasks:
            task.cancel()
    assert set(outcomes) == {"allow", "connection_error"}


async def test_frozen_it_is_late_and_not_ready(settings: Opa) -> None:
    quick = Opa(policy=settings.policy, binary=settings.binary, deadline=0.2, canary=0.2)
    async with running(quick) as it:
        assert it.own.pid is not None
        os.kill(it.own.pid, signal.SIGSTOP)
        opa = psutil.Process(it.own.pid)
        await eventually(lambda: opa.status() == psutil.STATUS_STOPPED, within=2)
        began = time.monotonic()
        with pytest.raises(DecisionError) as caught:
            await it.client.decide({}, deadline=0.2, headers={})
        assert time.monotonic() - began < 0.3
        assert caught.value.detail == "timeout"
        await eventually(lambda: not it.readiness.ready, within=2)
        assert "timeout" in it.readiness.status()["opa"]["error"]
        os.kill(it.own.pid, signal.SIGCONT)
        await eventually(lambda: it.readiness.ready, within=2)
        assert await it.allows("echo")


async def test_frozen_it_is_ended_all_the_same(settings: Opa) -> None:
    async with running(settings) as it:
        pid = it.own.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
    assert time.monotonic() - began < 4
    assert not psutil.pid_exists(pid)


async def test_an_opa_that_can_not_be_started_again_is_tried_again(
    settings: Opa, tmp_path: Path
) -> None:
    binary = tmp_path / "opa"
    binary.symlink_to(str(settings.binary))
    async with running(Opa(policy=settings.policy, binary=str(binary))) as it:
        pid = it.own.pid
        assert pid is not None
        binary.unlink()
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not it.readiness.ready, within=4)
        assert it.own.pid is None
        binary.symlink_to(str(settings.binary))
        await eventually(lambda: it.readiness.ready, within=4)
        assert await it.allows("echo")


async def test_what_opa_says_is_logged(
    settings: Opa,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = """
        echo on stdout
        echo '{"level":"info","msg":"Decision Log","input":{"level":"error","password":"x"}}' >&2
        echo '{"level":"error","msg":"disk on fire"}' >&2"""
    script(tmp_path / "opa", f'[ "$1" = run ] && {{ {said}\n}}\nexec {settings.binary} "$@"')
    async with running(Opa(policy=settings.policy, binary=str(tmp_path / "opa"))) as it:
        await eventually(lambda: "disk on fire" in caplog.text, within=2)
        assert await it.allows("echo")
    assert "password" not in caplog.text
    assert capfd.readouterr() == ("", "")


@asynccontextmanager
async def collector(
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Takes whatever is sent over HTTP, and says yes."""
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length: ")[1].split("\r\n")[0])
                bodies.append(await reader.readexactly(length))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", bodies
    finally:
        server.close()


async def test_with_tracing_opa_sends_its_own_span(
    settings: Opa, capfd: pytest.CaptureFixture[str]
) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with collector() as (address, bodies):
        async with running(settings, tracing=OpaTracing(address)) as it:
            headers = {"traceparent": f"00-{trace}-{parent}-01"}
            document = {"actor": {"id": "ann"}, "target": {"name": "echo", "secret": "hunter2"}}
            decision = await it.client.decide(document, deadline=1, headers=headers)
            assert decision.allow
            assert decision.opa_id
            await eventually(lambda: bodies, within=5)
            await eventually(lambda: it.readiness.ready, within=1)
        sent = b"".join(bodies)
    assert sent.count(bytes.fromhex(trace)) == 1, "one span, and none for the canary"
    assert bytes.fromhex(parent) in sent
    assert decision.opa_id.encode() in sent
    assert sent.count(b"opa.decision_id") == 1
    assert b"hunter2" not in sent
    assert capfd.readouterr() == ("", "")


async def test_opa_shows_its_certificate_to_a_collector_that_it_trusts(
    settings: Opa, tmp_path: Path
) -> None:
    authority = trustme.CA()
    ours, theirs = authority.issue_cert("opa.example"), authority.issue_cert("127.0.0.1")
    files = {name: tmp_path / f"{name}.pem" for name in ("authorities", "certificate", "key")}
    authority.cert_pem.write_to_path(files["authorities"])
    ours.cert_chain_pems[0].write_to_path(files["certificate"])
    ours.private_key_pem.write_to_path(files["key"])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    theirs.configure_cert(context)
    async with collector(context) as (address, bodies):
        paths = (str(files[name]) for name in ("authorities", "certificate", "key"))
        tracing = OpaTracing(address, "http", True, *paths)
        async with running(settings, tracing=tracing) as it:
            headers = {"traceparent": f"00-{1:032x}-{2:016x}-01"}
            await it.client.decide({"actor": {"id": "ann"}}, deadline=1, headers=headers)
            await eventually(lambda: bodies, within=5)
    assert f"{1:032x}" in b"".join(bodies).hex()


async def test_a_dead_collector_costs_nothing(settings: Opa) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        tracing = OpaTracing(f"127.0.0.1:{taken.getsockname()[1]}", "grpc")
        async with running(settings, tracing=tracing) as it:
            headers = {"traceparent": f"00-{1:032x}-{2:016x}-01"}
            for _ in range(20):
                await it.client.decide({}, deadline=0.5, headers=headers)
            began = time.monotonic()
    assert time.monotonic() - began < 3


# ── The library ───────────────────────────────────────────────────────────────────────────────────


async def test_the_starter_policy_lies_over_the_library(opa_bin: Path) -> None:
    settings = Opa(policy=ROOT / "policies" / "starter", binary=str(opa_bin))
    async with running(settings) as it:
        canary = question(enforcer_version="0", server="s", transport="http")
        decision = await it.client.decide(canary, deadline=1, headers={})
        assert decision.revision == it.own.expected
        assert decision.watermark
        assert it.readiness.watermark == decision.watermark
        named = {**canary, "target": {"type": "tool", "name": "x"}}
        del named["listing"]
        assert not (await it.client.decide(named, deadline=1, headers={})).allow


async def test_allow_all_allows(opa_bin: Path) -> None:
    settings = Opa(policy=ROOT / "policies" / "allow_all", binary=str(opa_bin))
    ask: Callable[..., Any] = question
    async with running(settings) as it:
        canary = ask(enforcer_version="0", server="s", transport="http")
        assert (await it.client.decide(canary, deadline=1, headers={})).allow
