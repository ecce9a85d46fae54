"""The Dockerfile read, and its steps done by hand: what stands for the image where none is built.

The last stage is followed line by line: what it copies from other stages is made here as they make
it, from the wheel, the packages that it needs, and the OPA that is there.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.pods.container import Image
from tests.support.processes import ROOT

DOCKERFILE = ROOT / "k8s" / "Dockerfile"
USR = Path("/usr")
OURS = "/opt/mcp-opa-sidecar"


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction, its flags and its words."""

    name: str
    flags: dict[str, str]
    words: list[str]
    text: str


@dataclass(slots=True)
class Stage:
    """What comes after a FROM."""

    base: str
    name: str
    steps: list[Step] = field(default_factory=list)

    def all(self, name: str) -> list[Step]:
        """The instructions of one kind."""
        return [each for each in self.steps if each.name == name]


def stages(text: str) -> list[Stage]:
    """The stages of a Dockerfile; what stands before the first is no stage's."""
    found: list[Stage] = []
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            found.append(Stage(base.strip(), alias.strip()))
        elif name and found:
            found[-1].steps.append(_step(name, rest))
    return found


def _step(name: str, rest: str) -> Step:
    words = shlex.split(rest)
    flags = [word for word in words if word.startswith("--")] if name == "COPY" else []
    pairs = (flag.removeprefix("--").partition("=") for flag in flags)
    return Step(
        name,
        {key: value for key, _, value in pairs},
        [word for word in words if word not in flags],
        rest,
    )


def image(folder: Path, opa: Path, packages: Mapping[str, Path]) -> Image:
    """The image's files, made below `folder`; of Debian's packages, by their names, each a /usr."""
    last = stages(DOCKERFILE.read_text("utf-8"))[-1]
    venv = folder / "package" / OURS.lstrip("/") / "venv"
    _install(folder / "wheels", venv, folder / "package")
    made = {("opa", "/usr/local/bin/opa"): opa, ("package", f"{OURS}/venv"): venv}
    for step in last.all("COPY"):
        *sources, target = step.words
        for each in sources:
            stage = step.flags.get("from")
            source = made[stage, each] if stage else ROOT / each
            _copy(source, folder / "root", target, each)
    installed = [packages[each] for each in installs(last)]
    user, _, group = last.all("USER")[-1].text.partition(":")
    env = dict(word.split("=", 1) for step in last.all("ENV") for word in step.words)
    return Image(
        folders={"/opt": folder / "root" / "opt"},
        over_usr=(folder / "root" / "usr", *(each for each in installed if each != USR)),
        env=env,
        user=int(user),
        group=int(group),
        entrypoint=tuple(each.strip('[]",') for each in last.all("ENTRYPOINT")[-1].text.split()),
    )


def installs(stage: Stage) -> list[str]:
    """The packages of Debian's that a stage installs."""
    found = []
    for step in stage.all("RUN"):
        for command in step.text.split("&&"):
            words = command.split()
            if words[:2] == ["apt-get", "install"]:
                found += [word for word in words[2:] if not word.startswith("-")]
    return found


def _copy(source: Path, root: Path, target: str, name: str) -> None:
    place = root / target.lstrip("/")
    if target.endswith("/"):
        place /= Path(name).name
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, place, symlinks=True)
    else:
        shutil.copy(source, place)


def _install(wheels: Path, venv: Path, prefix: Path) -> None:
    """The environment of the stage `package`; its packages come from this one, nothing is fetched.

    Only what the wheel says it needs is there: an import of anything else fails, as in the image.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT)
    _run(sys.executable, "-m", "venv", "--without-pip", venv)
    (wheel,) = wheels.glob("*.whl")
    python = venv / "bin" / "python"
    _run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = (venv / "lib").glob("python3.*/site-packages")
    for each in needed("mcp-opa-sidecar"):
        _copy_distribution(each, site)
    script = venv / "bin" / "mcp-sidecar"
    script.write_text(script.read_text("utf-8").replace(str(prefix), ""), "utf-8")


def needed(name: str) -> list[Distribution]:
    """What a distribution needs, and what that needs, as installed here; not itself."""
    found: dict[str, Distribution] = {}
    todo = [Requirement(name)]
    while todo:
        wanted = todo.pop()
        key = canonicalize_name(wanted.name)
        extras = wanted.extras or {""}
        known = distribution(wanted.name)
        if key in found and wanted.extras <= {""}:
            continue
        found[key] = known
        for each in map(Requirement, known.requires or ()):
            marker = each.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(each)
    del found[canonicalize_name(name)]
    return list(found.values())


def _copy_distribution(each: Distribution, site: Path) -> None:
    for file in each.files or ():
        source = Path(str(each.locate_file(file)))
        if ".." not in file.parts and source.is_file():
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, timeout=120, cwd="/")
