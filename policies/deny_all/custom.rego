# METADATA
# title: Denies everything
# description: |
#   Nothing gets through, whatever the grants say, and every listing is empty. Negotiation and the closing of
#   streams are not policy's business and go on, so that clients can connect and be told.
package mcp.custom

# METADATA
# title: Everything, for everybody
deny contains {"code": "denied_by_policy", "message": "This policy denies everything.", "rule": "deny-all"}
