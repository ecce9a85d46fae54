"""`python -m sidecar` is `mcp-sidecar`."""

import sys

from sidecar.cli import main

sys.exit(main())
