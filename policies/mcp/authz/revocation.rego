# Revocation. It is data of its own (`data.mcp_revoked`), so that it can be changed without a new policy.
package mcp.authz

# METADATA
# title: The revocations that concern the caller
# description: Everybody in the chain counts, prior actors too. Presence revokes, whatever the value says.
revoked contains {"code": "revoked", "message": message} if {
	some key in chain_keys
	is_revoked("principals", key)
	message := sprintf("The access of %s is revoked. Ask the operator of this server.", [key])
}

revoked contains {"code": "revoked", "message": message} if {
	is_revoked("tokens", input.actor.token.id)
	message := "The token is revoked. Sign in again."
}

revoked contains reason if {
	some reason in custom_denials
	reason.code == "revoked"
}

# METADATA
# title: The keys of everybody in the chain
chain_keys contains input.actor.key

chain_keys contains input.actor.on_behalf_of.key

chain_keys contains member.key if some member in input.actor.chain

# METADATA
# title: Whether a key is among the revoked ones
# description: An object is looked up. A list revokes as well, since it would be ignored in silence otherwise.
is_revoked(kind, key) if {
	_ := data.mcp_revoked[kind][key]
}

is_revoked(kind, key) if {
	_ := data.mcp_revoked[kind][0]
	key in data.mcp_revoked[kind]
}
