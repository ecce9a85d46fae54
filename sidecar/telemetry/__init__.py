"""What happened, for those who watch: spans and metrics. The only importer of OpenTelemetry.

::

    recorder        Telemetry: what the pipeline talks to; `build` makes it
      ├── tracecontext  what a caller may say of its trace (W3C), read strictly
      ├── spans         ids first, spans late
      │     └── attributes  the table of everything that a span can carry
      ├── metrics       the table of instruments, from one source for Prometheus and OTLP
      └── export        where spans and metrics go; what a lost one costs: nothing but itself

Ids first, spans late: an action's ids are made when it arrives, so that OPA and the server can name
our spans as parents; its spans are made when its outcome is known, with their true times. So a
denial is exported whatever the ratio says, and a call that is not exported costs no span.

Nothing of OpenTelemetry is imported before it is needed: a stdio wrapper is started anew for every
client. Attributes are chosen by a table, and the table is the documentation.
"""

from sidecar.telemetry.metrics import Series
from sidecar.telemetry.recorder import Telemetry, build

__all__ = ["Series", "Telemetry", "build"]
