"""``.ci/install-helm`` finds or builds a Helm, or says on one screen what to do.

Go is a script here, on a PATH of links to just the tools that are named: the real build takes
minutes, and is what ``make test-cluster`` begins with.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "install-helm"
TEXT = SCRIPT.read_text(encoding="utf-8")
VERSION, SUM = (TEXT.split(f"\n{name}=")[1].split()[0] for name in ("VERSION", "SUM"))
BASICS = ("sh", "dirname", "mktemp", "mkdir", "date", "sed", "tail", "rm", "mv", "ln", "chmod")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def answering(version: str) -> str:
    """What a Helm of that version does with the words `version --short`."""
    return f'[ "$*" = "version --short" ] && echo "v{version}+g0123456"'


@dataclass
class Machine:
    """A machine with the tools that a test gives it, and nothing else."""

    home: Path

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

    def has_go(self, *, total: str = SUM, builds: str = VERSION, code: int = 0) -> None:
        """A Go that gives a module with this sum, and makes a Helm of this version."""
        source = self.home / "source"
        source.mkdir()
        made = script(self.home / "made", answering(builds))
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
            [SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=30, check=False
        )

    @property
    def left(self) -> list[str]:
        """What is in the tools folder."""
        folder = self.cache / "bin"
        return sorted(each.name for each in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_one_of_the_same_major_on_path_is_taken_as_it_is(machine: Machine) -> None:
    theirs = script(machine.bin / "helm", answering("4.99.0"))
    for arguments in ((), ("--find",)):
        assert machine.run(*arguments).stdout.strip() == str(theirs)
    assert machine.left == []


@pytest.mark.parametrize("theirs", [answering("3.19.0"), answering("5.0.0"), "exit 1"])
def test_anything_else_on_path_is_passed_over_with_a_word(machine: Machine, theirs: str) -> None:
    script(machine.bin / "helm", theirs)
    done = machine.run("--find")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Passing over" in done.stderr


def test_the_pinned_one_is_built_once(machine: Machine) -> None:
    machine.has_go()
    assert machine.run("--find").returncode == 1
    first = machine.run()
    assert first.stdout.strip() == str(machine.cache / "bin" / "helm"), first.stderr
    assert machine.left == ["helm", f"helm-{VERSION}"]
    (machine.bin / "go").unlink()
    for arguments in ((), ("--find",)):
        assert machine.run(*arguments).stdout == first.stdout


@pytest.mark.parametrize(
    ("go", "said"),
    [
        (None, "Helm 4 (helm.sh) is needed"),
        ({"total": "h1:other="}, f"is not {SUM} but"),
        ({"builds": "4.0.0"}, 'its version is "4.0.0"'),
        ({"code": 1}, "exit code 1"),
    ],
    ids=["no Go", "another module", "another version", "a build that fails"],
)
def test_where_it_can_not_be_had_one_message_says_what_to_do(
    machine: Machine, go: dict[str, object] | None, said: str
) -> None:
    if go is not None:
        machine.has_go(**go)  # type: ignore[arg-type]
    done = machine.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("Either of these mends it") == 1
    assert machine.left == []
