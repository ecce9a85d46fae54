"""Images as archives that containerd takes, without a registry or anything to build them.

Each has two layers: what there is in all of them (Python, a shell, and the libraries that these
need, as they are on this machine), and what is the image's own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Files = Mapping[str, Path]
"""Files of this machine, by where they are in the image."""

TOOLS = "bin/cat", "bin/env", "bin/id", "bin/sh", "bin/sleep", "bin/touch", "sbin/nft"
LEFT_OUT = {"dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tkinter"}
LINKS = {each: f"usr/{each}" for each in ("bin", "sbin", "lib", "lib64")}


@dataclass(frozen=True, slots=True)
class Archive:
    """An image: its name, its layers, and what is run in it."""

    name: str
    layers: Sequence[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)


def tree(folder: Path, at: str, without: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """Every file of a folder, but for folders of some names."""
    for where, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if each not in without]
        for name in names + [each for each in folders if (Path(where) / each).is_symlink()]:
            file = Path(where) / name
            yield f"{at}/{file.relative_to(folder)}", file


def python() -> dict[str, Path]:
    """This Python, without what was installed into it, and the tools, at their places."""
    program = Path(sys.executable).resolve()
    modules = Path(os.__file__).parent
    found = dict(tree(modules, str(modules), LEFT_OUT))
    for name in (program.name, "python3", "python"):
        found[str(program.parent / name)] = program
    found["/usr/bin/python3"] = program
    for name in TOOLS:
        if (Path("/usr") / name).exists():  # else nft comes with the image
            found[f"/usr/{name}"] = (Path("/usr") / name).resolve()
    return found


def libraries(programs: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """What programs and modules need of this machine to be loaded, where they look for it."""
    asked = [
        each for each in programs if ".so" in each.suffixes or each.parent.name in {"bin", "sbin"}
    ]
    told = subprocess.run(["ldd", *asked], capture_output=True, text=True, check=False, timeout=60)
    needed = set(re.findall(r"^\t(?:\S+ => )?(/\S+) \(", told.stdout, re.MULTILINE))
    for path in needed - {str(each) for each in asked}:
        yield re.sub(r"^/(lib|lib64)/", r"/usr/\1/", path), Path(path).resolve()


def layer(target: Path, files: Files, texts: Mapping[str, str] | None = None) -> Path:
    """A layer with files, and what these need to be loaded."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, link in LINKS.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            tar.addfile(entry)
        entry = tarfile.TarInfo("tmp")
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(entry)
        for name, file in sorted((dict(libraries(files.values())) | dict(files)).items()):
            tar.add(file, name.lstrip("/"), recursive=False, filter=_roots)
        for name, text in (texts or {}).items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return target


def _roots(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def archive(target: Path, images: Sequence[Archive]) -> Path:
    """All of them in one file, in the image layout of the OCI."""
    with tarfile.open(target, "w") as tar:
        told: dict[Path, dict[str, Any]] = {}
        for each in images:
            for file in each.layers:
                if file not in told:
                    told[file] = _file(tar, file)
        found = []
        for each in images:
            layers = [told[file] for file in each.layers]
            manifest = _image(tar, each, layers)
            names = {"io.containerd.image.name": each.name}
            found.append({**manifest, "annotations": names})
        _text(tar, "oci-layout", {"imageLayoutVersion": "1.0.0"})
        _text(tar, "index.json", {"schemaVersion": 2, "manifests": found})
    return target


def _image(tar: tarfile.TarFile, image: Archive, layers: Sequence[Mapping[str, Any]]) -> Any:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    config = {
        "architecture": machine,
        "os": "linux",
        "config": dict(image.settings),
        "rootfs": {"type": "layers", "diff_ids": [each["digest"] for each in layers]},
    }
    kind = "application/vnd.oci.image"
    told = {"mediaType": f"{kind}.config.v1+json", **_blob(tar, json.dumps(config).encode())}
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": told,
        "layers": list(layers),
    }
    said = _blob(tar, json.dumps(manifest).encode())
    return {"mediaType": f"{kind}.manifest.v1+json", **said}


def _blob(tar: tarfile.TarFile, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    entry = tarfile.TarInfo(f"blobs/sha256/{digest}")
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
    return {"digest": f"sha256:{digest}", "size": len(content)}


def _file(tar: tarfile.TarFile, file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    tar.add(file, f"blobs/sha256/{digest}", filter=_roots)
    kind = "application/vnd.oci.image.layer.v1.tar"
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": file.stat().st_size}


def _text(tar: tarfile.TarFile, name: str, content: Any) -> None:
    text = json.dumps(content).encode()
    entry = tarfile.TarInfo(name)
    entry.size = len(text)
    tar.addfile(entry, io.BytesIO(text))
