"""Everything that can go wrong, on one page.

::

    SidecarError                 code: stable, snake_case; metric label, log field and reason code
    ├── ConfigError              the operator's to mend; exit 125; lists every problem at once
    ├── PolicyUnusable           the own OPA or its policy can not be used at start; exit 126
    ├── ProtocolError            the peer's fault; answered, never forwarded
    │   ├── MalformedMessage     not JSON-RPC, or JSON that two parsers may read differently
    │   ├── HeaderMismatch       an HTTP header says something else than the body
    │   ├── UnknownMethod        not in the table of methods and not declared
    │   ├── UnsupportedVersion   a revision that is not served here; says which ones are
    │   └── Unauthenticated      a credential is there and refused; its `code` says why
    ├── KeysUnusable             an issuer's keys could not be fetched or read
    ├── Overloaded               too many calls in flight
    ├── DecisionError            no usable answer: a deny
    │   ├── DecisionUnavailable  OPA not reached, late, or failing: may be tried again
    │   └── DecisionInvalid      undefined, wrong shape, evaluation error: asking again won't help
    ├── AuditError               the record could not be written, so nothing is let through
    ├── InjectionRefused         a pod asks for the sidecar in a way that can't be done safely
    └── UpstreamError            the server refused or died
        └── UpstreamTimeout      the server did not answer in time

A denial is not an error: it is an outcome (`sidecar.policy.enforcement`).
Any other exception that reaches a transport is a bug, and is answered as `internal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

RefusalCode = Literal[
    "token_malformed",  # no compact JWS, JSON that two parsers read differently, `crit`, `typ`
    "token_algorithm",  # `none`, HMAC, not in the issuer's list, or not for the key
    "token_issuer",  # no `iss`, or nobody that is configured
    "token_key_unknown",  # the issuer has no key by that id
    "keys_unavailable",  # the issuer's keys were never had, or for too long not refreshed
    "token_signature",
    "token_rejected",  # the cluster that was asked does not take it for good
    "review_unavailable",  # the cluster can not be asked
    "token_audience",  # for somebody else
    "token_expired",
    "token_not_yet_valid",  # `nbf` or `iat` in the future
    "token_claims",  # a claim is missing or of the wrong type
    "token_binding",  # `cnf`: bound to a key, which is not checked here
    "chain_malformed",  # `act` is not what RFC 8693 says, or names a foreign principal
    "chain_too_long",
    "workload_malformed",  # a certificate without one SPIFFE id, or an authority's
    "workload_domain",  # of a trust domain that is not listed
    "workload_expired",  # the connection has outlived the certificate
    "proxy_malformed",  # a trusted proxy that does not name one principal
    "credentials_missing",  # there is none, and one is needed
]
"""Why a credential is refused."""

_UNCHECKED = frozenset({"keys_unavailable", "review_unavailable"})
"""What says nothing of the credential: it may be good, and may be shown again."""


class SidecarError(Exception):
    """Root of the tree."""

    code = "internal"


class ConfigError(SidecarError):
    """The configuration, or the way the command was called, can not be used."""

    code = "configuration"

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


class PolicyUnusable(SidecarError):
    """OPA could not be started, or the policy folder does not compile."""

    code = "policy_unusable"


class ProtocolError(SidecarError):
    """A message that is answered with an error and goes nowhere.

    `rpc_code` is the JSON-RPC error code, `status` the HTTP status of the answer, `request_id` the
    id to echo (None when there is none that both sides read alike), and `data` the error's own.
    """

    code = "protocol"
    rpc_code = -32600
    status = 400

    def __init__(
        self,
        message: str,
        *,
        request_id: str | int | None = None,
        rpc_code: int | None = None,
        status: int | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.data = data
        if rpc_code is not None:
            self.rpc_code = rpc_code
        if status is not None:
            self.status = status


class MalformedMessage(ProtocolError):
    """Bytes that are not one unambiguous JSON-RPC message."""

    code = "malformed_message"


class HeaderMismatch(ProtocolError):
    """`Mcp-*` headers and the body disagree (MCP 2026-07-28, Server Validation)."""

    code = "header_mismatch"
    rpc_code = -32020


class UnsupportedVersion(ProtocolError):
    """A revision that is not served here (MCP 2026-07-28, versioning): the caller may fall back."""

    code = "unsupported_version"
    rpc_code = -32022

    def __init__(
        self, requested: str, supported: Sequence[str], *, request_id: str | int | None = None
    ) -> None:
        super().__init__(
            f"Unsupported protocol version: {requested}",
            request_id=request_id,
            data={"supported": list(supported), "requested": requested},
        )


class UnknownMethod(ProtocolError):
    """A method that is not in the table; denied without asking anybody."""

    code = "unknown_method"
    rpc_code = -32601
    status = 200


class Unauthenticated(ProtocolError):
    """A credential that is there and is no good: never taken for "nobody".

    `code` is one of `RefusalCode`. The message says nothing that the credential says.
    """

    code = "unauthenticated"
    rpc_code = -31401
    status = 401

    def __init__(self, code: RefusalCode, message: str) -> None:
        self.retryable = code in _UNCHECKED
        super().__init__(message, data={"reasons": [{"code": code}], "retryable": self.retryable})
        self.code = code


class KeysUnusable(SidecarError):
    """An issuer's keys could not be fetched, or what came is no key set."""

    code = "keys_unusable"


class Overloaded(SidecarError):
    """The bound on calls in flight is reached."""

    code = "too_many_calls"


class DecisionError(SidecarError):
    """No usable decision. `detail` is the stable cause, for spans and logs."""

    code = "policy_error"
    retryable = False

    def __init__(self, message: str, *, detail: str) -> None:
        super().__init__(message)
        self.detail = detail


class DecisionUnavailable(DecisionError):
    """OPA did not answer: `connection_error`, `timeout` or `server_error`."""

    code = "policy_unavailable"
    retryable = True


class DecisionInvalid(DecisionError):
    """OPA gave no decision: `undefined_decision`, `bad_response` or `evaluation_error`."""

    code = "policy_invalid"


class AuditError(SidecarError):
    """The audit record could not be written."""

    code = "audit_failed"


class UpstreamError(SidecarError):
    """The server's side failed. `sent` says whether a byte had left: then it may have executed."""

    code = "upstream_failed"
    rpc_code = -31502

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class UpstreamTimeout(UpstreamError):
    """The server did not answer in time."""

    code = "upstream_timeout"
    rpc_code = -31504


class InjectionRefused(SidecarError):
    """A pod that can not be given a sidecar which nobody gets around; the text says why."""

    code = "injection_refused"
