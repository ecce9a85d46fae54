# The user's own rules, read from package `mcp.custom`, which need not exist.
package mcp.authz

# METADATA
# title: The members of what a custom rule gives, none for a value that is not a collection
# description: |
#   The parameter also hides the type of the user's rule, which the compiler would hold against this code: whatever
#   shape a rule has, it has to compile and to be judged.
members(value) := {member | some member in value}

# METADATA
# title: The custom allows that hold
# description: An allow without a name is called `custom`; anything that is not an object allows nothing.
custom_allows := {object.union({"rule": "custom"}, allow) |
	some allow in members(data.mcp.custom.allow)
	is_object(allow)
	is_string(object.get(allow, "rule", ""))
}

# METADATA
# title: The custom denials that hold, as reasons
# description: Whatever a deny rule contains denies, in whatever shape, and so does a plain `deny if …`.
custom_denials contains as_reason(denial) if some denial in members(data.mcp.custom.deny)

custom_denials contains as_reason({}) if plain(data.mcp.custom.deny)

# METADATA
# title: Whether a value is no collection, and not false
plain(value) if {
	value
	not type_name(value) in {"array", "object", "set"}
}

# METADATA
# title: A denial brought into the shape of a reason
as_reason(denial) := object.union(
	{"code": "custom_denied", "message": "A rule of this policy denies it."},
	{key: value |
		is_object(denial)
		some key, form in {"code": `^[a-z][a-z0-9_]*$`, "message": ``, "scope": ``}
		value := denial[key]
		is_string(value)
		regex.match(form, value)
	},
)

# METADATA
# title: Whether a custom allow asks for everything
# description: |
#   `"any": true` lifts what an ordinary allow does not: unknown tools and actors, changed tools, resources that
#   are not normal, tasks of others. It is for trying the sidecar out. Denials and revocations outweigh it too.
lifted if {
	some allow in custom_allows
	allow.any == true
}
