# METADATA
# title: The decision
# description: |
#   The library owns `decision` and composes it from grants (data), revocations (data) and the user's own
#   rules in package `mcp.custom`. Whatever is missing, the answer is a whole document, and deny is its default.
#   The sidecar asks with strict builtin errors: an evaluation error is a deny.
package mcp.authz

import data.mcp.authz.arguments
import data.mcp.authz.coverage
import data.mcp.authz.grants

# METADATA
# title: The answer to the sidecar, decision document version 1
# entrypoint: true
decision := document

# METADATA
# title: The keys of the decision document, one rule each
document["allow"] := allowed

document["reasons"] := reasons if not allowed

document["visible"] := visible if {
	allowed
	filtered
}

document["rule"] := deciding.rule

document["owner"] := deciding.owner

document["revision"] := data.mcp.revision if is_string(data.mcp.revision)

document["watermark"] := watermark if input.canary == true

document["mode"] := data.mcp.custom.mode

document["attributes"] := data.mcp.custom.attributes

document["obligations"] := [obligation | some obligation in members(data.mcp.custom.obligations)] if {
	allowed
	data.mcp.custom.obligations
}

# METADATA
# title: Whether the action may happen
default allowed := false

# Negotiation never depends on policy, and closing a stream gives nothing away.
allowed if {
	ungoverned
	count(revoked) == 0
}

allowed if {
	not refused
	lifted
}

# A listing is filtered, not refused.
allowed if {
	not refused
	filtered
}

allowed if {
	not refused
	count(obstacles) == 0
	permitted
}

# METADATA
# title: Whether only a revocation may refuse the action
ungoverned if input.target.type == "negotiation"

ungoverned if {
	input.target.type == "stream"
	input.target.name == "close"
}

# METADATA
# title: Whether somebody said no, which nothing outweighs
refused if count(revoked) > 0

refused if count(custom_denials) > 0

# METADATA
# title: Whether somebody said yes
permitted if granted

permitted if count(custom_allows) > 0

# METADATA
# title: Whether the grants of all parties let the action pass
granted if {
	count(parties) > 0
	every party in parties {
		count(passing(party)) > 0
	}
}

# METADATA
# title: The principals whose grants have to agree
# description: |
#   The actor, and the one it acts for. Prior actors of the chain are no ground for access (RFC 8693 section 4.1).
parties["actor"] := input.actor

parties["on_behalf_of"] := input.actor.on_behalf_of

# METADATA
# title: What is asked for, in terms of grants
default wanted := {"kind": "none", "text": ""}

wanted := {"kind": coverage.kinds[input.target.type], "text": input.target.name} if {
	not input.target.type in {"resource", "subscription", "task"}
}

# The parts are normalised, the name is as the caller wrote it.
wanted := {"kind": "resources", "text": coverage.resource_uri(input.resource)} if {
	input.target.type == "resource"
}

wanted := {"kind": "subscriptions", "text": coverage.uri(input.target.name)} if subscribed == "resource"

# A task is the continuation of a call whose arguments were judged when it was made.
wanted := {"kind": "tools", "text": input.task.tool} if about_task

# METADATA
# title: What kind of thing a subscription is to
# description: |
#   `subscription.kind` says it. Without it the name decides: the list kinds are fixed words, and a URI has a
#   scheme. A task is never guessed, since whoever guesses wrong shows its results to a stranger.
subscribed := object.get(input.subscription, "kind", _guessed_kind) if input.target.type == "subscription"

default _guessed_kind := "unknown"

_guessed_kind := "listing" if {
	input.target.name in {"toolsListChanged", "promptsListChanged", "resourcesListChanged", "-"}
}

_guessed_kind := "resource" if contains(input.target.name, ":")

# METADATA
# title: Whether any live grant will do
# description: |
#   A stream and the "list changed" notices carry nothing that is not judged by itself, and every
#   ordinary client opens them: who may do anything at all may listen.
any_grant_will_do if {
	input.target.type == "stream"
	input.target.name in {"open", "resume"}
}

any_grant_will_do if subscribed == "listing"

# METADATA
# title: Whether the target is a task, or the notices of one
about_task if input.target.type == "task"

about_task if subscribed == "task"

# METADATA
# title: The arguments that constraints are held against
# description: Only tools and prompts have any; elsewhere a constrained grant does not pass, since its arguments are missing.
default given := {}

given := input.tool.arguments if {
	input.target.type == "tool"
	is_object(input.tool.arguments)
}

given := input.prompt.arguments if {
	input.target.type == "prompt"
	is_object(input.prompt.arguments)
}

# METADATA
# title: The entries among some that cover the target, arguments aside
covering(entries) := entries if any_grant_will_do

covering(entries) := coverage.covering(entries, wanted.kind, wanted.text) if not any_grant_will_do

# METADATA
# title: The names of the arguments that keep a grant from passing
stopped_by(grant) := arguments.failing(grant.arguments, given) if judges_arguments

# METADATA
# title: Whether the action is one whose arguments count
judges_arguments if {
	not about_task
	not any_grant_will_do
}

# METADATA
# title: The live grants of a principal that let the action pass
# description: Covering comes first, since only what covers has to be looked at closely.
passing(party) := {entry |
	some entry in grants.live(covering(grants.selected(party)))
	not is_stopped(entry.grant)
}

# METADATA
# title: Whether an argument keeps a grant from passing
is_stopped(grant) if count(stopped_by(grant)) > 0

# METADATA
# title: What decided, the lowest name of all
# description: Several grants that match are one allow. Members of a set never conflict, as two complete rules would.
deciding := sort(deciders)[0][1]

# METADATA
# title: All that decided, by name
deciders contains [entry.name, signature(entry.name, entry.grant)] if {
	allowed
	granted
	some entry in passing(input.actor)
}

deciders contains [rule.rule, signature(rule.rule, rule)] if {
	allowed
	not filtered
	not ungoverned
	some rule in custom_allows
}

deciders contains [denial.rule, signature(denial.rule, denial)] if {
	not allowed
	some denial in members(data.mcp.custom.deny)
	is_object(denial)
	is_string(denial.rule)
}

# A grant that nearly let the action pass, when it is the only one, is the one to talk about.
deciders contains [entry.name, signature(entry.name, entry.grant)] if {
	not allowed
	count(custom_denials) == 0
	count(near_misses) == 1
	some entry in near_misses
}

# METADATA
# title: A rule's name, and its owner when it has one
signature(name, source) := {"rule": name, "owner": source.owner} if is_string(source.owner)

signature(name, source) := {"rule": name} if not is_string(object.get(source, "owner", null))

# METADATA
# title: A hash of the revocation data, read for the readiness question only
watermark := crypto.sha256(json.marshal(revocations))

# METADATA
# title: The revocation data, empty where there is none
default revocations := {}

revocations := data.mcp_revoked
