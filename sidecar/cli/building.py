"""`policy build` and `policy revoke`: a policy, and what is revoked, for the OPA of a pod."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import yaml

from sidecar.config import Opa
from sidecar.config.readers import Problems, Record, text
from sidecar.errors import ConfigError
from sidecar.opa.bundle import Signing, build, bundle, config_map, render, revocations
from sidecar.opa.process import find_opa

REVOKED = Record(
    {
        "principals": [
            text("ISSUER|ID, such as https://idp.example.com|u-1042", r"[^|]+\|(?s:.+)")
        ],
        "tokens": [text("the id of a token, as a text", "(?s).+")],
    },
    (),
    dict,
)
"""What may be revoked: principals by their keys, tokens by their ids (`jti`)."""


async def policy(options: argparse.Namespace) -> int:
    """Build a bundle or a ConfigMap; the exit code.

    Raises:
        ConfigError: something can not be read or written, or does not fit together.
        PolicyUnusable: the policy does not pass the check.
    """
    work = _build if options.work == "build" else _revoke
    try:
        print(await work(options, await find_opa(_opa())))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    return 0


async def _build(options: argparse.Namespace, binary: str) -> str:
    folder, target = Path(options.folder), Path(options.output)
    is_bundle = target.name.endswith(".tar.gz")
    if not is_bundle and target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"-o {target}: is neither a bundle (.tar.gz) nor a ConfigMap (.yaml)")
    if options.signing_key is not None and not is_bundle:
        raise ConfigError("--signing-key: only a bundle can be signed, not a ConfigMap")
    built = await build(binary, folder)
    if is_bundle:
        made = await bundle(binary, built, _signing(options))
    else:
        made = render(config_map(built, options.name, options.namespace)).encode()
    _write(target, made)
    return f"{target}: revision {built.revision}, {len(built.modules)} modules"


async def _revoke(options: argparse.Namespace, binary: str) -> str:
    target, said = Path(options.output), _revoked(Path(options.file))
    if not target.name.endswith(".tar.gz"):
        raise ConfigError(f"-o {target}: is no bundle (.tar.gz)")
    built = revocations(**said)
    _write(target, await bundle(binary, built, _signing(options)))
    counts = ", ".join(f"{len(each)} {name}" for name, each in said.items())
    return f"{target}: revision {built.revision}, {counts}"


def _revoked(file: Path) -> dict[str, tuple[str, ...]]:
    """What the file says: `principals` and `tokens`, of which one may be missing, not both."""
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    problems = Problems()
    said: dict[str, tuple[str, ...]] | None = problems.read(REVOKED, document, "")
    if not said and not problems:
        raise ConfigError(f"{file}: needs principals or tokens; [] is nobody")
    if not said:
        raise ConfigError([f"{file}: {where.lstrip('.')}: {bad}" for where, bad in problems])
    return {"principals": (), "tokens": (), **said}


def _write(target: Path, content: bytes) -> None:
    target.write_bytes(content)


def _signing(options: argparse.Namespace) -> Signing | None:
    if options.signing_key is None:
        return None
    return Signing(Path(options.signing_key), options.signing_alg, options.scope)


def _opa() -> Opa:
    """Where OPA is looked for, as the modes do."""
    home = Path(os.environ.get("HOME", "/nonexistent"))
    cache = Path(os.environ.get("MCP_SIDECAR_CACHE") or home / ".cache" / "mcp-opa-sidecar")
    return Opa(binary=os.environ.get("MCP_SIDECAR_OPA_BIN") or None, tools=cache / "bin")
