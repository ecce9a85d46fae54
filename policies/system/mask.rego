# METADATA
# title: What OPA's decision log does not say
# description: |
#   Arguments, claims, token ids, headers, what servers and clients ask one another. OPA asks about each
#   record before it is written; the record is the input, and `erased` in it lists what is gone.
# schemas:
#   - input: {type: object}
package system.log

# Nobody acts: the sidecar asks whether OPA decides.
drop if input.input.canary

mask contains path if some path in always

mask contains path if {
	some number, _ in input.input.actor.chain
	path := sprintf("/input/actor/chain/%d/claims", [number])
}

always := {
	"/input/actor/claims",
	"/input/actor/on_behalf_of/claims",
	"/input/actor/token/id",
	"/input/tool/arguments",
	"/input/prompt/arguments",
	"/input/completion/argument",
	"/input/completion/context",
	"/input/method/params",
	"/input/elicitation/url",
	"/input/round/input_responses",
	"/input/context/unverified",
	"/result/obligations",
	"/nd_builtin_cache",
}
