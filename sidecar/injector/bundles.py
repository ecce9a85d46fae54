"""Policy and revocations that OPA fetches for itself, signed.

OPA activates no bundle that is not signed with the key and for the scope, and none whose roots
overlap those of another; what was in force stays. What boots from the image is a bundle as well,
with the root `system`, so that no other can claim that, or everything (`""`, as without roots).

Source: Open Policy Agent, "Bundles" and "Configuration".
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.config.readers import Record, a_value, number, one_of, text

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")

NAMESPACE = "{namespace}"
"""In a resource or scope: the pod's namespace, so that each may have a policy of its own."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A bundle on the server, and what it has to be signed for."""

    resource: str  # path of the bundle below the server's URL
    scope: str | None = None  # what the signature's `scope` has to be; None: it has none
    polling: int = 30  # seconds from one look to the next


@dataclass(frozen=True, slots=True)
class Revocation(Fetched):
    """The bundle of what is revoked, with the root `mcp_revoked`."""

    polling: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle(Fetched):
    """The bundle of the policy, with the root `mcp`, and the server that has both."""

    url: str  # of the server
    key: str  # public, in PEM
    algorithm: str = "RS256"
    ca: str | None = None  # ConfigMap with the `ca.crt` to believe the server by; else the image's
    token: bool = False  # shown to the server: the pod's account's, for the audience `mcp-policy`


@dataclass(frozen=True, slots=True)
class Places:
    """Where OPA finds in its container what it mounts."""

    persisted: str = "/var/lib/mcp-opa"
    token: str = "/var/run/secrets/mcp-policy/token"  # noqa: S105
    ca: str = "/etc/mcp-policy/ca.crt"


def settings(bundle: Bundle, revocation: Revocation | None, places: Places) -> list[str]:
    """OPA's configuration, as flags."""
    service, said = "services.policy", dict[str, object]()
    if bundle.ca is not None:
        said[f"{service}.tls.ca_cert"] = places.ca
    if bundle.token:
        said[f"{service}.credentials.bearer.token_path"] = places.token
    said |= {
        f"{service}.url": bundle.url,
        "keys.policy.algorithm": bundle.algorithm,
        "keys.policy.key": bundle.key,
        "persistence_directory": places.persisted,
        **_fetched("mcp", bundle),
        **({} if revocation is None else _fetched("mcp_revoked", revocation)),
    }
    return [f"--set={name}={value}" for name, value in said.items()]


def _fetched(root: str, fetched: Fetched) -> dict[str, object]:
    said: dict[str, object] = {
        "service": "policy",
        "resource": _in_namespace(fetched.resource),
        "persist": "true",
        "polling.min_delay_seconds": fetched.polling,
        "polling.max_delay_seconds": fetched.polling,
        "signing.keyid": "policy",
    }
    if fetched.scope is not None:
        said["signing.scope"] = _in_namespace(fetched.scope)
    return {f"bundles.{root}.{name}": value for name, value in said.items()}


def _in_namespace(said: str) -> str:
    """The kubelet puts the namespace in; the patterns below let nothing else be a variable."""
    return said.replace(NAMESPACE, "$(POD_NAMESPACE)")


# What OPA would read as something else than a text is none: `--set` has types.
_NO_TYPE = r"(?!(?:true|false|null|[0-9]+)$)"
_PART = r"(?:[A-Za-z0-9._~-]|\{namespace\})+"
_PEM = r"-----BEGIN PUBLIC KEY-----\n[A-Za-z0-9+/=\n]{1,4096}\n-----END PUBLIC KEY-----\n*"
CONFIG_MAP = text("the name of a ConfigMap", r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_flag = a_value("true or false", lambda value: isinstance(value, bool))

_FETCHED = {
    "resource": text(
        "a path below the URL, such as mcp/{namespace}.tar.gz", rf"{_NO_TYPE}{_PART}(?:/{_PART})*"
    ),
    "scope": text("a word, in which {namespace} may stand", f"{_NO_TYPE}{_PART}"),
    "polling": number(1, 3600, int),
}

REVOCATION = Record(_FETCHED, ("resource",), Revocation)

BUNDLE = Record(
    {
        **_FETCHED,
        "url": text(
            "http(s)://HOST[:PORT][/PATH]",
            r"https?://[A-Za-z0-9.:\[\]-]{1,255}(?:/[A-Za-z0-9._~-]+)*/?",
        ),
        "key": text("a public key in PEM (BEGIN PUBLIC KEY)", _PEM),
        "algorithm": one_of(*ALGORITHMS),
        "ca": CONFIG_MAP,
        "token": _flag,
    },
    ("url", "resource", "key"),
    Bundle,
)
"""What each field may be."""
