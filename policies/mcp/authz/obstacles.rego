# What stands in the way whatever the grants say.
package mcp.authz

import data.mcp.authz.coverage

# METADATA
# title: Obstacles in the actor or the target, as reasons
obstacles contains {"code": "unknown_actor", "message": message} if {
	not known_actor
	message := "Nothing proves who is calling. Sign in, or configure an identity for this client."
}

obstacles contains {"code": "unknown_tool", "message": message} if {
	input.target.type == "tool"
	input.tool.known == false
	message := sprintf(
		"The server has not listed a tool %q, or has listed it twice. List the tools and use a name from there.",
		[input.target.name],
	)
}

obstacles contains {"code": "catalog_unavailable", "message": message} if {
	input.target.type == "tool"
	not is_boolean(object.get(input, ["tool", "known"], null))
	message := "The server's tools are not listed yet, so the tool cannot be told from an unknown one. Try again."
}

obstacles contains {"code": "tool_changed", "message": message} if {
	input.target.type == "tool"
	input.tool.pinned == false
	message := sprintf(
		"The description of %q is not the one that was approved. Review it, then pin the tools again.",
		[input.target.name],
	)
}

obstacles contains {"code": "arguments_invalid", "message": message} if {
	input.target.type == "tool"
	input.tool.arguments_valid == false
	message := sprintf("The arguments do not match the schema that %q declares. Correct them.", [input.target.name])
}

obstacles contains {"code": "resource_not_normal", "message": message} if {
	input.target.type == "resource"
	not normal_resource
	message := "The URI can be read in more than one way. Send it without dot segments and needless escapes."
}

obstacles contains {"code": "task_unknown", "message": message} if {
	about_task
	not input.task.known == true
	message := "No such task was started through this sidecar. Start the call again."
}

obstacles contains {"code": "task_not_owned", "message": message} if {
	about_task
	input.task.known == true
	not owned(input.task)
	message := "The task was started by somebody else. Use the identity that started it."
}

# METADATA
# title: Whether the actor is of a type that can hold grants
known_actor if input.actor.type in {"human", "service", "agent"}

# METADATA
# title: Whether a URI can be read in one way only
# description: |
#   Parsers drop control characters and spaces, and keep dot segments of opaque paths ("db:../x"). A host that leaves
#   a port or a user out would let a grant for one server cover another.
normal_resource if {
	input.resource.normal == true
	not regex.match(`[\x00-\x20\x7f]`, input.resource.uri)
	not coverage.has_dot_segment(input.resource.path)
	coverage.authority(input.resource.uri) == input.resource.host
}

# METADATA
# title: Whether the very chain that asks has started a task
owned(task) if {
	count(task.owner) > 0
	task.owner == [member.key | some member in input.actor.chain]
}
