"""OPA: asking it, knowing whether it can be asked, and running one of our own.

`DecisionClient` answers one question, `Readiness` asks the canary question over and over, and
`OwnOpa` keeps a process that serves the library with the user's policy folder laid over it.
"""

from sidecar.opa.client import DecisionClient
from sidecar.opa.expected import Stamp
from sidecar.opa.own import OpaTracing, OwnOpa
from sidecar.opa.readiness import Readiness, question

__all__ = ["DecisionClient", "OpaTracing", "OwnOpa", "Readiness", "Stamp", "question"]
