# Why an action is denied: codes for programs, messages for people.
package mcp.authz

import data.mcp.authz.arguments
import data.mcp.authz.grants

# METADATA
# title: The reasons of a denial, the most telling first
reasons := [reason | some [_, reason] in sort(ranked)]

# METADATA
# title: Reasons with their rank
ranked contains [0, reason] if some reason in revoked

ranked contains [1, reason] if {
	some reason in custom_denials
	not reason.code == "revoked"
}

ranked contains [2, reason] if {
	some reason in obstacles
	reason.code == "unknown_actor"
}

ranked contains [3, reason] if {
	some reason in obstacles
	not reason.code == "unknown_actor"
}

ranked contains [4, reason] if {
	some role in ungranted
	some entry in missed(parties[role])
	some name in stopped_by(entry.grant)
	reason := {"code": "argument_not_allowed", "message": sprintf(
		"%s: the argument %q is not within grant %q (%s). Change it, or ask %s for a wider grant.",
		[
			title(role), name, entry.name,
			arguments.described(entry.grant.arguments[name]), contact(entry.grant),
		],
	)}
}

ranked contains [5, reason] if {
	some role in ungranted
	some entry in missed(parties[role])
	grants.malformed(entry.grant)
	reason := {"code": "grant_invalid", "message": sprintf(
		"%s: grant %q is not in force, it has a key that no grant has. Ask %s to correct it.",
		[title(role), entry.name, contact(entry.grant)],
	)}
}

ranked contains [6, reason] if {
	some role in ungranted
	some entry in missed(parties[role])
	grants.ended(entry.grant)
	reason := {"code": "grant_expired", "message": sprintf(
		"%s: grant %q has ended, or the time of its end cannot be read. Ask %s to renew it.",
		[title(role), entry.name, contact(entry.grant)],
	)}
}

ranked contains [7, reason] if {
	some role in ungranted
	count(missed(parties[role])) == 0
	reason := {"code": lacking[role], "message": sprintf(
		"%s: no grant covers %s %q. Ask the owner of this policy for one.",
		[title(role), object.get(input, ["target", "type"], "the target"), object.get(input, ["target", "name"], "")],
	)}
}

# METADATA
# title: The code for a party without any grant for the target
lacking := {"actor": "not_granted", "on_behalf_of": "not_granted_to_principal"}

# METADATA
# title: The parties that hold no grant that passes, where that matters
ungranted contains role if {
	known_actor
	not filtered
	not ungoverned
	not permitted
	count(revoked) == 0
	some role, party in parties
	count(passing(party)) == 0
}

# METADATA
# title: The grants of a party that would cover the target and do not pass
missed(party) := {entry | some entry in covering(grants.selected(party))}

# METADATA
# title: All grants that nearly let the action pass
near_misses contains entry if {
	some role in ungranted
	some entry in missed(parties[role])
}

# METADATA
# title: A party in words
title(role) := sprintf(form[role], [object.get(party, "type", "somebody"), object.get(party, "id", "")]) if {
	party := parties[role]
	form := {"actor": "%s %s", "on_behalf_of": "%s %s, who is acted for"}
}

# METADATA
# title: Whom to ask about a grant
contact(grant) := grant.owner if is_string(grant.owner)

contact(grant) := "the owner of this policy" if not is_string(object.get(grant, "owner", null))
