# What is shown of a listing: the items that a call would be allowed for, arguments aside.
package mcp.authz

import data.mcp.authz.coverage

# METADATA
# title: Whether the question is a listing to be filtered
filtered if {
	input.target.type == "listing"
	not lifted
}

# METADATA
# title: The names that are shown
# description: |
#   What grants and custom allows give, less what has changed or is denied; nothing of a listing that is not
#   understood, since a listing without `visible` is shown as a whole.
default visible := set()

visible := (((covered_names | allowed_names) - changed_names) | lifted_names) - denied_names

# METADATA
# title: The target type of what each kind of listing lists
listed_types := {
	"prompts": "prompt",
	"resource_templates": "resource",
	"resources": "resource",
	"tasks": "task",
	"tools": "tool",
}

# METADATA
# title: The type of the listed items
listed_type := listed_types[input.listing.kind]

# METADATA
# title: The names that the grants of all parties cover
covered_names := names & covered_by_all(names) if listed_type in {"prompt", "tool"}

covered_names := {name | some name, text in texts; text in by_text} if {
	listed_type in {"resource", "task"}
	by_text := covered_by_all({text | some text in texts})
}

# METADATA
# title: The listed names
names := {item.target.name | some item in input.listing.items}

# METADATA
# title: The text that a name is matched by, where that is not the name
texts[item.target.name] := coverage.uri(item.target.name) if {
	listed_type == "resource"
	some item in input.listing.items
}

texts[item.target.name] := item.task.tool if {
	listed_type == "task"
	some item in input.listing.items
	item.task.known == true
	owned(item.task)
}

# METADATA
# title: The texts that the grants of all parties cover
covered_by_all(wanted_texts) := intersection({coverage.covered(party, coverage.kinds[listed_type], wanted_texts) |
	some party in parties
})

# METADATA
# title: The names of tools that are not as they were pinned
changed_names := {item.target.name |
	some item in input.listing.items
	item.pinned == false
}

# METADATA
# title: Each listed item as the question that a call of it would be
# description: Custom rules judge these, so that they mean the same for a listing and for a call.
questions contains [item.target.name, question] if {
	some item in input.listing.items
	question := object.union(asked_alike, {
		"target": {"type": listed_type, "name": item.target.name},
		listed_type: listed_object(item),
	})
}

# METADATA
# title: What all those questions have in common
asked_alike := {
	"version": input.version,
	"enforcer": input.enforcer,
	"actor": input.actor,
	"mcp": object.union(input.mcp, {"method": called_by[listed_type]}),
	"server": input.server,
	"context": input.context,
}

# METADATA
# title: The method that uses an item of each type
called_by := {
	"prompt": "prompts/get",
	"resource": "resources/read",
	"task": "tasks/get",
	"tool": "tools/call",
}

# METADATA
# title: The object that stands beside the target
listed_object(item) := object.union(
	{"name": item.target.name, "arguments": {}, "annotations": {}, "known": true},
	object.filter(item, {"annotations", "digest", "pinned"}),
) if {
	listed_type == "tool"
}

listed_object(item) := {"name": item.target.name, "arguments": {}} if listed_type == "prompt"

listed_object(item) := {"uri": item.target.name, "normal": true} if listed_type == "resource"

listed_object(item) := object.union({"id": item.target.name}, object.get(item, "task", {})) if listed_type == "task"

# METADATA
# title: What custom rules say of each item
# description: |
#   Each item is an evaluation of its own, which is spared where there is no rule. A rule written with `contains`
#   is there for every question, if only as an empty set.
judged contains [verdict, name] if {
	customised
	some [name, question] in questions
	verdict := custom_verdict with input as question
}

# METADATA
# title: Whether there are custom rules
customised if data.mcp.custom.allow

customised if data.mcp.custom.deny

# METADATA
# title: What custom rules say of a question, the strongest first
custom_verdict := "denied" if {
	count(custom_denials) > 0
} else := "lifted" if {
	lifted
} else := "allowed" if {
	count(custom_allows) > 0
}

# METADATA
# title: The names that custom rules deny, lift and allow
# description: As for a call, an ordinary allow does not lift an unknown actor, an odd URI or a task of somebody else.
denied_names := {name | some ["denied", name] in judged}

lifted_names := {name | some ["lifted", name] in judged}

allowed_names := {name |
	known_actor
	some ["allowed", name] in judged
	in_order(name)
}

# METADATA
# title: Whether a call of an item would find no obstacle but a lack of grants
in_order(_) if listed_type in {"prompt", "tool"}

in_order(name) if texts[name]
