"""`policy build`: a policy folder made ready for the OPA of a pod."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sidecar.config import Opa
from sidecar.errors import ConfigError
from sidecar.opa.bundle import Signing, build, bundle, config_map, render
from sidecar.opa.process import find_opa


async def policy(options: argparse.Namespace) -> int:
    """Build a bundle or a ConfigMap; the exit code.

    Raises:
        ConfigError: something can not be read or written, or does not fit together.
        PolicyUnusable: the policy does not pass the check.
    """
    folder, target = Path(options.folder), Path(options.output)
    is_bundle = target.name.endswith(".tar.gz")
    if not is_bundle and target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"-o {target}: is neither a bundle (.tar.gz) nor a ConfigMap (.yaml)")
    if options.signing_key is not None and not is_bundle:
        raise ConfigError("--signing-key: only a bundle can be signed, not a ConfigMap")
    binary = await find_opa(_opa())
    try:
        built = await build(binary, folder)
        if is_bundle:
            made = await bundle(binary, built, _signing(options))
        else:
            made = render(config_map(built, options.name, options.namespace)).encode()
        _write(target, made)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    print(f"{target}: revision {built.revision}, {len(built.modules)} modules")
    return 0


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
