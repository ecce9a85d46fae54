"""The policy folder: what counts in it, when it has changed, and how a revision is made of it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path

from sidecar.errors import PolicyUnusable
from sidecar.protocol.jsonrpc import dump_json

_SUFFIXES = frozenset({".rego", ".json", ".yaml", ".yml"})
# The package clause is the first thing in a module that is not a comment.
_OWN_ENTRYPOINT = re.compile(
    r"(?:[ \t\r]*(?:#[^\n]*)?\n)*[ \t]*package[ \t]+mcp\.authz[ \t\r]*(?:[#;\n]|\Z)"
)

Fingerprint = tuple[object, ...]


def library_folder() -> Path:
    """The library that ships with this package: beside the code in a wheel, else in the clone."""
    here = Path(__file__).parent.parent
    shipped = here / "policies"
    return (shipped if shipped.is_dir() else here.parent / "policies") / "mcp"


def policy_files(folder: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Every policy and data file below `folder`: relative name, path, stat.

    Tests and hidden files are left out, symlinks are followed, and what is reached by two names
    counts under the first: a mounted ConfigMap has each file as `KEY` and as `..data/KEY`.

    Raises:
        OSError: for a folder or file that can not be read. A part of a policy is not a policy.
    """
    seen: set[Path] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        if (real := Path(root).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(root, name) for name in sorted(names) if _is_policy(name)):
            found, real = path.stat(), path.resolve()
            if stat.S_ISREG(found.st_mode) and real not in seen:
                seen.add(real)
                yield str(path.relative_to(folder)), path, found


def _raise(error: OSError) -> None:
    raise error


def _is_policy(name: str) -> bool:
    hidden_or_test = name.startswith(".") or name.endswith("_test.rego")
    return not hidden_or_test and Path(name).suffix in _SUFFIXES


def fingerprint(folder: Path) -> Fingerprint:
    """Changes whenever a file of the policy does; an unreadable folder has one too."""
    try:
        return tuple(
            (name, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
            for name, _, found in policy_files(folder)
        )
    except OSError as error:
        return (str(error),)


def assemble(library: Path, folder: Path, store: Path, system: Path | None = None) -> str:
    """Copy library and policy to `store/REVISION`, stamp it, and return the revision.

    A folder that defines package `mcp.authz` itself replaces the library. `system` holds what OPA
    asks about its own decision log. Nothing in a policy folder that counts is hidden, so
    `.library`, `.system` and `.revision.json` are free.

    Raises:
        PolicyUnusable: the folder holds no policy.
        OSError: something can not be read.
    """
    sources = {name: path for name, path, _ in policy_files(folder)}
    if not sources:
        raise PolicyUnusable(f"{folder} holds no .rego, .json or .yaml file")
    if not any(_replaces_library(path) for path in sources.values()):
        rules = ((name, path) for name, path, _ in policy_files(library) if path.suffix == ".rego")
        sources |= {f".library/{name}": path for name, path in rules}
    if system is not None:
        sources |= {f".system/{name}": path for name, path, _ in policy_files(system)}
    new, digest = Path(tempfile.mkdtemp(prefix="new.", dir=store)), hashlib.sha256()
    for name in sorted(sources):
        target = new / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sources[name], target)
        digest.update(f"{len(name)}:{name}:{target.stat().st_size}:".encode())
        digest.update(target.read_bytes())
    revision = digest.hexdigest()[:12]
    # `silent` is what OPA's log asks before it writes a decision down: see `own.opa_configuration`.
    stamp = {"mcp": {"revision": revision, "sidecar": {"silent": True}}}
    (new / ".revision.json").write_bytes(dump_json(stamp))
    if (store / revision).is_dir():
        shutil.rmtree(new)
    else:
        new.rename(store / revision)
    return revision


def modules(revision: Path) -> set[str]:
    """The names of the Rego modules of an assembled revision."""
    return {str(path.relative_to(revision)) for path in revision.rglob("*.rego")}


def bury(revision: Path, gone: Set[str]) -> None:
    """Put an empty module in the place of each one that is `gone`.

    OPA's watch replaces modules by name and keeps one that is missing from what it loads: a rule
    file that is removed or renamed would go on allowing.
    """
    for name in gone:
        target = revision / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("package mcp.sidecar.removed\n", encoding="utf-8")


def _replaces_library(path: Path) -> bool:
    if path.suffix != ".rego":
        return False
    text = path.read_bytes().decode("utf-8", errors="replace")
    return _OWN_ENTRYPOINT.match(text) is not None


def put_in_force(private: Path, revision: str) -> None:
    """Rename a symlink over the one that OPA watches: one event, and no moment without a policy."""
    link = private / "store" / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..", "store", revision))
    link.replace(private / "watched" / "current")


def prune(store: Path, keep: Set[str | None]) -> None:
    """Remove the revisions that are not to be kept."""
    for each in store.iterdir():
        if each.name not in keep:
            shutil.rmtree(each, ignore_errors=True)
