"""`shim`: a stdio server on a unix socket; and the folder with which that runs in other images."""

from __future__ import annotations

import argparse
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from sidecar import shim as shim_file
from sidecar.errors import ConfigError

LOOK = """\
import sys
program, *arguments = sys.argv[1:]
names = {"__name__": "shim"}
exec(compile(open(program).read(), program, "exec"), names)
names["main"](arguments)
for each in [*sys.modules.values()]:
    if getattr(each, "__file__", None):
        print(each.__file__)
"""
"""Runs the shim, and tells of what files it was made."""

ISOLATED = ("-I", "-S", "-X", "utf8")
_LIBRARY = re.compile(r"\t(?:(\S+) => )?(/\S+) \(0x[0-9a-f]+\)")


def shim(options: argparse.Namespace) -> int:
    """Serve a command, or install what serves one elsewhere; the exit code.

    Raises:
        ConfigError: it can not be installed.
    """
    if options.install is None:
        return shim_file.serve(options, options.command)
    folder = Path(options.install).absolute()
    try:
        install(folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"shim: can not be installed in {folder}: {error}") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"shim: does not run in {folder}: {said or error}") from error
    size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return 0


def install(folder: Path) -> None:
    """Copy this interpreter, its loader and libraries, and what the shim imports; then try it.

    Raises:
        OSError, SubprocessError: something can not be read, written or executed.
    """
    python, program = Path(sys.executable).resolve(), Path(str(shim_file.__file__))
    stdlib = Path(sysconfig.get_path("stdlib"))
    folder.mkdir(parents=True, exist_ok=True)
    modules = _modules([str(python)], program, folder)
    native = [each for each in modules if each.suffix == ".so"]
    libraries = _libraries(python, native)
    home = folder / sys.platlibdir / f"python{sysconfig.get_python_version()}"
    copies = {
        folder / "bin" / "python3": python,
        folder / "shim.py": program,
        **{folder / _place(name): path for name, path in libraries.items()},
        **{home / "lib-dynload" / each.name: each for each in native},
        **{home / each.relative_to(stdlib): each for each in modules if each.suffix == ".py"},
    }
    (home / "lib-dynload").mkdir(parents=True, exist_ok=True)
    for target, source in copies.items():
        _copy(source, target)
    words = shim_file.words(str(folder))
    _modules(words[: words.index("-I")], folder / "shim.py", folder)


def _modules(python: list[str], program: Path, folder: Path) -> list[Path]:
    """The files of the modules of a shim that has run, with a command that is the interpreter."""
    with TemporaryDirectory(dir=folder) as place:  # it may be all that can be written to
        options = ["--socket", "try.sock", "--", *python, *ISOLATED, "-c", ""]
        found = _run(*python, *ISOLATED, "-c", LOOK, str(program), *options, place=place)
    return [Path(each) for each in found]


def _place(library: str) -> str:
    """The loader is started by its place; libraries are looked up by their names."""
    return "ld.so" if library.startswith("ld-") else f"lib/{library}"


def _libraries(python: Path, native: list[Path]) -> Mapping[str, Path]:
    """What the loader loads for the interpreter and its modules, by the names that it looks for."""
    listed = _run(str(python), environ={"LD_TRACE_LOADED_OBJECTS": "1"})
    found = dict(_found(listed))
    loader = next(str(path) for name, path in found.items() if name.startswith("ld-"))
    for each in native:
        found |= dict(_found(_run(loader, "--list", str(each))))
    return found


def _found(listed: list[str]) -> Iterator[tuple[str, Path]]:
    for line in listed:
        if read := _LIBRARY.fullmatch(line):
            yield read[1] or Path(read[2]).name, Path(read[2])


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # one that runs can not be written to
    shutil.copyfile(source, target)
    target.chmod(0o644 if target.suffix == ".py" else 0o755)
    if target.suffix == ".py":
        # By its content: who takes the time to look at the source's, takes more than it saves.
        py_compile.compile(
            str(target),
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def _run(
    *command: str, environ: Mapping[str, str] | None = None, place: str | None = None
) -> list[str]:
    done = subprocess.run(
        command, env={**os.environ, **(environ or {})}, check=True, capture_output=True, text=True,
        timeout=60, cwd=place,
    )  # fmt: skip
    return done.stdout.splitlines()
