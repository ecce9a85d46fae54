"""An OPA of our own, with the library and the user's policy folder laid over it.

The rule: a policy that does not pass the check is never where OPA can see it. Each revision is made
in `store/` and checked there, and put in force by renaming one symlink, `watched/current`, which
OPA watches. So an edit is in force whole or not at all, and an OPA that is restarted comes up with
the last good one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from sidecar.config import Opa
from sidecar.errors import DecisionError, PolicyUnusable
from sidecar.opa.background import Background
from sidecar.opa.client import DecisionClient
from sidecar.opa.expected import Expected
from sidecar.opa.folder import (
    Fingerprint,
    assemble,
    bury,
    fingerprint,
    library_folder,
    modules,
    prune,
    put_in_force,
)
from sidecar.opa.process import LastWords, check, end, ended, find_opa, first_lines, spawn
from sidecar.opa.readiness import timestamp
from sidecar.protocol.jsonrpc import JsonObject, dump_json

logger = logging.getLogger("sidecar.opa")

START_PATIENCE = 10.0  # seconds until OPA serves its first policy
SETTLE = 0.1  # seconds between two looks that have to agree before an edit is taken
SHORTEST_BACKOFF, LONGEST_BACKOFF = 0.1, 2.0
BATCH_MS = 100  # how long OPA holds a span before it sends it
HEALTHY_AFTER = 10.0  # seconds of life after which the back-off starts anew

_PREFIX = "mcp-opa-"
_SERVE = (
    "run",
    "--server",
    "--addr=unix://opa.sock",
    "--watch",
    "--skip-version-check",
    "--log-level=error",
    "--log-format=json",
    "--shutdown-grace-period=1",
    "--config-file=opa.json",
)


@dataclass(frozen=True, slots=True)
class OpaTracing:
    """The collector that OPA sends its own spans to: `HOST:PORT`, OTLP over HTTP or gRPC.

    With TLS there may be files: of the authorities to trust, of a certificate to show and its key.
    """

    address: str
    protocol: Literal["http", "grpc"] = "http"
    tls: bool = False
    authorities: str | None = None
    certificate: str | None = None
    key: str | None = None

    @classmethod
    def to(
        cls,
        url: str,
        protocol: Literal["http", "grpc"],
        authorities: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
    ) -> OpaTracing:
        """Where the sidecar's own exporter sends to by this URL; over HTTP OPA adds the path."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        tls, host = parts.scheme == "https", parts.hostname or ""
        port = parts.port or (443 if tls or protocol == "grpc" else 80)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return cls(address, protocol, tls, authorities, certificate, key)


class OwnOpa:
    """An OPA process that serves `settings.policy` on the unix socket `url`.

    It is restarted when it ends, and never outlives this process. The folder is looked at every
    `settings.poll` seconds; an edit that passes the check is in force within 2 s, one that does not
    is `rejected`, `{"at": RFC 3339, "error": first lines}`, until the next good one.
    `served` is the revision that OPA was seen with.
    """

    def __init__(
        self, settings: Opa, *, tracing: OpaTracing | None = None, library: Path | None = None
    ) -> None:
        assert settings.policy is not None, "an own OPA has a policy folder"
        self._settings, self._tracing = settings, tracing
        self._folder, self._library = settings.policy, library or library_folder()
        self._private: Path | None = None
        self._binary = ""
        self._process: Process | None = None
        self._client: DecisionClient | None = None
        self._tasks: list[Background] = []
        self._seen: Fingerprint = ()
        self._loaded: set[str] = set()  # modules that the running OPA may know
        self._backoff = SHORTEST_BACKOFF
        self._logs = settings.decision_log == "console"
        self._last_words = LastWords(partial(os.write, 2)) if self._logs else LastWords()
        self.on_served: Callable[[], None] = lambda: None
        self._expected = Expected()
        self.served: str | None = None
        self.rejected: JsonObject | None = None

    @property
    def url(self) -> str:
        """What `DecisionClient` takes; there once `start` has begun."""
        return f"unix://{self._home / 'opa.sock'}"

    @property
    def expected(self) -> str | None:
        """The revision that passed the check last."""
        return self._expected.revision

    @property
    def pid(self) -> int | None:
        """The process id, None while it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def lagging(self) -> bool:
        """A revision passed the check, and OPA does not serve it 5 s later."""
        return self._expected.lagging(self.served, time.monotonic())

    def status(self) -> JsonObject:
        """For `/readyz`: `{revision, expected, rejected?}`."""
        status: JsonObject = {"revision": self.served, "expected": self.expected}
        return status | ({"rejected": self.rejected} if self.rejected else {})

    async def start(self) -> None:
        """Return once OPA serves the policy.

        Raises:
            PolicyUnusable: no OPA, one that is too old, a policy that does not pass the check, or
                no answer within 10 s. The message fits on one screen. Nothing is left behind.
        """
        try:
            await self._start()
        except OSError as error:
            await self.stop()
            raise PolicyUnusable(f"the policy can not be used: {error}") from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End OPA and remove everything that it was given."""
        for task in self._tasks:
            await task.stop()
        if self._process is not None:
            if self._tracing is not None:
                # OPA ends without sending the spans that it still holds.
                await asyncio.sleep(2 * BATCH_MS / 1000)
            await end(self._process)
        if self._client is not None:
            await self._client.close()
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)

    async def _start(self) -> None:
        self._private = _private_folder()
        self._client = DecisionClient(self.url)
        self._binary, self._seen = await asyncio.gather(find_opa(self._settings), self._look())
        await self._accept()
        told = opa_configuration(self._tracing, log=self._logs)
        (self._home / "opa.json").write_bytes(dump_json(told))
        self._tasks.append(Background(self._supervise, "own-opa"))
        if not await self._confirm(START_PATIENCE):
            message = f"OPA does not serve the policy {START_PATIENCE:g} s after its start"
            raise PolicyUnusable("\n".join([message, *self._last_words.lines]))
        self._tasks.append(Background(self._watch, "policy-folder"))

    @property
    def _home(self) -> Path:
        assert self._private is not None, "not started"
        return self._private

    # The policy, from the folder to where OPA sees it.

    async def _look(self) -> Fingerprint:
        return await asyncio.to_thread(fingerprint, self._folder)

    async def _watch(self) -> None:
        await asyncio.sleep(self._settings.poll)
        if await self._look() != self._seen:
            await self._reload()
        if self.served == self.expected or self.pid is None or await self._confirm(1.0):
            return
        logger.error("policy_not_in_force expected=%s served=%s", self.expected, self.served)
        put_in_force(self._home, str(self.expected))  # OPA may have missed it: show it again

    async def _reload(self) -> None:
        """Take an edit once it is whole: when two looks agree, or when it never rests."""
        for _ in range(10):
            before, self._seen = self._seen, await self._look()
            if self._seen == before:
                break
            await asyncio.sleep(SETTLE)
        try:
            await self._accept()
        except PolicyUnusable as error:
            self._reject(str(error))
        except OSError as error:
            self._seen = ()  # no word on the policy: try again at the next look
            self._reject(str(error))
        else:
            self.rejected = None

    def _reject(self, error: str) -> None:
        text = first_lines(error)
        if self.rejected is None or self.rejected["error"] != text:
            self.rejected = {"at": timestamp(), "error": text}
            logger.error("policy_rejected kept=%s error=%s", self.expected, text)

    async def _accept(self) -> None:
        """Assemble, check, put in force. After PolicyUnusable or OSError nothing has changed."""
        store = self._home / "store"
        mask = self._library.parent / "system" if self._logs else None
        revision = await asyncio.to_thread(assemble, self._library, self._folder, store, mask)
        if revision == self.expected:
            return
        try:
            bury(store / revision, self._loaded - modules(store / revision))
            await check(self._binary, store / revision)
        except BaseException:
            shutil.rmtree(store / revision, ignore_errors=True)
            raise
        self._loaded |= modules(store / revision)
        put_in_force(self._home, revision)
        prune(store, keep={revision, self.expected})  # OPA may still be reading the last one
        self._expected = Expected(revision, time.monotonic())
        logger.info("policy_accepted revision=%s", revision)

    async def _confirm(self, patience: float) -> bool:
        """Ask OPA until it serves the expected revision, for at most `patience` seconds."""
        assert self._client is not None
        until = time.monotonic() + patience
        while True:
            with suppress(DecisionError):
                self.served = await self._client.revision(deadline=self._settings.deadline)
            if self.served == self.expected:
                self.on_served()
                return True
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.01)

    # The process.

    async def _supervise(self) -> None:
        started = time.monotonic()
        try:
            code: object = await self._run()
        except OSError as error:
            code = error
        self.served, self._expected = None, Expected(self.expected, time.monotonic())
        if time.monotonic() - started > HEALTHY_AFTER:
            self._backoff = SHORTEST_BACKOFF
        logger.error("opa_ended code=%s restart_in=%.1fs", code, self._backoff)
        await asyncio.sleep(self._backoff)
        self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)

    async def _run(self) -> int:
        """One life of OPA; its exit code."""
        command = (self._binary, *_SERVE, "watched/current")
        self._loaded = modules(self._home / "watched" / "current")
        self._process = process = await spawn(command, self._home)
        assert process.stderr is not None
        await self._last_words.follow(process.stderr)
        return await ended(process)


def opa_configuration(tracing: OpaTracing | None, *, log: bool = False) -> JsonObject:
    """What OPA is told: where its own spans go, and whether it logs decisions.

    Spans have decision ids only where there is a decision log. So OPA gets one that drops every
    record: it would hold arguments, and cost ten times what the id does.
    """
    told = {} if tracing is None else {"distributed_tracing": _tracing(tracing)}
    if tracing is None and not log:
        return told
    drop = "/system/log/drop" if log else "/mcp/sidecar/silent"
    return {**told, "decision_logs": {"console": True, "drop_decision": drop}}


def _tracing(tracing: OpaTracing) -> JsonObject:
    """OPA's own spans. Which are exported is said by the flag of the context that a query brings.

    The percentage is that of queries without one.
    """
    files = {
        "tls_ca_cert_file": tracing.authorities,
        "tls_cert_file": tracing.certificate,
        "tls_private_key_file": tracing.key,
    }
    encrypted = "mtls" if tracing.certificate else "tls"
    return {
        "type": tracing.protocol,
        "address": tracing.address,
        "service_name": "opa",
        "sample_percentage": 0,
        "encryption": encrypted if tracing.tls else "off",
        "batch_span_processor_options": {"batch_timeout_ms": BATCH_MS},
        # It runs in a folder of its own.
        **{name: str(Path(file).absolute()) for name, file in files.items() if file},
    }


def _private_folder() -> Path:
    """A folder of ours alone, 0700, whose path leaves room for a socket's (at most 103 bytes)."""
    room = len(tempfile.gettempdir()) <= 70
    private = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=None if room else "/tmp"))  # noqa: S108
    (private / "store").mkdir()
    (private / "watched").mkdir()
    return private
