# METADATA
# title: The grants of one principal
# description: |
#   Selects a principal's own grants by lookup, so that a decision costs what the principal holds and
#   not what the file holds. Every reference into `data.mcp.grants` ends in a bound key for that
#   reason: a rule that named the whole document would load it for each question.
package mcp.authz.grants

# METADATA
# title: The section of the data file for each actor type; `unknown` has none
sections := {"human": "humans", "service": "services", "agent": "agents"}

# METADATA
# title: What a grant may say
# description: A grant with any other key is not in force, since a misspelt `arguments` would lift every constraint.
keys := {
	"arguments", "completions", "elicitation", "expires", "methods", "owner", "prompts",
	"resources", "roots", "sampling", "subscriptions", "tools",
}

# METADATA
# title: The issuer that a bare id or group in the data file means
default default_issuer := "static"

default_issuer := data.mcp.default_issuer

# METADATA
# title: All grants written for a principal or one of its groups
# description: A set of entries and not an object, since two groups may use one name for two grants.
selected(party) := own | shared if {
	section := sections[party.type]

	# The first "|" of a key ends the issuer, so an issuer with one could pass for another.
	not contains(party.issuer, "|")

	own := {{"name": name, "grant": grant} |
		some key in ({party.key} | bare(party.issuer, party.id))
		some name, grant in data.mcp.grants[section].principals[key]
		is_object(grant)
	}
	shared := {{"name": name, "grant": grant} |
		some group in party.groups
		some key in ({concat("|", [party.issuer, group])} | bare(party.issuer, group))
		some name, grant in data.mcp.grants[section].groups[key]
		is_object(grant)
	}
}

# METADATA
# title: The bare spelling of an id or group, for the default issuer only
# description: An id with "|" has none, else it could be chosen to read like a full key of another issuer.
bare(issuer, id) := {id |
	issuer == default_issuer
	not contains(id, "|")
}

# METADATA
# title: The entries among some that are in force
live(entries) := intact_entries - ended_entries if {
	intact_entries := {entry |
		some entry in entries
		object.remove(entry.grant, keys) == {}
		is_object(object.get(entry.grant, "arguments", {}))
	}
	ended_entries := {entry |
		some entry in intact_entries
		_ := entry.grant.expires
		ended(entry.grant)
	}
}

# METADATA
# title: Whether a grant has a part that is not understood
malformed(grant) if object.remove(grant, keys) != {}

malformed(grant) if not is_object(object.get(grant, "arguments", {}))

# METADATA
# title: Whether a grant has an end that is over, or that cannot be read
ended(grant) if {
	_ := grant.expires
	not _ahead(grant.expires)
}

# A rule of its own: a call inside `not` is made before it, and one that is undefined would undo the `not`.
_ahead(text) if now < instant(text)

# METADATA
# title: The time of the question
now := instant(input.context.time)

# RFC 3339 down to the days of each month: parsing anything less exact raises an evaluation error,
# and an error would take the actor's other grants with it.
_rfc3339 := concat("", [
	`^(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))`,
	`|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)`,
	`T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)$`,
])

# METADATA
# title: A time in nanoseconds; undefined for what is not one
# description: Nanoseconds end in the year 2262, so a later year is the last of them ("never").
instant(text) := time.parse_rfc3339_ns(text) if {
	_readable(text)
	text >= "1700"
	text < "2200"
}

instant(text) := 9223372036854775807 if {
	_readable(text)
	text >= "2200"
}

_readable(text) if {
	is_string(text)
	regex.match(_rfc3339, text)
}
