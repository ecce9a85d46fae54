package mcp.authz_test

question := calls(alone(ana), "get_ticket", {})

denied_by(value) := [reason.code | some reason in decision.reasons] if {
	decision := ask(question, {"grants": file, "deny": value})
	not decision.allow
}

test_custom_deny_outweighs_grants if denied_by({{"code": "no", "message": "No."}}) == ["no"]

test_custom_deny_outweighs_custom_allow if {
	decision := ask(question, {"allow": {{"rule": "r", "any": true}}, "deny": {{"code": "no", "message": "No."}}})
	decision == {"allow": false, "reasons": [{"code": "no", "message": "No."}]}
}

test_custom_deny_is_told_before_other_reasons if {
	decision := ask(calls(alone(ana), "delete", {}), {"deny": {{"code": "zzz"}}})
	[reason.code | some reason in decision.reasons] == ["zzz", "not_granted"]
}

test_whatever_deny_contains_denies if {
	every value in [{"no"}, {{}}, {null}, {false}, ["no"], {"x": "no"}, {{"code": "Not A Code"}}, {{"code": 1}}, true, "no"] {
		denied_by(value) == ["custom_denied"]
	}
}

test_no_deny_does_not_deny if {
	every value in [set(), [], {}, false] {
		not denied_by(value)
	}
}

test_a_reason_keeps_what_a_reason_has if {
	denial := {"code": "scope", "message": "m", "scope": "tickets:write", "rule": "r1", "owner": "team", "more": 1}
	decision := ask(question, {"grants": file, "deny": {denial}})
	decision == {
		"allow": false, "rule": "r1", "owner": "team",
		"reasons": [{"code": "scope", "message": "m", "scope": "tickets:write"}],
	}
}

allowed_by(value) := decision if {
	decision := ask(calls(alone(ana), "delete", {}), {"allow": value})
}

test_custom_allow if {
	allowed_by({{"rule": "r", "owner": "o"}}) == {"allow": true, "rule": "r", "owner": "o"}
	allowed_by({{}}) == {"allow": true, "rule": "custom"}
	allowed_by([{"rule": "b"}, {"rule": "a", "owner": 1}]) == {"allow": true, "rule": "a"}
}

test_custom_allow_and_grants_are_one_allow if {
	decision := ask(question, {"grants": file, "allow": {{"rule": "a"}, {"rule": "z"}}})
	decision == {"allow": true, "rule": "a"}
}

test_what_is_no_object_allows_nothing if {
	every value in [true, "yes", {"yes"}, {true}, ["r"], {{"rule": 1}}, {"rule": "r"}, set(), null] {
		not allowed_by(value).allow
	}
}

test_custom_allow_stands_in_for_both_parties if {
	decision := ask(calls(bot_for_ana, "x", {}), {"allow": {{"rule": "r"}}})
	decision == {"allow": true, "rule": "r"}
}

test_custom_rules_do_not_touch_negotiation if {
	decision := ask(asks(alone(ana), "negotiation", "initialize"), {"deny": {{"code": "no"}}, "allow": {{"rule": "r"}}})
	decision == {"allow": true}
}

test_mode_attributes_and_obligations_are_handed_on if {
	decision := ask(question, {"grants": file}) with data.mcp.custom.mode as "shadow" with data.mcp.custom.attributes as {"desk": 1} with data.mcp.custom.obligations as {{"type": "mask_result"}}
	decision == {
		"allow": true, "rule": "read", "owner": "desk", "mode": "shadow",
		"attributes": {"desk": 1}, "obligations": [{"type": "mask_result"}],
	}
}

test_a_denial_has_no_obligations if {
	decision := ask(question, {}) with data.mcp.custom.obligations as {{"type": "mask_result"}}
	not decision.obligations
}
