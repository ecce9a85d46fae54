"""The scripts that build a tool find or build it, or say on one screen what to do.

Go is a script here, on a PATH of links to just the tools that are named: the real builds take
minutes, and are what ``make test`` and ``make test-cluster`` begin with.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASICS = ("sh", "dirname", "mktemp", "mkdir", "date", "sed", "tail", "rm", "mv", "ln", "chmod")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@dataclass(frozen=True)
class Tool:
    """A tool: what one of a version answers when it is asked for that, and which will do."""

    name: str
    answer: str
    good: str
    bad: tuple[str, ...]
    needed: str

    @property
    def script(self) -> Path:
        return ROOT / ".ci" / f"install-{self.name}"

    def said(self, name: str) -> str:
        """A value that the script pins."""
        return self.script.read_text(encoding="utf-8").split(f"\n{name}=")[1].split()[0]

    def answering(self, version: str) -> str:
        return self.answer.format(version=version)


TOOLS = (
    Tool(
        "jaeger",
        """[ "$*" = version ] || exit 2
        echo log >&2; printf '{{"gitCommit":"","gitVersion":"v{version}","buildDate":""}}'""",
        "2.99.0",
        ("1.76.0", ""),
        "Jaeger 2 (jaegertracing.io) is needed",
    ),
    Tool(
        "helm",
        '[ "$*" = "version --short" ] && echo "v{version}+g0123456"',
        "4.99.0",
        ("3.19.0", "5.0.0", ""),
        "Helm 4 (helm.sh) is needed",
    ),
)


@dataclass
class Machine:
    """A machine with the tools that a test gives it, and nothing else."""

    home: Path
    tool: Tool

    def __post_init__(self) -> None:
        self.bin.mkdir(parents=True)
        for tool in (*BASICS, "cat", "nice"):
            found = shutil.which(tool)
            assert found is not None, tool
            (self.bin / tool).symlink_to(found)

    @property
    def bin(self) -> Path:
        return self.home / "bin"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def has_go(self, total: str | None = None, builds: str | None = None, code: int = 0) -> None:
        """A Go that gives a module with this sum, and makes a tool of this version."""
        source = self.home / "source"
        source.mkdir()
        version = builds or self.tool.said("VERSION")
        made = script(self.home / "made", self.tool.answering(version))
        total = total or self.tool.said("SUM")
        script(
            self.bin / "go",
            f"""case $1 in
            mod) printf '{{\\n\\t"Dir": "{source}",\\n\\t"Sum": "{total}",\\n\\t"E": ""\\n}}\\n' ;;
            build) while [ "$1" != -o ]; do shift; done
                cat {made} >"$2"; chmod 755 "$2"; exit {code} ;;
            esac""",
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "HOME": str(self.home), "MCP_SIDECAR_CACHE": str(self.cache)}
        return subprocess.run(
            [self.tool.script, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    @property
    def left(self) -> list[str]:
        """What is in the tools folder."""
        folder = self.cache / "bin"
        return sorted(each.name for each in folder.iterdir()) if folder.exists() else []


@pytest.fixture(params=TOOLS, ids=[each.name for each in TOOLS])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path, request.param)


def test_one_on_path_that_will_do_is_taken_as_it_is(machine: Machine) -> None:
    theirs = script(machine.bin / machine.tool.name, machine.tool.answering(machine.tool.good))
    for arguments in ((), ("--find",)):
        assert machine.run(*arguments).stdout.strip() == str(theirs)
    assert machine.left == []


def test_anything_else_on_path_is_passed_over_with_a_word(machine: Machine) -> None:
    for theirs in ("exit 1", *map(machine.tool.answering, machine.tool.bad)):
        script(machine.bin / machine.tool.name, theirs)
        done = machine.run("--find")
        assert (done.returncode, done.stdout) == (1, "")
        assert "Passing over" in done.stderr


def test_the_pinned_one_is_built_once(machine: Machine) -> None:
    name = machine.tool.name
    machine.has_go()
    assert machine.run("--find").returncode == 1
    first = machine.run()
    assert first.stdout.strip() == str(machine.cache / "bin" / name), first.stderr
    assert machine.left == [name, f"{name}-{machine.tool.said('VERSION')}"]
    (machine.bin / "go").unlink()
    for arguments in ((), ("--find",)):
        assert machine.run(*arguments).stdout == first.stdout


@pytest.mark.parametrize(
    ("go", "said"),
    [
        (None, "is needed"),
        ({"total": "h1:other="}, 'but "h1:other="'),
        ({"builds": "1.0.0"}, 'its version is "1.0.0"'),
        ({"code": 1}, "exit code 1"),
    ],
    ids=["no Go", "another module", "another version", "a build that fails"],
)
def test_where_it_can_not_be_had_one_message_says_what_to_do(
    machine: Machine, go: dict[str, Any] | None, said: str
) -> None:
    if go is not None:
        machine.has_go(**go)
    done = machine.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count(machine.tool.needed) == 1
    assert done.stderr.count("Any one of these mends it") == 1
    assert machine.left == []
