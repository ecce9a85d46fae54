package mcp.authz.coverage_test

import data.mcp.authz.coverage

ana := {"type": "human", "id": "ana", "issuer": "static", "key": "static|ana", "groups": []}

# Both ways to ask have to agree, whatever the pattern.
matches(pattern, text) if {
	grant := {"tools": [pattern]}
	listed := coverage.covered(ana, "tools", {text}) with data.mcp.grants as {"humans": {"principals": {"static|ana": {"g": grant}}}}
	called := coverage.covering({{"name": "g", "grant": grant}}, "tools", text)
	text in listed
	count(called) == 1
}

differs(pattern, text) if {
	grant := {"tools": [pattern]}
	listed := coverage.covered(ana, "tools", {text}) with data.mcp.grants as {"humans": {"principals": {"static|ana": {"g": grant}}}}
	called := coverage.covering({{"name": "g", "grant": grant}}, "tools", text)
	listed == set()
	called == set()
}

test_matches if {
	every pair in [
		["a", "a"], ["*", "a.b/c:d"], ["*", ""], ["get_*", "get_ticket"], ["get_*", "get_"], ["get_*", "get_a.b/c"],
		["*_ticket", "get_ticket"], ["a.*", "a.b.c"], ["a/*", "a/b/c"], ["get_?", "get_1"], ["[ab]c", "bc"],
		["[!a]c", "bc"], ["{get,put}_*", "put_x"], ["a,*", "a,b"], ["**", "x/y"], [`a\*`, "a*"], ["[ab]", "[ab]"],
		["file:///docs/*", "file:///docs/a b/c"],
	] {
		matches(pair[0], pair[1])
	}
}

test_differs if {
	every pair in [
		["a", "A"], ["a", "ab"], ["a", "a "], ["", "a"], ["get_*", "Get_x"], ["get_*", "forget_x"], ["get_?", "get_"],
		["get_?", "get_12"], ["*_ticket", "ticket"], ["[ab]c", "cc"], ["{get,put}_*", "del_x"], ["a,*", "b"],
		[`a\*`, "ab"], ["a.c", "abc"], ["^a$", "a"], ["a", ""], [1, "1"], [null, "null"], [["a"], "a"],
	] {
		differs(pair[0], pair[1])
	}
}

test_a_pattern_list_that_is_no_list_covers_nothing if {
	every value in ["get_ticket", "*", null, true, 1] {
		entries := {{"name": "g", "grant": {"tools": value}}}
		coverage.covering(entries, "tools", "get_ticket") == set()
	}
}

test_another_kind_is_not_covered if {
	coverage.covering({{"name": "g", "grant": {"tools": ["*"]}}}, "prompts", "a") == set()
}

test_many_names_at_once if {
	grants := {"humans": {"principals": {"static|ana": {"one": {"tools": ["a", "b_*"]}, "two": {"tools": ["*_z", "c"]}}}}}
	found := coverage.covered(ana, "tools", {"a", "b_1", "b_z", "c", "d", "y_z"}) with data.mcp.grants as grants
	found == {"a", "b_1", "b_z", "c", "y_z"}
}

test_listed_uri if {
	coverage.uri("file:///docs/a") == "file:///docs/a"
	coverage.uri("file:///docs/a%20b+c") == "file:///docs/a b+c"
	coverage.uri("db://x/t%C3%A4?q=%20#f") == "db://x/tä?q=%20#f"
	coverage.uri("db://x/a.b?path=../c") == "db://x/a.b?path=../c"
}

test_odd_uri_has_no_text if {
	every uri in [
		"file:///docs/../etc", "file:///docs/./a", "file:///docs/..", "db:../x", `file:///a\..\b`, "file:///%2e%2e/x",
		"file:///a%2Fb", "file:///a%252Fb", "file:///a%", "file:///a%zz", "file:///a%00",
	] {
		not coverage.uri(uri)
	}
}

test_uri_from_parts if {
	coverage.resource_uri(parts("FILE:///docs/%61", "file", "", "/docs/a")) == "file:///docs/a"
	coverage.resource_uri(parts("http://H:80/a?b#c", "http", "h:80", "/a")) == "http://h:80/a?b#c"
	coverage.resource_uri(parts("http://h", "http", "h", "")) == "http://h"
	coverage.resource_uri(parts("urn:x:y", "urn", "", "x:y")) == "urn:x:y"
	coverage.resource_uri(parts("note", "", "", "note")) == "note"
}

test_authority if {
	every pair in [
		["http://H:80/a?b", "h:80"], ["http://u@h", "u@h"], ["file:///a", ""], ["urn:x://y", ""], ["//h/x", "h"],
		["http://h?x//y", "h"], ["note", ""], ["http://[::1]:80/", "[::1]:80"],
	] {
		coverage.authority(pair[0]) == pair[1]
	}
}

test_uri_without_parts_is_undefined if not coverage.resource_uri({"uri": "file:///a", "normal": true})

parts(uri, scheme, host, path) := {"uri": uri, "scheme": scheme, "host": host, "path": path, "normal": true}
