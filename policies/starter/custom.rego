# METADATA
# title: Rules of your own
# description: |
#   For what grants cannot say. A `deny` outweighs every grant; an `allow` counts as one. Delete the file if
#   grants are enough.
package mcp.custom

# METADATA
# title: An agent gives no money back on its own
# description: Grants limit how much it may refund. This asks for somebody it does it for.
deny contains {
	"code": "refund_needs_principal",
	"message": "An agent refunds on behalf of somebody only. Call with the credential of the one you act for.",
} if {
	input.actor.type == "agent"
	not input.actor.on_behalf_of
	input.target.type == "tool"
	input.target.name == "refund_ticket"
}
