package mcp.authz.arguments_test

import data.mcp.authz.arguments

test_fits if {
	every pair in [
		[{"type": "string"}, ""], [{"type": "string", "enum": ["a", "b"]}, "b"],
		[{"type": "string", "pattern": "[a-z]+"}, "abc"], [{"type": "string", "pattern": "a|b"}, "b"],
		[{"type": "string", "min_length": 1, "max_length": 3}, "äöü"],
		[{"type": "number", "max": 100}, 100], [{"type": "number", "min": 0}, 0.5],
		[{"type": "number", "enum": [1, 2]}, 2], [{"type": "integer", "min": 1, "max": 3}, 3],
		[{"type": "integer"}, -7], [{"type": "integer"}, 5.0],
		[{"type": "boolean"}, false], [{"type": "boolean", "enum": [true]}, true],
		[{"type": "array"}, []], [{"type": "array", "min_items": 1, "max_items": 2}, [1, "a"]],
		[{"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}, ["a", "b", "a"]],
		[{"type": "number", "max": 1, "optional": true}, 1], [{"type": "number", "optional": false}, 1],
	] {
		arguments.fits(pair[0], pair[1])
	}
}

samples := {
	"string": ["a", "1", "true"],
	"number": [1.5, -0.1],
	"integer": [1, 0],
	"boolean": [true, false],
	"array": [[], [1]],
	"null": [null],
	"object": [{}, {"type": "number"}],
}

# A whole number is a number; everything else is of one type only.
is_of(type, type) := true

is_of("number", "integer") := true

test_a_value_of_another_type_never_fits if {
	every type in ["string", "number", "integer", "boolean", "array"] {
		every other, values in samples {
			fitting := [value | some value in values; arguments.fits({"type": type}, value)]
			expected := [value | is_of(type, other); some value in values]
			fitting == expected
		}
	}
}

test_does_not_fit if {
	every pair in [
		[{"type": "number", "max": 100}, 100.01], [{"type": "number", "max": 100}, null],
		[{"type": "number", "max": 100}, true], [{"type": "number", "max": 100}, "1"],
		[{"type": "number", "min": 0}, -0.1], [{"type": "number", "min": 0}, [1]],
		[{"type": "number", "enum": [1, 2]}, 3], [{"type": "number", "enum": [1]}, true],
		[{"type": "boolean", "enum": [true]}, false], [{"type": "boolean", "enum": [true]}, 1],
		[{"type": "integer"}, 1.5], [{"type": "integer", "max": 3}, 4],
		[{"type": "string", "enum": ["a"]}, "A"], [{"type": "string", "pattern": "[a-z]+"}, "abc1"],
		[{"type": "string", "pattern": "a|b"}, "ab"], [{"type": "string", "pattern": "a"}, "a\n"],
		[{"type": "string", "max_length": 3}, "abcd"], [{"type": "string", "min_length": 1}, ""],
		[{"type": "array", "max_items": 1}, [1, 2]], [{"type": "array", "min_items": 1}, []],
		[{"type": "array", "items": {"type": "string"}}, ["a", 1]],
		[{"type": "array", "items": {"type": "array"}}, [{}]],
	] {
		not arguments.fits(pair[0], pair[1])
	}
}

test_what_is_not_understood_does_not_fit if {
	every pair in [
		[{"max": 100}, 1], [{}, 1], [null, 1], ["number", 1], [{"type": "float"}, 1.5], [{"type": ["number"]}, 1],
		[{"type": "number", "maximum": 100}, 1], [{"type": "number", "max": "100"}, 1], [{"type": "number", "max": null}, 1],
		[{"type": "number", "min": null}, 1], [{"type": "string", "max": 5}, "a"], [{"type": "number", "max_length": 5}, 1],
		[{"type": "number", "enum": 1}, 1], [{"type": "string", "pattern": "["}, "["], [{"type": "string", "pattern": 1}, "1"],
		[{"type": "string", "max_length": "3"}, "a"], [{"type": "string", "items": {"type": "string"}}, "a"],
		[{"type": "array", "items": {}}, [1]], [{"type": "array", "items": null}, []],
		[{"type": "number", "optional": "yes"}, 1],
	] {
		not arguments.fits(pair[0], pair[1])
	}
}

limits := {"amount": {"type": "number", "max": 100}, "note": {"type": "string", "optional": true}}

test_failing if {
	arguments.failing(limits, {"amount": 1}) == set()
	arguments.failing(limits, {"amount": 1, "note": "x", "other": null}) == set()
	arguments.failing(limits, {}) == {"amount"}
	arguments.failing(limits, {"amount": null, "note": null}) == {"amount", "note"}
	arguments.failing({"flag": {"type": "boolean"}}, {"flag": false}) == set()
}

test_described if {
	arguments.described({"type": "string", "max_length": 5}) == `max length 5, type "string"`
}
