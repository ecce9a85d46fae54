package mcp.custom_test

import data.mcp.authz

nobody := {"type": "unknown", "id": "anonymous", "issuer": "none", "key": "none|anonymous", "groups": [], "chain": []}

test_unknown_actor_calls_unknown_tool if {
	decision := authz.decision with input as {
		"actor": nobody,
		"target": {"type": "tool", "name": "hidden"},
		"tool": {"name": "hidden", "arguments": {}, "annotations": {}, "known": false, "pinned": false},
	}
	decision == {"allow": true, "rule": "allow-all"}
}

test_every_target_type_is_allowed if {
	every type in [
		"resource", "prompt", "completion", "task", "subscription", "stream",
		"sampling", "elicitation", "roots", "negotiation", "method",
	] {
		decision := authz.decision with input as {"actor": nobody, "target": {"type": type, "name": "x"}}
		decision.allow
	}
}

test_listing_is_left_as_it_is if {
	decision := authz.decision with input as {
		"actor": nobody,
		"target": {"type": "listing", "name": "tools"},
		"listing": {"kind": "tools", "items": [{"target": {"type": "tool", "name": "a"}, "pinned": false}]},
	}
	decision == {"allow": true, "rule": "allow-all"}
}

test_revoked_is_still_revoked if {
	decision := authz.decision with input as {"actor": nobody, "target": {"type": "tool", "name": "a"}}
		with data.mcp_revoked as {"principals": {"none|anonymous": true}}
	not decision.allow
	decision.reasons[0].code == "revoked"
}
