package mcp.custom_test

import data.mcp.authz

ana := {"type": "human", "id": "ana", "issuer": "static", "key": "static|ana", "groups": [], "chain": []}

grants := {"humans": {"principals": {"ana": {"all": {"tools": ["*"], "prompts": ["*"], "sampling": ["*"]}}}}}

test_grants_do_not_help if {
	every type in ["tool", "prompt", "sampling", "stream", "method", "listing"] {
		decision := authz.decision with input as {
			"actor": ana,
			"target": {"type": type, "name": "open"},
			"tool": {"name": "open", "arguments": {}, "annotations": {}, "known": true},
			"prompt": {"name": "open", "arguments": {}},
		}
			with data.mcp.grants as grants
		not decision.allow
		decision.reasons[0].code == "denied_by_policy"
		decision.rule == "deny-all"
		not decision.visible
	}
}

test_negotiation_goes_on if {
	decision := authz.decision with input as {"actor": ana, "target": {"type": "negotiation", "name": "initialize"}}
	decision.allow
}
