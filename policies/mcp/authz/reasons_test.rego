package mcp.authz_test

test_messages_say_who_what_and_whom_to_ask if {
	message := answer(calls(alone(ana), "refund", {"amount": 101})).reasons[0].message
	every part in ["human ana", `"amount"`, `"refund"`, "max 100", "ask finance"] {
		contains(message, part)
	}
}

test_messages_name_the_principal_that_lacks if {
	message := answer(calls(bot_for_ana, "delete", {})).reasons[0].message
	startswith(message, "human ana, who is acted for")
}

test_a_grant_without_owner_sends_to_the_policy if {
	contains(answer(calls(alone(ana), "purge", {})).reasons[0].message, "the owner of this policy")
}

test_every_reason_has_code_and_message if {
	every question in [
		calls(alone(nobody), "x", {}), calls(alone(ana), "archive", {}), calls(bot_for_ana, "nothing", {}),
		{}, {"target": {"type": "tool"}}, {"actor": alone(ana)}, {"actor": {"type": "human"}},
	] {
		count(answer(question).reasons) > 0
		every reason in answer(question).reasons {
			regex.match(`^[a-z][a-z_]*$`, reason.code)
			count(reason.message) > 0
		}
	}
}

test_an_allow_has_no_reasons if not answer(calls(alone(ana), "get_ticket", {})).reasons
