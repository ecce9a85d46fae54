"""The images of the rig: pause, the sidecar's, and a server's."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from tests.kubelet.archives import Archive, archive, layer, python, tree
from tests.kubelet.node import PAUSE
from tests.pods.container import Image
from tests.pods.image import needed
from tests.support.processes import ROOT

SIDECAR = "localhost/mcp-opa-sidecar:1"
APP = "localhost/app:1"
SERVER = ["python3", "-m", "tests.pods.app", "--data", "/data"]
SOURCES = "tests/__init__.py", "tests/pods/__init__.py", "tests/pods/app.py", "tests/support"
PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/bin"
USERS = {"/etc/passwd": "root:x:0:0:root:/:/bin/sh\n", "/etc/group": "root:x:0:\n"}


def images(folder: Path, sidecar: Image, catatonit: Path) -> Path:
    """An archive of all of them; `sidecar` is what the Dockerfile says."""
    base = layer(folder / "base.tar", python(), USERS)
    found = [
        Archive(
            PAUSE,
            [layer(folder / "pause.tar", {"/pause": catatonit})],
            {"Entrypoint": ["/pause", "-P"]},
        ),
        Archive(SIDECAR, [base, _sidecar(folder, sidecar)], _settings(sidecar)),
        Archive(APP, [base, _app(folder)], {"Env": [f"PATH={PATH}", "PYTHONPATH=/app:/app/site"]}),
    ]
    return archive(folder / "images.tar", found)


def _sidecar(folder: Path, image: Image) -> Path:
    files: dict[str, Path] = {}
    for at, source in image.folders.items():
        files |= tree(source, at)
    for source in image.over_usr:
        files |= tree(source, "/usr")
    return layer(folder / "sidecar.tar", files)


def _settings(image: Image) -> dict[str, object]:
    return {
        "Env": [f"{name}={value}" for name, value in image.env.items()],
        "User": f"{image.user}:{image.group}",
        "Entrypoint": list(image.entrypoint),
    }


def _app(folder: Path) -> Path:
    files: dict[str, Path] = {}
    for each in (distribution("mcp"), *needed("mcp")):
        for file in each.files or ():
            if ".." not in file.parts and (source := Path(str(each.locate_file(file)))).is_file():
                files[f"/app/site/{file}"] = source
    for name in SOURCES:
        files |= (
            {f"/app/{name}": ROOT / name}
            if name.endswith(".py")
            else tree(ROOT / name, f"/app/{name}")
        )
    return layer(folder / "app.tar", files)
