"""A server of bundles where other pods are, and what fills it: our commands, and OPA's own.

OPA's own makes what ours refuse to make: bundles with other roots, which are signed all the same.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tests.pods.network import OUTSIDE_IP, Network, within
from tests.support.processes import environment, sidecar

PORT = 8000
ALGORITHM = "ES256"


class Server:
    """Serves what it is given, by ETags as bundle servers do, in the namespace of everybody else.

    `given` counts how often each was handed out since it is there: what OPA has activated it does
    not get again, what it has refused at every look. `missed` counts what it asked for in vain.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, token: str | None = None) -> None:
        """`token` is what has to be shown."""
        self.url = f"{'https' if tls else 'http'}://{OUTSIDE_IP}:{PORT}"
        self._tls, self._token = tls, token
        self.bundles: dict[str, bytes] = {}
        self.given: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._http: ThreadingHTTPServer | None = None

    def put(self, name: str, content: bytes) -> None:
        """Serve another bundle by this name."""
        self.bundles[name], self.given[name] = content, 0

    def start(self, network: Network) -> None:
        """Be there for a pod."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                shown = server._token in (None, self.headers["Authorization"])
                content = server.bundles.get(name, b"") if shown else b""
                server.missed[name] += not content
                tag = f'"{hashlib.sha256(content).hexdigest()}"'
                known = self.headers.get("If-None-Match") == tag
                self.send_response(404 if not content else 304 if known else 200)
                self.send_header("ETag", tag)
                self.send_header("Content-Length", str(0 if known else len(content)))
                self.end_headers()
                if content and not known:
                    self.wfile.write(content)
                    server.given[name] += 1

            def log_message(self, *_: Any) -> None:
                pass

        def listening() -> ThreadingHTTPServer:
            found = ThreadingHTTPServer((OUTSIDE_IP, PORT), Handler)
            if self._tls is not None:
                found.socket = self._tls.wrap_socket(found.socket, server_side=True)
            return found

        self._http = within(network.outside, listening)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Be gone."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None


class Maker:
    """Makes bundles, signed with keys of its own: `good`, which pods have the public half of, and
    `bad`."""

    def __init__(self, folder: Path, opa: Path) -> None:
        self._folder, self._opa = folder, opa
        self.public = self._keys()

    def _keys(self) -> str:
        public = ""
        for name in ("bad", "good"):
            key = ec.generate_private_key(ec.SECP256R1())
            private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            (self._folder / f"{name}.pem").write_bytes(private)
            pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            public = pem.decode()
        return public

    def policy(self, source: Path, scope: str = "mcp") -> tuple[str, bytes]:
        """`mcp-sidecar policy build`: the revision, and the bundle."""
        return self._command("build", source, scope)

    def revoked(self, said: Mapping[str, list[str]], scope: str = "revoked") -> bytes:
        """`mcp-sidecar policy revoke`"""
        file = self._folder / "revoked.yaml"
        file.write_text(json.dumps(said), "utf-8")
        return self._command("revoke", file, scope)[1]

    def _command(self, work: str, source: Path, scope: str) -> tuple[str, bytes]:
        made = self._folder / "made.tar.gz"
        signed = ("--signing-key", self._folder / "good.pem", "--signing-alg", ALGORITHM)
        done = subprocess.run(
            sidecar("policy", work, source, "-o", made, *signed, "--scope", scope),
            env=environment(self._opa), check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.stdout.split("revision ")[1].split(",")[0], made.read_bytes()

    def raw(
        self,
        files: Mapping[str, str],
        *,
        roots: list[str] | None,
        key: str | None = "good",
        scope: str | None = "mcp",
    ) -> bytes:
        """`opa build`, with any roots, or without; signed with a key, or not."""
        folder, made = self._folder / f"raw-{len(list(self._folder.iterdir()))}", "made.tar.gz"
        folder.mkdir()
        manifest = {"revision": "raw", "rego_version": 1} | ({"roots": roots} if roots else {})
        for name, text in {**files, ".manifest": json.dumps(manifest)}.items():
            (folder / name).write_text(text, "utf-8")
        flags: list[str] = []
        if key is not None:
            flags += ["--signing-key", f"../{key}.pem", "--signing-alg", ALGORITHM]
        if scope is not None:
            (self._folder / "claims.json").write_text(json.dumps({"scope": scope}), "utf-8")
            flags += ["--claims-file", "../claims.json"]
        subprocess.run(
            [self._opa, "build", "--bundle", ".", "--output", f"../{made}", *flags],
            cwd=folder, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        return (self._folder / made).read_bytes()
