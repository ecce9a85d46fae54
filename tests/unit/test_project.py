"""The project's rules that no tool checks: sizes, mirrored tests, and what no file may name."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sidecar"

MODULE_LINES = 600
FUNCTION_LINES = 60

# Modules without a unit test of their own, and the test that covers them instead: adapters, whose
# whole work is I/O and which are tested against the real thing, such as
# "transport/stdio.py": "tests/e2e/test_stdio.py". An entry that is no longer true fails.
EXEMPT: dict[str, str] = {
    "api_server.py": "tests/contract/test_reviewing.py",
    "cli/admitting.py": "tests/e2e/test_injector.py",
    "cli/arguments.py": "tests/e2e/test_cli.py",
    "cli/awaiting.py": "tests/e2e/test_app_health.py",
    "cli/building.py": "tests/contract/test_bundle.py",
    "cli/catalogs.py": "tests/e2e/test_pins.py",
    "cli/checking.py": "tests/e2e/test_cli.py",
    "cli/core.py": "tests/e2e/test_cli.py",
    "cli/injecting.py": "tests/e2e/test_injector.py",
    "cli/pinning.py": "tests/e2e/test_pins.py",
    "cli/records.py": "tests/e2e/test_cli.py",
    "cli/redirecting.py": "tests/pods/test_redirect.py",
    "cli/running.py": "tests/e2e/test_cli.py",
    "cli/serving.py": "tests/e2e/test_cli.py",
    "cli/shimming.py": "tests/e2e/test_shim_install.py",
    "config/readers.py": "tests/unit/config/test_keys.py",
    "injector/changes.py": "tests/unit/injector/test_plan.py",
    "injector/containers.py": "tests/unit/injector/test_plan.py",
    "injector/cluster.py": "tests/cluster/test_certificates.py",
    "injector/metrics.py": "tests/e2e/test_injector.py",
    "injector/mode.py": "tests/unit/injector/test_modes.py",
    "injector/opa.py": "tests/unit/injector/test_plan.py",
    "injector/parts.py": "tests/unit/injector/test_plan.py",
    "injector/patch.py": "tests/unit/injector/test_admission.py",
    "injector/webhook.py": "tests/e2e/test_injector.py",
    "injector/wishes.py": "tests/unit/injector/test_modes.py",
    "injector/workloads.py": "tests/unit/injector/test_manifests.py",
    "judging.py": "tests/unit/test_pipeline.py",
    "shim.py": "tests/e2e/test_shim.py",
    "transport/admin.py": "tests/e2e/test_policy_reload.py",
    "transport/answers.py": "tests/e2e/test_bridge_sessions.py",
    "transport/bridge.py": "tests/e2e/test_bridge_http.py",
    "transport/control.py": "tests/e2e/test_tail.py",
    "transport/channel.py": "tests/e2e/test_sse.py",
    "transport/child.py": "tests/e2e/test_stdio.py",
    "transport/hosted.py": "tests/e2e/test_bridge_streams.py",
    "transport/http.py": "tests/e2e/test_http.py",
    "transport/metadata.py": "tests/e2e/test_metadata.py",
    "transport/judged.py": "tests/e2e/test_sse.py",
    "transport/peer.py": "tests/e2e/test_stdio.py",
    "transport/pipes.py": "tests/e2e/test_stdio.py",
    "transport/relay.py": "tests/e2e/test_http.py",
    "transport/remote.py": "tests/e2e/test_bridge_stdio.py",
    "transport/remote_sse.py": "tests/e2e/test_bridge_sse.py",
    "transport/shared.py": "tests/e2e/test_bridge_streams.py",
    "transport/stdio.py": "tests/e2e/test_stdio.py",
    "transport/tls.py": "tests/e2e/test_tls.py",
    "transport/wrapped.py": "tests/e2e/test_shim_http.py",
}

# What no file may name, and why. The words are taken apart: this file is checked too.
HOSTS = "|".join(
    re.escape(name + "." + rest)
    for name, rest in (
        ("pypi", "org"),
        ("files", "pythonhosted.org"),
        ("registry", "npmjs.org"),
        ("proxy", "golang.org"),
        ("crates", "io"),
        ("deb", "debian.org"),
    )
)
FORBIDDEN = {
    "a package registry's host: that is for the user's settings": rf"(?i)\b(?:{HOSTS})\b",
    "unfinished work: that is in the issues": r"\b(?:TO" + r"DO|FIX" + r"ME)\b",
    "a path of one machine": r"(?<![\w.$}*-])/(?:wo" + r"rk|ro" + r"ot)/",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(module: Path) -> str:
    return str(module.relative_to(PACKAGE))


def mirror_of(module: Path) -> Path:
    inside = module.relative_to(PACKAGE)
    return ROOT / "tests" / "unit" / inside.parent / f"test_{inside.stem.strip('_')}.py"


def python_files() -> list[Path]:
    return modules() + sorted((ROOT / "tests").rglob("*.py"))


@cache
def repository_files() -> list[Path]:
    """What is in git, or would be with the next ``git add``."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_module_has_a_unit_test_that_mirrors_it() -> None:
    without = [
        f"{name_of(module)}: no {mirror_of(module).relative_to(ROOT)}"
        for module in modules()
        if module.stem not in ("__init__", "__main__")
        and name_of(module) not in EXEMPT
        and not mirror_of(module).is_file()
    ]
    assert without == []


def test_no_exemption_is_stale() -> None:
    stale = []
    for name, instead in EXEMPT.items():
        if not (PACKAGE / name).is_file():
            stale.append(f"{name} does not exist")
        elif mirror_of(PACKAGE / name).is_file():
            stale.append(f"{name} has a unit test now")
        elif not (ROOT / instead).is_file():
            stale.append(f"{name} is said to be tested by {instead}, which does not exist")
    assert stale == []


def test_every_unit_test_belongs_to_a_module() -> None:
    """``test_NAME.py`` for ``NAME.py``, and ``test_NAME_topic.py`` where one file is not enough."""
    unit = ROOT / "tests" / "unit"
    mirrors = {mirror_of(module).with_suffix("") for module in modules()}
    topics = {unit / "test_project.py", unit / "test_properties.py"}
    strays = [
        str(test.relative_to(ROOT))
        for test in sorted(set(unit.rglob("test_*.py")) - topics)
        if test.with_suffix("") not in mirrors
        and not any(str(test).startswith(f"{mirror}_") for mirror in mirrors)
    ]
    assert strays == []


def test_package_files_hold_no_logic() -> None:
    """A package's ``__init__`` is its docstring; the top one has the version too."""
    for init in PACKAGE.rglob("__init__.py"):
        body = ast.parse(init.read_text(encoding="utf-8")).body
        assert isinstance(next(iter(body), None), ast.Expr), f"{init} has no docstring"
        rest = [node for node in body[1:] if not isinstance(node, ast.ImportFrom | ast.Assign)]
        assert rest == [], f"{init} holds more than names"


def test_modules_are_small() -> None:
    sizes = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in python_files()
    }
    assert {name: size for name, size in sizes.items() if size > MODULE_LINES} == {}


def test_functions_are_small() -> None:
    large = []
    for file in python_files():
        for function in functions(ast.parse(file.read_text(encoding="utf-8"))):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines > FUNCTION_LINES:
                large.append(f"{file.relative_to(ROOT)}:{function.lineno} {function.name}: {lines}")
    assert large == []


@pytest.mark.allow_io("git knows which files belong to the repository")
@pytest.mark.parametrize(("why", "pattern"), FORBIDDEN.items(), ids=["host", "unfinished", "path"])
def test_no_file_names(why: str, pattern: str) -> None:
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1} {match[0]}"
            for match in re.finditer(pattern, text)
        ]
    assert found == [], why


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("see py" + "pi.org/simple", 1, id="host"),
        pytest.param("TO" + "DO: later", 1, id="word"),
        pytest.param("TO" + "DOS", 0, id="another word"),
        pytest.param("cd /wo" + "rk/main", 1, id="path"),
        pytest.param("opt/wo" + "rk/main and $x/ro" + "ot/", 0, id="a longer path"),
    ],
)
def test_the_patterns_find_what_they_should(text: str, expected: int) -> None:
    assert sum(bool(re.search(pattern, text)) for pattern in FORBIDDEN.values()) == expected
