"""``.ci/install-cluster`` builds a control plane once, or says on one screen what to do.

Go is a script here: the real build takes minutes, and is what ``make test-cluster`` begins with.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "install-cluster"
PARTS = ROOT / ".ci" / "cluster-parts" / "go.mod"
VERSION = re.findall(r"^\tk8s\.io/kubernetes v([0-9.]+)\b", PARTS.read_text(), re.MULTILINE)[0]
BUILT = "etcd", "kube-apiserver", "kube-controller-manager", "kubectl", "kubelet"


class Machine:
    def __init__(self, home: Path) -> None:
        self.home, self.bin, self.built = home, home / "cache" / "bin", home / "built"

    def has_go(self, version: str = VERSION, code: int = 0) -> None:
        """A Go that makes parts of this version."""
        made = self.home / "made"
        made.write_text(f"#!/bin/sh\necho Kubernetes v{version}\n")
        made.chmod(0o755)
        go = self.home / "go"
        go.write_text(
            f"""#!/bin/sh
            while [ "$1" != -o ]; do shift; done
            folder=$2
            shift 2
            for each; do
                echo "$each" >>{self.built}
                each=${{each%/v3}}
                cp {made} "$folder${{each##*/}}"
            done
            exit {code}
            """
        )
        go.chmod(0o755)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": f"{self.home}:/usr/bin:/bin",
            "HOME": str(self.home),
            "MCP_SIDECAR_CACHE": str(self.home / "cache"),
        }
        return subprocess.run(
            [SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=30, check=False
        )

    @property
    def left(self) -> list[str]:
        return sorted(each.name for each in self.bin.iterdir()) if self.bin.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_it_is_built_once(machine: Machine) -> None:
    machine.has_go()
    assert machine.run("--find").returncode == 1
    first = machine.run()
    folder = machine.bin / f"cluster-{VERSION}"
    assert first.stdout == f"{folder}\n", first.stderr
    assert sorted(each.name for each in folder.iterdir()) == sorted(BUILT)
    assert machine.left == [folder.name]
    (machine.home / "go").unlink()
    for arguments in ((), ("--find",)):
        assert machine.run(*arguments).stdout == first.stdout


def test_what_is_there_is_not_built_again(machine: Machine) -> None:
    machine.has_go()
    folder = Path(machine.run().stdout.strip())
    machine.built.unlink()
    (folder / "kubelet").unlink()
    assert machine.run("--find").returncode == 1
    assert machine.run().stdout == f"{folder}\n"
    assert machine.built.read_text() == "k8s.io/kubernetes/cmd/kubelet\n"
    assert (folder / "kubelet").exists()
    assert machine.left == [folder.name]


@pytest.mark.parametrize(
    ("go", "said"),
    [
        ({"version": "1.0.0"}, 'it says "Kubernetes v1.0.0"'),
        ({"code": 1}, "exit code 1"),
    ],
    ids=["another version", "a build that fails"],
)
def test_where_it_can_not_be_had_one_message_says_what_to_do(
    machine: Machine, go: dict[str, object], said: str
) -> None:
    machine.has_go(**go)  # type: ignore[arg-type]
    done = machine.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("This mends it") == 1
    assert machine.left == []


def test_each_part_is_of_the_same_release() -> None:
    text = PARTS.read_text(encoding="utf-8")
    replaced = re.findall(r"^\t(k8s\.io/\S+) => (\S+) v0\.(\S+)$", text, re.MULTILINE)
    assert replaced
    assert all(name == other for name, other, _ in replaced)
    assert {f"1.{version}" for _, _, version in replaced} == {VERSION}
