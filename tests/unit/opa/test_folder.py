"""What counts in a policy folder, and what is made of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sidecar.errors import PolicyUnusable
from sidecar.opa.folder import (
    assemble,
    fingerprint,
    library_folder,
    policy_files,
    prune,
    put_in_force,
)
from tests.support.opa import write

LIBRARY = {
    "authz/main.rego": "package mcp.authz\n",
    "authz/main_test.rego": "package x",
    "d.json": "{}",
}


def names(folder: Path) -> list[str]:
    return [name for name, _, _ in policy_files(folder)]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return write(tmp_path / "library", LIBRARY)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "private" / "store").mkdir(parents=True)
    (tmp_path / "private" / "watched").mkdir()
    return tmp_path / "private" / "store"


def listed(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def made(store: Path, revision: str) -> set[str]:
    root = store / revision
    return {str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()}


# ── What counts ───────────────────────────────────────────────────────────────────────────────────


def test_policies_and_data_count(tmp_path: Path) -> None:
    good = ["a.rego", "b.json", "c.yaml", "d.yml", "nested/deep/e.rego"]
    bad = [".f.rego", "g_test.rego", "README.md", ".git/h.rego", "nested/.i/j.json", "k.rego~"]
    write(tmp_path, dict.fromkeys(good + bad, "x"))
    (tmp_path / "folder.json").mkdir()
    assert names(tmp_path) == good


def test_a_config_map_counts_once(tmp_path: Path) -> None:
    write(tmp_path / "..2026_01", {"a.rego": "x", "b.json": "{}"})
    (tmp_path / "..data").symlink_to("..2026_01")
    for key in ("a.rego", "b.json"):
        (tmp_path / key).symlink_to(Path("..data", key))
    assert names(tmp_path) == ["a.rego", "b.json"]


def test_symlinks_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a.rego": "x", "sub/b.rego": "x"})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "one").symlink_to(tmp_path / "real")
    (folder / "two").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "real")
    (folder / "z.rego").symlink_to(tmp_path / "real" / "a.rego")
    assert names(folder) == ["z.rego", "one/sub/b.rego"]


def test_hard_links_are_files_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, {"a/data.json": "{}"})
    (tmp_path / "b").mkdir()
    os.link(tmp_path / "a" / "data.json", tmp_path / "b" / "data.json")
    assert names(tmp_path) == ["a/data.json", "b/data.json"]


def test_what_can_not_be_read_is_an_error_not_a_smaller_policy(tmp_path: Path) -> None:
    write(tmp_path, {"a.rego": "x"})
    (tmp_path / "deny.rego").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        names(tmp_path)
    with pytest.raises(FileNotFoundError):
        names(tmp_path / "missing")


# ── When it has changed ───────────────────────────────────────────────────────────────────────────


def test_the_fingerprint_changes_with_every_file(tmp_path: Path) -> None:
    seen = [fingerprint(tmp_path / "folder")]
    folder = write(tmp_path / "folder", {"a.rego": "1"})
    seen.append(fingerprint(folder))
    assert fingerprint(folder) == seen[-1]
    write(folder, {"a.rego": "22"})
    seen.append(fingerprint(folder))
    write(folder, {"b.json": "{}"})
    seen.append(fingerprint(folder))
    (folder / "b.json").rename(folder / "c.json")
    seen.append(fingerprint(folder))
    (folder / "c.json").unlink()
    (folder / "c.json").symlink_to("nowhere")
    seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_does_not_mind_what_does_not_count(tmp_path: Path) -> None:
    before = fingerprint(write(tmp_path, {"a.rego": "1"}))
    write(tmp_path, {".a.rego.swp": "x", "a_test.rego": "x", "notes.txt": "x"})
    assert fingerprint(tmp_path) == before


# ── What is made of it ────────────────────────────────────────────────────────────────────────────


def test_the_policy_lies_over_the_library(library: Path, store: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "policy", {"custom.rego": "package mcp.custom", "n/data.json": "{}"})
    revision = assemble(library, folder, store)
    assert len(revision) == 12
    assert made(store, revision) == {
        "custom.rego", "n/data.json", ".library/authz/main.rego", ".revision.json",
    }  # fmt: skip
    stamp = json.loads((store / revision / ".revision.json").read_text())
    assert stamp["mcp"]["revision"] == revision
    assert stamp["mcp"]["sidecar"]["silent"] is True
    assert listed(store) == [revision]


@pytest.mark.parametrize(
    ("text", "replaces"),
    [
        pytest.param("package mcp.authz\n", True, id="plain"),
        pytest.param("package mcp.authz", True, id="no newline"),
        pytest.param(
            "\r\n# METADATA\n# title: x\n\n  package  mcp.authz # mine\n", True, id="late"
        ),
        pytest.param("package mcp.authz; import rego.v1\n", True, id="semicolon"),
        pytest.param("package mcp.authz.more\n", False, id="below"),
        pytest.param("package mcp.authz2\n", False, id="another"),
        pytest.param("# package mcp.authz\npackage x\n", False, id="comment"),
        pytest.param("package x\n\nt := `\npackage mcp.authz\n`\n", False, id="string"),
        pytest.param("\n" * 50_000 + "#", False, id="many lines"),
    ],
)
def test_a_folder_with_the_entrypoint_replaces_the_library(
    library: Path, store: Path, tmp_path: Path, text: str, replaces: bool
) -> None:
    folder = write(tmp_path / "policy", {"own.rego": text})
    files = made(store, assemble(library, folder, store))
    assert (".library/authz/main.rego" not in files) is replaces


def test_the_revision_is_the_contents(library: Path, store: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "policy", {"a.rego": "1", "b.rego": "2"})
    first = assemble(library, folder, store)
    (folder / "a.rego").touch()
    assert assemble(library, folder, store) == first
    revisions = {first}
    write(folder, {"a.rego": "12", "b.rego": ""})
    revisions.add(assemble(library, folder, store))
    (folder / "a.rego").rename(folder / "c.rego")
    revisions.add(assemble(library, folder, store))
    write(library, {"authz/main.rego": "package mcp.authz\n\nx := 1\n"})
    revisions.add(assemble(library, folder, store))
    assert len(revisions) == 4
    assert listed(store) == sorted(revisions)


def test_a_folder_without_a_policy_is_none(library: Path, store: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "policy", {"README.md": "x"})
    with pytest.raises(PolicyUnusable, match="holds no"):
        assemble(library, folder, store)
    assert listed(store) == []


def test_put_in_force_replaces_what_was(store: Path) -> None:
    current = store.parent / "watched" / "current"
    (store / "link").symlink_to("left over")
    for revision in ("r1", "r2"):
        (store / revision).mkdir()
        put_in_force(store.parent, revision)
        assert current.resolve() == (store / revision).resolve()
    assert listed(store) == ["r1", "r2"]
    prune(store, keep={"r2", None})
    assert listed(store) == ["r2"]


def test_the_library_is_the_one_of_this_clone() -> None:
    assert library_folder().name == "mcp"
    assert names(library_folder())
