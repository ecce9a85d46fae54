"""Settings: read once, into frozen values.

Four sources, of which a later one wins: the standard variables `OTEL_*` and `POD_*`, one YAML file
(`--config`), the variables `MCP_SIDECAR_*`, and flags. A flag such as `--audit` has the variable
`MCP_SIDECAR_AUDIT`, every scalar of the file has `MCP_SIDECAR_<GROUP>__<KEY>`, as in
`MCP_SIDECAR_LIMITS__NESTING`; an empty variable counts as not set.

`settings` are the values, `keys` the table of all that the file can say, `readers` what looks at a
value, `loading` the way from the sources to the settings. `schema.json` says the same to editors;
a unit test holds the two together, since importing `jsonschema` takes too long for a wrapper that
is started anew for every client.
"""

from sidecar.config.keys import KEYS
from sidecar.config.loading import load
from sidecar.config.readers import Record
from sidecar.config.settings import (
    Assertion,
    Audit,
    Bridge,
    Catalog,
    Enforcement,
    Http,
    Identity,
    Limits,
    Listen,
    Mode,
    Opa,
    Pod,
    Protocol,
    Proxy,
    Settings,
    Spiffe,
    Telemetry,
    Tls,
    Upstream,
    describe,
)

__all__ = [
    "KEYS",
    "Assertion",
    "Audit",
    "Bridge",
    "Catalog",
    "Enforcement",
    "Http",
    "Identity",
    "Limits",
    "Listen",
    "Mode",
    "Opa",
    "Pod",
    "Protocol",
    "Proxy",
    "Record",
    "Settings",
    "Spiffe",
    "Telemetry",
    "Tls",
    "Upstream",
    "describe",
    "load",
]
