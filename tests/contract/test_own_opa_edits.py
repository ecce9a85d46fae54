"""Edits of the policy folder while a real OPA serves it: in force whole, or rejected."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from sidecar.config import Opa
from sidecar.opa import OwnOpa
from sidecar.opa.expected import IN_FORCE_PATIENCE
from tests.support.opa import CALLERS, eventually, write
from tests.support.own_opa import BROKEN_REGO, Running, data, running

IN_FORCE = (
    20.0  # seconds; 2 are promised (test_policy_reload.py measures), a busy machine takes more
)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write(tmp_path / "policy", {"callers.rego": CALLERS, "data.json": data("echo")})


@pytest.fixture
def settings(opa_bin: Path, policy: Path) -> Opa:
    return Opa(policy=policy, binary=str(opa_bin))


def serves_another(own: OwnOpa, revision: str | None) -> bool:
    return own.served not in (None, revision)


async def test_an_edit_is_in_force_within_two_seconds(settings: Opa, policy: Path) -> None:
    async with running(settings) as it:
        before = it.own.expected
        write(policy, {"data.json": data("echo", "delete")})
        await eventually(lambda: it.allows("delete"), within=IN_FORCE)
        await eventually(lambda: it.changes, within=1)
        assert it.changes == [(it.own.served, None)]
        assert it.readiness.revision == it.own.expected != before
        (policy / "data.json").unlink()
        write(policy, {"nested/callers/data.yaml": "ann: [other]"})
        write(policy, {"callers.rego": CALLERS.replace("data.callers", "data.nested.callers")})
        await eventually(lambda: it.allows("other"), within=IN_FORCE)
        assert not await it.allows("echo")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("custom.rego", BROKEN_REGO, id="does not compile"),
        pytest.param("data.json", '{"callers": {"ann": ["del', id="broken data"),
    ],
)
async def test_a_bad_edit_keeps_the_last_good_one(
    settings: Opa, policy: Path, name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(settings) as it:
        good = it.own.expected
        write(policy, {name: text})
        await eventually(lambda: it.own.rejected, within=IN_FORCE)
        status = it.readiness.status()
        assert status["ready"] is True
        assert status["policy"]["revision"] == status["policy"]["expected"] == good
        assert name in status["policy"]["rejected"]["error"]
        assert status["policy"]["rejected"]["at"].endswith("Z")
        lines = [record for record in caplog.records if record.msg.startswith("policy_rejected")]
        assert [record.levelno for record in lines] == [logging.ERROR]
        assert name in lines[0].getMessage()
        assert await it.allows("echo")

        assert it.own.pid is not None
        os.kill(it.own.pid, signal.SIGKILL)
        await eventually(lambda: it.own.pid is None, within=2)
        await eventually(lambda: it.allows("echo"), within=2)
        await eventually(lambda: it.own.served == good, within=2)
        assert it.own.rejected is not None

        write(policy, {name: data("delete") if name == "data.json" else "package mcp.custom\n"})
        await eventually(lambda: it.own.rejected is None, within=IN_FORCE)
        assert "rejected" not in it.readiness.status()["policy"]
        if name == "data.json":
            await eventually(lambda: it.allows("delete"), within=IN_FORCE)


async def test_a_bad_edit_that_is_undone_is_no_longer_rejected(settings: Opa, policy: Path) -> None:
    async with running(settings) as it:
        good = it.own.expected
        write(policy, {"data.json": "{"})
        await eventually(lambda: it.own.rejected, within=IN_FORCE)
        write(policy, {"data.json": data("echo")})
        await eventually(lambda: it.own.rejected is None, within=IN_FORCE)
        assert it.own.expected == good
        assert await it.allows("echo")


async def test_a_folder_that_vanishes_keeps_the_last_good_one(settings: Opa, policy: Path) -> None:
    async with running(settings) as it:
        policy.rename(policy.with_name("away"))
        await eventually(lambda: it.own.rejected, within=IN_FORCE)
        assert await it.allows("echo")
        policy.with_name("away").rename(policy)
        await eventually(lambda: it.own.rejected is None, within=IN_FORCE)


async def test_a_config_map_that_is_swapped(settings: Opa, tmp_path: Path) -> None:
    """As the kubelet does it: each key is a symlink into `..data`, which is renamed over."""
    folder = tmp_path / "mounted"

    def mount(version: str, *tools: str) -> None:
        files = {"callers.rego": CALLERS, "data.json": data(*tools)}
        write(folder / f"..{version}", files)
        (folder / "..new").symlink_to(f"..{version}")
        (folder / "..new").replace(folder / "..data")
        for name in files:
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(Path("..data", name))

    mount("v1", "echo")
    async with running(Opa(policy=folder, binary=settings.binary)) as it:
        assert await it.allows("echo")
        mount("v2", "delete")
        await eventually(lambda: it.allows("delete"), within=IN_FORCE)
        assert not await it.allows("echo")


async def test_every_swap_is_seen_whole(settings: Opa, policy: Path) -> None:
    """25 revisions in a row under traffic: no answer mixes two of them, none is missing."""
    marked = CALLERS.replace(
        "decision := {", 'decision := {"rule": concat(" ", [data.mark, "M0"]), '
    )
    write(policy, {"callers.rego": marked, "mark.json": '{"mark": "M0"}'})
    torn: list[object] = []

    async def traffic(it: Running) -> None:
        while True:
            decision = await it.client.decide({}, deadline=0.5, headers={})
            first, second = (decision.rule or "").split()
            if first != second:
                torn.append(decision)
            await asyncio.sleep(0)

    fast = Opa(policy=policy, binary=settings.binary, poll=0.02)
    async with running(fast) as it, asyncio.TaskGroup() as group:
        task = group.create_task(traffic(it))
        for number in range(1, 26):
            mark, before = f"M{number}", it.own.expected
            write(
                policy,
                {"mark.json": f'{{"mark": "{mark}"}}', "callers.rego": marked.replace("M0", mark)},
            )
            await eventually(partial(serves_another, it.own, before), within=IN_FORCE)
            assert it.own.served == it.own.expected
            assert (await it.client.decide({}, deadline=0.5, headers={})).rule == f"{mark} {mark}"
        task.cancel()
        store = Path(it.own.url.removeprefix("unix://")).parent / "store"
        assert len(list(store.iterdir())) <= 2
    assert torn == []


async def test_a_revision_that_is_not_served_is_not_ready(
    settings: Opa, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.opa.expected.IN_FORCE_PATIENCE", 0.3)
    async with running(settings) as it:
        with monkeypatch.context() as patch:
            patch.setattr("sidecar.opa.own.put_in_force", lambda *_: None)
            write(policy, {"data.json": data("delete")})
            await eventually(lambda: not it.readiness.ready, within=3)
            policy_status = it.readiness.status()["policy"]
            assert policy_status["revision"] != policy_status["expected"]
        await eventually(lambda: it.readiness.ready, within=5)
        assert await it.allows("delete")
    assert IN_FORCE_PATIENCE == 5
