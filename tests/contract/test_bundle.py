"""What `policy build` makes, in the hands of a real OPA."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tests.support.processes import STARTER, environment, sidecar


def build(opa: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        sidecar("policy", "build", *arguments),
        env=environment(opa), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def evaluated(opa: Path, query: str, *flags: str | Path) -> Any:
    """The value of a query."""
    done = subprocess.run(
        [opa, "eval", "--fail", *flags, query],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["result"][0]["expressions"][0]["value"]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    private = ec.generate_private_key(ec.SECP256R1())
    files = tmp_path / "key.pem", tmp_path / "public.pem"
    files[0].write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = private.public_key()
    files[1].write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return files


def test_bundle_and_config_map_hold_the_same_policy(opa_bin: Path, tmp_path: Path) -> None:
    bundle, config_map = tmp_path / "b.tar.gz", tmp_path / "cm.yaml"
    for target in (bundle, config_map):
        done = build(opa_bin, STARTER, "-o", target)
        assert done.returncode == 0, done.stderr
        assert "revision " in done.stdout
    found = yaml.safe_load(config_map.read_text())
    folder = tmp_path / "mounted"
    folder.mkdir()
    for name, text in found["data"].items():
        (folder / name).write_text(text)
    revision = found["metadata"]["annotations"]["mcp-opa-sidecar.io/revision"]
    for flags in (("--bundle", bundle), ("--data", folder)):
        assert evaluated(opa_bin, "data.mcp.revision", *flags) == revision
        decision = evaluated(opa_bin, "data.mcp.authz.decision", *flags)
        assert decision["allow"] is False
        grants = evaluated(opa_bin, "data.mcp.grants", *flags)
        assert "agents" in grants


def test_a_bundle_owns_no_more_than_its_root(opa_bin: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b.tar.gz"
    assert build(opa_bin, STARTER, "-o", bundle).returncode == 0
    told = subprocess.run(
        ["tar", "-xOzf", bundle, "/.manifest"], capture_output=True, text=True, check=True
    )
    assert json.loads(told.stdout)["roots"] == ["mcp"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        pytest.param("authz.rego", "package system.authz\nallow := true\n", "system", id="authz"),
        pytest.param("log.rego", "package system.log\ndrop := true\n", "system", id="log"),
        pytest.param("other.rego", "package other\nx := 1\n", "other", id="package"),
        pytest.param("data.yaml", "mcp_revoked: {}\n", "mcp_revoked", id="data"),
        pytest.param("bad.rego", "package mcp.custom\nallow contains\n", "bad.rego", id="broken"),
        pytest.param("data.yaml", "mcp: [\n", "data.yaml", id="no YAML"),
    ],
)
def test_what_does_not_belong_is_refused(
    opa_bin: Path, tmp_path: Path, name: str, text: str, said: str
) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / name).write_text(text)
    for target in (tmp_path / "b.tar.gz", tmp_path / "cm.yaml"):
        done = build(opa_bin, folder, "-o", target)
        assert done.returncode == 126, done.stdout
        assert said in done.stderr
        assert not target.exists()


def test_a_signed_bundle_is_taken_by_who_has_the_key_and_the_scope(
    opa_bin: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    bundle, unsigned = tmp_path / "b.tar.gz", tmp_path / "u.tar.gz"
    signed = ("--signing-key", private, "--signing-alg", "ES256", "--scope", "mcp")
    assert build(opa_bin, STARTER, "-o", bundle, *signed).returncode == 0
    assert build(opa_bin, STARTER, "-o", unsigned).returncode == 0

    def served(path: Path, *flags: str | Path) -> int:
        """OPA's own check of a bundle's signature, as `opa run` does it."""
        return subprocess.run(
            [opa_bin, "build", "--bundle", path, "--output", tmp_path / "o.tar.gz",
             "--signing-alg", "ES256", *flags],
            capture_output=True, timeout=60, check=False,
        ).returncode  # fmt: skip

    key = ("--verification-key", public)
    assert served(bundle, *key, "--scope", "mcp") == 0
    assert served(bundle, *key, "--scope", "other") != 0
    assert served(unsigned, *key, "--scope", "mcp") != 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param((STARTER, "-o", "x.zip"), "neither", id="kind"),
        pytest.param(("nowhere", "-o", "x.yaml"), "nowhere", id="folder"),
        pytest.param((STARTER, "-o", "nowhere/x.yaml"), "nowhere", id="target"),
        pytest.param(
            (STARTER, "-o", "x.yaml", "--signing-key", "k"), "only a bundle", id="signed ConfigMap"
        ),
    ],
)
def test_wrong_usage(opa_bin: Path, arguments: tuple[str | Path, ...], said: str) -> None:
    done = build(opa_bin, *arguments)
    assert (done.returncode, said in done.stderr) == (125, True), done.stderr


# ── What is revoked ───────────────────────────────────────────────────────────────────────────────


def revoke(opa: Path, text: str, folder: Path, *flags: str | Path) -> Any:
    """`policy revoke`, and what it was to make."""
    file, made = folder / "revoked.yaml", folder / "revoked.tar.gz"
    file.write_text(text, "utf-8")
    done = subprocess.run(
        sidecar("policy", "revoke", file, "-o", made, *flags),
        env=environment(opa), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done, made


def test_the_library_finds_in_it_who_is_revoked(opa_bin: Path, tmp_path: Path) -> None:
    text = 'principals: ["static|eve", "https://idp|x|y"]\ntokens: ["7", f81d]\n'
    done, made = revoke(opa_bin, text, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 principals, 2 tokens" in done.stdout
    policy = tmp_path / "policy.tar.gz"
    assert build(opa_bin, STARTER, "-o", policy).returncode == 0
    question = tmp_path / "input.json"
    for actor, revoked in {
        "static|eve": True, "https://idp|x|y": True, "static|ana": False, "eve": False,
    }.items():  # fmt: skip
        for token in ("f81d", "7", "other"):
            asked = {"actor": {"key": actor, "token": {"id": token}}}
            question.write_text(json.dumps(asked), "utf-8")
            flags = ("--bundle", policy, "--bundle", made, "--input", question)
            reasons = evaluated(opa_bin, "data.mcp.authz.revoked", *flags)
            assert bool(reasons) is (revoked or token != "other"), (actor, token)


def test_what_is_revoked_owns_its_own_root_alone(opa_bin: Path, tmp_path: Path) -> None:
    _, made = revoke(opa_bin, "principals: []\n", tmp_path)
    told = subprocess.run(
        ["tar", "-xOzf", made, "/.manifest"], capture_output=True, text=True, check=True
    )
    assert json.loads(told.stdout)["roots"] == ["mcp_revoked"]
    assert evaluated(opa_bin, "data.mcp_revoked", "--bundle", made) == {
        "principals": {}, "tokens": {},
    }  # fmt: skip


def test_its_revision_is_what_it_says(opa_bin: Path, tmp_path: Path) -> None:
    def revision(text: str) -> str:
        done, _ = revoke(opa_bin, text, tmp_path)
        return str(done.stdout.split("revision ")[1].split(",")[0])

    one = revision('principals: ["a|b", "c|d"]\n')
    assert one == revision('principals: ["c|d", "a|b"]\ntokens: []\n')
    assert one != revision('principals: ["c|d"]\n')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "must be a mapping", id="nothing"),
        pytest.param("{}", "needs principals or tokens", id="nobody"),
        pytest.param("principal: []", "did you mean 'principals'", id="a typo"),
        pytest.param("principals: [ana]", "principals[0]: must be ISSUER|ID", id="no issuer"),
        pytest.param("principals: ['|x', 'y|']", "principals[1]: must be", id="halves"),
        pytest.param("tokens: [7]", "tokens[0]: must be the id of a token", id="a number"),
        pytest.param("tokens: {a: true}", "must be a list", id="a mapping"),
        pytest.param("tokens: [", "revoked.yaml", id="no YAML"),
    ],
)
def test_what_can_not_be_meant_is_refused(
    opa_bin: Path, tmp_path: Path, text: str, said: str
) -> None:
    done, made = revoke(opa_bin, text, tmp_path)
    assert (done.returncode, said in done.stderr) == (125, True), done.stderr
    assert not made.exists()
