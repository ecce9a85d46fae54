package system.log_test

import data.system.log

record(asked) := {"decision_id": "1", "path": "mcp/authz/decision", "input": asked, "result": {"allow": true}}

test_arguments_are_erased if {
	paths := log.mask with input as record({"tool": {"arguments": {"password": "x"}}})
	{"/input/tool/arguments", "/input/prompt/arguments", "/input/method/params"} & paths == {
		"/input/tool/arguments", "/input/prompt/arguments", "/input/method/params",
	}
}

test_claims_are_erased_of_everybody_in_the_chain if {
	paths := log.mask with input as record({"actor": {"chain": [{"claims": {}}, {"claims": {}}]}})
	{path | some path in paths; endswith(path, "/claims")} == {
		"/input/actor/claims", "/input/actor/on_behalf_of/claims",
		"/input/actor/chain/0/claims", "/input/actor/chain/1/claims",
	}
}

test_token_ids_headers_and_answers_are_erased if {
	paths := log.mask with input as record({})
	every path in ["/input/actor/token/id", "/input/context/unverified", "/input/round/input_responses"] {
		path in paths
	}
}

test_who_and_what_is_kept if {
	paths := log.mask with input as record({"actor": {"chain": [{"claims": {}}]}})
	every path in ["/input/actor", "/input/actor/key", "/input/target", "/result", "/result/reasons"] {
		not path in paths
	}
}

test_the_canary_is_dropped if log.drop with input as record({"canary": true})

test_nothing_else_is_dropped if not log.drop with input as record({"tool": {"name": "x"}})
