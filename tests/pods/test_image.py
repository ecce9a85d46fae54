"""The Dockerfile, without anything to build it: what it copies, who runs, and what is where."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

from sidecar.injector.opa import BOOT
from tests.pods.conftest import Rig
from tests.pods.container import Container
from tests.pods.image import DOCKERFILE, installs, needed, stages
from tests.pods.network import Network
from tests.support.processes import ROOT

TEXT = DOCKERFILE.read_text("utf-8")
STAGES = stages(TEXT)
LAST = STAGES[-1]
COPIED = sorted(
    {
        word
        for stage in STAGES
        for step in stage.all("COPY")
        if "from" not in step.flags
        for word in step.words[:-1]
    }
)


def ignored(path: str) -> bool:
    """Whether `.dockerignore` leaves it out: the last pattern that fits decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = line.strip().removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        heads = ["/".join(parts[:number]) for number in range(1, len(parts) + 1)]
        tails = parts if line.lstrip("!").startswith("**/") else heads
        if line and not line.startswith("#") and any(fnmatch.fnmatch(e, pattern) for e in tails):
            found = not line.startswith("!")
    return found


@pytest.mark.parametrize("path", COPIED)
def test_what_is_copied_is_there_and_sent_along(path: str) -> None:
    assert (ROOT / path).exists()
    files = [each for each in (ROOT / path).rglob("*") if each.is_file()] or [ROOT / path]
    sent = [each for each in files if not ignored(str(each.relative_to(ROOT)))]
    assert sent
    assert not [each for each in sent if "_test.rego" in each.name or "__pycache__" in each.parts]


@pytest.mark.parametrize("path", [".git/config", ".venv/bin/python", "tests/conftest.py", "k8s/x"])
def test_nothing_else_is_sent_along(path: str) -> None:
    assert ignored(path)


def test_stages() -> None:
    assert re.search(r"^ARG PYTHON=\S+:3\.\d+-slim-\w+$", TEXT, re.MULTILINE)
    assert {stage.base for stage in STAGES} == {"${PYTHON}"}
    names = {stage.name for stage in STAGES}
    copied = [step for stage in STAGES for step in stage.all("COPY")]
    assert {step.flags["from"] for step in copied if "from" in step.flags} <= names
    assert not [step for stage in STAGES for step in stage.all("ADD")]


def test_the_last_one_installs_what_it_says_and_is_nobody() -> None:
    (run,) = LAST.all("RUN")
    commands = [each.split()[:2] for each in run.text.split("&&")]
    assert commands == [["apt-get", "update"], ["apt-get", "install"], ["rm", "-rf"]]
    assert installs(LAST) == ["nftables"]
    (user,) = LAST.all("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text)
    assert LAST.steps.index(user) > max(map(LAST.steps.index, LAST.all("COPY")))


def test_everything_is_pinned() -> None:
    found = [
        step.text
        for stage in STAGES
        for step in stage.all("RUN")
        if "pip" in step.text and " install " in step.text
    ]
    assert found
    assert all("--constraint .ci/constraints.txt" in text for text in found)
    pins = (ROOT / ".ci" / "constraints.txt").read_text("utf-8")
    pinned = set(re.findall(r"^([A-Za-z0-9._-]+)==", pins, re.MULTILINE))
    normal = {re.sub(r"[-_.]+", "-", each).lower() for each in pinned}
    wanted = {re.sub(r"[-_.]+", "-", each.name).lower() for each in needed("mcp-opa-sidecar")}
    assert wanted <= normal
    (opa,) = [stage for stage in STAGES if stage.name == "opa"]
    assert any(".ci/install-opa" in step.text for step in opa.all("RUN"))


PROGRAM = """
for each in mcp-sidecar opa nft; do command -v $each; done
ls {boot}
mcp-sidecar --version
opa version | head -1
opa check --strict {boot}
touch {boot}/x /usr/local/bin/x 2>/dev/null && echo writable
id -u
"""


def test_what_is_made_by_its_steps_has_what_pods_expect(rig: Rig, tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    root.mkdir()
    with Network() as network:
        container = Container(
            {}, rig.images["sidecar"], mounts=[], env={},
            command=["sh", "-c", PROGRAM.format(boot=BOOT)],
            network=network.pod, root=root, log=log, pod_context={},
        )  # fmt: skip
        try:
            assert container.wait(30)
        finally:
            container.kill()
    lines = log.read_text("utf-8").splitlines()
    assert lines[:5] == [
        "/opt/mcp-opa-sidecar/venv/bin/mcp-sidecar", "/usr/local/bin/opa", "/usr/sbin/nft",
        "authz.rego", "mask.rego",
    ]  # fmt: skip
    assert lines[5].startswith("mcp-opa-sidecar ")
    assert lines[6].startswith("Version: 1.")
    assert lines[7:] == ["20001"]
    assert rig.images["sidecar"].entrypoint == ("mcp-sidecar",)


def test_the_scripts_of_its_steps_are_shell() -> None:
    for stage in STAGES:
        for step in stage.all("RUN"):
            done = subprocess.run(["sh", "-n", "-c", step.text], capture_output=True, check=False)
            assert done.returncode == 0, step.text
