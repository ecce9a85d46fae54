package mcp.authz_test

import data.mcp.authz

lists(actor, kind, items) := object.union(asks(actor, "listing", kind), {"listing": {"kind": kind, "items": items}})

tools_list(actor, names) := lists(actor, "tools", [{"target": {"type": "tool", "name": name}} | some name in names])

shown(asked) := answer(asked).visible

test_only_what_is_granted_is_shown if {
	shown(tools_list(alone(ana), ["delete", "get_b", "get_a", "refund", "archive", "purge"])) == {"get_a", "get_b", "refund"}
}

test_acting_for_somebody_shows_what_both_have if {
	shown(tools_list(bot_for_ana, ["get_ticket", "get_comment", "delete", "refund"])) == {"get_ticket", "refund"}
}

test_an_unknown_actor_is_shown_nothing if {
	answer(tools_list(alone(nobody), ["get_a"])) == {"allow": true, "visible": set()}
}

test_a_changed_tool_is_not_shown if {
	items := [
		{"target": {"type": "tool", "name": "get_a"}, "pinned": false},
		{"target": {"type": "tool", "name": "get_b"}, "pinned": true},
	]
	shown(lists(alone(ana), "tools", items)) == {"get_b"}
}

named(type, names) := [{"target": {"type": type, "name": name}} | some name in names]

test_other_kinds_by_their_own_keys if {
	shown(lists(alone(ana), "prompts", named("prompt", ["greet", "part"]))) == {"greet"}
	uris := ["file:///docs/a", "file:///docs/a%20b", "file:///docs/../etc", "file:///etc/a", "file:///docs/%2e%2e/etc"]
	shown(lists(alone(ana), "resources", named("resource", uris))) == {"file:///docs/a", "file:///docs/a%20b"}
	templates := ["file:///docs/{name}", "file:///{path}"]
	shown(lists(alone(ana), "resource_templates", named("resource", templates))) == {"file:///docs/{name}"}
}

test_own_tasks_are_shown if {
	items := [
		{"target": {"type": "task", "name": "mine"}, "task": task(["static|ana"])},
		{"target": {"type": "task", "name": "hers"}, "task": task(["static|eve"])},
		{"target": {"type": "task", "name": "gone"}, "task": {"id": "gone", "known": false}},
		{"target": {"type": "task", "name": "bare"}},
	]
	shown(lists(alone(ana), "tasks", items)) == {"mine"}
	shown(lists(alone(nobody), "tasks", items)) == set()
}

test_an_unknown_kind_shows_nothing if {
	shown(lists(alone(ana), "secrets", named("tool", ["get_a"]))) == set()
	shown(asks(alone(ana), "listing", "tools")) == set()
}

names := ["get_a", "get_b", "other", "odd"]

judged(allow, deny) := decision if {
	decision := ask(tools_list(alone(ana), names), {"grants": file, "allow": allow, "deny": deny})
}

test_any_leaves_a_listing_as_it_is if judged({{"rule": "r", "any": true}}, set()) == {"allow": true, "rule": "r"}

test_custom_deny_of_the_listing_hides_all if {
	decision := judged(set(), {{"code": "no", "message": "No."}})
	decision == {"allow": false, "reasons": [{"code": "no", "message": "No."}]}
}

test_an_ordinary_custom_allow_shows_what_it_would_allow if {
	judged({{"rule": "r"}}, set()) == {"allow": true, "visible": {"get_a", "get_b", "other", "odd"}}
}

test_an_ordinary_custom_allow_shows_nothing_that_a_call_would_find_in_the_way if {
	every asked in [
		tools_list(alone(nobody), ["get_a"]),
		lists(alone(ana), "tools", [{"target": {"type": "tool", "name": "a"}, "pinned": false}]),
		lists(alone(ana), "resources", named("resource", ["file:///docs/../etc"])),
		lists(alone(ana), "tasks", [{"target": {"type": "task", "name": "t"}, "task": task(["static|eve"])}]),
	] {
		decision := ask(asked, {"allow": {{"rule": "r"}}})
		decision == {"allow": true, "visible": set()}
	}
}

test_every_kind_is_judged_as_its_call if {
	every kind, type in authz.listed_types {
		items := [{"target": {"type": type, "name": "x"}, "task": task(["static|ana"])}]
		decision := ask(lists(alone(ana), kind, items), {"allow": {{"rule": "r"}}})
		decision.visible == {"x"}
	}
}
