package mcp.authz_test

revoked_by(revocations, asked) := [reason.code | some reason in decision.reasons] if {
	decision := ask(asked, {"grants": file, "revoked": revocations})
	not decision.allow
}

test_revoked_principal if {
	every value in [true, false, null, "left", {}] {
		revoked_by({"principals": {"static|ana": value}}, question) == ["revoked"]
	}
}

test_everybody_in_the_chain_can_be_revoked if {
	actor := object.union(bot, {"chain": [bot, nobody, ana], "on_behalf_of": ana})
	every key in ["static|bot", "none|anonymous", "static|ana"] {
		revoked_by({"principals": {key: true}}, calls(actor, "get_ticket", {})) == ["revoked"]
	}
}

test_a_list_revokes_too if {
	revoked_by({"principals": ["static|eve", "static|ana"]}, question) == ["revoked"]
	not revoked_by({"principals": ["static|eve"]}, question)
}

test_revoked_token if {
	actor := object.union(alone(ana), {"token": {"id": "t1"}})
	revoked_by({"tokens": {"t1": true}}, calls(actor, "get_ticket", {})) == ["revoked"]
	not revoked_by({"tokens": {"t2": true}}, calls(actor, "get_ticket", {}))
}

test_somebody_else_is_not_revoked if {
	every revocations in [
		{}, {"principals": {}}, {"principals": {"ana": true}}, {"principals": {"https://idp.example.com|ana": true}},
		{"tokens": {"static|ana": true}}, {"principals": []},
	] {
		not revoked_by(revocations, question)
	}
}

test_revoked_comes_first_and_alone if {
	decision := ask(calls(alone(ana), "delete", {}), {"revoked": {"principals": {"static|ana": true}}, "deny": {{"code": "aaa"}}, "allow": {{"any": true}}})
	[reason.code | some reason in decision.reasons] == ["revoked", "aaa"]
}

test_revocation_refuses_what_nothing_else_does if {
	every asked in [
		asks(alone(ana), "negotiation", "initialize"), asks(alone(ana), "stream", "close"), tools_list(alone(ana), ["get_a"]),
	] {
		revoked_by({"principals": {"static|ana": true}}, asked) == ["revoked"]
	}
}

test_a_custom_rule_can_revoke if {
	decision := ask(asks(alone(ana), "negotiation", "initialize"), {"deny": {{"code": "revoked", "message": "Gone."}}})
	decision == {"allow": false, "reasons": [{"code": "revoked", "message": "Gone."}]}
}
