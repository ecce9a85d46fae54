"""The commands, and the only place where the parts are put together.

`arguments` are what can be said on the command line, `core` is what every mode stands on,
`catalogs` what is known of servers before they are asked, `serving` is a mode each, `checking` and
`pinning` look without serving, `running` is the way from one to the other. What takes long to
import is imported by the function that needs it: a stdio wrapper is started anew for every client.
"""

from sidecar.cli.running import main

__all__ = ["main"]
