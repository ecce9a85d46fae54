package system.authz_test

import data.system.authz

asked(method, path, parameters) := {"method": method, "path": path, "params": parameters}

decision := ["v1", "data", "mcp", "authz", "decision"]

permits(method, path, parameters) if authz.allow with input as asked(method, path, parameters)

test_the_decision if {
	permits("POST", decision, {})
	permits("POST", decision, {"strict-builtin-errors": ["true"], "provenance": ["true"]})
}

test_health_and_metrics if {
	permits("GET", ["health"], {})
	permits("GET", ["health"], {"plugins": [""], "bundles": [""]})
	permits("GET", ["metrics"], {})
}

test_parameters_that_show_more_are_refused if {
	every name in ["explain", "instrument", "metrics", "pretty", "partial", "input"] {
		not permits("POST", decision, {name: ["true"]})
		not permits("POST", decision, {name: ["true"], "provenance": ["true"]})
	}
}

test_other_methods_are_refused if {
	every method in ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "post", ""] {
		not permits(method, decision, {})
	}
	not permits("POST", ["health"], {})
	not permits("PUT", ["metrics"], {})
}

test_other_paths_are_refused if {
	every path in [
		[], [""], ["v1", "data"], ["v1", "data", "mcp"], ["v1", "data", "mcp", "authz"],
		["v1", "data", "mcp", "authz", "decision", ""], ["v1", "data", "mcp", "authz", "decision", "allow"],
		["v1/data/mcp/authz/decision"], ["v1", "data", "system", "authz", "allow"], ["v0", "data", "mcp", "authz", "decision"],
		["v1", "query"], ["v1", "compile"], ["v1", "policies"], ["v1", "config"], ["v1", "status"], ["health"],
	] {
		not permits("POST", path, {})
	}
	every path in [["health", "live"], ["health", ""], ["", "health"], ["v1", "policies"], ["v1", "config"], ["v1", "data"], ["debug", "pprof"]] {
		not permits("GET", path, {})
	}
	not permits("PUT", ["v1", "policies", "x"], {})
	not permits("DELETE", ["v1", "policies", "x"], {})
	not permits("PATCH", ["v1", "data"], {})
}

test_what_is_left_out_is_refused if {
	authz.allow == false with input as {}
	authz.allow == false with input as {"method": "POST", "path": decision}
	authz.allow == false with input as {"method": "GET", "path": ["health"], "params": null}
}
