# METADATA
# title: Allows everything
# description: |
#   For trying the sidecar out: unknown actors, unknown tools and unfiltered listings included. Only a revocation
#   denies. Not for anything that matters.
package mcp.custom

# METADATA
# title: Everything, for everybody
allow contains {"rule": "allow-all", "any": true}
