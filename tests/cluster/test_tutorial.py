"""The tutorial of `k8s/README.md`: its commands, run in order from an empty cluster to a trace.

There is no node here, and no Service leads anywhere. What stands for them is in two tables: `RUNS`
of `node` has what is done with the pods of each Deployment, once the real controllers have made
them, and `IN_PLACE` the commands that are not run just as they stand.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cluster.conftest import assert_bare
from tests.cluster.control_plane import Cluster
from tests.cluster.node import Node
from tests.pods.conftest import Rig
from tests.pods.network import POD_IP
from tests.support.client import LEGACY, over_http, tools_of
from tests.support.processes import ROOT, wait_until

pytestmark = pytest.mark.timeout(300)

README = (ROOT / "k8s" / "README.md").read_text(encoding="utf-8")
[TUTORIAL] = re.findall(r"^## Ten minutes.*?(?=^## )", README, re.DOTALL | re.MULTILINE)
BLOCKS = re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", TUTORIAL, re.DOTALL | re.MULTILINE)
NEEDS_AN_ENGINE = "sh docker"  # images are built and loaded: tests/pods/image.py stands for that


class Reader:
    """Somebody who types what is to be read, at the top of a clone."""

    def __init__(self, cluster: Cluster, node: Node, opa: Path, folder: Path) -> None:
        self.node, self.folder = node, folder
        folder.mkdir()
        for each in ("k8s", "policies", ".venv"):
            (folder / each).symlink_to(ROOT / each)
        self._env = {
            "PATH": f"{cluster.parts}:{os.environ['PATH']}",
            "HOME": str(folder),
            "KUBECONFIG": str(cluster.kubeconfig),
            "MCP_SIDECAR_OPA_BIN": str(opa),
        }

    def types(self, command: str, shown: str | None) -> str:
        """What is printed; the command has to succeed, and to print what the page shows."""
        for pattern, instead in IN_PLACE.items():
            if found := re.fullmatch(pattern, command):
                return instead(self, found, shown)
        return self.prints("sh", "-c", command, shown=shown)

    def prints(self, *words: str, shown: str | None) -> str:
        """What a command prints. It is run once."""
        done = subprocess.run(
            words, cwd=self.folder, env=self._env, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        assert shown is None or fits(done.stdout, shown), f"{shown}\nis not\n{done.stdout}"
        return done.stdout

    def after_the_node(self, found: re.Match[str], shown: str | None) -> str:
        self.node.run(found["namespace"], found["name"])
        return self.prints("sh", "-c", found[0], shown=shown)

    def outside(self, found: re.Match[str], shown: str | None) -> str:
        """Where other pods are, and Services lead to the pods that they select."""
        lines = [f"connect-to = {name}:{place}\n" for name, place in self.node.services()]
        (self.folder / ".curlrc").write_text("".join(lines))
        network = f"--net={self.node.network.outside}"
        return self.prints("nsenter", network, "sh", "-c", found["command"], shown=shown)

    def again(self, found: re.Match[str], shown: str | None) -> str:
        """The same, until the spans have come: it changes nothing."""

        def ask() -> str:
            with suppress(AssertionError):
                return self.outside(found, shown)
            return ""

        return wait_until(ask, f"Jaeger has {shown}")

    def for_people(self, found: re.Match[str], shown: str | None) -> str:
        """Not run: it only lets a browser in."""
        return ""


Instead = Callable[[Reader, re.Match[str], str | None], str]
CLIENT = r"kubectl -n agents exec deployment/client -- "
IN_PLACE: dict[str, Instead] = {
    r"kubectl -n (?P<namespace>\S+) rollout status deployment/(?P<name>\S+)": Reader.after_the_node,
    CLIENT + r"(?P<command>curl .* http://jaeger.*)": Reader.again,
    CLIENT + r"(?P<command>curl .* http://tickets.*)": Reader.outside,
    r"kubectl -n observability port-forward service/jaeger 16686": Reader.for_people,
}


def fits(printed: str, shown: str) -> bool:
    """Whether it is what the page shows, with anything where that has an ellipsis."""
    pattern = ".*".join(map(re.escape, shown.strip().split("…")))
    return re.fullmatch(pattern, printed.strip()) is not None


def commands(block: str) -> list[str]:
    """Those of a block, joined where a line goes on."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def steps() -> Iterator[tuple[str, str | None]]:
    """Each command of the tutorial, with what the page shows of it."""
    for (kind, block), (after, shown) in pairwise([*BLOCKS, ("", "")]):
        if kind == "sh":
            *most, last = commands(block)
            yield from ((each, None) for each in most)
            yield last, shown if after == "text" else None


@pytest.fixture
def node(
    bare_cluster: Cluster, rig: Rig, jaeger_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    with Node(bare_cluster, rig, jaeger_bin, tmp_path_factory.mktemp("tutorial")) as found:
        yield found


@pytest.fixture
def reader(node: Node, opa_bin: Path) -> Reader:
    return Reader(node.cluster, node, opa_bin, node.folder / "clone")


async def tools() -> list[str]:
    """What the official client is shown by the example server: what ana may call."""
    async with over_http(f"http://{POD_IP}:8080/mcp", LEGACY) as client:
        return await tools_of(client)


def test_from_an_empty_cluster_to_a_trace(reader: Reader, node: Node) -> None:
    printed = "".join(reader.types(command, shown) for command, shown in steps())
    [denied] = re.findall(r'"decision_id":"([^"]+)"', printed)
    [traced] = re.findall(r'"authz.decision_id","type":"string","value":"([^"]+)"', printed)
    assert traced == denied
    assert node.running["tickets"].log("tickets") == "get_ticket 4711: done\n"
    assert node.network.from_outside(lambda: asyncio.run(tools())) == ["get_ticket"]
    assert_bare(node.cluster)


def test_just_one_block_needs_a_container_engine() -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count(NEEDS_AN_ENGINE) == 1
    assert set(kinds) == {"sh", "text", NEEDS_AN_ENGINE}


def test_each_stand_in_stands_for_something() -> None:
    typed = [command for command, _ in steps()]
    for pattern in IN_PLACE:
        assert any(re.fullmatch(pattern, each) for each in typed), pattern


def test_what_is_shown_after_a_command_is_looked_at() -> None:
    assert sum(shown is not None for _, shown in steps()) == [k for k, _ in BLOCKS].count("text")


def test_its_jaeger_is_the_one_that_is_tested_with() -> None:
    pinned = re.findall(r"^VERSION=(\S+)$", (ROOT / ".ci/install-jaeger").read_text(), re.MULTILINE)
    example = (ROOT / "k8s/examples/jaeger.yaml").read_text("utf-8")
    assert re.findall(r"image: \S+/jaeger:(\S+)", example) == pinned
