"""The wheel is the whole product: code, schema and policies, without the clone it was built in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.processes import ROOT, environment

POLICIES = {
    "mcp/authz/decision.rego",
    "schemas/input.schema.json",
    "schemas/decision.schema.json",
    "starter/data.yaml",
    "allow_all/custom.rego",
    "deny_all/custom.rego",
    "system/mask.rego",
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, in a folder that stands for site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_policies_are_in_it_and_their_tests_are_not(unpacked: Path) -> None:
    policies = unpacked / "sidecar" / "policies"
    shipped = {str(each.relative_to(policies)) for each in policies.rglob("*") if each.is_file()}
    assert shipped >= POLICIES
    assert not [each for each in shipped if each.endswith("_test.rego")]
    assert (unpacked / "sidecar" / "config" / "schema.json").exists()


def test_a_copied_starter_works_with_the_library_of_the_wheel(
    unpacked: Path, opa_bin: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(unpacked / "sidecar" / "policies" / "starter", policy)
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", "check", "--policy", str(policy)],
        cwd=tmp_path,
        env={**environment(opa_bin), "PYTHONPATH": str(unpacked) + os.pathsep},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "OPA decides" in done.stderr
