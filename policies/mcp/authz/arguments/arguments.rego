# METADATA
# title: Argument constraints
# description: |
#   A constraint names the type of its argument, and whatever it says has to hold. Rego orders values of
#   different types (`null <= 100` is true), so each comparison checks the types of both sides first,
#   and a limit that is misspelt or belongs to another type fails the argument.
package mcp.authz.arguments

# METADATA
# title: The names of the arguments that a set of constraints does not let pass
failing(constraints, given) := {name |
	some name, constraint in constraints
	not _satisfied(constraint, given, name)
}

_satisfied(constraint, given, name) if fits(constraint, given[name])

_satisfied(constraint, given, name) if {
	constraint.optional == true
	not name in object.keys(given)
}

# METADATA
# title: Whether a value is of a constraint's type and within all its limits
fits(constraint, value) if {
	_is(constraint.type, value)
	every key, limit in constraint {
		_holds(key, limit, value)
	}
}

_holds(key, limit, value) if _scalar_holds(key, limit, value)

_holds("min_items", limit, value) if {
	is_array(value)
	is_number(limit)
	count(value) >= limit
}

_holds("max_items", limit, value) if {
	is_array(value)
	is_number(limit)
	count(value) <= limit
}

_holds("items", constraint, value) if {
	is_array(value)
	is_string(constraint.type)
	every item in value {
		every key, limit in constraint {
			_scalar_holds(key, limit, item)
		}
	}
}

_scalar_holds("type", type, value) if _is(type, value)

_scalar_holds("optional", flag, _) if is_boolean(flag)

_scalar_holds("enum", choices, value) if {
	is_array(choices)
	value in choices
}

_scalar_holds("min", limit, value) if {
	is_number(limit)
	is_number(value)
	value >= limit
}

_scalar_holds("max", limit, value) if {
	is_number(limit)
	is_number(value)
	value <= limit
}

_scalar_holds("min_length", limit, value) if {
	is_string(value)
	is_number(limit)
	count(value) >= limit
}

_scalar_holds("max_length", limit, value) if {
	is_string(value)
	is_number(limit)
	count(value) <= limit
}

# The whole value has to match: a pattern that only had to occur would let anything stand around it.
_scalar_holds("pattern", pattern, value) if {
	is_string(value)
	is_string(pattern)
	regex.is_valid(pattern)
	regex.match(sprintf(`\A(?:%s)\z`, [pattern]), value)
}

_is("string", value) if is_string(value)

_is("number", value) if is_number(value)

_is("integer", value) if {
	is_number(value)
	floor(value) == value
}

_is("boolean", value) if is_boolean(value)

_is("array", value) if is_array(value)

# METADATA
# title: A constraint in words, for the message of a denial
described(constraint) := concat(", ", [_limit_text(key, limit) |
	some key, limit in constraint
])

_limit_text(key, limit) := sprintf("%s %s", [replace(key, "_", " "), json.marshal(limit)])
