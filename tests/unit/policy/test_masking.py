"""What may be written down of arguments and results: bounded, and without their secrets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sidecar.policy.masking import MASKED, MAX_BYTES, Masking, holds_token, looks_secret, text

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbmEifQ.c2lnbmF0dXJl"
NAME, TAG = "<string 3>", "<string 1>"
NOTHING = Masking()
ALL = Masking(shown=("arguments",))


def masked(value: Any, *shown: str, secrets: tuple[str, ...] = ()) -> Any:
    return Masking(shown, secrets).mask("arguments", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hunter2", "<string 7>"),
        (4711, "<number>"),
        (1.5, "<number>"),
        (True, True),
        (None, None),
        ([], []),
        ({"id": 4711, "who": {"name": "Ana"}}, {"id": "<number>", "who": {"name": "<string 3>"}}),
        (["a", ["bc"]], ["<string 1>", ["<string 2>"]]),
        ({"password": "hunter2"}, {"password": MASKED}),
        ({"Authorization": ["Bearer", {"x": 1}]}, {"Authorization": MASKED}),
        ({"no word\n": 1}, {"<key 8>": "<number>"}),
        ({JWT: 1}, {f"<key {len(JWT)}>": "<number>"}),
    ],
)
def test_values_are_masked_unless_they_are_named(value: Any, expected: Any) -> None:
    assert masked(value) == expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (("arguments.id",), (7, NAME, TAG)),
        (("arguments.who.name",), ("<number>", "Ana", TAG)),
        (("arguments.who",), ("<number>", "Ana", "x")),
        (("arguments.who.tags",), ("<number>", NAME, "x")),
        (("arguments.*.name",), ("<number>", "Ana", TAG)),
        (("arguments",), (7, "Ana", "x")),
        (("result", "who", "id"), ("<number>", NAME, TAG)),
    ],
)
def test_a_path_shows_what_it_names_and_what_is_below(
    shown: tuple[str, ...], expected: tuple[Any, ...]
) -> None:
    number, name, tag = expected
    found = masked({"id": 7, "who": {"name": "Ana", "tags": ["x"]}}, *shown)
    assert found == {"id": number, "who": {"name": name, "tags": [tag]}}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (("arguments",), MASKED),
        (("arguments.*",), MASKED),
        (("arguments.max_tokens.deeper",), MASKED),
        (("arguments.max_tokens",), 100),
    ],
)
def test_a_secrets_name_is_shown_only_when_the_path_ends_in_it(
    shown: tuple[str, ...], expected: Any
) -> None:
    assert masked({"max_tokens": 100}, *shown) == {"max_tokens": expected}


@pytest.mark.parametrize(
    "name",
    ["password", "PASSWORD", "userPassword", "db_pass_word", "access-token", "X-Api-Key", "apiKey",
     "Set-Cookie", "sessionId", "client_secret", "cardPin", "card_pin", "PIN", "aws_access_key",
     "Proxy-Authorization", "basicAuth", "credentials", "privateKey", "otp", "cvv2Cvv"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name", ["id", "shipping", "author", "compass", "opinion", "key", "name", ""]
)
def test_names_of_others(name: str) -> None:
    assert not looks_secret(name)


def test_names_can_be_added() -> None:
    assert masked({"badge_no": "77"}, "arguments") == {"badge_no": "77"}
    assert masked({"badge_no": "77"}, "arguments", secrets=("badgeno",)) == {"badge_no": MASKED}


@pytest.mark.parametrize(
    "secret",
    [
        JWT,
        f"see {JWT} there",
        "Bearer abcdef123",
        "authorization: Basic YW5hOmh1bnRlcjI=",
        "postgres://ana:hunter2@db/tickets",
        '{"password": "hunter2"}',
        '{\\"api_key\\":\\"hunter2\\"}',
        "password=hunter2",
        "the pin: 1234",
        "-----BEGIN PRIVATE KEY-----\nMIIE",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_abcdefghij0123456789",
        "sk-abcdefghijklmnop",
        "0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_looks_like_a_token_is_masked_wherever_it_is(secret: str) -> None:
    assert holds_token(secret)
    for shown in ("arguments", "arguments.note"):
        assert masked({"note": secret}, shown) == {"note": f"<string {len(secret)}>"}


@pytest.mark.parametrize(
    "plain",
    ["", "Ana", "ticket 4711 is closed", "https://desk.example/t/4711?x=1", "a: b", "shipping: 3",
     "019ab3c2-7a3b-7c11-9f52-0123456789ab"],
)  # fmt: skip
def test_ordinary_texts_can_be_shown(plain: str) -> None:
    assert masked(plain, "arguments") == plain


def test_long_texts_are_cut_and_very_long_ones_not_shown() -> None:
    words = "word " * 100
    assert masked(words, "arguments") == words[:256] + "..."
    assert masked("word " * 1000, "arguments") == "<string 5000>"


def test_what_has_no_room_is_left_out() -> None:
    value = masked({f"k{number}": "word " * 40 for number in range(100)}, "arguments")
    assert value["..."] == "..."
    assert value["k0"] == "word " * 40


def test_the_depth_is_bounded() -> None:
    value: Any = "deep"
    for _ in range(60):
        value = {"a": [value]}
    assert text(masked(value)).count("[") == 8


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=600),
    lambda inner: st.lists(inner, max_size=30)
    | st.dictionaries(st.text(max_size=90), inner, max_size=30),
    max_leaves=200,
)  # fmt: skip
LIMITS = st.sampled_from([512, 1024, MAX_BYTES])


@given(JSON, st.sampled_from([NOTHING, ALL]), LIMITS)
def test_it_is_json_within_its_limit(value: Any, rules: Masking, limit: int) -> None:
    written = text(rules.mask("arguments", value, limit))
    assert len(written) <= limit
    assert written.isascii()
    json.loads(written)


SECRET = st.text("abcdefghijklmnop0123456789", min_size=12, max_size=30).map(
    lambda text: f"Zq{text}"
)


def hidden(value: Any, secret: str) -> st.SearchStrategy[Any]:
    """The value somewhere with a secret in it."""
    return st.sampled_from([
        {"note": secret, "rest": value}, [value, {"who": [secret]}], [[secret, value]], secret,
        {"rest": value, "deep": {"er": f"so {secret} so"}},
    ])  # fmt: skip


@given(JSON, SECRET, st.data())
def test_no_text_survives_unless_it_is_named(value: Any, secret: str, data: st.DataObject) -> None:
    assume(secret not in json.dumps(value))
    assert secret not in text(NOTHING.mask("arguments", data.draw(hidden(value, secret))))


NAMES = st.sampled_from(["password", "accessToken", "api-key", "Cookie", "client.secret", "my_pin"])


@given(JSON, SECRET, NAMES, st.data())
def test_no_secret_survives_a_path_that_covers_it(
    value: Any, secret: str, name: str, data: st.DataObject
) -> None:
    assume(secret not in json.dumps(value))
    place = st.sampled_from([
        {name: secret}, {name: {"value": [secret]}},
        {"note": f"{name.replace('my_', '')}={secret}"},
        {"text": json.dumps({name.replace("my_", ""): secret})}, {"header": f"Bearer {secret}"},
    ])  # fmt: skip
    whole = [value, {"inner": data.draw(place)}]
    assert secret not in text(ALL.mask("arguments", whole))
