"""A policy made ready for an OPA that is not ours: a bundle, or the keys of a ConfigMap.

Library and folder are put together, checked and stamped with a revision as the own OPA would do it;
OPA's own loader merges the data, so that what is shipped is what was checked. Everything is under
the root `mcp`: a bundle without roots owns all of OPA, `system.authz` included. What is revoked is
a bundle of its own, with the root `mcp_revoked`.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from sidecar.errors import PolicyUnusable
from sidecar.opa.folder import assemble, library_folder
from sidecar.opa.process import check, output
from sidecar.protocol.jsonrpc import FROM_SERVER, JsonObject, dump_json, parse_json

ROOT, REVOKED = "mcp", "mcp_revoked"
MAX_CONFIG_MAP = 1_000_000
"""Bytes: the API server takes 1 MiB with all that is around them."""


@dataclass(frozen=True, slots=True)
class Built:
    """A policy that has passed the check: its files, and its data as one document."""

    revision: str
    modules: dict[str, str]
    data: JsonObject
    root: str = ROOT


@dataclass(frozen=True, slots=True)
class Signing:
    """How a bundle is signed: with a PEM file of a private key, for a scope."""

    key: Path
    algorithm: str = "RS256"
    scope: str | None = None


async def build(binary: str, folder: Path) -> Built:
    """Put library and `folder` together, and check them.

    Raises:
        PolicyUnusable: it does not compile, or has data outside of what is ours.
        OSError: something can not be read.
    """
    with tempfile.TemporaryDirectory(prefix="mcp-opa-build-") as name:
        store = Path(name)
        revision = assemble(library_folder(), folder, store)
        made = store / revision
        await check(binary, made)
        merged = store / "merged.tar.gz"
        await _run((binary, "build", ".", "--output", str(merged)), made)
        modules = {
            str(path.relative_to(made)): path.read_text("utf-8")
            for path in sorted(made.rglob("*.rego"))
        }
        data = _data(merged)
    strangers = sorted(data.keys() - {ROOT})
    if strangers:
        raise PolicyUnusable(
            f"data outside of {ROOT}: {', '.join(strangers)}. A bundle with it would own that as"
            f" well; revocations ({REVOKED}) are a bundle of their own"
        )
    built = Built(revision, modules, data)
    await bundle(binary, built, None)  # refuses a module outside of the roots, also for a ConfigMap
    return built


def revocations(principals: Iterable[str], tokens: Iterable[str]) -> Built:
    """What is revoked: principals by their keys (`ISSUER|ID`), tokens by their ids."""
    revoked = {"principals": dict.fromkeys(sorted(principals), True)}
    revoked["tokens"] = dict.fromkeys(sorted(tokens), True)
    revision = hashlib.sha256(dump_json(revoked)).hexdigest()[:12]
    return Built(revision, {}, {REVOKED: revoked}, REVOKED)


async def bundle(binary: str, built: Built, signing: Signing | None) -> bytes:
    """A bundle that OPA fetches, or is started with.

    Raises:
        PolicyUnusable: OPA does not make one of it.
    """
    with tempfile.TemporaryDirectory(prefix="mcp-opa-build-") as name:
        folder, made = Path(name, "bundle"), Path(name, "bundle.tar.gz")
        _lay_out(built, folder)
        flags = _signed(signing, Path(name)) if signing else ()
        await _run((binary, "build", "--bundle", ".", "--output", str(made), *flags), folder)
        return _read(made)


def config_map(built: Built, name: str, namespace: str | None) -> JsonObject:
    """The ConfigMap that OPA watches in a pod.

    Raises:
        PolicyUnusable: it is too large for one.
    """
    keys = {path.lstrip(".").replace("/", "_"): text for path, text in built.modules.items()}
    if len(keys) < len(built.modules):
        raise PolicyUnusable("two files have the same name once '/' is '_': rename one")
    keys["data.json"] = dump_json(built.data).decode()
    if sum(len(text.encode()) for text in keys.values()) > MAX_CONFIG_MAP:
        raise PolicyUnusable("the policy is too large for a ConfigMap: build a bundle")
    metadata = {"name": name, "annotations": {"mcp-opa-sidecar.io/revision": built.revision}}
    if namespace is not None:
        metadata["namespace"] = namespace
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": keys}


def render(config_map: JsonObject) -> str:
    """A ConfigMap as YAML in which people can read the policy, and see what changed of it."""
    head = {name: value for name, value in config_map.items() if name != "data"}
    blocks = [f"  {key}: {_block(text)}" for key, text in config_map["data"].items()]
    return yaml.safe_dump(head, sort_keys=False) + "data:\n" + "".join(blocks)


def _block(text: str) -> str:
    """A literal block, which PyYAML does not write for what has tabs."""
    if not text or any(each not in "\n\t" and not each.isprintable() for each in text):
        return json.dumps(text) + "\n"
    ends = text.endswith("\n")
    lines = text.removesuffix("\n").split("\n")
    return "|2" + "-+"[ends] + "\n" + "".join(f"    {line}\n" if line else "\n" for line in lines)


def _lay_out(built: Built, folder: Path) -> None:
    folder.mkdir()
    for path, text in built.modules.items():
        module = folder / path.replace(".library/", "library/")
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(text, "utf-8")
    (folder / "data.json").write_bytes(dump_json(built.data))
    manifest = {"revision": built.revision, "roots": [built.root], "rego_version": 1}
    (folder / ".manifest").write_text(json.dumps(manifest), "utf-8")


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _signed(signing: Signing, folder: Path) -> tuple[str, ...]:
    flags = ("--signing-key", str(signing.key.resolve()), "--signing-alg", signing.algorithm)
    if signing.scope is None:
        return flags
    claims = folder / "claims.json"
    claims.write_text(json.dumps({"scope": signing.scope}), "utf-8")
    return (*flags, "--claims-file", str(claims))


def _data(bundle: Path) -> JsonObject:
    with tarfile.open(bundle) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if member.name.lstrip("/") == "data.json" and file is not None:
                return cast("JsonObject", parse_json(file.read(), FROM_SERVER))
    return {}


async def _run(command: tuple[str, ...], folder: Path) -> None:
    code, text = await output(command, folder)
    if code != 0:
        raise PolicyUnusable(f"opa build refuses the policy:\n{text}")
