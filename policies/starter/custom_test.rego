package mcp.custom_test

import data.mcp.authz
import data.mcp.custom

bot := {"type": "agent", "id": "support-bot", "issuer": "static", "key": "static|support-bot", "groups": []}

ana := {"type": "human", "id": "ana", "issuer": "static", "key": "static|ana", "groups": []}

call(actor, tool, arguments) := {
	"actor": object.union({"chain": [actor]}, actor),
	"target": {"type": "tool", "name": tool},
	"tool": {"name": tool, "arguments": arguments, "annotations": {}, "known": true},
	"context": {"time": "2026-11-22T10:15:00Z"},
}

for_ana := object.union(bot, {"on_behalf_of": ana, "chain": [bot, ana]})

first_code(question) := code if {
	decision := authz.decision with input as question
	not decision.allow
	code := decision.reasons[0].code
}

allowed(question) if {
	decision := authz.decision with input as question
	decision.allow
}

test_agent_alone_does_not_refund if {
	first_code(call(bot, "refund_ticket", {"amount": 1})) == "refund_needs_principal"
}

test_agent_refunds_for_somebody if {
	allowed(call(for_ana, "refund_ticket", {"amount": 50}))
}

test_agent_refunds_no_more_than_its_own_limit if {
	first_code(call(for_ana, "refund_ticket", {"amount": 51})) == "argument_not_allowed"
}

test_agent_does_not_delete_for_ana if {
	first_code(call(for_ana, "delete_ticket", {"id": 1})) == "not_granted_to_principal"
}

test_agent_does_not_create_for_ana if {
	first_code(call(for_ana, "create_ticket", {})) == "not_granted"
}

test_other_calls_are_not_denied if {
	count(custom.deny) == 0 with input as call(bot, "delete_ticket", {"id": 1})
	count(custom.deny) == 0 with input as call(ana, "refund_ticket", {"amount": 1})
}

test_ana_refunds_up_to_100 if {
	allowed(call(ana, "refund_ticket", {"amount": 100}))
	first_code(call(ana, "refund_ticket", {"amount": 100.01})) == "argument_not_allowed"
	first_code(call(ana, "refund_ticket", {"amount": -1})) == "argument_not_allowed"
}

test_reporting_only_reads if {
	service := {"type": "service", "id": "reporting", "issuer": "static", "key": "static|reporting", "groups": []}
	allowed(call(service, "get_ticket", {"id": 1}))
	first_code(call(service, "create_ticket", {})) == "not_granted"
}

test_no_human_is_reporting if {
	human := {"type": "human", "id": "reporting", "issuer": "static", "key": "static|reporting", "groups": []}
	first_code(call(human, "get_ticket", {"id": 1})) == "not_granted"
}
