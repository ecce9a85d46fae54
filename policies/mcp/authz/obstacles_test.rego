package mcp.authz_test

with_tool(patch) := object.union(calls(alone(ana), "get_ticket", {}), {"tool": patch})

test_unknown_actor if {
	codes(calls(alone(nobody), "get_ticket", {})) == ["unknown_actor"]
	codes(object.remove(calls(alone(ana), "get_ticket", {}), ["actor"])) == ["unknown_actor"]
	codes(calls(alone(object.union(ana, {"type": "admin"})), "get_ticket", {})) == ["unknown_actor"]
}

test_unknown_tool if codes(with_tool({"known": false})) == ["unknown_tool"]

test_unknown_tool_comes_before_the_lack_of_a_grant if {
	question := object.union(calls(alone(ana), "hidden", {}), {"tool": {"known": false}})
	codes(question) == ["unknown_tool", "not_granted"]
}

test_catalog_unavailable if {
	question := calls(alone(ana), "get_ticket", {})
	codes(object.union(object.remove(question, ["tool"]), {"tool": object.remove(question.tool, ["known"])})) == ["catalog_unavailable"]
	codes(with_tool({"known": null})) == ["catalog_unavailable"]
	codes(with_tool({"known": "true"})) == ["catalog_unavailable"]
	codes(object.remove(question, ["tool"])) == ["catalog_unavailable"]
}

test_changed_tool if {
	codes(with_tool({"pinned": false})) == ["tool_changed"]
	allowed(with_tool({"pinned": true}))
}

test_invalid_arguments if {
	codes(with_tool({"arguments_valid": false})) == ["arguments_invalid"]
	allowed(with_tool({"arguments_valid": true}))
}

resource(uri, normal) := {"uri": uri, "scheme": "file", "host": "", "path": trim_prefix(uri, "file://"), "normal": normal}

reads(uri, parts) := object.union(asks(alone(ana), "resource", uri), {"resource": parts})

test_resource if {
	allowed(reads("file:///docs/a", resource("file:///docs/a", true)))
	codes(reads("file:///etc/a", resource("file:///etc/a", true))) == ["not_granted"]
}

test_the_parts_count_and_not_the_name if {
	codes(reads("file:///docs/../etc/a", resource("file:///etc/a", true))) == ["not_granted"]
}

test_resource_that_is_not_normal if {
	every parts in [
		resource("file:///docs/a", false), object.remove(resource("file:///docs/a", true), ["normal"]),
		object.union(resource("file:///docs/a", true), {"uri": "file:///do\ncs/a"}),
		object.union(resource("file:///docs/a", true), {"uri": "file:///docs/a b"}),
		object.union(resource("file:///docs/a", true), {"path": "/docs/../docs/a"}),
		object.union(resource("file:///docs/a", true), {"uri": "file://other:80/docs/a"}),
		object.union(resource("file:///docs/a", true), {"uri": "file://user@/docs/a"}),
		object.remove(resource("file:///docs/a", true), ["host"]),
	] {
		codes(reads("file:///docs/a", parts))[0] == "resource_not_normal"
	}
	codes(asks(alone(ana), "resource", "file:///docs/a")) == ["resource_not_normal", "not_granted"]
}

task(owner) := {"id": "t1", "known": true, "tool": "get_ticket", "owner": owner}

asks_task(actor, facts) := object.union(asks(actor, "task", "t1"), {"task": facts})

test_own_task if {
	allowed(asks_task(alone(ana), task(["static|ana"])))
	allowed(asks_task(bot_for_ana, task(["static|bot", "static|ana"])))
}

test_task_of_somebody_else if {
	every owner in [["static|eve"], ["static|bot", "static|ana"], ["static|ana", "static|ana"], [], "static|ana", null] {
		codes(asks_task(alone(ana), task(owner))) == ["task_not_owned"]
	}
	codes(asks_task(bot_for_ana, task(["static|ana", "static|bot"]))) == ["task_not_owned"]
}

test_unknown_task if {
	codes(asks_task(alone(ana), {"id": "t1", "known": false})) == ["task_unknown", "not_granted"]
	codes(asks(alone(ana), "task", "t1")) == ["task_unknown", "not_granted"]
}

test_task_of_a_tool_that_is_no_longer_granted if {
	codes(asks_task(alone(ana), object.union(task(["static|ana"]), {"tool": "delete"}))) == ["not_granted"]
}

test_task_of_nobody if codes(asks_task(nobody, task([]))) == ["unknown_actor", "task_not_owned"]

test_a_call_with_arguments_was_judged_when_it_was_made if {
	allowed(asks_task(alone(ana), object.union(task(["static|ana"]), {"tool": "refund"})))
}

test_subscription_to_a_task if {
	question := asks_subscription(alone(ana), "t1", {"kind": "task"})
	allowed(object.union(question, {"task": task(["static|ana"])}))
	codes(object.union(question, {"task": task(["static|eve"])})) == ["task_not_owned"]
}

test_any_lifts_every_obstacle if {
	every question in [
		calls(alone(nobody), "x", {}), with_tool({"known": false}), with_tool({"pinned": false}),
		reads("file:///docs/a", resource("file:///docs/a", false)), asks_task(alone(ana), task([])),
	] {
		decision := ask(question, {"allow": {{"rule": "r", "any": true}}})
		decision == {"allow": true, "rule": "r"}
	}
}

test_an_ordinary_custom_allow_lifts_none if {
	every question in [
		calls(alone(nobody), "x", {}), with_tool({"known": false}), with_tool({"pinned": false}),
		reads("file:///docs/a", resource("file:///docs/a", false)), asks_task(alone(ana), task([])),
	] {
		every allow in [{"rule": "r"}, {"rule": "r", "any": false}, {"rule": "r", "any": "true"}] {
			decision := ask(question, {"allow": {allow}})
			not decision.allow
			count(decision.reasons) == 1
		}
	}
}
