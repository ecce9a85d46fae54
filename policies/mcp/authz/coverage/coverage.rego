# METADATA
# title: What grants cover
# description: |
#   One meaning of "covers" for listings and calls. A pattern is an exact name or a glob without
#   delimiters, so that `*` also crosses "." and "/".
package mcp.authz.coverage

import data.mcp.authz.grants

# METADATA
# title: The part of a grant that speaks of a target type
kinds := {
	"completion": "completions",
	"elicitation": "elicitation",
	"method": "methods",
	"prompt": "prompts",
	"resource": "resources",
	"roots": "roots",
	"sampling": "sampling",
	"subscription": "subscriptions",
	"task": "tools",
	"tool": "tools",
}

# METADATA
# title: The names among `texts` that a principal's live grants cover, arguments aside
# description: |
#   All patterns at once: names and prefixes are matched as whole sets, and only other globs one by one, so that
#   200 names against 200 grants stay within milliseconds.
covered(party, kind, texts) := (exact | prefixed) | globbed if {
	patterns := {pattern | some entry in grants.live(grants.selected(party)); some pattern in entry.grant[kind]}
	exact := texts & patterns
	rest := texts - exact
	globs := {pattern | some pattern in patterns; is_string(pattern); regex.match(_wildcard, pattern)}
	open_ended := {pattern | some pattern in globs; regex.match(_prefix, pattern)}
	prefixes := {trim_suffix(pattern, "*") | some pattern in open_ended}
	prefixed := {text | some text in rest; strings.any_prefix_match(text, prefixes)}
	globbed := {text |
		some text in (rest - prefixed)
		some pattern in (globs - open_ended)
		glob.match(pattern, null, text)
	}
}

# METADATA
# title: The entries among some that cover a name, arguments aside
# description: The same meaning as `covered`, by entry.
covering(entries, kind, text) := exact | globbed if {
	exact := {entry | some entry in entries; text in entry.grant[kind]}
	globbed := {entry |
		some entry in (entries - exact)
		some pattern in entry.grant[kind]
		is_string(pattern)
		regex.match(_wildcard, pattern)
		glob.match(pattern, null, text)
	}
}

_wildcard := `[*?\[\]{}\\]`

_prefix := `^[^*?\[\]{}\\]*\*$`

# METADATA
# title: A listed URI in the form that a read of it is judged in
# description: |
#   Undefined for what a read would find `resource_not_normal`. The query stays as it is: "a" does not cover "a?all=1".
uri(text) := text if {
	not contains(text, "%")
	not has_dot_segment(_before_query(text))
}

uri(text) := concat("", [decoded, substring(text, count(path), -1)]) if {
	contains(text, "%")
	path := _before_query(text)

	# What separates segments, or could be decoded twice, is never decoded here.
	regex.match(`^(?:[^%]|%[0-9A-Fa-f]{2})*$`, path)
	not regex.match(`(?i)%(?:2f|5c|2e|25|00)`, path)

	# In a path "+" is itself, in a form it is a space: the decoder is for forms.
	decoded := urlquery.decode(replace(path, "+", "%2B"))
	not has_dot_segment(decoded)
}

# METADATA
# title: The URI of a resource from its normalised parts, with the query of the original
resource_uri(resource) := concat("", [
	_scheme(resource), _authority(resource), resource.path,
	substring(resource.uri, count(_before_query(resource.uri)), -1),
])

# METADATA
# title: What stands between "//" and the path of a URI, in lower case; empty without "//"
authority(uri) := lower(regex.replace(uri, `(?s)^[^:/?#]*:?//([^/?#]*).*$`, "$1")) if _with_authority(uri)

authority(uri) := "" if not _with_authority(uri)

_with_authority(uri) if regex.match(`^[^:/?#]*:?//`, uri)

# METADATA
# title: Whether a path could lead out of the folder it is written in
has_dot_segment(path) if regex.match(`(?:^|[/\\:])\.\.?(?:[/\\]|$)`, path)

_scheme(resource) := "" if resource.scheme == ""

_scheme(resource) := concat("", [resource.scheme, ":"]) if resource.scheme != ""

_authority(resource) := concat("", ["//", resource.host]) if _hierarchical(resource)

_authority(resource) := "" if not _hierarchical(resource)

_hierarchical(resource) if resource.host != ""

_hierarchical(resource) if startswith(resource.path, "/")

_before_query(text) := split(split(text, "?")[0], "#")[0]
