# METADATA
# title: What may be asked of a pod's OPA
# description: |
#   With `--authorization=basic` OPA asks this about each request of its API, on the diagnostic listener as well. One
#   rule with a value for everything, and no helper: whatever else is loaded can not add to it. A second `allow` with
#   another value is a conflict, which OPA answers like a no.
# schemas:
#   - input: {type: object}
package system.authz

allow := count(permitted) == 1 if {
	permitted := [path |
		some [method, path, parameters] in [
			["POST", ["v1", "data", "mcp", "authz", "decision"], {"strict-builtin-errors", "provenance"}],
			["GET", ["health"], {"bundles", "plugins"}],
			["GET", ["metrics"], set()],
		]
		input.method == method
		input.path == path
		object.keys(input.params) - parameters == set()
	]
}
