"""The record: who did what, what was decided, what came of it. JSON lines, two for a call.

`decision` is written before anything is forwarded, and when it can't be written nothing is let
through; `outcome` is written when the call has ended. Both carry the decision id, by which they
belong together, and the trace id. Principals are there by type, id, issuer and key; arguments by
their digest; claims, tokens and raw session ids never. Arguments and results are there, masked,
when that is switched on (`recording.Content`).

Who is not let in leaves a record of its own, `refused`: why, from where and at which path. Of each
reason only so many are written in a minute, and the next one says how many were not.

A record is one `write` of a whole line to a descriptor that appends, so processes that share a file
do not tear each other's lines (in a pipe: up to PIPE_BUF). A line that was torn all the same, by a
full disk, is ended before the next one. Times are the call's own.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.conversation import Call, Stranger
from sidecar.errors import AuditError, ConfigError
from sidecar.policy.document import session_digest
from sidecar.policy.identity import Principal
from sidecar.protocol.catalog import digest
from sidecar.protocol.jsonrpc import Json, JsonObject, dump_json
from sidecar.recording import NO_CONTENT, Content

if TYPE_CHECKING:
    from sidecar.config import Audit as Settings

log = logging.getLogger("sidecar.audit")

MODE = 0o600
MAX_LINE = 64 * 1024
QUIET = 60.0

MINUTE, MOST = 60.0, 10
"""So many strangers of one reason are written down in that many seconds."""

_LIMITS = ((1024, 64), (128, 16), (32, 8))
"""Longest string, longest list: of a record that is too long. The last pair is always enough."""

_WITH_ARGUMENTS = frozenset({"tools/call", "prompts/get"})
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


class Audit:
    """A recorder of the pipeline that appends to a descriptor.

    `path` is the file that `reopen` opens again; None when the descriptor is not ours. `failures`
    are records that could not be written.
    """

    def __init__(
        self,
        fd: int,
        *,
        path: Path | None = None,
        sync: bool = False,
        content: Content = NO_CONTENT,
    ) -> None:
        self._fd, self._path, self._content = fd, path, content
        self._sync = sync and stat.S_ISREG(os.fstat(fd).st_mode)
        self._torn = False
        self._complained = float("-inf")
        self._floods: dict[str, _Flood] = {}
        self.failures = 0

    @classmethod
    def open(cls, settings: Settings, *, stream: int, content: Content = NO_CONTENT) -> Audit:
        """The record that the settings name; "-" is `stream`, a descriptor that stays open.

        Raises:
            ConfigError: the file can not be opened for appending.

        """
        if settings.path is None or settings.path == "-":
            return cls(stream, sync=settings.sync, content=content)
        path = Path(settings.path)
        try:
            fd = os.open(path, _FLAGS, MODE)
        except OSError as error:
            raise ConfigError(f"audit.path: can not append to {path}: {error.strerror}") from error
        return cls(fd, path=path, sync=settings.sync, content=content)

    def decided(self, call: Call) -> None:
        """Write down what was decided, before anything is let through.

        Raises:
            AuditError: it could not be written.

        """
        if not judged(call):
            return
        try:
            self._append(line(decision_record(call, self._content)))
        except OSError as error:
            raise AuditError(f"the audit record could not be written: {error.strerror}") from error

    def finished(self, call: Call) -> None:
        """Write down what came of it. It has happened: a failure can only be complained of."""
        if not judged(call):
            return
        try:
            self._append(line(outcome_record(call, self._content)))
        except OSError as error:
            self._complain(error)

    def refused(self, stranger: Stranger) -> None:
        """Write down who was not let in; a flood of them is counted."""
        flood = self._floods.setdefault(stranger.code, _Flood())
        if (left_out := flood.admit(time.monotonic())) is None:
            return
        try:
            self._append(line(stranger_record(stranger, time.time_ns(), left_out)))
        except OSError as error:
            self._complain(error)

    def reopen(self) -> None:
        """Go on in a new file of the same name, after the old one was moved away.

        When that can't be opened, the record goes on in the old one.
        """
        if self._path is None:
            return
        try:
            fd = os.open(self._path, _FLAGS, MODE)
        except OSError as error:
            self._complain(error)
            return
        self.close()
        self._fd, self._torn = fd, False

    def close(self) -> None:
        """Close the file; a descriptor that is not ours is left open."""
        if self._path is not None:
            os.close(self._fd)

    def _append(self, record: bytes) -> None:
        try:
            self._write(record)
        except OSError:
            self.failures += 1
            raise

    def _write(self, record: bytes) -> None:
        whole = b"\n" + record if self._torn else record
        written = os.write(self._fd, whole)
        if written != len(whole):
            self._torn = self._torn or written > 0
            raise OSError(0, f"{written} of {len(whole)} bytes written")
        self._torn = False
        if self._sync:
            os.fsync(self._fd)

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._complained >= QUIET:
            self._complained = now
            log.error("the audit record could not be written: %s", error.strerror)


@dataclass(slots=True)
class _Flood:
    """What is alike: since when, how much of it was written down, and how much was not."""

    since: float = float("-inf")
    written: int = 0
    left_out: int = 0

    def admit(self, now: float) -> int | None:
        """How many were left out before this one; None for one that is left out itself."""
        if now - self.since >= MINUTE:
            self.since, self.written = now, 0
        if self.written == MOST:
            self.left_out += 1
            return None
        self.written += 1
        before, self.left_out = self.left_out, 0
        return before


def line(record: JsonObject) -> bytes:
    """A record as one line of at most 64 KiB; where something was cut, it says so."""
    whole = dump_json(record) + b"\n"
    for longest, most in _LIMITS:
        if len(whole) <= MAX_LINE:
            break
        whole = dump_json({**_cut(record, longest, most), "truncated": True}) + b"\n"
    return whole


def _cut(value: Json, longest: int, most: int) -> Json:
    match value:
        case str():
            return value if len(value) <= longest else value[: longest - 1] + "…"
        case dict():
            return {key: _cut(each, longest, most) for key, each in value.items()}
        case list():
            return [_cut(each, longest, most) for each in value[:most]]
        case _:
            return value


def judged(call: Call) -> bool:
    """Whether anybody decided: the policy, or the table by a refusal. Else there is no record."""
    return call.decision is not None or call.error is not None or call.verdict != "allow"


def decision_record(call: Call, content: Content = NO_CONTENT) -> JsonObject:
    """Who tried what, and what was decided."""
    decision, operation = call.decision, call.operation
    record = {
        **_heading("decision", call.answered or call.received, call),
        "assurance": call.actor.assurance,
        "chain": [_principal(each) for each in call.actor.chain],
        "session": session_digest(operation.session_id),
        "arguments_digest": _arguments_digest(call),
        "arguments": content.arguments_of(call),
        "reasons": [
            _present({"code": each.code, "message": each.message or None, "scope": each.scope})
            for each in call.reasons
        ],
        "error": call.error.detail if call.error else None,
        "rule": decision.rule if decision else None,
        "owner": decision.owner if decision else None,
        "policy_revision": decision.revision if decision else None,
        "opa_decision_id": decision.opa_id if decision else None,
        "milliseconds": _milliseconds(call.asked, call.answered) if call.asked else None,
    }
    return _present(record)


def outcome_record(call: Call, content: Content = NO_CONTENT) -> JsonObject:
    """What came of it."""
    record = {
        **_heading("outcome", call.finished, call),
        "outcome": call.outcome,
        "rpc_error": call.rpc_error[0] if call.rpc_error else None,
        "forwarded": call.forwarded > 0,
        "result": content.result_of(call),
        "milliseconds": _milliseconds(call.received, call.finished),
    }
    return _present(record)


def stranger_record(stranger: Stranger, when: int, left_out: int) -> JsonObject:
    """Who was not let in; `left_out` are those like it that have no record."""
    record = {
        "time": _rfc3339(when),
        "type": "refused",
        "reason": stranger.code,
        "transport": stranger.transport,
        "source_address": stranger.source_address,
        "path": stranger.path,
        "left_out": left_out or None,
    }
    return _present(record)


def _heading(kind: str, when: int, call: Call) -> JsonObject:
    """What both records of a call say: enough to read either alone."""
    operation, behind = call.operation, call.actor.on_behalf_of
    actor = {
        "type": call.actor.principal.type,
        "key": call.actor.principal.key,
        "on_behalf_of": behind.key if behind else None,
    }
    return {
        "time": _rfc3339(when),
        "type": kind,
        "decision_id": call.decision_id,
        "trace_id": call.trace.trace_id,
        "actor": _present(actor),
        "server": call.server,
        "transport": call.transport,
        "direction": operation.direction.value,
        "method": operation.message.method,
        "targets": [{"type": each.type, "name": each.name} for each in operation.targets],
        "resource": call.resource,
        "decision": call.verdict,
        "mode": call.mode,
    }


def _principal(principal: Principal) -> JsonObject:
    return {
        "type": principal.type,
        "id": principal.id,
        "issuer": principal.issuer,
        "key": principal.key,
    }


def _arguments_digest(call: Call) -> str | None:
    if call.operation.message.method not in _WITH_ARGUMENTS:
        return None
    return digest(call.operation.params.get("arguments", {}))


def _present(record: JsonObject) -> JsonObject:
    """An absent thing is an absent key, as in the input document."""
    return {key: value for key, value in record.items() if value is not None}


def _milliseconds(start: int, end: int) -> float:
    return round(max(0, end - start) / 1e6, 3)


def _rfc3339(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 10**6:03d}Z"
