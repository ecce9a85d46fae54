package mcp.authz.grants_test

import data.mcp.authz.grants

ana := {"type": "human", "id": "ana", "issuer": "static", "key": "static|ana", "groups": ["support"]}

file := {
	"humans": {
		"principals": {
			"ana": {"bare": {"tools": ["a"]}},
			"static|ana": {"full": {"tools": ["b"]}},
			"https://idp.example.com|ana": {"other": {"tools": ["c"]}},
		},
		"groups": {
			"support": {"shared": {"tools": ["d"]}},
			"https://idp.example.com|support": {"elsewhere": {"tools": ["e"]}},
		},
	},
	"agents": {"principals": {"ana": {"agent": {"tools": ["f"]}}}},
}

names(party) := found if {
	entries := grants.selected(party) with data.mcp.grants as file with data.mcp.default_issuer as "static"
	found := {entry.name | some entry in entries}
}

test_bare_and_full_names_of_the_default_issuer if names(ana) == {"bare", "full", "shared"}

test_another_issuer_is_another_principal if {
	party := object.union(ana, {"issuer": "https://idp.example.com", "key": "https://idp.example.com|ana"})
	names(party) == {"other", "elsewhere"}
}

test_third_issuer_has_nothing if {
	party := object.union(ana, {"issuer": "https://evil.example.com", "key": "https://evil.example.com|ana"})
	names(party) == set()
}

test_default_issuer_is_data if {
	party := object.union(ana, {"issuer": "https://idp.example.com", "key": "https://idp.example.com|ana"})
	entries := grants.selected(party) with data.mcp.grants as file with data.mcp.default_issuer as "https://idp.example.com"
	{entry.name | some entry in entries} == {"bare", "other", "shared", "elsewhere"}
}

test_another_type_is_another_section if {
	names(object.union(ana, {"type": "agent"})) == {"agent"}
	names(object.union(ana, {"type": "service"})) == set()
}

test_unknown_type_has_no_section if not names(object.union(ana, {"type": "unknown"}))

test_id_that_reads_like_a_key_is_nobody_else if {
	id := "https://idp.example.com|ana"
	names({"type": "human", "id": id, "issuer": "static", "key": concat("|", ["static", id]), "groups": []}) == set()
}

test_group_that_reads_like_a_key_is_no_other_group if {
	names({
		"type": "human", "id": "x", "issuer": "static", "key": "static|x",
		"groups": ["https://idp.example.com|support"],
	}) == set()
}

test_issuer_with_a_bar_is_refused if {
	not names({"type": "human", "id": "ana", "issuer": "static|", "key": "static||ana", "groups": []})
}

test_no_file_no_grants if grants.selected(ana) == set() with data.mcp.grants as {}

test_a_grant_that_is_no_object_is_none if {
	found := grants.selected(ana) with data.mcp.grants as {"humans": {"principals": {"ana": {"x": null, "y": "all"}}}}
	found == set()
}

live(grant, time) if {
	entries := grants.live(grants.selected(ana)) with data.mcp.grants as {"humans": {"principals": {"ana": {"x": grant}}}}
		with data.mcp.default_issuer as "static"
		with input.context.time as time
	count(entries) == 1
}

now := "2026-11-22T10:15:00Z"

test_no_end_is_live if live({"tools": ["a"]}, now)

test_future_end_is_live if {
	every end in [
		"2026-11-22T10:15:01Z", "2026-11-22T11:15:01+01:00", "2028-02-29T00:00:00Z", "9999-12-31T23:59:59Z",
		"2026-11-22T10:15:00.5Z",
	] {
		live({"tools": ["a"], "expires": end}, now)
	}
}

test_past_end_is_not_live if {
	every end in ["2026-11-22T10:15:00Z", "2026-11-22T11:14:59+01:00", "2020-01-01T00:00:00Z"] {
		not live({"tools": ["a"], "expires": end}, now)
	}
}

test_unreadable_end_is_not_live if {
	every end in [
		"tomorrow", "", "2027-02-29T00:00:00Z", "2027-02-30T00:00:00Z", "2027-13-01T00:00:00Z", "2027-01-01",
		"2027-01-01T25:00:00Z", "0001-01-01T00:00:00Z", null, false, 4102444800, ["2027-01-01T00:00:00Z"],
	] {
		not live({"tools": ["a"], "expires": end}, now)
	}
}

test_no_readable_time_of_the_question_ends_what_can_end if {
	not live({"tools": ["a"], "expires": "2027-01-01T00:00:00Z"}, "now")
	live({"tools": ["a"]}, "now")
}

test_a_misspelt_key_is_not_live if {
	not live({"tools": ["a"], "argument": {}}, now)
	not live({"tools": ["a"], "arguments": null}, now)
	not live({"tools": ["a"], "arguments": ["amount"]}, now)
}

test_malformed if {
	grants.malformed({"tool": ["a"]})
	grants.malformed({"arguments": null})
	not grants.malformed({"tools": ["a"], "arguments": {}})
}
