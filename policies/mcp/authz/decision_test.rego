package mcp.authz_test

import data.mcp.authz

# The actors and questions that all tests of this package use.
ana := {"type": "human", "id": "ana", "issuer": "static", "key": "static|ana", "groups": []}

bot := {"type": "agent", "id": "bot", "issuer": "static", "key": "static|bot", "groups": []}

nobody := {"type": "unknown", "id": "anonymous", "issuer": "none", "key": "none|anonymous", "groups": []}

alone(party) := object.union(party, {"chain": [party]})

bot_for_ana := object.union(bot, {"chain": [bot, ana], "on_behalf_of": ana})

asks(actor, type, name) := {
	"version": 1,
	"enforcer": {"version": "0", "obligations": []},
	"actor": actor,
	"mcp": {"method": "x", "kind": "request", "direction": "client_to_server", "transport": "http"},
	"target": {"type": type, "name": name},
	"server": {"name": "tickets"},
	"context": {"time": "2026-11-22T10:15:00Z"},
}

calls(actor, name, arguments) := object.union(
	asks(actor, "tool", name),
	{"tool": {"name": name, "arguments": arguments, "annotations": {}, "known": true}},
)

for_humans(grants) := {"humans": {"principals": {"ana": grants}}}

file := {
	"humans": {"principals": {"ana": {
		"read": {"tools": ["get_*"], "owner": "desk"},
		"refund": {"tools": ["refund"], "arguments": {"amount": {"type": "number", "max": 100}}, "owner": "finance"},
		"old": {"tools": ["archive"], "expires": "2020-01-01T00:00:00Z", "owner": "desk"},
		"misspelt": {"tools": ["purge"], "expire": "2099-01-01T00:00:00Z"},
		"others": {
			"prompts": ["greet"], "completions": ["greet"], "resources": ["file:///docs/*"], "sampling": ["*"],
			"elicitation": ["form"], "roots": ["*"], "methods": ["x/*"], "subscriptions": ["file:///docs/*"],
		},
	}}},
	"agents": {"principals": {"bot": {
		"bot-read": {"tools": ["get_ticket"]},
		"bot-delete": {"tools": ["delete"]},
		"bot-refund": {"tools": ["refund"], "arguments": {"amount": {"type": "number", "max": 50}}},
	}}},
}

# The library alone, with nothing of a policy that lies over it.
ask(question, world) := decision if {
	decision := authz.decision with input as question
		with data.mcp.default_issuer as "static"
		with data.mcp.grants as object.get(world, "grants", {})
		with data.mcp.custom.allow as object.get(world, "allow", set())
		with data.mcp.custom.deny as object.get(world, "deny", set())
		with data.mcp_revoked as object.get(world, "revoked", {})
}

answer(question) := decision if {
	decision := ask(question, {"grants": file})
}

allowed(question) if answer(question).allow

codes(question) := [reason.code | some reason in answer(question).reasons] if not allowed(question)

test_nothing_at_all_is_denied if {
	decision := ask({}, {})
	decision.allow == false
	decision.reasons[0].code == "unknown_actor"
}

test_no_data_at_all_is_denied if {
	decision := ask(calls(alone(ana), "get_ticket", {}), {})
	decision.allow == false
	decision.reasons[0].code == "not_granted"
}

test_a_grant_allows_and_says_who_answers_for_it if {
	answer(calls(alone(ana), "get_ticket", {})) == {"allow": true, "rule": "read", "owner": "desk"}
}

test_an_owner_is_not_needed if {
	answer(calls(alone(bot), "get_ticket", {})) == {"allow": true, "rule": "bot-read"}
}

test_no_grant if codes(calls(alone(ana), "delete", {})) == ["not_granted"]

test_an_agent_is_no_human_of_that_name if {
	codes(calls(alone(object.union(ana, {"type": "agent"})), "get_ticket", {})) == ["not_granted"]
}

test_argument_within_its_limit if allowed(calls(alone(ana), "refund", {"amount": 100}))

test_argument_beyond_its_limit if {
	every arguments in [{"amount": 101}, {"amount": null}, {"amount": true}, {"amount": "1"}, {}, {"Amount": 1}] {
		question := calls(alone(ana), "refund", arguments)
		codes(question) == ["argument_not_allowed"]
		contains(answer(question).reasons[0].message, `"amount"`)
		answer(question).rule == "refund"
		answer(question).owner == "finance"
	}
}

test_arguments_that_are_no_object_meet_no_constraint if {
	codes(calls(alone(ana), "refund", null)) == ["argument_not_allowed"]
	codes(calls(alone(ana), "refund", [{"amount": 1}])) == ["argument_not_allowed"]
}

test_ended_grant if {
	codes(calls(alone(ana), "archive", {})) == ["grant_expired"]
	answer(calls(alone(ana), "archive", {})).rule == "old"
}

test_misspelt_grant if codes(calls(alone(ana), "purge", {})) == ["grant_invalid"]

test_acting_for_somebody_needs_both if {
	allowed(calls(bot_for_ana, "get_ticket", {}))
	codes(calls(bot_for_ana, "delete", {})) == ["not_granted_to_principal"]
	codes(calls(bot_for_ana, "get_comment", {})) == ["not_granted"]
	codes(calls(bot_for_ana, "nothing", {})) == ["not_granted", "not_granted_to_principal"]
}

test_acting_for_somebody_is_held_to_both_limits if {
	allowed(calls(bot_for_ana, "refund", {"amount": 50}))
	codes(calls(bot_for_ana, "refund", {"amount": 51})) == ["argument_not_allowed"]
	codes(calls(bot_for_ana, "refund", {"amount": 101})) == ["argument_not_allowed", "argument_not_allowed"]
}

test_a_prior_actor_is_no_ground if {
	actor := object.union(nobody, {"type": "agent", "chain": [nobody, ana, bot], "on_behalf_of": bot})
	codes(calls(actor, "get_ticket", {})) == ["not_granted"]
	between := object.union(bot, {"chain": [bot, nobody, ana], "on_behalf_of": ana})
	allowed(calls(between, "get_ticket", {}))
}

test_acting_for_the_unknown_is_denied if {
	actor := object.union(bot, {"chain": [bot, nobody], "on_behalf_of": nobody})
	codes(calls(actor, "get_ticket", {})) == ["not_granted_to_principal"]
}

test_several_grants_are_one_allow_by_the_lowest_name if {
	decision := ask(calls(alone(ana), "a", {}), {"grants": for_humans({"z": {"tools": ["*"], "owner": "a"}, "b": {"tools": ["a"], "owner": "z"}, "c": {"tools": ["a"]}})})
	decision == {"allow": true, "rule": "b", "owner": "z"}
}

test_one_name_in_two_groups_is_no_conflict if {
	groups := {"g": {"same": {"tools": ["a"], "owner": "x"}}, "h": {"same": {"tools": ["a"], "owner": "y"}}}
	decision := ask(calls(alone(object.union(ana, {"groups": ["g", "h"]})), "a", {}), {"grants": {"humans": {"groups": groups}}})
	decision == {"allow": true, "rule": "same", "owner": "x"}
}

test_two_near_misses_name_no_rule if {
	limit := {"tools": ["a"], "arguments": {"n": {"type": "number"}}}
	decision := ask(calls(alone(ana), "a", {}), {"grants": for_humans({"x": limit, "y": limit})})
	decision.allow == false
	count(decision.reasons) == 2
	not decision.rule
}

test_another_grant_makes_up_for_a_limit if {
	grants := for_humans({"x": {"tools": ["a"], "arguments": {"n": {"type": "number"}}}, "y": {"tools": ["*"]}})
	decision := ask(calls(alone(ana), "a", {}), {"grants": grants})
	decision == {"allow": true, "rule": "y"}
}

test_other_targets_by_their_own_keys if {
	every pair in [
		["completion", "greet"], ["sampling", "-"], ["elicitation", "form"],
		["roots", "-"], ["method", "x/y"],
	] {
		answer(asks(alone(ana), pair[0], pair[1])) == {"allow": true, "rule": "others"}
	}
}

test_other_targets_not_granted if {
	every pair in [
		["completion", "part"], ["elicitation", "url"], ["method", "y/x"], ["prompt", "part"], ["sampling_", "-"],
	] {
		codes(asks(alone(ana), pair[0], pair[1])) == ["not_granted"]
	}
}

test_tool_grants_are_for_tools_only if {
	every type in ["prompt", "completion", "resource", "subscription", "sampling", "elicitation", "roots", "method"] {
		decision := ask(object.union(asks(alone(ana), type, "x"), {"resource": resource("x", true)}), {"grants": for_humans({"all": {"tools": ["*"]}})})
		decision.reasons[0].code == "not_granted"
	}
}

test_prompt_arguments_are_held_to_constraints if {
	grants := for_humans({"p": {"prompts": ["greet"], "arguments": {"name": {"type": "string"}}}})
	question := asks(alone(ana), "prompt", "greet")
	good := ask(object.union(question, {"prompt": {"name": "greet", "arguments": {"name": "x"}}}), {"grants": grants})
	good.allow
	bad := ask(object.union(question, {"prompt": {"name": "greet", "arguments": {}}}), {"grants": grants})
	bad.reasons[0].code == "argument_not_allowed"
}

test_a_constrained_grant_does_not_cover_what_has_no_arguments if {
	decision := ask(asks(alone(ana), "method", "x/y"), {"grants": for_humans({"m": {"methods": ["*"], "arguments": {"n": {"type": "number"}}}})})
	decision.reasons[0].code == "argument_not_allowed"
}

test_streams_are_for_those_with_a_live_grant if {
	allowed(asks(alone(ana), "stream", "open"))
	allowed(asks(alone(ana), "stream", "resume"))
	codes(asks(alone(ana), "stream", "replay")) == ["not_granted"]
	codes(asks(alone(object.union(ana, {"key": "static|eve", "id": "eve"})), "stream", "open")) == ["not_granted"]
	decision := ask(asks(alone(ana), "stream", "open"), {"grants": for_humans({"old": {"tools": ["a"], "expires": "2020-01-01T00:00:00Z"}})})
	decision.reasons[0].code == "grant_expired"
}

test_a_constrained_grant_is_enough_for_a_stream if {
	decision := ask(asks(alone(ana), "stream", "open"), {"grants": for_humans({"x": {"tools": ["a"], "arguments": {"n": {"type": "number"}}}})})
	decision.allow
}

test_closing_and_negotiation_are_for_everybody if {
	answer(asks(alone(nobody), "stream", "close")) == {"allow": true}
	answer(asks(alone(nobody), "negotiation", "initialize")) == {"allow": true}
}

test_subscriptions if {
	allowed(asks_subscription(alone(ana), "file:///docs/a", {}))
	allowed(asks_subscription(alone(ana), "file:///docs/a", {"kind": "resource"}))
	allowed(asks_subscription(alone(ana), "toolsListChanged", {}))
	allowed(asks_subscription(alone(ana), "anything", {"kind": "listing"}))
}

test_subscriptions_not_granted if {
	codes(asks_subscription(alone(ana), "file:///etc/a", {})) == ["not_granted"]
	codes(asks_subscription(alone(ana), "file:///docs/../etc/a", {})) == ["not_granted"]
	codes(asks_subscription(alone(ana), "task-1", {})) == ["not_granted"]
	codes(asks_subscription(alone(ana), "toolsListChanged", {"kind": "task"})) == ["task_unknown", "not_granted"]
	codes(asks_subscription(alone(nobody), "toolsListChanged", {})) == ["unknown_actor"]
	codes(asks(alone(ana), "subscription", "file:///docs/a")) == ["not_granted"]
}

asks_subscription(actor, name, more) := object.union(
	asks(actor, "subscription", name),
	{"subscription": object.union({"name": name}, more)},
)

test_revision_is_told if {
	decision := ask(calls(alone(ana), "get_x", {}), {"grants": file}) with data.mcp.revision as "r1"
	decision == {"allow": true, "rule": "read", "owner": "desk", "revision": "r1"}
}

canary := object.union(asks(alone(nobody), "listing", "tools"), {"canary": true, "listing": {"kind": "tools", "items": []}})

test_canary_is_answered_with_a_watermark if {
	decision := ask(canary, {})
	decision.allow
	decision.visible == set()
	count(decision.watermark) == 64
}

test_watermark_follows_the_revocations if {
	before := ask(canary, {}).watermark
	after := ask(canary, {"revoked": {"tokens": {"t": true}}}).watermark
	before != after
}

test_watermark_is_for_the_canary_only if {
	decision := ask(object.remove(canary, ["canary"]), {})
	not decision.watermark
}

test_an_ill_formed_pattern_of_somebody_else_hurts_nobody if {
	grants := object.union(file, {"humans": {"principals": {"eve": {"x": {
		"tools": ["[", "get_*"],
		"arguments": {"a": {"type": "string", "pattern": "["}},
		"expires": "x",
	}}}}})
	decision := ask(calls(alone(ana), "get_ticket", {}), {"grants": grants})
	decision.rule == "read"
}
